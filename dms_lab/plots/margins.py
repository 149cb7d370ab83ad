"""Margins over a baseline at equal budgets, as bars."""

from typing import TYPE_CHECKING

from dms_lab.plots.accuracy import parts
from dms_lab.plots.axes import BUDGETS, panels, paper, wrapped
from dms_lab.plots.style import Look, display_name, looks

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def margins_figure(margins: "pd.DataFrame", published: "pd.DataFrame | None" = None) -> "Figure":
    """A bar for each curve, a panel for each budget of `comparison.margins`, in points, with intervals.

    Hollow diamonds are published margins (`published.margins`) of the same model, method, baseline and tasks. They are of
    frontiers that end at their last points, and so is the tick on a bar (`margin_unheld`); the bar itself is of frontiers
    that are held. Curves that share no budget with the baseline say so. Raises `ValueError` if no curve has a
    margin.
    """
    found = margins[margins["margin"].notna()]
    if found.empty:
        raise ValueError("there is nothing to draw: no curve shares a range of budgets with the baseline")
    budgets = [budget for budget in BUDGETS if (found["budget"] == budget).any()]
    styles = looks(margins)
    bars = {  # name -> rows of one curve, a budget each
        f"{part}: {look.name}" if part else look.name: rows
        for part, mine in parts(margins).items()
        for (method, variant), look in styles.items()
        if len(rows := mine[(mine["method"] == method) & (mine["variant"] == variant)])
    }
    against = display_name(str(margins["against"].iloc[0]))
    with paper():
        figure, places = panels(len(budgets), height=0.7 + 0.2 * len(bars), sharey=True)
        for panel, budget in zip(places, budgets, strict=True):
            for place, rows in enumerate(bars.values()):
                look = styles[rows["method"].iloc[0], rows["variant"].iloc[0]]
                _bar(panel, place, rows[rows["budget"] == budget], look)
                elsewhere = published_margin(published, rows, budget)
                if elsewhere is not None:
                    panel.plot(100 * elsewhere, place, "D", color="black", markerfacecolor="white", zorder=4)
            panel.axvline(0, color="black", linewidth=0.6)
            panel.grid(axis="x")
            panel.set_axisbelow(True)
            panel.set_title(short(budget))
            panel.set_xlabel(f"points over {against}")
        places[0].set_yticks(range(len(bars)), [wrapped(name) for name in bars])
        places[0].invert_yaxis()
    return figure


def short(budget: str) -> str:
    """A budget's name without its unit."""
    return BUDGETS[budget].removesuffix(" (tokens)").removesuffix(" per problem")


def published_margin(published: "pd.DataFrame | None", rows: "pd.DataFrame", budget: str) -> float | None:
    """The mean of published margins over the tasks of a curve's `rows`; None unless there is one for each of the tasks."""
    found = _published(published, rows, budget)
    return sum(found.values()) / len(found) if found and set(found) == _tasks(rows) else None


def unpublished_tasks(published: "pd.DataFrame | None", rows: "pd.DataFrame", budget: str) -> list[str]:
    """The tasks for want of which `published_margin` is None; [] where it is not, or where nothing was published."""
    found = _published(published, rows, budget)
    return sorted(_tasks(rows) - set(found)) if found else []


def _tasks(rows: "pd.DataFrame") -> set[str]:
    return set(rows.iloc[0].get("tasks", "").split(", "))


def _published(published: "pd.DataFrame | None", rows: "pd.DataFrame", budget: str) -> dict[str, float]:
    """The published margins of a curve's model, method and baseline by task; a task without a number is left out."""
    if published is None:
        return {}
    curve = rows.iloc[0]
    same = (published[["model", "method", "against"]] == curve[["model", "method", "against"]]).all(axis=1)
    found = published[same & (published["budget"] == budget) & published["task"].isin(_tasks(rows))].dropna(
        subset=["margin"]
    )
    return dict(zip(found["task"], found["margin"], strict=True))


def _bar(panel: "Axes", place: int, row: "pd.DataFrame", look: Look) -> None:
    value, low, high = (float(row[name].iloc[0]) if len(row) else float("nan") for name in ("margin", "low", "high"))
    if value != value:
        panel.annotate(
            "no common budget",
            (0, place),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=6,
            color="#555555",
        )
        return
    unheld = float(row["margin_unheld"].iloc[0])
    if unheld == unheld:
        panel.plot(100 * unheld, place, "|", color="black", markersize=9, zorder=3, label="not held")
    panel.barh(place, 100 * value, height=0.65, color=look.colour, alpha=0.85, hatch=look.hatch, edgecolor="white")
    if low == low and high == high:
        ends = [[max(0.0, 100 * (value - low))], [max(0.0, 100 * (high - value))]]
        panel.errorbar(100 * value, place, xerr=ends, fmt="none", ecolor="#222222", elinewidth=0.8, capsize=2)
