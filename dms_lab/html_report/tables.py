"""The tables of an analysis, for the report and the terminal alike: points, margins, equal accuracy, equal budget."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dms_lab.html_report.page import Cell, Table
from dms_lab.plots import display_name, sorting_key
from dms_lab.plots.style import natural

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table as RichTable

_SHORT = {"kv_reads": "KV reads", "peak_tokens": "peak", "kv_bytes_peak": "peak memory"}
_BUDGETS = list(_SHORT)
_NOWHERE = Cell("no common budget")
_NOT_STATED = Cell("not stated")
_RESTS_ON = "held: the share of the budgets beyond a frontier's last point; area: under the curve, in points x doublings"


# -- cells ---------------------------------------------------------------------------------------------------------------
def is_missing(value: Any) -> bool:
    """Whether there is no number."""
    return value is None or value != value


def text(value: Any) -> Cell:
    """A text as it is; nothing where there is none."""
    return Cell("") if is_missing(value) or value == "" else Cell(str(value), str(value))


def method(name: str) -> Cell:
    """A method by the name it has in figures."""
    return text(display_name(name))


def number(value: Any, digits: int = 0) -> Cell:
    """A number; trailing zeros are kept, so that columns align."""
    return Cell("") if is_missing(value) else Cell(f"{value:.{digits}f}", float(value))


def mebibytes(value: Any) -> Cell:
    """Bytes in MiB."""
    return Cell("") if is_missing(value) else number(value / 2**20, 3 if value < 2**24 else 1)


def percent(value: Any, low: Any = None, high: Any = None, sign: bool = False) -> Cell:
    """A share in percent with its interval; `sign` for differences, in points."""
    if is_missing(value):
        return Cell("")
    style = "+.1f" if sign else ".1f"
    shown = f"{100 * value:{style}}"
    if not (is_missing(low) or is_missing(high)):
        shown += f" [{100 * low:{style}}, {100 * high:{style}}]"
    return Cell(shown, float(value))


def table(caption: str, rows: list[dict[str, Cell]]) -> Table:
    """A table of rows by column name, without columns that are empty throughout; numbers stand to the right."""
    names = [name for name in (rows[0] if rows else []) if any(row[name].text for row in rows)]
    numeric = frozenset(name for name in names if not any(isinstance(row[name].value, str) for row in rows))
    return Table(caption, names, [[row[name] for name in names] for row in rows], numeric)


def without(shown: Table, *names: str) -> Table:
    """The table without columns, for a terminal that is not wide enough for all."""
    kept = [place for place, name in enumerate(shown.columns) if name not in names]
    columns = [shown.columns[place] for place in kept]
    return Table(shown.caption, columns, [[row[place] for place in kept] for row in shown.rows], shown.numeric)


def to_rich(shown: Table) -> "RichTable":
    """The table for the terminal."""
    from rich.markup import escape
    from rich.table import Table as RichTable

    made = RichTable(title=escape(shown.caption), title_justify="left")
    for name in shown.columns:
        made.add_column(escape(name), justify="right" if name in shown.numeric else "left", overflow="fold")
    for row in shown.rows:
        made.add_row(*(escape(cell.text) for cell in row))
    return made


def ordered(frame: "pd.DataFrame", *by: str) -> list[dict]:
    """Rows by method as in figures, by variant, then by the columns in `by`."""

    def place(value: Any) -> float:
        return _BUDGETS.index(value) if value in _BUDGETS else -1.0 if is_missing(value) else value

    def key(row: dict) -> tuple:
        return (*sorting_key(row["method"]), natural(row["variant"]), *(place(row[name]) for name in by))

    return sorted(frame.to_dict("records"), key=key)


# -- tables --------------------------------------------------------------------------------------------------------------
def points_table(points: "pd.DataFrame", caption: str = "Points, in percent") -> Table:
    """Every point of one model and set of tasks; `frontier` marks those that no point of the same curve beats."""
    rows = []
    for row in ordered(points, "target_cr", "width", "max_tokens"):
        best = [mark for mark, name in (("r", "kv_reads"), ("p", "peak_tokens")) if row[f"is_frontier_{name}"]]
        rows.append(
            {
                "method": method(row["method"]),
                "variant": text(row["variant"]),
                "CR": number(row["target_cr"], 2 if row["target_cr"] % 1 else 0),
                "measured": number(row["measured_cr"], 2),
                "W": number(row["width"]),
                "L": number(row["max_tokens"]),
                "accuracy": percent(row["accuracy"], row["accuracy_low"], row["accuracy_high"]),
                "perplexity": number(row["perplexity"], 2),
                "at text CR": number(row["text_cr"], 2),
                "KV reads": number(row["kv_reads"]),
                "peak": number(row["peak_tokens"]),
                "MiB": mebibytes(row["kv_bytes_peak"]),
                "frontier": text("".join(best)),
                "seeds": number(row["num_seeds"]),
                "problems": number(row["num_problems"]),
            }
        )
    return table(caption, rows)


def margins_table(margins: "pd.DataFrame", caption: str) -> Table:
    """A row a curve (and CR, where curves are by CR) and budget: the margin, what it rests on, from where to where."""
    has_cr = "target_cr" in margins
    rows = []
    for row in ordered(margins, *(["target_cr"] if has_cr else []), "budget"):
        cells = _curve(row)
        if has_cr:
            cells["CR"] = number(row["target_cr"], 2 if row["target_cr"] % 1 else 0)
        ends = {name: _cost(row[f"budget_{end}"], row["budget"]) for name, end in (("from", "low"), ("to", "high"))}
        rows.append(cells | {"budget": text(_SHORT[row["budget"]])} | _margin(row) | ends)
    return table(_explained(caption, margins), rows)


def _explained(caption: str, margins: "pd.DataFrame") -> str:
    """The caption, and what stands beside margins where there are any."""
    return f"{caption}; {_RESTS_ON}" if margins["margin"].notna().any() else caption


def _curve(row: dict) -> dict[str, Cell]:
    return {"method": method(row["method"]), "variant": text(row["variant"])}


def _margin(row: dict) -> dict[str, Cell]:
    """The margin in points with its interval, the share of it that is held, the margin without that, and the area."""
    meets, meets_unheld = not is_missing(row["margin"]), not is_missing(row["margin_unheld"])
    without = percent(row["margin_unheld"], sign=True) if meets_unheld else _NOWHERE
    return {
        "margin": percent(row["margin"], row["low"], row["high"], sign=True) if meets else _NOWHERE,
        "held": Cell(f"{100 * row['held_share']:.1f} %", float(row["held_share"])) if meets else Cell(""),
        "not held": without if meets else Cell(""),
        "area": number(100 * row["area"], 1),
    }


def equal_accuracy_table(frame: "pd.DataFrame", caption: str) -> Table:
    """How many times less a curve needs than the baseline for the accuracy of each of its frontier points."""

    def cells(row: dict) -> dict[str, Cell]:
        return {
            "accuracy": percent(row["accuracy"]),
            "baseline needs": _cost(row["at"], row["budget"]),
            "needs": _cost(row["needed"], row["budget"]),
            "times less": _times(row),
            "status": text(row["status"]),
        }

    return _against_table(frame, caption, cells)


def equal_budget_table(frame: "pd.DataFrame", caption: str) -> Table:
    """How accurate a curve is at the cost of each of the baseline's frontier points."""

    def cells(row: dict) -> dict[str, Cell]:
        return {
            "budget of baseline": _cost(row["at"], row["budget"]),
            "accuracy": percent(row["accuracy"]),
            "of baseline": percent(row["against_accuracy"]),
            "difference": _difference(row),
            "status": text("not measured there" if is_missing(row["accuracy"]) else "held" if row["is_held"] else ""),
        }

    return _against_table(frame, caption, cells)


