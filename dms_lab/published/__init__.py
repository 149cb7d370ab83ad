"""What others published, to hold against what is measured here: accuracies, margins, the cost of a retrofit.

The CSV files beside this one are as printed, in percent, each row with its source. What is returned has shares, and the
project's names of models and tasks (`MODELS`, `TASKS`) where it has one. Other names stay the paper's, and nothing that is
measured here is compared with them: its needles (NIAH-4k) and variables (VT-4k) are made otherwise than those of
`evaluation.ruler`, and how it asked GSM8K, MMLU, HellaSwag and others is not known. What full attention scores by its own
model's card, to check a pipeline against, is in `evaluation.benchmarks`.
"""

import csv
from collections.abc import Iterator
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

MODELS = {
    "Llama-3-1B": "llama32_1b",
    "Llama-3.2-1B-Instruct": "llama32_1b",
    "Qwen-R1-1.5B": "qwen_r1_1_5b",
    "Qwen-R1-7B": "qwen_r1_7b",
    "Qwen-R1-32B": "qwen_r1_32b",
    "Qwen3-8B": "qwen3_8b",
}
TASKS = {
    "AIME24": "dms_aime24",
    "MATH500": "dms_math500",
    "GPQA-Diamond": "dms_gpqa_diamond",
    "LiveCodeBench": "dms_livecodebench",
}
# Columns of each file, in order, and what they hold; "percent" becomes a share, "?" may be empty.
_SCORES = {"task": "name", "model": "name", "method": "name", "compression_ratio": "number"}
_FILES = {
    "scores_llama32_1b.csv": _SCORES | {"window": "count?", "score_percent": "percent", "source": "name"},
    "scores_qwen3_8b.csv": _SCORES | {"window": "count?", "score_percent": "percent", "source": "name"},
    "scores_same_length.csv": _SCORES
    | {"width": "count", "max_tokens": "count", "accuracy_percent": "percent", "source": "name"},
    "margins.csv": {"budget": "name", "task": "name", "model": "name", "method": "name", "against": "name"}
    | {"margin_points": "percent?", "source": "name"},
    "retrofit_costs.csv": {"model": "name", "batch_size_sequences": "count", "context_tokens": "count"}
    | {"window_tokens": "count", "steps": "count", "learning_rate": "number", "h100_hours": "number", "source": "name"},
}
_RENAMED = {"score_percent": "accuracy", "accuracy_percent": "accuracy", "margin_points": "margin"}


def scores(model: str | None = None) -> "pd.DataFrame":
    """Published accuracies: task, model, method, compression_ratio, window, width, max_tokens, accuracy, source.

    Of one model by the project's name or the paper's, or of all; without rows if none was published. What a table does not
    say (a window, a width, a length) is None.
    """
    columns = [*_SCORES, "window", "width", "max_tokens", "accuracy", "source"]
    rows = [row for name in _FILES if name.startswith("scores_") for row in _rows(name)]
    return _frame([{column: row.get(column) for column in columns} for row in rows], columns, model)


def margins(model: str | None = None) -> "pd.DataFrame":
    """Published mean differences of accuracy at equal budget: budget, task, model, method, against, margin, source.

    Budget is kv_reads, peak_tokens or throughput. Over the largest range of budgets that both frontiers cover, each to its
    last point: `margin_unheld` of `comparison.margins` is defined so, its `margin` is not. On which axis the mean was taken
    is not said. NaN where the table has no number.
    """
    return _frame(list(_rows("margins.csv")), ["budget", "task", "model", "method", "against", "margin", "source"], model)


def retrofit_costs(model: str | None = None) -> "pd.DataFrame":
    """What a retrofit cost for each unit of compression: batch, context and window in tokens, steps, rate, H100 hours.

    A model retrofitted to ratio 8 takes seven times that: the ratio rises from 1.
    """
    return _frame(list(_rows("retrofit_costs.csv")), list(_FILES["retrofit_costs.csv"]), model)


def _frame(rows: list[dict[str, Any]], columns: list[str], model: str | None) -> "pd.DataFrame":
    import pandas as pd

    wanted = None if model is None else MODELS.get(model, model)
    rows = [row for row in rows if wanted in (None, row["model"])]
    frame = pd.DataFrame(rows, columns=columns)
    for name in frame.columns.intersection(["window", "width", "max_tokens"]):
        frame[name] = pd.Series([row[name] for row in rows], dtype=object)  # whole numbers beside None
    return frame


def _rows(name: str) -> Iterator[dict[str, Any]]:
    """The rows of a file; `ValueError` with its line for one that is not as `_FILES` has it."""
    columns = _FILES[name]
    with files(__package__).joinpath(name).open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file, strict=True)
        if next(reader, None) != list(columns):
            raise ValueError(f"{name}:1 is not the header {','.join(columns)}; install dms_lab anew")
        for cells in reader:
            where = f"{name}:{reader.line_num}"
            if len(cells) != len(columns):
                raise ValueError(
                    f"{where} has {len(cells)} cells where the header has {len(columns)}; install dms_lab anew"
                )
            row = {column: _value(cell, columns[column], where) for column, cell in zip(columns, cells, strict=True)}
            yield {_RENAMED.get(column, column): _ours(value, column) for column, value in row.items()}


def _value(cell: str, kind: str, where: str) -> Any:
    if not cell:
        if kind.endswith("?"):
            return None
        raise ValueError(f"{where} has an empty cell where a {kind} belongs; install dms_lab anew")
    try:
        if kind == "name":
            return cell
        if kind.startswith("count"):
            return int(cell)
        return float(f"{cell}e-2") if kind.startswith("percent") else float(cell)  # 57.6 percent is 0.576 to the digit
    except ValueError as error:
        raise ValueError(f"{where} has {cell!r} where a {kind.rstrip('?')} belongs; install dms_lab anew") from error


def _ours(value: Any, column: str) -> Any:
    return {"model": MODELS, "task": TASKS}.get(column, {}).get(value, value)
