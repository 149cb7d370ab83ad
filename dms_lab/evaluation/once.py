"""Evaluations of a run that are done once: recorded in `evaluated.json`, gone on with after a kill, no row written twice.

For one process at a time; `sweeping.job` locks the run's folder.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from dms_lab import models, results
from dms_lab.config import TrainConfig
from dms_lab.evaluation import evaluated
from dms_lab.evaluation.dialled import dialled_jobs
from dms_lab.evaluation.partial import Partial
from dms_lab.evaluation.report import method_name, record, rivals_at, subject_of
from dms_lab.evaluation.suite import checkpoints_of, evaluate, not_measured_yet


def evaluate_once(config: TrainConfig, folder: Path) -> None:
    """As `report.evaluate_run`, where that was not done with these settings yet."""

    def parts(partial: Partial) -> Iterable[list[results.Result]]:
        subject = subject_of(config, folder, checkpoints_of(folder, method_name(config)))
        return evaluate(subject, rivals_at(config, subject), partial)

    _once(folder, evaluated.own_evaluation(config), parts, config.tracking)


def evaluate_dialled_once(config: TrainConfig, folder: Path, ratios: Sequence[float], text: str | None) -> None:
    """As `dialled.evaluate_dialled` of a run, where that was not done with these settings yet."""

    def parts(partial: Partial) -> Iterable[list[results.Result]]:
        jobs = dialled_jobs(folder, ratios, config, text, models.load_tokenizer(config.model))
        for _, (found, _) in not_measured_yet(subject_of(config, folder, {}), jobs, partial):
            yield found

    _once(folder, evaluated.dialled_evaluation(config, ratios, text), parts, config.tracking)


def _once(
    folder: Path, what: dict[str, Any], parts: Callable[[Partial], Iterable[list[results.Result]]], tracking: str
) -> None:
    if evaluated.is_recorded(folder, what):
        return
    evaluated.drop_cut_off_line(folder)
    partial, lines = Partial(folder, what), []

    def append(path: Path, rows: list[results.Result]) -> None:
        lines.extend(results.append_new(path, rows))

    record(parts(partial), folder, append, tracking)
    evaluated.record(folder, what, lines)
    partial.remove()