def _against_table(frame: "pd.DataFrame", caption: str, cells: Callable[[dict], dict[str, Cell]]) -> Table:
    """A row a curve, budget and frontier point of the baseline: which one it is, then what `cells` says of the row."""
    rows = []
    for row in ordered(frame, "budget", "at"):
        baseline = {"baseline: W": number(row["against_width"]), "baseline: L": number(row["against_max_tokens"])}
        rows.append(_curve(row) | {"budget": text(_SHORT[row["budget"]])} | baseline | cells(row))
    return table(caption, rows)


def _times(row: dict) -> Cell:
    shown = number(row["ratio"], 2)
    if is_missing(row["ratio"]) and not is_missing(row["at_least"]):
        return Cell(f"> {row['at_least']:.2f}", float(row["at_least"]))
    if is_missing(row["ratio"]) or is_missing(row["low"]) or is_missing(row["high"]):
        return shown
    return Cell(f"{shown.text} [{row['low']:.2f}, {row['high']:.2f}]", shown.value)


def _difference(row: dict) -> Cell:
    return percent(row["difference"], row["low"], row["high"], sign=True)


def _cost(value: Any, budget: str) -> Cell:
    shown = mebibytes(value) if budget == "kv_bytes_peak" else number(value)
    return Cell(f"{shown.text} MiB", shown.value) if shown.text and budget == "kv_bytes_peak" else shown


