"""Accuracy against what the cache costs: every point with its interval, and the frontier of each curve."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from dms_lab.pareto import frontier
from dms_lab.plots.axes import handle, in_unit, legend_below, log2_axis, panels, paper, wrapped
from dms_lab.plots.style import INK, Look, looks

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BAND = {"color": "#dedede", "linewidth": 7, "solid_capstyle": "round", "zorder": 0.5}
_PALE = 0.4  # of points that another point of their curve beats


def measured(points: "pd.DataFrame", budget: str) -> "pd.DataFrame":
    """The points with an accuracy and a cost in `budget`; raises `ValueError` if there is none."""
    rows = points[points["accuracy"].notna() & (points[budget] > 0)]
    if rows.empty:
        raise ValueError(f"there is nothing to draw: no point has both an accuracy and {budget}")
    return rows


def parts(rows: "pd.DataFrame") -> dict[str, "pd.DataFrame"]:
    """What can be compared, by its name: the rows of one model on the same tasks; "" if all are.

    The name is of the model, the tasks or both, whatever differs.
    """
    found = {}
    rows = rows if "tasks" in rows else rows.assign(tasks="")
    for (model, tasks), mine in rows.groupby(["model", "tasks"], sort=True):
        words = [str(model)] * (rows["model"].nunique() > 1) + [str(tasks)] * (rows["tasks"].nunique() > 1)
        found[": ".join(words)] = mine
    return found


def on_frontier(rows: "pd.DataFrame", budget: str) -> "pd.DataFrame":
    """The rows of one curve that no other of it beats, by rising budget."""
    return rows.iloc[frontier(rows[budget], rows["accuracy"])]


def error_sides(rows: "pd.DataFrame") -> list["pd.Series"]:
    """The distances from the accuracy to the ends of its interval, below and above, in percent.

    Of equal scores an end may be a rounding beyond the mean; a missing end has no distance.
    """
    below, above = rows["accuracy"] - rows["accuracy_low"], rows["accuracy_high"] - rows["accuracy"]
    return [100 * side.astype(float).clip(lower=0).fillna(0.0) for side in (below, above)]


def accuracy_figure(points: "pd.DataFrame", budget: str = "kv_reads", title: str = "accuracy (%)") -> "Figure":
    """Accuracy against `budget` (a column of `comparison.curve_points`), a panel a model and set of tasks.

    Lines join the points that no cheaper point of the same method and variant beats, and go on thin to the largest budget
    that was measured of it, as margins are computed; the others are pale. The grey band
    joins those that no cheaper point of any method beats; the dotted line is the highest accuracy of full attention.
    Raises `ValueError` for an unknown budget, or without any point.
    """
    name, unit = in_unit(budget, points[budget].dropna().tolist() or [0])
    rows = measured(points, budget)
    rows = rows.assign(**{budget: rows[budget] / unit})
    styles = looks(rows)
    with paper():
        figure, places = panels(len(parts(rows)), len(styles), sharey=True)
        for panel, (part, mine) in zip(places, parts(rows).items(), strict=True):
            best = on_frontier(mine, budget)
            panel.plot(best[budget], 100 * best["accuracy"], **_BAND)
            draw_curves(panel, mine, budget, styles, lambda curve: on_frontier(curve, budget))
            _draw_held(panel, mine, budget, styles)
            log2_axis(panel, mine[budget].tolist())
            panel.set_xlabel(name)
            panel.set_title(wrapped(part))
        places[0].set_ylabel(title)
        legend_below(figure, {look.name: handle(look) for look in styles.values()} | {"best of all": band()})
    return figure


def band() -> object:
    """What stands in a legend for the frontier of all methods."""
    from matplotlib.lines import Line2D

    return Line2D([], [], **_BAND)


def draw_curves(
    panel: "Axes",
    rows: "pd.DataFrame",
    x: str,
    styles: dict[tuple[str, str], Look],
    line: Callable[["pd.DataFrame"], "pd.DataFrame"],
) -> None:
    """Draws each curve of `rows` into `panel`: all points with their intervals, and `line(rows of a curve)` joined."""
    for (method, variant), look in styles.items():
        mine = rows[(rows["method"] == method) & (rows["variant"] == variant)]
        if mine.empty:
            continue
        best = line(mine)
        beaten = mine.drop(best.index)
        bars = {"fmt": "none", "ecolor": look.colour, "elinewidth": 0.6, "alpha": 0.6}
        panel.errorbar(mine[x], 100 * mine["accuracy"], yerr=error_sides(mine), **bars)
        drawn = {"color": look.colour, "marker": look.marker}
        panel.plot(best[x], 100 * best["accuracy"], linestyle=look.line, label=look.name, **drawn)
        panel.plot(beaten[x], 100 * beaten["accuracy"], linestyle="", alpha=_PALE, label=f"{look.name}, beaten", **drawn)
    full_line(panel, rows)
    panel.grid(axis="y")
    panel.set_axisbelow(True)


def _draw_held(panel: "Axes", rows: "pd.DataFrame", x: str, styles: dict[tuple[str, str], Look]) -> None:
    for (method, variant), look in styles.items():
        mine = rows[(rows["method"] == method) & (rows["variant"] == variant)]
        ends = held(mine, x)
        if ends:
            height = 100 * mine["accuracy"].max()
            panel.plot(
                ends, [height] * 2, color=look.colour, linestyle=look.line, linewidth=0.6, label=f"{look.name}, held"
            )


def held(rows: "pd.DataFrame", x: str) -> list[float]:
    """From where to where the best accuracy of a curve's rows was not beaten by what cost more; [] if nothing did."""
    if rows.empty:
        return []
    ends = [float(on_frontier(rows, x)[x].iloc[-1]), float(rows[x].max())]
    return ends if ends[1] > ends[0] else []


def full_line(panel: "Axes", rows: "pd.DataFrame") -> None:
    """A dotted line at the highest accuracy of full attention, where there is one."""
    full = rows[rows["method"] == "full"]["accuracy"]
    if len(full):
        panel.axhline(100 * full.max(), color=INK, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
