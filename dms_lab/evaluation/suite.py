"""The whole comparison: full attention, each member of a DMS family, and the rivals at the budget it was measured at."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dms_lab import models
from dms_lab.attachment import Retrofit, retrofit
from dms_lab.cache.policy import Policy
from dms_lab.checkpoint import load_checkpoint, read_metadata
from dms_lab.config import EvalConfig, ModelConfig
from dms_lab.evaluation import hard
from dms_lab.policies import HEURISTICS, FullPolicy, StreamingLLMPolicy
from dms_lab.results import Result
from dms_lab.tiny import tasks
from dms_lab.tiny.corpus import Document

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a base model and its trained checkpoints by (method, target CR)."""

    model: ModelConfig
    checkpoints: dict[tuple[str, float], Path]
    run_id: str
    seed: int
    config_hash: str


def evaluate(
    subject: Subject,
    settings: EvalConfig,
    held_out: list[Document],
    on_generated_tasks: bool,
    rivals_at: tuple[float, ...],
) -> Iterator[list[Result]]:
    """Yields the results of one method and budget after the other.

    `on_generated_tasks` is for models that know the embedded tasks; `held_out` text gives perplexity where there is any.
    Rivals are run at the live tokens that the method `dms` was measured at, for the target CRs in `rivals_at`.
    """
    tokenizer = models.load_tokenizer(subject.model)
    problems = {
        family: hard.make_problems(family, settings.num_problems, settings.length, subject.seed)
        for family in (tasks.FAMILIES if on_generated_tasks else ())
    }

    def run(handle: Retrofit, make_policy, method: str, cr: float, window: int | None) -> tuple[list[Result], float]:
        label = hard.Label(subject.run_id, subject.model.name, method, cr, window, subject.seed, subject.config_hash)
        found, live = [], 0.0
        if problems:
            found, live = hard.evaluate_tasks(handle, make_policy, tokenizer, problems, label, settings.batch_size)
        if held_out:
            found.append(hard.evaluate_perplexity(handle, make_policy, held_out, label, "held_out_text"))
        return found, live

    base = retrofit(models.load_base(subject.model), None)
    yield run(base, FullPolicy, "full", 1.0, None)[0]
    budgets: dict[float, int] = {}
    for (method, cr), folder in sorted(subject.checkpoints.items(), key=lambda item: (item[0][0] != "dms", item[0])):
        handle = load_checkpoint(folder, models.load_base(subject.model))
        make_policy, window = _trained_policy(handle)
        found, live = run(handle, make_policy, method, cr, window)
        if method == "dms" and problems:
            budgets[cr] = max(8, round(live))
        yield found
    for cr in rivals_at:
        for name in settings.rivals if cr in budgets else ():
            rule = HEURISTICS[name]
            yield run(base, lambda rule=rule, cr=cr: rule(budgets[cr]), name, cr, None)[0]


def _trained_policy(handle: Retrofit) -> tuple:
    config = handle.config
    if config.predictor == "sinks":
        budget = config.window + config.num_sinks

        def window_policy() -> Policy:
            return StreamingLLMPolicy(budget, config.num_sinks)

        return window_policy, config.window
    return handle.policy, config.window


def checkpoints_of(folder: Path, method: str = "dms") -> dict[tuple[str, float], Path]:
    """The checkpoints below a run's folder (or the one that `folder` itself is) by (method, target CR)."""
    places = [folder] if (folder / "dms.json").is_file() else sorted((folder / "checkpoints").glob("cr*"))
    if not places:
        raise ValueError(f"no checkpoint in {folder}: give a folder with dms.json in it, or a finished run's folder")
    return {(method, float(read_metadata(p).provenance.get("cr", 0))): p for p in places}