def versus_table(margins: "pd.DataFrame", accuracy: "pd.DataFrame", budgets: "pd.DataFrame", caption: str) -> Table:
    """One row a curve and budget: its margin, what it needs for the baseline's accuracy, its accuracy at equal budget.

    The last two at the most accurate and the most expensive point of the baseline that the curve reaches.
    """
    keys = ["method", "variant", "budget"]
    rows = []
    for row in ordered(margins, "budget"):
        same = [frame[(frame[keys] == [row[key] for key in keys]).all(axis=1)] for frame in (accuracy, budgets)]
        reached = same[0][same[0]["at_least"].notna()].sort_values("accuracy").tail(1).to_dict("records")
        covered = same[1][same[1]["difference"].notna()].sort_values("at").tail(1).to_dict("records")
        cells = _curve(row) | {"budget": text(_SHORT[row["budget"]])} | _margin(row)
        cells["times less"] = _times(reached[0]) if reached else Cell("")
        cells["for accuracy"] = percent(reached[0]["accuracy"]) if reached else _status(same[0])
        cells["difference"] = _difference(covered[0]) if covered else Cell("")
        at = _cost(covered[0]["at"], row["budget"]) if covered else Cell("")
        cells["at a budget of"] = Cell(f"{at.text} (held)", at.value) if covered and covered[0]["is_held"] else at
        rows.append(cells)
    return table(_explained(caption, margins), rows)


def _status(rows: "pd.DataFrame") -> Cell:
    return Cell(", ".join(sorted(set(rows["status"])))) if len(rows) else Cell("")


def published_table(points_by_task: dict[str, "pd.DataFrame"], scores: "pd.DataFrame") -> Table | None:
    """Published scores beside what was measured of the same model, task, method and CR, of single chains at their longest.

    How long published chains were is "not stated" for some. None if nothing of these models and tasks was published.
    """
    rows = []
    for task, points in points_by_task.items():
        for score in scores[scores["task"] == task].to_dict("records"):
            same = points[(points["model"] == score["model"]) & (points["method"] == score["method"])]
            same = same[same["target_cr"] == score["compression_ratio"]]
            for row in ordered(same) or [{}]:
                measured = row.get("accuracy")
                rows.append(
                    {
                        "model": text(score["model"]),
                        "task": text(task),
                        "method": method(score["method"]),
                        "variant": text(row.get("variant", "")),
                        "CR": number(score["compression_ratio"]),
                        "published": percent(score["accuracy"]),
                        "measured": percent(measured, row.get("accuracy_low"), row.get("accuracy_high")),
                        "difference": percent(None if is_missing(measured) else measured - score["accuracy"], sign=True),
                        "published: L": _NOT_STATED if is_missing(score["max_tokens"]) else number(score["max_tokens"]),
                        "measured: L": number(row.get("max_tokens")),
                        "source": text(score["source"]),
                    }
                )
    return table("Published beside measured, in percent", rows) if rows else None


def runs_table(frame: "pd.DataFrame") -> Table:
    """What computed the results: a row for each run, its seed, configuration, code and versions."""
    rows = []
    names = ["model", "run_id", "seed", "config_hash", "git_revision"]
    versions = frame["versions"].map(lambda found: ", ".join(f"{name} {found[name]}" for name in sorted(found)))
    for key, mine in frame.assign(_versions=versions).groupby([*names, "_versions"], sort=True):
        model, run, seed, config, revision, made_with = key
        methods = sorted(mine["method"].unique(), key=sorting_key)
        rows.append(
            {
                "model": text(model),
                "run": text(run),
                "seed": number(seed),
                "configuration": text(config),
                "methods": text(", ".join(display_name(name) for name in methods)),
                "rows": number(len(mine)),
                "tokens": number(mine["tokens_generated"].sum()),
                "revision": text(revision),
                "versions": text(made_with),
            }
        )
    return table("What computed the results", rows)
