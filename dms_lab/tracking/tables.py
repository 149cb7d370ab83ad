"""Frames and rows as tables of W&B: bounded, and of the types that it takes."""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd
    import wandb

_log = logging.getLogger(__name__)
MOST_ROWS = 10_000
MOST_SAMPLES = 64
MOST_CHARACTERS = 4200  # of a cell; `evaluation.examples` writes shorter ones
_NOT_SHOWN = ("problem_scores", "schema_version")  # the files have them
SAMPLES = {
    "task": "task",
    "problem": "problem",
    "method": "method",
    "CR": "target_cr",
    "prompt": "prompt",
    "text": "text",
    "answer": "answer",
    "verdict": "score",
    "note": "note",
    "finish reason": "finish_reason",
    "tokens": "num_tokens",
    "KV reads": "kv_reads",
    "peak tokens": "peak_tokens",
}


def table(frame: "pd.DataFrame", name: str) -> "wandb.Table":
    """The first `MOST_ROWS` rows of a frame of results, points or margins; dicts and lists as JSON text.

    `name` is what it is called where it is told that there are more.
    """
    import wandb

    if len(frame) > MOST_ROWS:
        _log.warning("W&B gets the first %d of %d rows of %s; the files have all", MOST_ROWS, len(frame), name)
    columns = [name for name in frame.columns if name not in _NOT_SHOWN]
    rows = frame[columns].head(MOST_ROWS).itertuples(index=False)
    data = [[cell(value) for value in row] for row in rows]
    return wandb.Table(columns=columns, data=data, allow_mixed_types=True)


def mark_of(*contents: "pd.DataFrame | list[dict[str, Any]] | None") -> str:
    """A text that is the same for the same contents of tables."""
    texts = [one.to_csv() if hasattr(one, "to_csv") else json.dumps(one) for one in contents]
    return hashlib.sha256("\n\n".join(texts).encode()).hexdigest()[:16]


def left_out(frame: "pd.DataFrame", name: str) -> dict[str, int]:
    """How many rows of a frame its table does not have, for a summary; {} if it has all."""
    return {f"{name}/rows_left_out": len(frame) - MOST_ROWS} if len(frame) > MOST_ROWS else {}


def samples_table(rows: Sequence[dict[str, Any]]) -> "wandb.Table":
    """At most `MOST_SAMPLES` rows of `examples.jsonl`, evenly from every task, method and CR."""
    import wandb

    data = [[cell(row.get(name)) for name in SAMPLES.values()] for row in evenly(rows, MOST_SAMPLES)]
    return wandb.Table(columns=list(SAMPLES), data=data, allow_mixed_types=True)


def evenly(rows: Iterable[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """`most` rows or all, the first of every task, method and CR, then their second, and so on; in the order of `rows`."""
    groups: dict[tuple, list[tuple[int, dict[str, Any]]]] = {}
    for place, row in enumerate(rows):
        groups.setdefault((row["task"], row["method"], row["target_cr"]), []).append((place, row))
    taken = [found for found in chain.from_iterable(zip_longest(*groups.values())) if found is not None]
    return [row for _, row in sorted(taken[:most], key=lambda found: found[0])]


def cell(value: Any) -> Any:
    """A value as a table takes it: numbers that are none become None, what is neither number nor text becomes JSON."""
    if hasattr(value, "item"):  # numpy's
        value = value.item()
    if value is None or value != value:
        return None
    if isinstance(value, bool | int | float):
        return value
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " [...]"
