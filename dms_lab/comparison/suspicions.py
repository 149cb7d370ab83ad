"""What a reader should doubt before a method is praised or blamed: sentences, from the rows alone."""

import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from dms_lab.comparison.points import MeasuredPoint, Row, grouped, is_missing, label, measured_points
from dms_lab.config import RIVALS
from dms_lab.evaluation.benchmarks import BENCHMARKS, TOLERANCE

if TYPE_CHECKING:
    import pandas as pd

FULL_LENGTH = 32768  # tokens; scores of shorter chains are not compared with published ones
MANY_TRUNCATED = 0.2
FAR_OFF = 0.2
_KEEP_EVERYTHING = ("full", "quest")  # they drop nothing, so their measured ratio is 1 whatever was asked for
_SHARED_RUNS = ("full", *RIVALS)  # measured beside every run: that there are several says nothing
# What a method was set to, not how it was asked; and the length of problems, which makes another curve.
_OWN_SETTINGS = ("budget", "live_tokens", "dialled_from", "threshold", "length")


def warnings_of(frame: "pd.DataFrame") -> list[str]:
    """A sentence for everything in these results that a conclusion should not rest on; [] if nothing was found.

    Budgets that were not reached (more than 20 % off) or differ within a point, full attention off its published score,
    chains cut off, a single seed or different ones, several configurations or settings in one curve, tasks that differ,
    several versions or revisions, no interval, no baseline.
    """
    points, rows = measured_points(frame), frame.to_dict("records")
    found: list[str] = []
    for part in (_budgets, _live_tokens, _seeds, _configurations, _tasks, _baselines, _intervals, _scores):
        found += part(points)
    for row in longest(rows):
        found += score_suspicions(row, _full_score(row))
        found += truncation_suspicions(row)
    return [*found, *_settings(rows), *_provenance(rows)]


# -- of one row: also what the evaluation says at its end ----------------------------------------------------------------
def score_suspicions(row: Row, expected: float | None) -> Iterator[str]:
    """A sentence if full attention scores something else than `expected` percent; parts of a task are not compared."""
    if expected is None or row["method"] != "full" or row["settings"].get("limit") is not None:
        return
    if is_missing(row["max_tokens"]) or row["max_tokens"] < FULL_LENGTH or "avg" not in row["metrics"]:
        return
    value, low, high = (100 * share for share in row["metrics"]["avg"])
    if high < expected - TOLERANCE or low > expected + TOLERANCE:
        yield (
            f"{row['model']} with full attention scores {value:.1f} % [{low:.0f}-{high:.0f}] on {row['task']}, published "
            f"is {expected:g}: outside {TOLERANCE:g} points, so suspect the pipeline (template, sampling, grading, "
            "truncation) before the method"
        )


def truncation_suspicions(row: Row) -> Iterator[str]:
    """A sentence if more than a fifth of the chains were cut off."""
    if not is_missing(row["truncation_rate"]) and row["truncation_rate"] > MANY_TRUNCATED:
        yield (
            f"{100 * row['truncation_rate']:.0f} % of the chains of {row['method']} on {row['task']} ran out of "
            f"{row['max_tokens']:g} tokens"
        )


def longest(rows: Iterable[Row]) -> list[Row]:
    """Of each task and setting of a method the row with the longest limit, of equals the one cut off most.

    Rows without a limit are left out.
    """
    found: dict[tuple, Row] = {}
    for row in rows:
        dial = row["settings"].get("budget") or row["target_cr"]
        name = (row["model"], row["task"], row["method"], row["variant"], dial)
        if not is_missing(row["max_tokens"]) and (name not in found or _length(row) > _length(found[name])):
            found[name] = row
    return [found[name] for name in sorted(found)]


def _length(row: Row) -> tuple[float, float]:
    return row["max_tokens"], 0.0 if is_missing(row["truncation_rate"]) else row["truncation_rate"]


def _full_score(row: Row) -> float | None:
    """What full attention should score; a model without a configuration is called by its hub id, `/` as `_`."""
    path = row["model"].replace("_", "/", 1)
    return BENCHMARKS[row["task"]].full_score(row["model"], path) if row["task"] in BENCHMARKS else None


# -- of points -----------------------------------------------------------------------------------------------------------
def _live_tokens(points: list[MeasuredPoint]) -> Iterator[str]:
    """Rules beside several runs of one seed were given what each of the runs had kept: one ratio, several budgets."""
    for point in points:
        for rows in grouped(point.answered, lambda row: (row["task"], row["seed"])).values():
            live = sorted({row["settings"]["live_tokens"] for row in rows if "live_tokens" in row["settings"]})
            if len(live) > 1:
                yield (
                    f"{point.model}: {label(point.method, point.variant)} at CR {point.target_cr:g} is a mean over budgets "
                    f"of {', '.join(map(str, live))} live tokens, those of several runs: compare each beside its own run"
                )
                break


def _budgets(points: list[MeasuredPoint]) -> Iterator[str]:
    asked = (p for p in points if p.dial[0] == "cr" and p.target_cr > 1 and p.method not in _KEEP_EVERYTHING)
    for (model, method, variant, tasks), part in grouped(asked, lambda point: point.curve).items():
        for target, same in grouped(part, lambda point: point.target_cr).items():
            measured = sum(point.measured_cr for point in same) / len(same)
            if abs(measured / target - 1) > FAR_OFF:
                yield (
                    f"{model}: {label(method, variant)} at CR {target:g} measured {measured:.2f} on {tasks or 'text'}, "
                    f"more than {100 * FAR_OFF:.0f} % off: compare it by what it read and held, not by its CR"
                )


