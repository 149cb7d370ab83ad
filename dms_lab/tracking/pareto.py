"""A comparison in W&B: points and margins as tables, accuracy against KV reads as a chart and as a figure, the report."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dms_lab import results
from dms_lab.tracking.evaluation import plain
from dms_lab.tracking.run import Label, WandbRun
from dms_lab.tracking.tables import cell, left_out, mark_of, table

if TYPE_CHECKING:
    import pandas as pd

_log = logging.getLogger(__name__)
BUDGET = "kv_reads"
MOST_FIGURES = 24  # models and sets of tasks that are drawn
_SHOWN = ["method", "variant", "target_cr", "width", "max_tokens", BUDGET, "accuracy"]


@dataclass(frozen=True)
class Comparison:
    """What was compared: frames of `dms_lab.comparison`, the warnings, and the page that shows them, if there is one."""

    points: "pd.DataFrame"
    margins: "pd.DataFrame | None" = None
    warnings: tuple[str, ...] = ()
    report: Path | None = None


def log_pareto(folder: Path, name: str, found: Comparison) -> WandbRun:
    """The comparison called `name` has its W&B run, which is returned, closed; W&B's files of it go below `folder`."""
    models, methods = sorted(set(found.points["model"])), sorted(set(found.points["method"]))
    what = {"models": models, "methods": methods, "warnings": list(found.warnings)}
    what |= {"versions": results.versions(), "git_revision": results.git_revision()}
    label = Label(f"pareto-{plain(name)}", "pareto", name, name, (*models, *methods), what)
    run = WandbRun(label, folder)
    run.log_new(mark_of(found.points, found.margins), lambda: _values(found))
    run.summarize(_summary(found))
    if found.report is not None:
        run.attach(found.report, "report")
    run.finish()
    return run


def _values(found: Comparison) -> dict[str, Any]:
    """Tables and figures."""
    values: dict[str, Any] = {"points": table(found.points, "points")}
    if found.margins is not None:
        values["margins"] = table(found.margins, "margins")
    return values | dict(_figures(found.points))


def _figures(points: "pd.DataFrame") -> Iterator[tuple[str, Any]]:
    """Of each model and set of tasks W&B's own scatter, and the figure with frontiers and the line of full attention."""
    import wandb

    from dms_lab.plots import interactive

    measured = points[points["accuracy"].notna() & (points[BUDGET] > 0)]
    parts = list(measured.groupby(["model", "tasks"]))
    if len(parts) > MOST_FIGURES:
        _log.warning("W&B gets figures of the first %d of %d models and sets of tasks", MOST_FIGURES, len(parts))
    for (model, tasks), rows in parts[:MOST_FIGURES]:
        title = f"{model} {tasks}"
        yield f"scatter/{title}", wandb.plot.scatter(table(rows[_SHOWN], title), BUDGET, "accuracy", title)
        yield f"frontier/{title}", wandb.Plotly(interactive.accuracy(rows, BUDGET))


def _summary(found: Comparison) -> dict[str, float]:
    numbers: dict[str, float] = {"num_points": len(found.points)} | left_out(found.points, "points")
    for row in [] if found.margins is None else found.margins.to_dict("records"):
        if cell(row["margin"]) is not None:
            curve = " ".join(filter(None, (row["method"], row["variant"])))
            for name in ("margin", "margin_unheld", "held_share"):
                if cell(row[name]) is not None:
                    numbers[f"{name}/{row['model']}/{row['tasks']}/{curve}/{row['budget']}"] = row[name]
    return numbers
