"""Figures and the table of a comparison: accuracy against what the cache costs."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from dms_lab.pareto import frontier, mean_interval

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

# One colour, marker and name a method, everywhere; the markers tell them apart in grey.
STYLE = {
    "full": ("#000000", "s", "square", "full attention"),
    "dms": ("#0072b2", "o", "circle", "DMS"),
    "dms_immediate": ("#56b4e9", "v", "triangle-down", "DMS, immediate eviction"),
    "streaming_llm_tuned": ("#d55e00", "D", "diamond", "window, fine-tuned"),
    "streaming_llm": ("#e69f00", "^", "triangle-up", "StreamingLLM"),
    "tova": ("#009e73", "P", "cross", "TOVA"),
    "h2o": ("#cc79a7", "X", "x", "H2O"),
    "random": ("#999999", "*", "star", "random"),
    "quest": ("#8c564b", "p", "pentagon", "Quest"),
}
OTHERS = ("#555555", "h", "hexagon")  # a method that has no style of its own is drawn all the same
BUDGETS = {"kv_reads": "KV reads per request (tokens)", "peak_tokens": "peak live tokens per request"}


def mean_over_tasks(frame: "pd.DataFrame") -> "pd.DataFrame":
    """One row per (method, target CR): means over the tasks (and seeds) with an accuracy, and its interval.

    The interval is of these problems and seeds: it says how well the mean was measured, not how it varies over seeds.
    """
    import pandas as pd

    with_answers = frame[frame["accuracy"].notna()]
    points = []
    for (method, cr), rows in with_answers.groupby(["method", "target_cr"]):
        low, high = mean_interval(rows["accuracy"], rows["accuracy_low"], rows["accuracy_high"])
        means = {name: rows[name].mean() for name in ("accuracy", "measured_cr", *BUDGETS)}
        points.append({"method": method, "target_cr": cr, "accuracy_low": low, "accuracy_high": high} | means)
    return pd.DataFrame(points)


def per_task(frame: "pd.DataFrame") -> "pd.DataFrame":
    """One row per (method, task, target CR): means over seeds, of the tasks with an accuracy."""
    with_answers = frame[frame["accuracy"].notna()]
    return with_answers.groupby(["method", "task", "target_cr"], as_index=False)[["accuracy", *BUDGETS]].mean()


def styles(frame: "pd.DataFrame") -> dict[str, tuple[str, str, str, str]]:
    """(colour, matplotlib marker, plotly symbol, name) of each method in `frame`, in the order of `STYLE`."""
    found = set(frame["method"])
    known = {method: style for method, style in STYLE.items() if method in found}
    return known | {method: (*OTHERS, method) for method in sorted(found - set(STYLE))}


def summary_table(frame: "pd.DataFrame") -> "Table":
    """The comparison as a table for the terminal: accuracy per task in percent, their mean, and the cost."""
    from rich.table import Table

    tasks = [t for t in frame["task"].unique() if frame[frame["task"] == t]["accuracy"].notna().any()]
    texts = [t for t in frame["task"].unique() if frame[frame["task"] == t]["perplexity"].notna().any()]
    means = mean_over_tasks(frame)
    table = Table(title="Exact match in percent, 95 % interval of the mean in brackets")
    for name in ("method", "CR", "measured", *tasks, "mean", *("ppl" for _ in texts), "KV reads", "peak"):
        table.add_column(name, justify="left" if name == "method" else "right", overflow="fold")
    order = {name: place for place, name in enumerate(STYLE)}
    groups = sorted(frame.groupby(["method", "target_cr"]), key=lambda g: (g[0][1], order.get(g[0][0], 99)))
    for (method, cr), rows in groups:
        by_task = {task: part for task, part in rows.groupby("task")}
        cells = [f"{100 * by_task[t]['accuracy'].mean():.1f}" if t in by_task else "" for t in tasks]
        answered = rows[rows["accuracy"].notna()]
        ppl = [f"{by_task[t]['perplexity'].mean():.2f}" if t in by_task else "" for t in texts]
        measured = (answered if len(answered) else rows)["measured_cr"].mean()
        cost = [f"{answered[c].mean():.0f}" if len(answered) else "" for c in BUDGETS]
        mean = means[(means["method"] == method) & (means["target_cr"] == cr)] if len(means) else means
        name = STYLE.get(method, ("", "", "", method))[3]
        table.add_row(name, f"{cr:g}", f"{measured:.2f}", *cells, _with_interval(mean), *ppl, *cost)
    return table


def _with_interval(mean: "pd.DataFrame") -> str:
    if not len(mean):
        return ""
    value, low, high = (100 * float(mean[name].iloc[0]) for name in ("accuracy", "accuracy_low", "accuracy_high"))
    return f"{value:.1f} [{low:.0f}-{high:.0f}]"


def pareto_figures(frame: "pd.DataFrame", folder: Path) -> list[Path]:
    """Writes `pareto.png` and the self-contained `pareto.html`; returns their paths. Needs at least one accuracy."""
    points = mean_over_tasks(frame)
    if points.empty:
        raise ValueError("there is no accuracy to draw; only perplexities were measured")
    return [_png(points, per_task(frame), folder / "pareto.png"), _html(points, folder / "pareto.html")]


# -- benchmarks: a point for every width and length ----------------------------------------------------------------------
def benchmark_table(frame: "pd.DataFrame", task: str) -> "Table":
    """Every point of one task as a table for the terminal: accuracies and truncation in percent, and the cost.

    The accuracy that stands for the point comes with its 95 % interval; W is the width, L the limit of tokens.
    """
    from rich.table import Table

    table = Table(title=f"{task}, in percent, 95 % interval in brackets; KV reads, peak and MB are of W chains together")
    names = (
        "method",
        "CR",
        "measured",
        "W",
        "L",
        "headline",
        "avg",
        "maj",
        "pass@k",
        "truncated",
        "KV reads",
        "peak",
        "MB",
    )
    for name in names:
        table.add_column(name, justify="left" if name in ("method", "headline") else "right", overflow="fold")
    order = {name: place for place, name in enumerate(STYLE)}
    rows = sorted(frame.to_dict("records"), key=lambda r: (r["target_cr"], order.get(r["method"], 99)))
    for row in rows:
        metrics = [_percent(row["metrics"].get(name, [None])[0]) for name in ("avg", "maj", "pass_at_k")]
        low, high = row["accuracy_low"], row["accuracy_high"]
        headline = f"{row['headline']} {_percent(row['accuracy'])} [{_percent(low, 0)}-{_percent(high, 0)}]"
        if _is_missing(row["accuracy"]):
            headline = "" if _is_missing(row["perplexity"]) else f"{row['headline']} {row['perplexity']:.2f}"
        megabytes = None if _is_missing(row["kv_bytes_peak"]) else row["kv_bytes_peak"] / 1e6
        table.add_row(
            STYLE.get(row["method"], ("", "", "", row["method"]))[3],
            f"{row['target_cr']:g}",
            _number(row["measured_cr"], 2),
            f"{row['width']}",
            _number(row["max_tokens"]),
            headline,
            *metrics,
            _percent(row["truncation_rate"]),
            _number(row["kv_reads"]),
            _number(row["peak_tokens"]),
            _number(megabytes, 3),
        )
    return table


def _is_missing(value: float | None) -> bool:
    return value is None or value != value


def _number(value: float | None, digits: int = 0) -> str:
    return "" if _is_missing(value) else f"{value:.{digits}f}"


def _percent(share: float | None, digits: int = 1) -> str:
    return "" if _is_missing(share) else f"{100 * share:.{digits}f}"


def benchmark_figures(frame: "pd.DataFrame", folder: Path) -> list[Path]:
    """Writes `pareto-<task>.png` for each task with an accuracy and a cost: every point, and each method's frontier."""
    found = []
    measured = frame[frame["accuracy"].notna() & (frame["kv_reads"] > 0)]
    for task, rows in measured.groupby("task"):
        found.append(_benchmark_png(rows, str(task), folder / f"pareto-{task}.png"))
    return found


