"""Rows of results to points: one budget of one method, its mean over tasks and seeds, and how sure that is.

A point's accuracy and costs are the mean over tasks (equal weight, whatever their sizes) of the mean over seeds. Points are
comparable where their means are over the same tasks: `tasks` says which, and curves are made of points that agree in it.
"""

import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from dms_lab import pareto
from dms_lab.pareto import Cell

if TYPE_CHECKING:
    import pandas as pd

BUDGETS = ("kv_reads", "peak_tokens", "kv_bytes_peak")
SEEDS, PROBLEMS = "seeds and problems", "problems"  # what the interval of a point is over
Row = dict[str, Any]


def label(method: str, variant: str = "") -> str:
    """What a curve is called: the method, and behind it the variant where there is one."""
    return f"{method} {variant}".strip()


@dataclass(frozen=True)
class MeasuredPoint:
    """The rows of one budget of one method: what was asked of it, and means and intervals of what came out.

    `dial` is what its budget was set by: the compression ratio, or the live tokens of a rule with a budget. `answered` rows
    have an accuracy, `texts` a perplexity.
    """

    model: str
    method: str
    variant: str
    dial: tuple[str, float]
    width: int
    max_tokens: int | None
    length: int | None
    answered: tuple[Row, ...]
    texts: tuple[Row, ...]

    @property
    def tasks(self) -> str:
        """The tasks that its accuracy is the mean of, in order of their names; "" without any.

        Those of a run's own evaluation are made at a length, and are others at another.
        """
        length = "" if self.length is None else f" of {self.length} tokens"
        return ", ".join(sorted({row["task"] for row in self.answered})) + length

    @property
    def curve(self) -> tuple[str, str, str, str]:
        """Which curve it is a point of."""
        return self.model, self.method, self.variant, self.tasks

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows that say what was kept: those with an accuracy, of texts where there are none."""
        return self.answered or self.texts

    @property
    def target_cr(self) -> float:
        """The compression that was asked for; of a rule with a budget the mean over tasks."""
        kind, value = self.dial
        return value if kind == "cr" else _mean(self.rows, "target_cr")

    @property
    def measured_cr(self) -> float:
        """The compression that was reached, mean over tasks and seeds."""
        return _mean(self.rows, "measured_cr")

    @property
    def text_cr(self) -> float:
        """The compression that texts were measured at, which is not that of tasks; NaN without texts."""
        return _mean(self.texts, "measured_cr")

    @property
    def seeds(self) -> list[int]:
        """The seeds that it is the mean of."""
        return sorted({row["seed"] for row in self.rows})

    @property
    def num_draws(self) -> int:
        """How many times chains were drawn for each seed."""
        return max(1, *(len(row["sampling_seeds"]) for row in self.rows))

    def mean(self, name: str) -> float:
        """The mean of a column over tasks of the mean over seeds; NaN if any row lacks it."""
        return _mean(self.answered, name)

    @cached_property
    def accuracy(self) -> float:
        """The mean accuracy; NaN where only texts were measured."""
        return self.mean("accuracy")

    def cells(self, budget: str) -> list[Cell] | None:
        """What resampling needs; None if a row does not say what each problem scored."""
        if not self.answered or any(not len(row["problem_scores"]) for row in self.answered):
            return None
        return [
            Cell(row["task"], row["seed"], problem_set(row), tuple(row["problem_scores"]), _number(row[budget]))
            for row in self.answered
        ]

    def interval(self, resampled: bool) -> tuple[float, float]:
        """95 % interval of the accuracy (`pareto.mean_interval`); NaN where a row has none and no scores either.

        `resampled`: seeds and problems are drawn again to find its variance, which needs `cells`; else every problem is an
        independent one, counted once however many seeds had it, and nothing is said of how seeds differ.
        """
        if any(is_missing(row["accuracy_low"]) and not len(row["problem_scores"]) for row in self.answered):
            return math.nan, math.nan
        by_task = grouped(self.answered, lambda row: row["task"]).values()
        shares = [_mean(rows, "accuracy") for rows in by_task]
        trials = [sum(_counted(rows).values()) for rows in by_task]
        if not shares:
            return math.nan, math.nan
        cells = self.cells("kv_reads") if resampled else None
        if cells is None:
            return pareto.mean_interval(shares, trials)
        drawn = pareto.resample([[cells]], lambda _, accuracy: accuracy[:, 0])
        return pareto.mean_interval(shares, trials, float(drawn.var()))

    def row(self, resampled: bool) -> Row:
        """Its row in `curve_points`, but for the frontier."""
        low, high = self.interval(resampled)
        over = SEEDS if resampled and len(self.seeds) > 1 else PROBLEMS
        kind, value = self.dial
        return {
            "model": self.model,
            "method": self.method,
            "variant": self.variant,
            "tasks": self.tasks,
            "target_cr": self.target_cr,
            "budget_tokens": int(value) if kind == "budget" else None,
            "width": self.width,
            "max_tokens": self.max_tokens,
            "accuracy": self.accuracy,
            "accuracy_low": low,
            "accuracy_high": high,
            "interval_over": "" if math.isnan(low) else over,
            "perplexity": _mean(self.texts, "perplexity"),
            "text_cr": self.text_cr,
            "measured_cr": self.measured_cr,
            **{name: self.mean(name) for name in BUDGETS},
            "num_seeds": len(self.seeds),
            "num_problems": sum(_counted(self.answered).values()),
        }


def curve_points(frame: "pd.DataFrame") -> "pd.DataFrame":
    """One row per (model, method, variant, tasks, target CR, width, max_tokens): means, intervals, who is on a frontier.

    A rule with a budget of live tokens has `budget_tokens`, and its target CR is the mean over tasks. `max_tokens` is None
    for the tasks of a run's own evaluation. Rows of one seed that differ in nothing else count as one; of those tasks the
    rows with the most problems stand for a seed. `perplexity` is the mean of the text rows, at the compression `text_cr`
    of these texts; NaN without. A point that has nothing else has no tasks. `is_frontier_*`: no other point of its curve
    (of any CR) is as accurate for no more. Intervals (`MeasuredPoint.interval`) are found by one rule for all points of a
    frame: over seeds, too, if every row with an accuracy says what single problems scored. `interval_over` says over what.
    """
    points = measured_points(frame)
    resampled = all(point.cells("kv_reads") is not None for point in points if point.answered)
    table = table_of([point.row(resampled) for point in points])
    for budget in BUDGETS[:2]:
        on = {id(point) for curve in curves_of(points, budget).values() for point in on_frontier(curve, budget)}
        table[f"is_frontier_{budget}"] = [id(point) in on for point in points]
    return table


def table_of(rows: list[Row]) -> "pd.DataFrame":
    """Rows as a frame, whole numbers beside None as they are."""
    import pandas as pd

    table = pd.DataFrame(rows)
    for name in table.columns.intersection(["max_tokens", "budget_tokens", "against_width", "against_max_tokens"]):
        table[name] = pd.Series([row[name] for row in rows], dtype=object)
    return table


def measured_points(frame: "pd.DataFrame") -> list[MeasuredPoint]:
    """The points of a frame of results, in an order that does not depend on that of its rows.

    Raises `ValueError` for a frame without rows.
    """
    if not len(frame):
        raise ValueError("there are no results to compare; load some first")
    rows = frame.to_dict("records")
    answered = grouped((row for row in rows if not is_missing(row["accuracy"])), lambda row: (*_key(row), _length(row)))
    answered = {key: _most_problems(part) for key, part in answered.items()}
    texts = grouped((row for row in rows if not is_missing(row["perplexity"])), _key)
    of_texts_alone = {(*key, None) for key in set(texts).difference(key[:-1] for key in answered)}
    return [
        MeasuredPoint(*key, _ordered(answered.get(key, ())), _ordered(texts.get(key[:-1], ())))
        for key in sorted({*answered, *of_texts_alone}, key=_sortable)
    ]


def curves_of(points: Iterable[MeasuredPoint], budget: str, by_dial: bool = False) -> dict[tuple, list[MeasuredPoint]]:
    """Points by curve, of those with an accuracy and this budget; with `by_dial` each setting is a curve of its own."""
    usable = (point for point in points if point.tasks and point.mean(budget) > 0)
    return grouped(usable, lambda point: (*point.curve, point.dial) if by_dial else point.curve)


def on_frontier(points: list[MeasuredPoint], budget: str) -> list[MeasuredPoint]:
    """The points that no other of them beats, by rising budget."""
    kept = pareto.frontier([point.mean(budget) for point in points], [point.accuracy for point in points])
    return [points[index] for index in kept]


def problem_set(row: Row) -> Hashable:
    """What tells the problems of a task apart: a benchmark's prompts; of a run's own what draws them, seed and number."""
    prompts = row["settings"].get("prompts")
    return ("seed", row["seed"], row["num_problems"]) if prompts is None else ("prompts", prompts)


def is_missing(value: Any) -> bool:
    """Whether a cell of a frame holds no number."""
    return value is None or value != value


def _key(row: Row) -> tuple:
    live = row["settings"].get("budget")
    dial = ("cr", float(row["target_cr"])) if live is None else ("budget", float(live))
    max_tokens = None if is_missing(row["max_tokens"]) else int(row["max_tokens"])
    return row["model"], row["method"], row["variant"], dial, int(row["width"]), max_tokens


def _length(row: Row) -> int | None:
    """The length that a run's own evaluation makes its tasks' problems of; a benchmark names its own in the task."""
    return row["settings"].get("length")


def _most_problems(rows: list[Row]) -> list[Row]:
    """Of a run's own tasks, for each seed, the rows with the most problems: beside them a trial with a few says nothing."""
    own = [row for row in rows if row["settings"].get("prompts") is None]
    most = {place: max(row["num_problems"] for row in part) for place, part in grouped(own, _drawn_by).items()}
    return [row for row in rows if row["num_problems"] >= most.get(_drawn_by(row), 0)]


