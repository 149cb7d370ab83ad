"""The figure of a benchmark: a point for every width, limit and ratio, and each method's frontier."""

from pathlib import Path
from typing import TYPE_CHECKING

from dms_lab.plots.accuracy import draw_curves, on_frontier
from dms_lab.plots.axes import TOKEN_BUDGETS, handle, legend_below, log2_axis, panels, paper
from dms_lab.plots.style import looks

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def benchmark_figures(frame: "pd.DataFrame", folder: Path) -> list[Path]:
    """Writes `pareto-<task>.png` for each task with an accuracy and a cost; returns their paths."""
    found = []
    measured = frame[frame["accuracy"].notna() & (frame["kv_reads"] > 0)]
    for task, rows in measured.groupby("task"):
        found.append(Path(folder) / f"pareto-{task}.png")
        with paper():
            benchmark_figure(rows, str(task)).savefig(found[-1], dpi=300, metadata={"Software": None})
    return found


def benchmark_figure(rows: "pd.DataFrame", task: str) -> "Figure":
    """Accuracy of one task against its cost: every point, and each method's frontier as a line; a panel a budget."""
    rows = rows.reset_index(drop=True)
    rows = rows if "variant" in rows else rows.assign(variant="")
    styles = looks(rows)
    with paper():
        figure, places = panels(len(TOKEN_BUDGETS), sharey=True)
        for panel, (budget, title) in zip(places, TOKEN_BUDGETS.items(), strict=True):
            draw_curves(panel, rows, budget, styles, lambda curve, budget=budget: on_frontier(curve, budget))
            log2_axis(panel, rows[budget].tolist())
            panel.set_xlabel(title)
        places[0].set_ylabel(f"{task}: {rows['headline'].iloc[0]} (%)")
        legend_below(figure, {look.name: handle(look) for look in styles.values()}, title="line: frontier")
    return figure
