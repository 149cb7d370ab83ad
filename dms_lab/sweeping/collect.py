"""The results of a sweep in one file that can be committed: `results.csv` beside its `sweep.yaml`."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dms_lab.config import RIVALS, EvalConfig
from dms_lab.evaluation_config import EvaluateConfig
from dms_lab.sweep_config import SweepConfig
from dms_lab.sweeping.evaluations import DialConfig
from dms_lab.sweeping.points import Point
from dms_lab.sweeping.state import is_done

UNTRAINED = ("full", *RIVALS)
# What a row is about. A row about the same as a later one is an earlier measurement of it.
_ABOUT = "model method task target_cr seed width max_tokens sampling_seeds settings run_id config_hash variant".split()


def collect(sweep: SweepConfig, points: Sequence[Point]) -> tuple[int, list[Point]]:
    """Writes every row of the points that are done once, the last of equals; returns how many, and the points missing.

    A run's folder is shared by every sweep that has the run: of its rows those count that this sweep asked for. Methods
    without training know nothing of the run beside which they were measured, so of those with the same seed and
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
            if not is_asked(row, point):
                continue
            row["variant"] = "" if row["method"] in UNTRAINED else point.variant
            found[_about(row)] = row
    results.save_csv(pd.DataFrame(list(found.values())), sweep.results)
    return len(found), [point for point in points if point not in done]


def is_asked(row: dict[str, Any], point: Point) -> bool:
    """Whether a row of the results in a point's folder is of an evaluation that the point asks for."""
    asked = [evaluation.config for evaluation in point.then]
    if isinstance(point.config, EvaluateConfig):
        asked.append(point.config)
    elif not _is_benchmark(row) and "dialled_from" not in row["settings"]:
        return point.config.eval_after and _is_own(row, point.config.eval)
    return any(_is_of_benchmarks(row, c) if isinstance(c, EvaluateConfig) else _is_of_dial(row, c) for c in asked)


def _is_own(row: dict[str, Any], asked: EvalConfig) -> bool:
    is_of_length = row["settings"].get("length") in (None, asked.length)
    return is_of_length and (row["method"] not in RIVALS or row["method"] in asked.rivals)


def _is_benchmark(row: dict[str, Any]) -> bool:
    return "limit" in row["settings"]  # null where there was none; a run's own evaluation has no such setting


def _is_of(task: str, asked: Sequence[str]) -> bool:
    """Whether a task is one of those asked, at a length perhaps; of lm-eval's own, groups have other names inside."""
    return not task.startswith("dms_") or any(re.fullmatch(re.escape(name) + r"(_\d+)?", task) for name in asked)


def _is_of_dial(row: dict[str, Any], config: DialConfig) -> bool:
    return not _is_benchmark(row) and "dialled_from" in row["settings"] and row["target_cr"] in config.cr


def _is_of_benchmarks(row: dict[str, Any], config: EvaluateConfig) -> bool:
    settings, asked = row["settings"], config.eval
    is_full = row["method"] == "full"  # stands beside whatever was asked for
    if not _is_benchmark(row) or (not is_full and row["method"].endswith("_dialled") != bool(config.cr)):
        return False
    data, generation = settings.get("data", {}), settings.get("generation", {})
    num_samples = asked.num_samples if generation.get("do_sample") else 1  # greedy chains are all alike
    return (
        _is_of(row["task"], asked.tasks)
        and row["width"] in asked.width
        and (not asked.max_tokens or row["max_tokens"] in asked.max_tokens)
        and (is_full or not config.cr or row["target_cr"] in config.cr)
        and _comparable(row["num_samples"]) in (None, num_samples)
        and settings.get("limit") == config.limit
        and data.get("lengths") in (None, list(asked.lengths or ()))
        and data.get("num_problems", asked.num_problems) == asked.num_problems
        and (asked.temperature is None or generation.get("temperature") == asked.temperature)
    )


def _about(row: dict[str, Any]) -> str:
    passing = ("run_id", "config_hash") if row["method"] in UNTRAINED else ()
    return json.dumps([_comparable(row[name]) for name in _ABOUT if name not in passing])


def _comparable(value: Any) -> Any:
    """A value of a frame, where whole numbers beside nulls have become floats and nulls NaN."""
    if isinstance(value, float):
        return None if value != value else value
    return float(value) if isinstance(value, int) else value