def _drawn_by(row: Row) -> tuple:
    return row["task"], row["seed"]


def _sortable(key: tuple) -> tuple:
    return (*key[:-2], *(-1 if part is None else part for part in key[-2:]))


def _ordered(rows: Iterable[Row]) -> tuple[Row, ...]:
    return tuple(sorted(rows, key=_row_order))


def _row_order(row: Row) -> tuple:
    return row["task"], row["seed"], repr(problem_set(row)), str(row["accuracy"]), str(row["perplexity"]), row["run_id"]


def _mean(rows: Iterable[Row], name: str) -> float:
    tasks = [
        np.mean([np.mean([_number(row[name]) for row in seed]) for seed in grouped(task, lambda row: row["seed"]).values()])
        for task in grouped(rows, lambda row: row["task"]).values()
    ]
    return float(np.mean(tasks)) if tasks else math.nan


def _counted(rows: Iterable[Row]) -> dict[Hashable, int]:
    """The number of problems of each task and set of its problems: seeds that had the same count once."""
    return {(row["task"], problem_set(row)): row["num_problems"] for row in rows}


def _number(value: Any) -> float:
    return math.nan if is_missing(value) else float(value)


def grouped(items: Iterable, key: Callable[[Any], Hashable]) -> dict[Any, list]:
    """Items by key, in order."""
    found: dict[Any, list] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found
