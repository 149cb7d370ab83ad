"""The results of a sweep in one file that can be committed: `results.csv` beside its `sweep.yaml`.

A sweep may be computed on several machines, or over more time than a disk keeps its runs: rows that the file has of points
whose runs are not here stay in it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dms_lab.config import RIVALS
from dms_lab.evaluation.evaluated import digests, rows_of
from dms_lab.sweep_config import SweepConfig
from dms_lab.sweeping.job import job_of
from dms_lab.sweeping.points import Point
from dms_lab.sweeping.state import is_done
from dms_lab.sweeping.steps import Training

UNTRAINED = ("full", *RIVALS)
# What a row is about. A row about the same as a later one is an earlier measurement of it.
_ABOUT = "model method task target_cr seed width max_tokens sampling_seeds settings run_id config_hash variant".split()


class Collected(NamedTuple):
    """How many rows there are now; of the points without a finished run here those with earlier rows, and those without."""

    num_rows: int
    kept: list[Point]
    missing: list[Point]


def collect(sweep: SweepConfig, points: Sequence[Point]) -> Collected:
    """Writes every row of the points that are done once, the last of equals, beside rows collected before of other points.

    A run's folder is shared by every sweep that has the run: of its rows those count that this sweep asked for. Methods
    without training know nothing of the run beside which they were measured, so of those with the same seed, target and
    settings (their live tokens among them) one row is kept. Raises `ValueError` if nothing is done.
    """
    import pandas as pd

    from dms_lab import results

    done = [point for point in points if is_done(point)]
    if not done:
        raise ValueError(f"no point of {sweep.name} is done yet; ask for its status")
    kept = [point for point in points if point not in done]
    before = _rows_before(sweep, kept)
    found = {_about(row): row for row in before}
    for point in done:
        path = Path(point.folder) / results.RESULTS
        if not path.is_file():  # with eval_after=false
            continue
        asked = rows_asked(point)
        for digest, row in zip(digests(path.parent), results.load(path).to_dict("records"), strict=True):
            if digest not in asked:
                continue
            row["variant"] = "" if row["method"] in UNTRAINED else point.variant
            found[_about(row)] = row
    results.save_csv(pd.DataFrame(list(found.values())), sweep.results)
    known = {row["run_id"] for row in before}
    missing = [point for point in kept if Path(point.folder).name not in known]
    return Collected(len(found), [point for point in kept if point not in missing], missing)


def _rows_before(sweep: SweepConfig, points: Sequence[Point]) -> list[dict[str, Any]]:
    """The rows of these points in the `results.csv` that is there."""
    from dms_lab import results

    if not sweep.results.is_file():
        return []
    names = {Path(point.folder).name for point in points}
    return [row for row in results.load(sweep.results).to_dict("records") if row["run_id"] in names]


def rows_asked(point: Point) -> set[str]:
    """The digests of the rows of all evaluations that a point asks for."""
    steps = [step for step in job_of(point, Path()).steps() if not isinstance(step, Training)]
    return set().union(*(rows_of(step.folder, step.what) for step in steps))


def _about(row: dict[str, Any]) -> str:
    passing = ("run_id", "config_hash") if row["method"] in UNTRAINED else ()
    return json.dumps([_comparable(row[name]) for name in _ABOUT if name not in passing])


def _comparable(value: Any) -> Any:
    """A value of a frame, where whole numbers beside nulls have become floats and nulls NaN."""
    if isinstance(value, float):
        return None if value != value else value
    return float(value) if isinstance(value, int) else value