def _seeds(points: list[MeasuredPoint]) -> Iterator[str]:
    for (model, tasks), part in grouped(points, lambda point: (point.model, point.tasks)).items():
        curves = grouped(part, lambda point: label(point.method, point.variant))
        seeds = {name: frozenset(seed for point in curve for seed in point.seeds) for name, curve in curves.items()}
        draws = {name: max(len(point.seeds) * point.num_draws for point in curve) for name, curve in curves.items()}
        single = [name for name, number in draws.items() if number == 1]
        if single:
            yield (
                f"{model}: one seed alone of {_listed(single)} on {tasks or 'text'}: how much seeds differ is not known, "
                "and no interval shows it"
            )
        if len(set(seeds.values())) > 1:
            each = "; ".join(f"{name}: {', '.join(map(str, sorted(found)))}" for name, found in seeds.items())
            yield f"{model}: curves on {tasks or 'text'} are of different seeds ({each}), so they are compared less exactly"


def _configurations(points: list[MeasuredPoint]) -> Iterator[str]:
    for point in points:
        if point.method not in _SHARED_RUNS:
            by_seed = grouped(point.rows, lambda row: (row["seed"], row["task"]))
            number = max(len({row["config_hash"] for row in rows}) for rows in by_seed.values())
            if number > 1:
                yield (
                    f"{point.model}: {label(point.method, point.variant)} at CR {point.target_cr:g} is the mean of "
                    f"{number} configurations of one seed; load the results.csv of a sweep, which tells its variants apart"
                )


def _tasks(points: list[MeasuredPoint]) -> Iterator[str]:
    answered = (point for point in points if point.tasks)
    for (model, is_own), part in grouped(answered, lambda point: (point.model, point.max_tokens is None)).items():
        tasks = sorted({point.tasks for point in part})
        if len(tasks) > 1:
            yield (
                f"{model}: points are means over different tasks ({'; '.join(tasks)}), and only those over the same are "
                f"compared: {'finish what is missing' if is_own else 'look at one task at a time'}"
            )


def _baselines(points: list[MeasuredPoint]) -> Iterator[str]:
    answered = (point for point in points if point.tasks)
    for (model, tasks), part in grouped(answered, lambda point: (point.model, point.tasks)).items():
        if all(point.method != "full" for point in part):
            yield f"{model}: full attention was not measured on {tasks}: there is nothing to hold the methods against"


def _intervals(points: list[MeasuredPoint]) -> Iterator[str]:
    for model, methods in _methods(p for p in points if any(is_missing(row["accuracy_low"]) for row in p.answered)):
        yield f"{model}: results of {methods} have no interval"


def _scores(points: list[MeasuredPoint]) -> Iterator[str]:
    for model, methods in _methods(p for p in points if p.tasks and p.cells("kv_reads") is None):
        yield (
            f"{model}: what single problems scored is not known of {methods}, so what lies between curves has no "
            "interval: remove their results.jsonl and evaluate again (chains that are stored are not drawn again)"
        )


def _methods(points: Iterable[MeasuredPoint]) -> Iterator[tuple[str, str]]:
    """Each model and its methods among the points, listed."""
    for model, part in grouped(points, lambda point: point.model).items():
        yield model, _listed(dict.fromkeys(label(point.method, point.variant) for point in part))


# -- of all rows ---------------------------------------------------------------------------------------------------------
def _settings(rows: list[Row]) -> Iterator[str]:
    for (model, task), part in sorted(grouped(rows, lambda row: (row["model"], row["task"])).items()):
        asked = [{"headline": row["headline"]} | _number_of(row) | row["settings"] for row in part]
        for name in sorted({name for one in asked for name in one}.difference(_OWN_SETTINGS)):
            values = sorted({json.dumps(one.get(name), sort_keys=True) for one in asked})
            if len(values) > 1:
                yield (
                    f"{model}: rows of {task} differ in {name} ({' and '.join(values[:4])}) and stand in one comparison "
                    "all the same; drop those that do not belong"
                )


def _number_of(row: Row) -> dict[str, int]:
    """How many problems a run's own evaluation asked; of a benchmark its `limit` says so."""
    return {} if "prompts" in row["settings"] else {"num_problems": row["num_problems"]}


def _provenance(rows: list[Row]) -> Iterator[str]:
    revisions = sorted({row["git_revision"] for row in rows})
    if len(revisions) > 1:
        yield f"the results were computed by {len(revisions)} revisions of the code ({', '.join(revisions[:6])})"
    if changed := [revision for revision in revisions if revision.endswith("+")]:
        yield f"the code had changes that are in no commit ({', '.join(changed[:6])})"
    for name in sorted({name for row in rows for name in row["versions"]}):
        found = sorted({row["versions"][name] for row in rows if name in row["versions"]})
        if len(found) > 1:
            yield f"the results were computed by {len(found)} versions of {name} ({', '.join(found)})"


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    *shown, last = names if len(names) <= most else [*names[: most - 1], f"{len(names) - most + 1} more"]
    return f"{', '.join(shown)} and {last}" if shown else last
