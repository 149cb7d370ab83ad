"""All that W&B has of a folder, made again from its files: the same runs under the same ids."""

from pathlib import Path

from dms_lab import results
from dms_lab.tracking.evaluation import evaluation_ids, log_evaluations
from dms_lab.tracking.pareto import Comparison, log_pareto
from dms_lab.tracking.run import wait
from dms_lab.tracking.training import METRICS, log_training

_SWEEP = "sweep.yaml"


def rebuild(place: Path, comparison: Comparison | None = None) -> list[str]:
    """Every training and evaluation in `place`, and their comparison, have their W&B runs; returns the ids.

    `place`: a run's folder, one that holds several, a sweep's, whose runs are looked for where they were computed, or one
    file of results. Without `comparison` it is made. Raises `ValueError` if there is nothing to send.
    """
    folder = place if place.is_dir() else place.parent
    name = folder.resolve().name
    is_sweep = (folder / _SWEEP).is_file()
    group = name if is_sweep else None
    places = [folder, *_runs_of(folder)] if is_sweep else [folder]
    trained = dict.fromkeys(file.parent for root in places for file in sorted(root.rglob(METRICS)))
    found = [log_training(run, group) for run in trained if (run / "config.json").is_file()]
    files = [place] if place.is_file() else [file for root in places for file in sorted(root.rglob(results.RESULTS))]
    files += [folder / results.TABLE] if place.is_dir() and (folder / results.TABLE).is_file() else []
    for file in dict.fromkeys(files):  # the table last: of what was measured on another machine
        left = [run_id for run_id in dict.fromkeys(evaluation_ids(results.load(file))) if run_id not in found]
        log_evaluations(file, left, group)
        found += left
    if files:
        found.append(log_pareto(folder, name, comparison or _compared(place)))
    if not found:
        raise ValueError(f"nothing of {place} can be sent to W&B: it has neither trainings nor results")
    wait()
    return found


def _runs_of(folder: Path) -> list[Path]:
    """The folders of a sweep's points that are on this machine."""
    from dms_lab.sweep_config import load_sweep
    from dms_lab.sweeping.points import expand

    return [Path(point.folder) for point in expand(load_sweep(folder)) if Path(point.folder).is_dir()]


def _compared(place: Path) -> Comparison:
    from dms_lab import comparison

    frame = results.load(place)
    has_baseline = (frame["method"] == "full").any()
    margins = comparison.margins(frame) if has_baseline else None
    return Comparison(comparison.curve_points(frame), margins, tuple(comparison.warnings_of(frame)))
