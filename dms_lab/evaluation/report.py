"""Evaluates a run's checkpoints, appends the results, and shows them: table, `pareto.png`, `pareto.html`."""

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from dms_lab import models, plots, results, terminal
from dms_lab.checkpoint import METADATA, read_metadata
from dms_lab.config import ModelConfig, TrainConfig, config_hash, resolve
from dms_lab.evaluation.suite import Subject, checkpoints_of, evaluate
from dms_lab.tracking import evaluation_id, log_evaluations
from dms_lab.training.sources import held_out_documents

if TYPE_CHECKING:
    import pandas as pd

_log = logging.getLogger(__name__)


def method_name(config: TrainConfig) -> str:
    """The name of a trained method in results and figures."""
    if config.method == "streaming_llm":
        return "streaming_llm_tuned"
    return "dms_immediate" if config.window == 1 else "dms"


def load_config(folder: Path) -> TrainConfig:
    """The configuration that a run left in its folder; raises `ValueError` if there is none."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"no config.json in {folder}: give the folder of a run of dms_lab.train, or a checkpoint in it")
    values = json.loads(path.read_text())
    return resolve(values | {"steps_per_cr": 1})


def base_of(checkpoint: Path) -> ModelConfig:
    """The base model of a checkpoint, as its run was configured, else as the checkpoint names it."""
    path = read_metadata(checkpoint).base_model
    if (run_of(checkpoint) / "config.json").is_file():
        return load_config(run_of(checkpoint)).model
    return ModelConfig(path, path, 0, 0, 0.0, 0.0, 1)


def run_of(place: Path) -> Path:
    """The folder of the run that `place` is, or whose checkpoint it is."""
    return place.parent.parent if (place / METADATA).is_file() else place


def evaluate_run(
    config: TrainConfig,
    folder: Path,
    others: dict[tuple[str, float], Path] | None = None,
    checkpoint: Path | None = None,
) -> None:
    """Evaluates the family in `folder` (and `others`), appends to `results.jsonl`, prints the table, draws figures.

    `checkpoint` names one member, to evaluate that alone.
    """
    subject = subject_of(config, folder, checkpoints_of(checkpoint or folder, method_name(config)) | (others or {}))
    record(evaluate(subject, rivals_at(config, subject)), folder, tracking=config.tracking)


def rivals_at(config: TrainConfig, subject: Subject) -> tuple[float, ...]:
    """The CRs of the family at whose measured budgets untrained rivals are measured too."""
    if config.eval.rivals and not subject.knows_tasks:
        _log.info("no untrained rivals: they run on the generated tasks, and this run's evaluation is held-out text")
    return tuple(cr for cr in config.cr_family if cr > 2) or config.cr_family


def subject_of(config: TrainConfig, folder: Path, checkpoints: dict[tuple[str, float], Path]) -> Subject:
    """What a run's own evaluation is of: the run in `folder`, these checkpoints, the tasks and the text of its data."""
    return Subject(
        model=config.model,
        checkpoints=checkpoints,
        run_id=folder.name,
        seed=config.seed,
        config_hash=config_hash(config),
        settings=config.eval,
        held_out=held_out_documents(config, models.load_tokenizer(config.model), config.eval.held_out_tokens),
        knows_tasks=config.data.kind == "tiny",
        text={"context": config.context, "data": config.data.path or config.data.kind},
    )


def record(
    parts: Iterable[list[results.Result]],
    folder: Path,
    append: Callable[[Path, list[results.Result]], None] = results.append,
    tracking: str = "none",
) -> None:
    """Appends each part to `results.jsonl` as it is measured; ends with their table, and figures if there are accuracies.

    The figures are of all that the file holds: what was measured again or on more problems stands for the rest. With
    `tracking="wandb"` what was measured gets its run in W&B.
    """
    console = terminal.console()
    path = folder / results.RESULTS
    found: list[results.Result] = []
    with console.status("evaluating") as status:
        for part in parts:
            append(path, part)
            found += part
            done = f"evaluated {part[0].method} at CR {part[0].target_cr:g}"
            status.update(done)
            if not console.is_terminal:  # a log, which shows no spinner
                console.print(done)
    import pandas as pd

    frame = pd.DataFrame([vars(result) for result in found])
    console.print(plots.summary_table(frame))
    if frame["accuracy"].notna().any():
        for figure in plots.pareto_figures(_standing(results.load(path)), folder):
            console.print(f"figure: {figure}")
    console.print(f"results: {path}")
    if tracking == "wandb":
        log_evaluations(path, {evaluation_id(vars(result)) for result in found})


def _standing(frame: "pd.DataFrame") -> "pd.DataFrame":
    """Of rows about the same, the last of those with the most problems."""
    ordered = frame.sort_values("num_problems", kind="stable")
    return ordered.drop_duplicates(["method", "task", "target_cr"], keep="last").sort_index()
