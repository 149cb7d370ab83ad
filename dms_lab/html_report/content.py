"""What is made of an analysis: the sections of a report, the tables of a terminal, files of tables and figures."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from dms_lab import comparison, published
from dms_lab.html_report import tables
from dms_lab.html_report.analysis import Analysis
from dms_lab.html_report.page import Details, Key, Page, Plot, Section, Table
from dms_lab.html_report.sources import Origin
from dms_lab.plots import (
    BUDGETS,
    accuracy_figure,
    display_name,
    interactive,
    looks,
    margins_figure,
    ratio_figure,
    retention_figure,
    save_figure,
)
from dms_lab.plots.margins import unpublished_tasks
from dms_lab.plots.ratio import equal_length
from dms_lab.plots.style import Marker

if TYPE_CHECKING:
    import pandas as pd

MOST_MAPS = 8  # retention maps in a report; the runs' own files have the rest
_READING = [
    "CR: the target, full / kept at the training length; measured: logical tokens / live slots at the end of the request, "
    "prompt and window included, of tasks; texts are compressed by another ratio, which stands beside their perplexity (at "
    "text CR). W chains answer a problem together, of at most L tokens each; costs are of all W.",
    "KV reads: live slots attended to, summed over decode steps, mean over layers and KV heads. Peak: the most live slots "
    "at any step. MiB: what was allocated for keys, values, tables and metadata at the peak.",
    "A line joins the points of one method and variant that no cheaper point of it beats (in the table, r: by KV reads, p: "
    "by peak), and goes on thin to the largest budget measured; pale points are beaten; the grey band joins those that no "
    "point of any method beats; the dotted line is the highest accuracy of full attention. Budgets are on log2 axes.",
    "Margin: mean of a curve's accuracy less the baseline's over the budgets that both cover, on a log2 axis, in points. "
    "Beyond its last point a frontier is held to the largest budget measured; held says how much of the common budgets is "
    "such, and not held is the margin as the paper defines it, over the rest alone (no common budget: there is none). "
    "Times less: the baseline's budget over the curve's for the same accuracy (>: the cheapest that was measured is more "
    "accurate already; an interval from 0: with other problems or seeds the accuracy may not be reached at all). "
    "Difference: of accuracies at equal budget.",
]


def page_of(analysis: Analysis, origin: Origin, title: str, command: str) -> Page:
    """The report of an analysis."""
    sections = [_comparison_section(analysis, name, points) for name, points in _parts(analysis).items()]
    sections += _versus_section(analysis) + _published_section(analysis) + _texts_section(analysis)
    sections += _retention_section(origin)
    sections += [Section("How to read this", [*_READING, *intervals_said(analysis)]), _origin_section(analysis, origin)]
    return Page(title, origin.question, analysis.warnings, sections, command)


def _parts(analysis: Analysis) -> dict[str, "pd.DataFrame"]:
    """The points with accuracies that can be compared, by model and tasks."""
    points = analysis.points[analysis.points["tasks"] != ""]
    return {f"{model}: {tasks}": rows for (model, tasks), rows in points.groupby(["model", "tasks"], sort=True)}


def _of(frame: "pd.DataFrame", points: "pd.DataFrame") -> "pd.DataFrame":
    """The rows of a frame about the model and tasks of `points`."""
    return frame[(frame["model"] == points["model"].iloc[0]) & (frame["tasks"] == points["tasks"].iloc[0])]


def _comparison_section(analysis: Analysis, name: str, points: "pd.DataFrame") -> Section:
    scores, margins = analysis.published_scores, analysis.published_margins
    plots = [
        Plot(
            f"Accuracy against {title.removesuffix(' (tokens)')}",
            f"Accuracy of each method in percent against {title}; the table of points has the same numbers",
            interactive.accuracy(points, budget),
        )
        for budget, title in BUDGETS.items()
        if (points["accuracy"].notna() & (points[budget] > 0)).any()
    ]
    if len(alike := equal_length(points)):
        chains = "single chains" if (width := alike["width"].iloc[0]) == 1 else f"{width} chains together"
        what = f"Accuracy of {chains} of equal length in percent against the compression ratio; hollow: published"
        plots.append(Plot("Accuracy against compression at equal length", what, interactive.ratio(points, scores)))
    mine = _of(analysis.margins, points)
    if mine["margin"].notna().any():
        what = f"Margins over {display_name(analysis.against)} in points; the table of margins has the same numbers"
        plots.append(Plot(f"Margin over {display_name(analysis.against)}", what, interactive.margins(mine, margins)))
    return Section(
        name, [] if _meets(analysis, points) else [_apart(analysis)], keys_of(points), plots, _tables_of(analysis, points)
    )


def _tables_of(analysis: Analysis, points: "pd.DataFrame") -> list[Table]:
    """The points, and where they stand against the baseline."""
    shown = [tables.points_table(points, f"Points, in percent{_over(points)}")]
    if _meets(analysis, points):
        frames = (_of(frame, points) for frame in (analysis.margins, analysis.equal_accuracy, analysis.equal_budget))
        shown.append(tables.versus_table(*frames, versus_caption(analysis)))
    return shown


def _meets(analysis: Analysis, points: "pd.DataFrame") -> bool:
    """Whether any curve shares a budget or an accuracy with the baseline."""
    found = [_of(analysis.margins, points)["margin"], _of(analysis.equal_accuracy, points)["at_least"]]
    return any(values.notna().any() for values in found)


def _apart(analysis: Analysis) -> str:
    baseline = display_name(analysis.against)
    return (
        f"No curve shares a budget with {baseline} or reaches its accuracy, so there is no margin: measure {baseline} at "
        "more budgets (widths, lengths), or say with --within how much less accuracy will do."
    )


def versus_caption(analysis: Analysis) -> str:
    """What the table of one row a curve and budget says."""
    return (
        f"Against {display_name(analysis.against)}: margin in points; times less budget at {_equal(analysis)}, the highest "
        "that is reached; difference of accuracies at the largest budget that both cover"
    )


def _equal(analysis: Analysis) -> str:
    return f"an accuracy {100 * analysis.within:g} points lower" if analysis.within else "equal accuracy"


def keys_of(points: "pd.DataFrame") -> list[Key]:
    """The legend of the figures of `points`."""
    keys = [
        Key(look.name, look.colour, marker_path(look.marker), _DASHES[look.dash])
        for look in looks(points[points["accuracy"].notna()]).values()
    ]
    return [*keys, Key(interactive.BEST, "#c8c8c8", width=8.0)]


_DASHES = {"solid": "", "dash": "0.5 0.2", "dot": "0.15 0.15", "dashdot": "0.5 0.2 0.12 0.2", "4px,2px": "0.25 0.12"}
_DASHES |= {"10px,2px,2px,2px,2px,2px": "0.7 0.12 0.12 0.12 0.12 0.12"}


def marker_path(marker: Marker) -> str:
    """A matplotlib marker as an SVG path around 0, 0, about one unit wide."""
    from matplotlib.markers import MarkerStyle
    from matplotlib.path import Path as Outline

    letters = {Outline.MOVETO: "M", Outline.LINETO: "L", Outline.CURVE3: "Q", Outline.CURVE4: "C", Outline.CLOSEPOLY: "Z"}
    style = MarkerStyle(marker)
    outline = style.get_path().transformed(style.get_transform())
    found = []
    for values, code in outline.iter_segments():
        numbers = [] if letters[code] == "Z" else [f"{-v if i % 2 else v:.3g}" for i, v in enumerate(values)]
        found.append(letters[code] + " ".join(numbers))
    return "".join(found)


def intervals_said(analysis: Analysis) -> list[str]:
    """What the intervals are over, of these results: of accuracies, and of what lies between curves."""
    points, margins = analysis.points[analysis.points["accuracy"].notna()], analysis.margins
    over = set(points["interval_over"]) - {""}
    said = []
    if comparison.SEEDS in over:
        said.append(
            "Intervals of accuracies are of 95 %: Wilson's, of as many problems as make them as uncertain as seeds and "
            "problems that are drawn again do; of a single seed only its problems are."
        )
    elif over and points["num_seeds"].max() > 1:
        said.append(
            "Intervals of accuracies are of 95 %: Wilson's, of all problems, those that seeds share counted once. How "
            "seeds differ is not in them: some rows do not say what single problems scored."
        )
    elif over:
        said.append("Intervals of accuracies are of 95 %: Wilson's, of the problems of a single seed.")
    found = margins[margins["margin"].notna()]
    if len(found) and found["low"].notna().any():
        said.append(
            "Intervals of what lies between curves: problems and seeds are drawn again, the same ones for a curve and its "
            "baseline"
            + ("." if found["low"].notna().all() else "; there are none where single scores are not known.")
            + " Scores that are all right or all wrong are drawn as just that: an interval of no width says that problems "
            "were too easy, too hard or too few to tell, not that nothing could differ."
        )
    elif len(found):
        said.append("What lies between curves has no intervals: what single problems scored is not known.")
    return said


def _over(points: "pd.DataFrame") -> str:
    """Over what the intervals of some points are, for a caption."""
    names = sorted(set(points["interval_over"]) - {""}, reverse=True)
    return f" with 95 % intervals over {' or '.join(names)}" if names else ""


def _versus_section(analysis: Analysis) -> list[Section]:
    shown = []
    for name, points in _parts(analysis).items():
        if not _meets(analysis, points):
            continue
        whole = _of(analysis.margins, points)
        by_cr = f"Margins of each compression ratio in points, {name}"
        shown += [
            tables.margins_table(whole, f"Margins in points, {name}"),
            tables.margins_table(_of(analysis.margins_by_cr, points), by_cr),
            tables.equal_accuracy_table(_of(analysis.equal_accuracy, points), f"At {_equal(analysis)}, {name}"),
            tables.equal_budget_table(_of(analysis.equal_budget, points), f"At equal budget, {name}"),
        ]
    if not shown:
        return []
    text = "Every point of the baseline's frontier, and what each curve needs for its accuracy, or has for its budget."
    return [Section(f"Against {display_name(analysis.against)}", [text], tables=shown)]


def published_beside(analysis: Analysis) -> Table | None:
    """The table of published scores beside measured ones of single chains; None if there are none."""
    frame, scores = analysis.frame, analysis.published_scores
    measured = {}
    for task in sorted(frame["task"].unique()):
        if (scores["task"] == task).any():
            rows = equal_length(comparison.curve_points(frame[frame["task"] == task]))
            measured[task] = rows[rows["width"] == 1]
    return tables.published_table(measured, scores)


def published_notes(analysis: Analysis) -> list[str]:
    """What was published of these models, and cannot stand beside what was measured: sentences."""
    said = []
    others = analysis.published_scores[~analysis.published_scores["task"].isin(published.TASKS.values())]
    for model, rows in others.groupby("model"):
        names = ", ".join(sorted(set(rows["task"])))
        said.append(
            f"{model}: of {names} there are published scores under names of the paper, and no task here that is certain to "
            "be the same: nothing is compared with them"
        )
    for (model, method, variant, tasks, budget), rows in analysis.margins.groupby(_CURVE) if len(analysis.margins) else ():
        lacking = unpublished_tasks(analysis.published_margins, rows, budget)
        if lacking:
            said.append(
                f"{model}: no published margin in {budget} of {comparison.label(method, variant)} stands beside the mean "
                f"over {tasks}: there is none of {', '.join(lacking)}"
            )
    return said


_CURVE = ["model", "method", "variant", "tasks", "budget"]


def _published_section(analysis: Analysis) -> list[Section]:
    shown, notes = published_beside(analysis), published_notes(analysis)
    text = (
        "Scores of single chains, at the longest limit that was measured of these; L says where lengths differ. Published "
        "margins are of frontiers that end at their last points: hold them against what is called not held."
    )
    if shown is None and not notes:
        return []
    said = [text, *(f"{note}." for note in notes)] if shown else [f"{note}." for note in notes]
    return [Section("Published beside measured", said, tables=[shown] if shown else [])]


def _texts_section(analysis: Analysis) -> list[Section]:
    points = analysis.points[analysis.points["tasks"] == ""]
    if points.empty:
        return []
    return [Section("Perplexity alone", tables=[tables.points_table(points, "Points without tasks")])]


def _retention_section(origin: Origin) -> list[Section]:
    if not origin.runs:
        return []
    shown = dict(list(origin.runs.items())[:MOST_MAPS])
    what = "Share of tokens that each layer and KV head kept, over the steps of training"
    text = f"{what}." + (f" The first {MOST_MAPS} of {len(origin.runs)} runs." if len(shown) < len(origin.runs) else "")
    plots = [Plot(name, f"{what}: {name}", interactive.retention(folder)) for name, folder in shown.items()]
    return [Section("What was kept", [text], plots=plots)]


def _origin_section(analysis: Analysis, origin: Origin) -> Section:
    details = [Details(name, content) for name, content in origin.texts.items()]
    return Section("What computed this", tables=[tables.runs_table(analysis.frame)], details=details)


# -- terminal and files --------------------------------------------------------------------------------------------------
def summary(analysis: Analysis) -> list[Table]:
    """The tables of a terminal: points, where they stand against the baseline, published beside measured."""
    found = []
    for name, points in _parts(analysis).items():
        of_points, *versus = _tables_of(analysis, points)
        found += [replace(of_points, caption=f"{name}, in percent{_over(points)}"), *versus]
    found += [table for section in _texts_section(analysis) for table in section.tables]
    beside = published_beside(analysis)
    return [*found, tables.without(beside, "model", "source")] if beside else found


def notes(analysis: Analysis) -> list[str]:
    """What there is to say of what cannot be held against the baseline, or against what was published."""
    apart = [f"{name}: {_apart(analysis)}" for name, points in _parts(analysis).items() if not _meets(analysis, points)]
    return [*apart, *published_notes(analysis)]


def write_tables(analysis: Analysis, folder: Path) -> list[Path]:
    """Writes `pareto.csv`, the points, and `margins.csv`: of whole curves (no target_cr), then of each CR."""
    import pandas as pd

    folder.mkdir(parents=True, exist_ok=True)
    margins = pd.concat([analysis.margins, analysis.margins_by_cr], ignore_index=True)
    paths = [folder / "pareto.csv", folder / "margins.csv"]
    for frame, path in zip((analysis.points, margins), paths, strict=True):
        frame.to_csv(path, index=False, lineterminator="\n")
    return paths


def write_figures(analysis: Analysis, origin: Origin, folder: Path) -> list[Path]:
    """Writes every figure that there is something for, as PNG and SVG; returns their paths."""
    points, paths = analysis.points, []
    for budget in BUDGETS:
        if (points["accuracy"].notna() & (points[budget] > 0)).any():
            paths += save_figure(accuracy_figure(points, budget), folder / f"accuracy-{budget}")
    if len(equal_length(points)):
        paths += save_figure(ratio_figure(points, analysis.published_scores), folder / "accuracy-cr")
    if len(analysis.margins) and analysis.margins["margin"].notna().any():
        paths += save_figure(margins_figure(analysis.margins, analysis.published_margins), folder / "margins")
    for name, run in list(origin.runs.items())[:MOST_MAPS]:
        paths += save_figure(retention_figure(run), folder / f"retention-{name.replace('/', '-')}")
    return paths
