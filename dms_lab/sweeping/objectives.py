"""What a search minimises, read from the results of a run's own evaluation; all of it at the run's full CR.

    generated tasks (data=tiny)   1 - accuracy                   KV reads as a share of full attention's, both mean of tasks
    text                          perplexity of held-out text    live tokens as a share of all: 1 / measured CR

Costs are measured, not aimed at. A chain that breaks off early reads less, so that a low share of reads says nothing alone:
the result of a search is the set of trials that no other beats in one without losing in the other.
"""

import json
import math
from pathlib import Path
from typing import Any

from dms_lab.config import RIVALS, TrainConfig

NAMES = {True: ("errors", "kv_reads"), False: ("perplexity", "kept")}  # by whether the data are generated tasks
FAILED = (math.inf, math.inf)  # of a trial that has none
_RESULTS = "results.jsonl"  # as in `results`


def check_objectives(config: TrainConfig) -> None:
    """Raises `ValueError` unless a run of this configuration leaves what is minimised."""
    if not config.eval_after:
        raise ValueError("a search compares what the evaluation of each run measures; leave out eval_after=false")


def objectives(config: TrainConfig, folder: Path) -> tuple[float, float]:
    """Both objectives of an evaluated run; `ValueError` if its results do not have them."""
    rows = [json.loads(line) for line in (folder / _RESULTS).read_text().splitlines()]
    full = {row["task"]: row for row in rows if row["method"] == "full"}
    trained = {row["task"]: row for row in rows if row["method"] not in ("full", *RIVALS) and row["target_cr"] == config.cr}
    if config.data.kind == "tiny":
        tasks = [task for task, row in trained.items() if row["accuracy"] is not None and task in full]
        errors = _mean(1 - trained[task]["accuracy"] for task in tasks)
        reads = _mean(trained[task]["kv_reads"] / full[task]["kv_reads"] for task in tasks)
        return _told(folder, (errors, reads), True)
    texts = [row for row in trained.values() if row["perplexity"] is not None]
    return _told(folder, (_mean(t["perplexity"] for t in texts), _mean(1 / t["measured_cr"] for t in texts)), False)


def _mean(values: Any) -> float:
    found = list(values)
    return sum(found) / len(found) if found else math.nan


def _told(folder: Path, found: tuple[float, float], knows_tasks: bool) -> tuple[float, float]:
    for name, value in zip(NAMES[knows_tasks], found, strict=True):
        if not math.isfinite(value):
            raise ValueError(f"{folder} has no finite {name} to compare: its results say {value}")
    return found
