"""The figures that a run's own evaluation ends with: means over its tasks against the cost, for paper and for browser."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from dms_lab.comparison import curve_points
from dms_lab.plots.accuracy import error_sides, full_line
from dms_lab.plots.axes import TOKEN_BUDGETS, handle, legend_below, log2_axis, panels, paper
from dms_lab.plots.style import looks_of_methods

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_TITLE = "exact match, mean over tasks (%)"


def mean_over_tasks(frame: "pd.DataFrame") -> "pd.DataFrame":
    """The points of `comparison.curve_points` that have an accuracy, one per (method, target CR) of a run."""
    points = curve_points(frame)
    return points[points["accuracy"].notna()]


def per_task(frame: "pd.DataFrame") -> "pd.DataFrame":
    """One row per (method, task, target CR): means over seeds, of the tasks with an accuracy."""
    with_answers = frame[frame["accuracy"].notna()]
    return with_answers.groupby(["method", "task", "target_cr"], as_index=False)[["accuracy", *TOKEN_BUDGETS]].mean()


def pareto_figures(frame: "pd.DataFrame", folder: Path) -> list[Path]:
    """Writes `pareto.png` and the self-contained `pareto.html`; returns their paths. Needs at least one accuracy."""
    points = mean_over_tasks(frame)
    if points.empty:
        raise ValueError("there is no accuracy to draw; only perplexities were measured")
    png = Path(folder) / "pareto.png"
    with paper():
        run_figure(points, per_task(frame)).savefig(png, dpi=300, metadata={"Software": None})
    return [png, _html(points, Path(folder) / "pareto.html")]


def run_figure(points: "pd.DataFrame", tasks: "pd.DataFrame") -> "Figure":
    """The means over tasks with their intervals, and thin lines for single tasks; a panel a budget."""
    styles = looks_of_methods(points["method"])
    with paper():
        figure, places = panels(len(TOKEN_BUDGETS), sharey=True)
        for panel, budget in zip(places, TOKEN_BUDGETS, strict=True):
            for (method, _), rows in tasks.groupby(["method", "task"]):
                rows = rows.sort_values(budget)
                panel.plot(rows[budget], 100 * rows["accuracy"], color=styles[method].colour, linewidth=0.5, alpha=0.45)
            for method, look in styles.items():
                rows = points[points["method"] == method].sort_values(budget)
                drawn = {"color": look.colour, "marker": look.marker, "linestyle": look.line, "elinewidth": 0.8}
                panel.errorbar(rows[budget], 100 * rows["accuracy"], yerr=error_sides(rows), **drawn)
            full_line(panel, points)
            log2_axis(panel, [*points[budget], *tasks[budget]])
            panel.set_xlabel(TOKEN_BUDGETS[budget])
        places[0].set_ylabel(_TITLE)
        legend_below(figure, {look.name: handle(look) for look in styles.values()}, title="thin: one task")
    return figure


def _html(points: "pd.DataFrame", path: Path) -> Path:
    from plotly import graph_objects as go
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=1, cols=2, shared_yaxes=True, subplot_titles=list(TOKEN_BUDGETS.values()))
    for column, budget in enumerate(TOKEN_BUDGETS, 1):
        for method, look in looks_of_methods(points["method"]).items():
            rows = points[points["method"] == method].sort_values(budget)
            below, above = error_sides(rows)
            figure.add_trace(
                go.Scatter(
                    x=rows[budget],
                    y=100 * rows["accuracy"],
                    error_y={"array": above, "arrayminus": below},
                    customdata=rows[["target_cr", "measured_cr"]],
                    hovertemplate="%{y:.1f} % at %{x:.0f}, CR %{customdata[0]} (measured %{customdata[1]:.2f})",
                    name=look.name,
                    legendgroup=method,
                    showlegend=column == 1,
                    mode="lines+markers",
                    marker={"symbol": look.symbol, "color": look.colour, "size": 9},
                    line={"color": look.colour, "dash": look.dash},
                ),
                row=1,
                col=column,
            )
        figure.update_xaxes(type="log", dtick=math.log10(2), tickformat=".0f", row=1, col=column)  # a tick a doubling
    figure.update_yaxes(title_text=_TITLE, row=1, col=1)
    figure.write_html(path, include_plotlyjs=True)
    return path