def _benchmark_png(rows: "pd.DataFrame", task: str, path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for panel, (budget, title) in zip(panels, BUDGETS.items(), strict=True):
        for method, (colour, marker, _, name) in styles(rows).items():
            mine = rows[rows["method"] == method]
            error = [mine["accuracy"] - mine["accuracy_low"], mine["accuracy_high"] - mine["accuracy"]]
            error = [100 * side.clip(lower=0) for side in error]  # of equal scores an end may be a rounding beyond
            panel.errorbar(
                mine[budget], 100 * mine["accuracy"], yerr=error, fmt=marker, color=colour, capsize=2, linewidth=0.5
            )
            best = mine.iloc[frontier(mine[budget], mine["accuracy"])]
            panel.plot(best[budget], 100 * best["accuracy"], color=colour, marker=marker, linewidth=1.4, label=name)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.set_xlabel(title.replace("per request", "per problem"))
    panels[0].set_ylabel(f"{task}: {rows['headline'].iloc[0]} (%)")
    panels[1].legend(title="line: frontier", title_fontsize=8, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


# -- the figures of a run ------------------------------------------------------------------------------------------------
def _png(points: "pd.DataFrame", tasks: "pd.DataFrame", path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for panel, (budget, title) in zip(panels, BUDGETS.items(), strict=True):
        for (method, _), rows in tasks.groupby(["method", "task"]):
            rows, colour = rows.sort_values(budget), styles(points)[method][0]
            panel.plot(rows[budget], 100 * rows["accuracy"], color=colour, linewidth=0.5, alpha=0.45)
        for method, (colour, marker, _, name) in styles(points).items():
            rows = points[points["method"] == method].sort_values(budget)
            error = [rows["accuracy"] - rows["accuracy_low"], rows["accuracy_high"] - rows["accuracy"]]
            panel.errorbar(
                rows[budget],
                100 * rows["accuracy"],
                yerr=[100 * e for e in error],
                color=colour,
                marker=marker,
                capsize=2,
                linewidth=1.2,
                label=name,
            )
        full = points[points["method"] == "full"]["accuracy"]
        if len(full):
            panel.axhline(100 * full.mean(), color="black", linewidth=0.6, linestyle=":")
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:.0f}")
        panel.set_xlabel(title)
    panels[0].set_ylabel("exact match, mean over tasks (%)")
    panels[1].legend(title="thin: one task", title_fontsize=8, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _html(points: "pd.DataFrame", path: Path) -> Path:
    from plotly import graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=1, cols=2, shared_yaxes=True, subplot_titles=list(BUDGETS.values()))
    for column, budget in enumerate(BUDGETS, 1):
        for method, (colour, _, symbol, name) in styles(points).items():
            rows = points[points["method"] == method].sort_values(budget)
            figure.add_trace(
                go.Scatter(
                    x=rows[budget],
                    y=100 * rows["accuracy"],
                    error_y={
                        "array": 100 * (rows["accuracy_high"] - rows["accuracy"]),
                        "arrayminus": 100 * (rows["accuracy"] - rows["accuracy_low"]),
                    },
                    customdata=rows[["target_cr", "measured_cr"]],
                    hovertemplate="%{y:.1f} % at %{x:.0f}, CR %{customdata[0]} (measured %{customdata[1]:.2f})",
                    name=name,
                    legendgroup=method,
                    showlegend=column == 1,
                    mode="lines+markers",
                    marker={"symbol": symbol, "color": colour, "size": 9},
                    line={"color": colour},
                ),
                row=1,
                col=column,
            )
        figure.update_xaxes(type="log", dtick=math.log10(2), tickformat=".0f", row=1, col=column)  # a tick a doubling
    figure.update_yaxes(title_text="exact match, mean over tasks (%)", row=1, col=1)
    figure.write_html(path, include_plotlyjs=True)
    return path
