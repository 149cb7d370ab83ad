"""Comparisons as tables for the terminal."""

from typing import TYPE_CHECKING

from dms_lab.plots.axes import TOKEN_BUDGETS
from dms_lab.plots.run import mean_over_tasks
from dms_lab.plots.style import display_name, sorting_key

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table


def summary_table(frame: "pd.DataFrame") -> "Table":
    """The comparison as a table for the terminal: accuracy per task in percent, their mean, and the cost.

    A text's perplexity has the ratio that this text was compressed to beside it: that of tasks is another.
    """
    from rich.table import Table

    tasks = [t for t in frame["task"].unique() if frame[frame["task"] == t]["accuracy"].notna().any()]
    texts = [t for t in frame["task"].unique() if frame[frame["task"] == t]["perplexity"].notna().any()]
    means = mean_over_tasks(frame)
    table = Table(title="Exact match in percent, 95 % interval of the mean in brackets")
    for name in ("method", "CR", "measured", *tasks, "mean", *["ppl", "at text CR"] * len(texts), "KV reads", "peak"):
        table.add_column(name, justify="left" if name == "method" else "right", overflow="fold")
    groups = sorted(frame.groupby(["method", "target_cr"]), key=lambda g: (g[0][1], sorting_key(g[0][0])))
    for (method, cr), rows in groups:
        by_task = {task: part for task, part in rows.groupby("task")}
        cells = [f"{100 * by_task[t]['accuracy'].mean():.1f}" if t in by_task else "" for t in tasks]
        answered = rows[rows["accuracy"].notna()]
        ppl = [
            f"{by_task[t][name].mean():.2f}" if t in by_task else ""
            for t in texts
            for name in ("perplexity", "measured_cr")
        ]
        held = (answered if len(answered) else rows)["measured_cr"].mean()
        cost = [f"{answered[c].mean():.0f}" if len(answered) else "" for c in TOKEN_BUDGETS]
        mean = means[(means["method"] == method) & (means["target_cr"] == cr)] if len(means) else means
        table.add_row(display_name(method), f"{cr:g}", f"{held:.2f}", *cells, _with_interval(mean), *ppl, *cost)
    return table


def _with_interval(mean: "pd.DataFrame") -> str:
    if not len(mean):
        return ""
    value, low, high = (100 * float(mean[name].iloc[0]) for name in ("accuracy", "accuracy_low", "accuracy_high"))
    return f"{value:.1f} [{low:.0f}-{high:.0f}]"


def benchmark_table(frame: "pd.DataFrame", task: str) -> "Table":
    """Every point of one task as a table for the terminal: accuracies and truncation in percent, and the cost.

    The accuracy that stands for the point comes with its 95 % interval; W is the width, L the limit of tokens.
    """
    from rich.table import Table

    table = Table(title=f"{task}, in percent, 95 % interval in brackets; KV reads, peak and MB are of W chains together")
    for name in "method,CR,measured,W,L,headline,avg,maj,pass@k,truncated,KV reads,peak,MB".split(","):
        table.add_column(name, justify="left" if name in ("method", "headline") else "right", overflow="fold")
    for row in sorted(frame.to_dict("records"), key=lambda r: (r["target_cr"], sorting_key(r["method"]))):
        metrics = [_percent(row["metrics"].get(name, [None])[0]) for name in ("avg", "maj", "pass_at_k")]
        table.add_row(
            display_name(row["method"]),
            f"{row['target_cr']:g}",
            _number(row["measured_cr"], 2),
            f"{row['width']}",
            _number(row["max_tokens"]),
            _headline(row),
            *metrics,
            _percent(row["truncation_rate"]),
            _number(row["kv_reads"]),
            _number(row["peak_tokens"]),
            _number(None if _is_missing(row["kv_bytes_peak"]) else row["kv_bytes_peak"] / 1e6, 3),
        )
    return table


def _headline(row: dict) -> str:
    if _is_missing(row["accuracy"]):
        return "" if _is_missing(row["perplexity"]) else f"{row['headline']} {row['perplexity']:.2f}"
    low, high = row["accuracy_low"], row["accuracy_high"]
    return f"{row['headline']} {_percent(row['accuracy'])} [{_percent(low, 0)}-{_percent(high, 0)}]"


def _is_missing(value: float | None) -> bool:
    return value is None or value != value


def _number(value: float | None, digits: int = 0) -> str:
    return "" if _is_missing(value) else f"{value:.{digits}f}"


def _percent(share: float | None, digits: int = 1) -> str:
    return "" if _is_missing(share) else f"{100 * share:.{digits}f}"
