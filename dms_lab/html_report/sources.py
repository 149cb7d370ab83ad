"""Where results come from: folders of runs and of studies, sweeps (whose results are collected anew), single files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dms_lab import results
from dms_lab.plots.retention import METRICS
from dms_lab.sweep_config import SWEEP, SweepConfig, load_sweep

if TYPE_CHECKING:
    import pandas as pd

    from dms_lab.sweeping.points import Point


@dataclass(frozen=True)
class Origin:
    """What was asked, the files of the results, texts of configurations, runs with metrics on this machine, and notices."""

    question: str = ""
    files: tuple[Path, ...] = ()
    texts: dict[str, str] = field(default_factory=dict)
    runs: dict[str, Path] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


def origin_of(places: Sequence[Path]) -> Origin:
    """What is known of where the results in `places` come from; a sweep's `results.csv` is written anew from its runs.

    Not so where the file has runs that are no points of the sweep: they would be lost. Raises `ValueError` for a place that
    is not there.
    """
    found = [_origin(Path(place)) for place in places]
    return Origin(
        question=" ".join(one.question for one in found if one.question),
        files=tuple(file for one in found for file in one.files),
        texts={name: text for one in found for name, text in one.texts.items()},
        runs={name: folder for one in found for name, folder in one.runs.items()},
        notices=tuple(notice for one in found for notice in one.notices),
    )


def _origin(place: Path) -> Origin:
    if not place.exists():
        raise ValueError(f"there is no {place}: give a folder of results or runs, a study's folder, or a file of results")
    is_sweep = place.suffix in (".yaml", ".yml") if place.is_file() else (place / SWEEP).is_file()
    if is_sweep:
        return _of_sweep(place)
    folder = place if place.is_dir() else place.parent
    runs = {_name(path.parent): path.parent for path in sorted(folder.rglob(METRICS))}
    return Origin(files=tuple(results.files_in(place)) or (place,), texts=_configurations(runs.values()), runs=runs)


def _of_sweep(place: Path) -> Origin:
    from dms_lab.sweeping.points import expand

    sweep = load_sweep(place)
    points = expand(sweep)
    folders = {_name(Path(point.folder)): Path(point.folder) for point in points}
    runs = {name: folder for name, folder in folders.items() if (folder / METRICS).is_file()}
    path = place / SWEEP if place.is_dir() else place
    texts = {str(path): path.read_text(encoding="utf-8")} | _configurations(folders.values())
    return Origin(sweep.question or "", (sweep.results,), texts, runs, tuple(_refresh(sweep, points)))


def _refresh(sweep: SweepConfig, points: "Sequence[Point]") -> list[str]:
    """Collects the sweep's results, unless that would lose some; returns what there is to say of it."""
    from dms_lab.sweeping.collect import collect
    from dms_lab.sweeping.state import is_done

    done = [point for point in points if is_done(point)]
    known = set(results.load(sweep.results)["run_id"]) if sweep.results.is_file() else set()
    foreign = known - {Path(point.folder).name for point in points}
    if done and foreign:
        return [
            f"{sweep.results} is used as it is: {len(foreign)} of its {len(known)} runs are no points of sweep.yaml; "
            f"python -m dms_lab.sweep collect {sweep.folder} writes it without them"
        ]
    if not done:
        return []
    missing = collect(sweep, points).missing
    return [f"{len(missing)} of {len(points)} points of {sweep.name} are not done yet"] if missing else []


def _configurations(folders: Sequence[Path]) -> dict[str, str]:
    """The configurations that runs left, what is equal in all of them said once."""
    found = {}
    for folder in folders:
        path = folder / "config.json"
        if path.is_file():
            found[_name(folder)] = json.loads(path.read_text(encoding="utf-8"))
    if not found:
        return {}
    flat = {name: dict(_flat(values)) for name, values in found.items()}
    first = next(iter(flat.values()))
    common = {key: value for key, value in first.items() if all(one.get(key) == value for one in flat.values())}
    texts = {f"configuration of {len(found)} runs" if len(found) > 1 else f"configuration of {next(iter(found))}": common}
    texts |= {f"configuration of {name}": {k: v for k, v in one.items() if k not in common} for name, one in flat.items()}
    return {name: "\n".join(f"{key}={value}" for key, value in one.items()) for name, one in texts.items() if one}


def _flat(values: dict, prefix: str = "") -> list[tuple[str, str]]:
    pairs = []
    for key, value in values.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, json.dumps(value))]
    return pairs


def _name(folder: Path) -> str:
    """A run's folder in two words: demos of different seeds have folders of one name."""
    parts = folder.resolve().parts[-2:]
    return parts[-1] if parts[0] == "runs" else "/".join(parts)


def load(origin: Origin) -> "pd.DataFrame":
    """The results of an origin in one frame."""
    return results.load(*origin.files)
