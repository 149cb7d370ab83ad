"""All that W&B has of a folder, made again from its files: the same runs under the same ids."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dms_lab import results
from dms_lab.sweep_config import SWEEP, load_sweep
from dms_lab.tracking.evaluation import evaluation_ids, log_evaluations
from dms_lab.tracking.pareto import Comparison, log_pareto
from dms_lab.tracking.run import WandbRun, wait
from dms_lab.tracking.training import METRICS, log_training


@dataclass(frozen=True)
class _Files:
    """What there is in a place: folders of trainings, files of results, and the sweep that they belong to."""

    name: str
    folder: Path
    trained: list[Path]
    results: list[Path]
    group: str | None = None


def rebuild(places: Sequence[Path], comparison: Comparison | None = None, out: Path | None = None) -> list[WandbRun]:
    """Every training and evaluation in `places`, and `comparison`, have their W&B runs; returns these, closed.

    A place: a run's folder, one that holds several, a sweep's (or its file), whose runs are looked for where they were
    computed, or a file of results. `out` is where W&B's files of the comparison go; what is compared, and under which
    variants, is for the caller to say. Raises `ValueError` if there is nothing to send, and at the first run that W&B does
    not take.
    """
    found: dict[str, WandbRun] = {}

    def taken(run: WandbRun) -> None:
        if run.failure is not None:
            raise ValueError(
                f"W&B did not take the run {run.label.run_id} ({run.failure}); the same command goes on from it"
            )
        found[run.label.run_id] = run

    files = [_files(Path(place)) for place in places]
    for one in files:
        for folder in one.trained:
            taken(log_training(folder, one.group))
        for file in one.results:
            for run_id in dict.fromkeys(evaluation_ids(results.load(file))):
                if run_id not in found:
                    taken(*log_evaluations(file, [run_id], one.group))
    if comparison is not None:
        name = " + ".join(one.name for one in files)
        taken(log_pareto(out or files[0].folder, name, comparison))
    wait()
    if not found:
        asked = ", ".join(map(str, places))
        raise ValueError(f"nothing of {asked} can be sent to W&B: there are neither trainings nor results")
    return list(found.values())


def has_results(places: Sequence[Path]) -> bool:
    """Whether there is anything to compare in `places`."""
    return any(_files(Path(place)).results for place in places)


def _files(place: Path) -> _Files:
    is_sweep = place.suffix in (".yaml", ".yml") if place.is_file() else (place / SWEEP).is_file()
    if is_sweep:
        from dms_lab.sweeping.points import expand

        sweep = load_sweep(place)
        runs = [Path(point.folder) for point in expand(sweep)]
        # The table last: it is for what was measured on another machine.
        measured = [*(folder / results.RESULTS for folder in runs), sweep.results]
        return _Files(sweep.name, sweep.folder, _trained(runs), _existing(measured), sweep.name)
    if place.is_file():
        return _Files(place.stem, place.parent, [], [place])
    trained = _trained([file.parent for file in sorted(place.rglob(METRICS))])
    # Tables last: they are for what was measured on another machine.
    measured = sorted(results.files_in(place), key=lambda file: file.suffix == ".csv")
    return _Files(place.resolve().name, place, trained, measured)


def _trained(folders: Sequence[Path]) -> list[Path]:
    return [folder for folder in folders if len(_existing([folder / METRICS, folder / "config.json"])) == 2]


def _existing(files: Sequence[Path]) -> list[Path]:
    return [file for file in files if file.is_file()]
