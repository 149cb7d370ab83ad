"""Evaluations in W&B: of each way in which the results of a folder were measured one run, made from its files alone.

results.jsonl (or .csv), examples.jsonl -> rows of one run and one way of drawing chains -> summary, results, samples
"""

import hashlib
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dms_lab import results
from dms_lab.tracking.run import Label, WandbRun
from dms_lab.tracking.tables import cell, left_out, mark_of, samples_table, table

if TYPE_CHECKING:
    import pandas as pd

EXAMPLES = "examples.jsonl"  # as `evaluation.examples` writes it
# Of a result's `settings` what says how chains were drawn; the rest is of its task, or of its method.
_WAY = ("storage", "deterministic", "attention", "places", "chat", "thinking", "generation", "limit")
_NUMBERS = ("accuracy", "perplexity", "measured_cr", "kv_reads", "peak_tokens")


def evaluation_id(row: dict[str, Any]) -> str:
    """The W&B id of the evaluation that a row of results (or of examples) is of: its run, and how chains were drawn."""
    settings = way_of(row["settings"])
    digest = hashlib.sha256(json.dumps([row["run_id"], settings], sort_keys=True).encode()).hexdigest()[:8]
    return f"{row['config_hash'] or plain(row['run_id'])}-eval-{digest}"


def way_of(settings: dict[str, Any]) -> dict[str, Any]:
    """How chains were drawn, of the `settings` of a result; {} for a run's own evaluation."""
    return {name: settings[name] for name in _WAY if name in settings}


def plain(name: str, most: int = 80) -> str:
    """A name as W&B's ids may have it."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)[-most:]


def evaluation_ids(frame: "pd.DataFrame") -> list[str]:
    """The W&B id of each row of a frame of results."""
    return [evaluation_id(row) for row in frame[["run_id", "config_hash", "settings"]].to_dict("records")]


def log_evaluations(place: Path, ids: Collection[str], group: str | None = None) -> list[WandbRun]:
    """These evaluations have their W&B runs, with all that the file `place` says of them; returns the runs, closed."""
    frame, folder = results.load(place), place.parent
    path = folder / EXAMPLES
    examples = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    rows_of, runs = evaluation_ids(frame), []
    for run_id in sorted(ids):
        shown = [row for row in examples if evaluation_id(row) == run_id]
        runs.append(_log(frame[[i == run_id for i in rows_of]], shown, run_id, folder, _sweep(folder) or group))
    return runs


def _sweep(folder: Path) -> str | None:
    path = folder / "config.json"
    return json.loads(path.read_text()).get("sweep") if path.is_file() else None


def _log(rows: "pd.DataFrame", examples: list[dict[str, Any]], run_id: str, folder: Path, group: str | None) -> WandbRun:
    last = rows.iloc[-1]
    way = way_of(last["settings"])
    what = {name: cell(last[name]) for name in ("run_id", "config_hash", "model", "window", "seed", "git_revision")}
    what |= {"settings": way, "versions": last["versions"], "tasks": sorted(set(rows["task"]))}
    kind = "benchmarks" if way else "own evaluation"
    tags = (last["model"], *sorted(set(rows["method"])), kind)
    run = WandbRun(Label(run_id, "evaluate", f"{last['run_id']} {kind}", group, tags, what), folder)
    run.log_new(
        mark_of(rows, examples),
        lambda: {"results": table(rows, "results")} | ({"samples": samples_table(examples)} if examples else {}),
    )
    run.summarize(summary(rows) | left_out(rows, "results"))
    run.finish()
    return run


def summary(rows: "pd.DataFrame") -> dict[str, float]:
    """The numbers of each row by a name that says what they are of; of equal names the last counts."""
    found = {}
    for row in rows.to_dict("records"):
        name = f"{row['task']}/{_name(row)}"
        if cell(row["max_tokens"]) is not None:
            name += f"/W{row['width']}L{row['max_tokens']:.0f}"
        found |= {f"{name}/{key}": row[key] for key in _NUMBERS if cell(row[key]) is not None}
    return found


def _name(row: dict[str, Any]) -> str:
    """The method, its budget of live tokens where it was set to one, else its ratio, and the length of its problems."""
    settings = row["settings"]
    dial = f"cr{row['target_cr']:g}" if settings.get("budget") is None else f"budget{settings['budget']:g}"
    length = settings.get("length")
    return f"{row['method']}/{dial}" + (f"/length{length}" if length is not None else "")
