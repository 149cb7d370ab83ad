"""Curves against a baseline: margins, what an equal accuracy costs, how accurate an equal budget is.

Intervals draw seeds and problems again, the same ones for a curve and its baseline: seeds of both together, and of each
task the problems that both were asked (within each seed where each drew its own, as in a run's own evaluation). They are
NaN where a row does not say what each problem scored. Budgets are read on a log2 axis unless `axis` says otherwise.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dms_lab import pareto
from dms_lab.comparison.points import BUDGETS, MeasuredPoint, curves_of, label, measured_points, on_frontier, table_of

if TYPE_CHECKING:
    import pandas as pd

_UNKNOWN = (math.nan, math.nan)
_MARGIN = ("margin", "low", "high", "held_share", "margin_unheld", "area", "budget_low", "budget_high")


@dataclass(frozen=True)
class Pair:
    """A curve and the baseline of the same model on the same tasks (without points if it was not measured there)."""

    head: dict[str, Any]
    budget: str
    points: list[MeasuredPoint]
    baseline: list[MeasuredPoint]

    @property
    def curve(self) -> tuple[list[float], list[float]]:
        """Budgets and accuracies of the curve."""
        return _curve(self.points, self.budget)

    def cells(self, baseline: list[MeasuredPoint] | None = None) -> tuple[list, list] | None:
        """What resampling needs of both; None if single scores are not known."""
        both = [
            [point.cells(self.budget) for point in points]
            for points in (self.points, self.baseline if baseline is None else baseline)
        ]
        return None if any(cells is None for curve in both for cells in curve) else (both[0], both[1])


def margins(frame: "pd.DataFrame", against: str = "full", by: str | None = None, axis: str = "log2") -> "pd.DataFrame":
    """One row per curve and budget: the mean of its accuracy less the baseline's over the budgets that both cover.

    `low`, `high`: 95 % interval (`pareto.margin_interval`); `budget_low` to `budget_high`: what both cover. `held_share` of
    that lies beyond the last point of a frontier, which is held to the largest budget measured; `margin_unheld` is the
    margin without (the paper's: each frontier ends at its last point), over the rest of the budgets. `area`: under the
    curve over what both cover (accuracy times doublings of the budget). NaN where they do not meet.

    A curve is the union of a method's points over widths, lengths and CRs; with `by="target_cr"` one for each CR (each
    budget of a rule that has one), against the whole baseline. `against` is a method, or "method variant" where it has
    several (see `label`). Raises `ValueError` if nothing of that name was measured.
    """
    rows = []
    for pair in _pairs(frame, against, by):
        row = pair.head | dict.fromkeys(_MARGIN, math.nan)
        if pair.baseline:
            other = _curve(pair.baseline, pair.budget)
            low, high = pareto.common_interval(*pair.curve, *other)
            row["margin"] = pareto.margin(*pair.curve, *other, axis)
            row["held_share"] = pareto.held_share(*pair.curve, *other, axis)
            row["margin_unheld"] = pareto.margin(*pair.curve, *other, axis, hold=False)
            row["budget_low"], row["budget_high"] = low, high
            if not math.isnan(row["margin"]):
                row["area"] = pareto.area(*pair.curve, low, high, axis)
                cells = pair.cells()
                row["low"], row["high"] = pareto.margin_interval(*cells, axis) if cells else _UNKNOWN
        rows.append(row)
    return table_of(rows)


def equal_accuracy(
    frame: "pd.DataFrame", against: str = "full", by: str | None = None, axis: str = "log2", within: float = 0.0
) -> "pd.DataFrame":
    """One row per curve, budget and frontier point of the baseline: the budget for its accuracy less `within`.

    `needed` is that budget, `ratio` how many times less than the baseline's `at`; `low`, `high` the ratio's 95 % interval
    (`pareto.ratio_intervals`). `status` is "measured", or why both are NaN: "not reached", "no baseline", or "cheaper than
    measured", where the curve's cheapest point is more accurate already, so the ratio is `at_least` that. Otherwise as
    `margins`.
    """
    rows = []
    for pair in _pairs(frame, against, by):
        found = on_frontier(pair.baseline, pair.budget) if pair.baseline else []
        cells = pair.cells(found) if found else None
        ends = pareto.ratio_intervals(*cells, within, axis) if cells else [_UNKNOWN] * len(found)
        for point, (low, high) in zip(found, ends, strict=True):
            wanted, at = point.accuracy - within, point.mean(pair.budget)
            needed = float(pareto.budget_at(*pair.curve, wanted, axis))
            status, at_least = "measured", at / needed
            if math.isnan(needed):
                is_cheaper = wanted <= max(pair.curve[1])
                status = "cheaper than measured" if is_cheaper else "not reached"
                at_least = at / min(pair.curve[0]) if is_cheaper else math.nan
            what = {"accuracy": wanted, "at": at, "needed": needed, "ratio": at / needed, "at_least": at_least}
            rows.append(pair.head | _who(point) | what | {"low": low, "high": high, "status": status})
        if not found:
            what = dict.fromkeys(("accuracy", "at", "needed", "ratio", "at_least", "low", "high"), math.nan)
            rows.append(pair.head | _who(None) | what | {"status": "no baseline"})
    return table_of(rows)


def equal_budget(frame: "pd.DataFrame", against: str = "full", by: str | None = None, axis: str = "log2") -> "pd.DataFrame":
    """One row per curve, budget and frontier point of the baseline: the curve's accuracy at its budget `at`.

    `difference` to the baseline's accuracy with its 95 % interval `low`, `high`; NaN where the curve does not reach to
    that budget. `is_held`: it is beyond the last point of the curve's frontier, whose accuracy stands for it. Otherwise as
    `margins`.
    """
    rows = []
    for pair in _pairs(frame, against, by):
        found = on_frontier(pair.baseline, pair.budget) if pair.baseline else []
        cells = pair.cells(found) if found else None
        ends = pareto.difference_intervals(*cells, axis) if cells else [_UNKNOWN] * len(found)
        for point, (low, high) in zip(found, ends, strict=True):
            at, other = point.mean(pair.budget), point.accuracy
            accuracy = float(pareto.accuracy_at(*pair.curve, at, axis))
            what = {"at": at, "accuracy": accuracy, "against_accuracy": other, "difference": accuracy - other}
            is_held = not math.isnan(accuracy) and at > on_frontier(pair.points, pair.budget)[-1].mean(pair.budget)
            rows.append(pair.head | _who(point) | what | {"low": low, "high": high, "is_held": is_held})
        if not found:
            what = dict.fromkeys(("at", "accuracy", "against_accuracy", "difference", "low", "high"), math.nan)
            rows.append(pair.head | _who(None) | what | {"is_held": False})
    return table_of(rows)


def _pairs(frame: "pd.DataFrame", against: str, by: str | None) -> Iterator[Pair]:
    if by not in (None, "target_cr"):
        raise ValueError(f"by={by!r} is not known; choose 'target_cr' for a curve each, or None for their union")
    points = measured_points(frame)
    name = _baseline(points, against)
    for budget in BUDGETS:
        whole = curves_of(points, budget)
        for key, curve in curves_of(points, budget, by == "target_cr").items():
            model, method, variant, tasks = key[:4]
            if (method, variant) == name:
                continue
            head = {"model": model, "method": method, "variant": variant, "tasks": tasks}
            if by:
                head["target_cr"] = sum(point.target_cr for point in curve) / len(curve)
            head |= {"budget": budget, "against": label(*name)}
            yield Pair(head, budget, curve, whole.get((model, *name, tasks), []))


def _baseline(points: list[MeasuredPoint], against: str) -> tuple[str, str]:
    """Method and variant that `against` names."""
    known = sorted({(point.method, point.variant) for point in points if point.tasks})
    exact = [name for name in known if label(*name) == against]
    found = exact or [name for name in known if name[0] == against]
    if len(found) != 1:
        names = ", ".join(repr(label(*name)) for name in (found or known)) or "none"
        problem = "is not in these results" if not found else "has several variants"
        raise ValueError(f"against={against!r} {problem}; choose one of {names}")
    return found[0]


def _curve(points: list[MeasuredPoint], budget: str) -> tuple[list[float], list[float]]:
    return [point.mean(budget) for point in points], [point.accuracy for point in points]


def _who(point: MeasuredPoint | None) -> dict[str, Any]:
    """Which point of the baseline a row is about."""
    if point is None:
        return {"against_cr": math.nan, "against_width": None, "against_max_tokens": None}
    return {"against_cr": point.target_cr, "against_width": point.width, "against_max_tokens": point.max_tokens}
