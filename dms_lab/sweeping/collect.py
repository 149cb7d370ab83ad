"""The results of a sweep in one file that can be committed: `results.csv` beside its `sweep.yaml`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dms_lab.config import RIVALS
from dms_lab.sweep_config import SweepConfig
from dms_lab.sweeping.points import Point
from dms_lab.sweeping.state import is_done

UNTRAINED = ("full", *RIVALS)
# What a row is about. A row about the same as a later one is an earlier measurement of it.
_ABOUT = "model method task target_cr seed width max_tokens sampling_seeds settings run_id config_hash variant".split()


def collect(sweep: SweepConfig, points: Sequence[Point]) -> tuple[int, list[Point]]:
    """Writes every row of the points that are done once, the last of equals; returns how many, and the points missing.

    Methods without training know nothing of the run beside which they were measured, so of those with the same seed and
    target one row is kept. Raises `ValueError` if nothing is done.
    """
    import pandas as pd

    from dms_lab import results

    done = [point for point in points if is_done(point)]
    if not done:
        raise ValueError(f"no point of {sweep.name} is done yet; ask for its status")
    found: dict[str, dict[str, Any]] = {}
    for point in done:
        path = Path(point.folder) / results.RESULTS
        for row in results.load(path).to_dict("records") if path.is_file() else ():  # none with eval_after=false
            row["variant"] = "" if row["method"] in UNTRAINED else point.variant
            found[_about(row)] = row
    results.save_csv(pd.DataFrame(list(found.values())), sweep.results)
    return len(found), [point for point in points if point not in done]


def _about(row: dict[str, Any]) -> str:
    passing = ("run_id", "config_hash") if row["method"] in UNTRAINED else ()
    return json.dumps([_comparable(row[name]) for name in _ABOUT if name not in passing])


def _comparable(value: Any) -> Any:
    """A value of a frame, where whole numbers beside nulls have become floats and nulls NaN."""
    if isinstance(value, float):
        return None if value != value else value
    return float(value) if isinstance(value, int) else value
