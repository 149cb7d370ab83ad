"""Accuracy against the compression ratio at equal length, and what was published of the same models."""

from typing import TYPE_CHECKING

from dms_lab.plots.accuracy import draw_curves, parts
from dms_lab.plots.axes import handle, legend_below, log2_axis, panels, paper, wrapped
from dms_lab.plots.style import Look, looks, looks_of_methods

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNSTATED = "published, length not stated"


def equal_length(points: "pd.DataFrame") -> "pd.DataFrame":
    """The points of single chains at the longest limit of each model and set of tasks, with an accuracy and a target CR.

    Where there are no single chains, those of the smallest width.
    """
    rows = points[points["accuracy"].notna() & (points["target_cr"] >= 1)]
    rows = rows if "tasks" in rows else rows.assign(tasks="")
    rows = rows[rows["width"] == rows.groupby(["model", "tasks"])["width"].transform("min")]
    limit = rows["max_tokens"].astype(float).fillna(-1)
    return rows[limit == limit.groupby([rows["model"], rows["tasks"]]).transform("max")]


def ratio_figure(points: "pd.DataFrame", published: "pd.DataFrame | None" = None, title: str = "accuracy (%)") -> "Figure":
    """Accuracy of single chains of equal length against the target CR, a panel a model and set of tasks.

    Hollow markers are published scores (`published.scores`) of single chains of the same model on all of the same tasks;
    the legend says where their length is not stated. Raises `ValueError` without any point.
    """
    rows = equal_length(points)
    if rows.empty:
        raise ValueError("there is nothing to draw: no point has both an accuracy and a compression ratio")
    styles = looks(rows)
    elsewhere = {part: published_means(published, mine) for part, mine in parts(rows).items()}
    others = looks_of_methods(method for means in elsewhere.values() for method in means["method"])
    with paper():
        figure, places = panels(len(elsewhere), len(styles), sharey=True)
        for panel, (part, mine) in zip(places, parts(rows).items(), strict=True):
            draw_curves(panel, mine, "target_cr", styles, lambda curve: curve.sort_values("target_cr"))
            _draw_published(panel, elsewhere[part], others)
            log2_axis(panel, [*mine["target_cr"], *elsewhere[part]["compression_ratio"]])
            panel.set_xlabel("compression ratio (target)")
            panel.set_title(wrapped(part))
        places[0].set_ylabel(title)
        handles = {look.name: handle(look) for look in styles.values()}
        shown = {tuple(row) for means in elsewhere.values() for row in means[["method", "said"]].to_numpy()}
        for method, look in others.items():
            for said in sorted(said for name, said in shown if name == method):
                handles[f"{look.name}, {said}"] = handle(look, line=False, hollow=True)
        legend_below(figure, handles)
    return figure


def published_means(published: "pd.DataFrame | None", rows: "pd.DataFrame") -> "pd.DataFrame":
    """Published means over the tasks of `rows`, of the model of `rows`: those that were published for each of the tasks.

    Of single chains, so there are none unless `rows` are of such, and as long as those of `rows` where it was said how long
    they were: `said` is "published", or that and "length not stated". Columns: method, compression_ratio, window, said,
    accuracy.
    """
    import pandas as pd

    by = ["method", "compression_ratio", "window", "said"]
    if published is None or rows.empty or (rows["width"] != 1).any():
        return pd.DataFrame(columns=[*by, "accuracy"])
    tasks = set(rows["tasks"].iloc[0].split(", "))
    found = published[(published["model"] == rows["model"].iloc[0]) & published["task"].isin(tasks)]
    found = found[found["width"].isna() | (found["width"] == 1)]
    found = found[found["max_tokens"].isna() | (found["max_tokens"] == rows["max_tokens"].iloc[0])]
    found = found.assign(said=found["max_tokens"].map(lambda length: UNSTATED if pd.isna(length) else "published"))
    means = found.groupby(by, as_index=False, dropna=False).agg(accuracy=("accuracy", "mean"), tasks=("task", "nunique"))
    return means[means["tasks"] == len(tasks)].drop(columns="tasks")


def _draw_published(panel: "Axes", rows: "pd.DataFrame", others: dict[str, Look]) -> None:
    for method, mine in rows.groupby("method"):
        look = others[str(method)]
        panel.plot(
            mine["compression_ratio"],
            100 * mine["accuracy"],
            linestyle="",
            marker=look.marker,
            color=look.colour,
            markerfacecolor="white",
            markersize=6,
            zorder=3,
        )
