"""What is said of methods follows from their rows by the definitions, however the rows are ordered or repeated."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pandas.testing import assert_frame_equal
from test_results import POINT

from dms_lab import comparison, pareto, results

NAMES = ["model", "method", "variant", "tasks"]


def row(method="dms", cr=8.0, task="road", seed=0, scores=(1.0, 0.0), kv_reads=100.0, **changes):
    """A row of a run's own evaluation; its accuracy is that of the scores."""
    mean = float(np.mean(scores))
    values = {
        "method": method,
        "target_cr": cr,
        "task": task,
        "seed": seed,
        "problem_scores": list(map(float, scores)),
        "num_problems": len(scores),
        "accuracy": mean,
        "accuracy_low": mean - 0.1,
        "accuracy_high": mean + 0.1,
        "measured_cr": cr,
        "kv_reads": kv_reads,
        "peak_tokens": None if kv_reads is None else kv_reads / 10,
        "kv_bytes_peak": None if kv_reads is None else 1000 * kv_reads,
        "settings": {},
    }
    return vars(dataclasses.replace(POINT, **(values | changes)))


def bench(method="dms", width=1, max_tokens=96, prompts="p", **changes):
    """A row of a benchmark, whose problems are the same for every seed."""
    changes["settings"] = changes.get("settings", {}) | {"prompts": prompts}
    return row(method, **({"task": "dms_tiny_road", "width": width, "max_tokens": max_tokens} | changes))


def frame(*rows):
    return pd.DataFrame(list(rows))


def one(table, **where):
    """The only row of a table that has these values, as a dict."""
    for name, value in where.items():
        table = table[table[name] == value]
    (found,) = table.to_dict("records")
    return found


def hyper_scaling():
    return results.load(Path(__file__).parent / "data" / "schema2")


# -- points ---------------------------------------------------------------------------------------------------------------
def test_a_point_is_the_mean_over_tasks_of_means_over_seeds():
    points = comparison.curve_points(
        frame(
            row(task="road", seed=0, scores=[1, 1, 1, 1], kv_reads=100.0),
            row(task="road", seed=1, scores=[0, 0], kv_reads=300.0),
            row(task="ledger", seed=0, scores=[1, 0, 0, 0], kv_reads=600.0),
        )
    )
    (found,) = points.to_dict("records")
    assert found["tasks"] == "ledger, road"
    assert found["accuracy"] == pytest.approx((0.5 + 0.25) / 2)
    assert found["kv_reads"] == pytest.approx((200 + 600) / 2)
    assert (found["num_seeds"], found["num_problems"]) == (2, 10)
    assert (found["width"], found["max_tokens"], found["budget_tokens"]) == (1, None, None)
    assert (found["target_cr"], found["measured_cr"]) == (8.0, 8.0)
    assert math.isnan(found["perplexity"])


def test_seeds_that_share_their_problems_are_counted_once():
    rows = [bench(seed=seed, scores=[1, 0, 1]) for seed in range(3)]
    assert comparison.curve_points(frame(*rows))["num_problems"].tolist() == [3]


def test_text_stands_beside_the_tasks_of_its_point_or_alone():
    text = {"accuracy": None, "accuracy_low": None, "accuracy_high": None, "problem_scores": [], "kv_reads": None}
    rows = [row(), *(row(task=name, perplexity=value, **text) for name, value in (("a", 10.0), ("b", 20.0)))]
    (found,) = comparison.curve_points(frame(*rows)).to_dict("records")
    assert (found["perplexity"], found["accuracy"], found["tasks"]) == (15.0, 0.5, "road")
    (alone,) = comparison.curve_points(frame(*rows[1:])).to_dict("records")
    assert (alone["perplexity"], alone["tasks"], alone["measured_cr"]) == (15.0, "", 8.0)
    assert math.isnan(alone["accuracy"])
    assert not alone["is_frontier_kv_reads"]


def test_problems_of_another_length_are_another_curve_beside_the_same_text():
    text = {"accuracy": None, "accuracy_low": None, "accuracy_high": None, "problem_scores": [], "kv_reads": None}
    rows = [row(scores=[score], settings={"length": length}) for length, score in ((512, 1), (256, 0))]
    rows.append(row(task="text", perplexity=10.0, settings={"context": 512}, **text))
    points = comparison.curve_points(frame(*rows))
    assert points[["tasks", "accuracy", "perplexity"]].to_numpy().tolist() == [
        ["road of 256 tokens", 0.0, 10.0],
        ["road of 512 tokens", 1.0, 10.0],
    ]
    assert points["is_frontier_kv_reads"].all()


def test_beside_a_perplexity_stands_what_the_text_was_compressed_to_and_not_the_tasks():
    text = {"task": "held_out", "accuracy": None, "perplexity": 12.0, "problem_scores": [], "kv_reads": None}
    rows = [row(measured_cr=7.9), *(row(seed=seed, measured_cr=cr, **text) for seed, cr in ((0, 3.0), (1, 4.0)))]
    (found,) = comparison.curve_points(frame(*rows)).to_dict("records")
    assert (found["measured_cr"], found["text_cr"]) == (7.9, 3.5)
    (without,) = comparison.curve_points(frame(row())).to_dict("records")
    assert math.isnan(without["text_cr"])


def test_each_width_length_ratio_and_variant_is_a_point_and_a_rule_s_budget_is_one_over_tasks():
    rows = [bench(width=w, max_tokens=most) for w in (1, 2) for most in (48, 96)]
    rows += [bench(cr=4.0), bench(variant="window=4")]
    rows += [
        bench("tova", cr=cr, task=task, settings={"budget": 64})
        for cr, task in ((15.5, "dms_tiny_road"), (16.5, "dms_aime24"))
    ]
    points = comparison.curve_points(frame(*rows))
    assert len(points) == 7
    assert set(map(tuple, points[["variant", "target_cr", "width", "max_tokens"]].to_numpy().tolist())) == {
        *(("", 8.0, w, most) for w in (1, 2) for most in (48, 96)),
        ("", 4.0, 1, 96),
        ("window=4", 8.0, 1, 96),
        ("", 16.0, 1, 96),
    }
    assert one(points, method="tova")["budget_tokens"] == 64
    assert {type(value) for value in points["max_tokens"]} == {int}


def test_the_frontier_is_that_of_a_curve_over_all_its_ratios():
    rows = [
        row(cr=8.0, scores=[1, 0, 0, 0], kv_reads=100.0, peak_tokens=90.0),
        row(cr=4.0, scores=[1, 1, 0, 0], kv_reads=200.0, peak_tokens=80.0),
        row(cr=2.0, scores=[1, 1, 0, 0], kv_reads=400.0, peak_tokens=70.0),
        row(cr=2.0, scores=[1, 0, 0, 0], kv_reads=400.0, variant="window=4"),
        row("full", cr=1.0, scores=[1, 1, 1, 1], kv_reads=None),
    ]
    points = comparison.curve_points(frame(*rows)).set_index(["method", "variant", "target_cr"])
    on = points["is_frontier_kv_reads"]
    assert on.to_dict() == {
        ("dms", "", 8.0): True,
        ("dms", "", 4.0): True,
        ("dms", "", 2.0): False,
        ("dms", "window=4", 2.0): True,
        ("full", "", 1.0): False,
    }
    assert points["is_frontier_peak_tokens"].to_dict()["dms", "", 2.0]
    assert not points["is_frontier_peak_tokens"].to_dict()["dms", "", 8.0]


# -- intervals ------------------------------------------------------------------------------------------------------------
ENDS = ["accuracy_low", "accuracy_high"]


def ends(*rows):
    return comparison.curve_points(frame(*rows))[ENDS].to_numpy()


def test_the_interval_of_a_point_is_that_of_seeds_and_problems_drawn_again_where_scores_are_known():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 2, (3, 40))
    shared = ends(*(bench(seed=s, scores=scores[s]) for s in range(3)))
    assert shared[0] == pytest.approx(pareto.seeds_interval(scores), abs=0.02)
    widths = [np.diff(ends(*(make(seed=s, scores=scores[0]) for s in range(3))))[0, 0] for make in (bench, row)]
    assert widths[1] < 0.85 * widths[0]  # each seed's own problems average out


def test_without_scores_every_problem_counts_once_over_all_seeds_of_a_task():
    without = {"problem_scores": [], "num_problems": 40, "accuracy": 0.9, "accuracy_low": 0.8, "accuracy_high": 0.95}
    assert ends(*(row(seed=s, **without) for s in range(3)))[0] == pytest.approx(pareto.wilson_interval(108, 120))
    assert ends(*(bench(seed=s, **without) for s in range(3)))[0] == pytest.approx(pareto.wilson_interval(36, 40))
    assert np.isnan(ends(row(**without | {"accuracy_low": None}))).all()


@pytest.mark.parametrize("known", [True, False])
def test_neighbours_are_as_sure_by_one_rule_also_where_nothing_is_wrong(known):
    """From 59 to 64 of 64 right, each end rises with the accuracy."""
    rows = [row(cr=right, scores=[1] * right + [0] * (64 - right), kv_reads=right) for right in range(59, 65)]
    rows = rows if known else [one | {"problem_scores": []} for one in rows]
    low, high = ends(*rows).T
    assert (np.diff(low) > 0.005).all()
    assert (np.diff(high) >= 0).all()
    assert (low[-1], high[-1]) == (pytest.approx(pareto.wilson_interval(64, 64)[0]), 1.0)


def test_where_one_row_lacks_scores_no_interval_of_the_frame_is_over_seeds():
    rng = np.random.default_rng(0)
    rows = [row(cr=cr, seed=s, scores=rng.integers(0, 2, 30) * (s > 0)) for cr in (4.0, 8.0) for s in range(3)]
    points = comparison.curve_points(frame(*rows))
    assert points["interval_over"].tolist() == ["seeds and problems"] * 2
    rows[0] = rows[0] | {"problem_scores": []}
    mixed = comparison.curve_points(frame(*rows))
    without = comparison.curve_points(frame(*(one | {"problem_scores": []} for one in rows)))
    assert mixed["interval_over"].tolist() == ["problems"] * 2
    assert_frame_equal(mixed, without)
    assert (mixed["accuracy_low"] > points["accuracy_low"] + 0.05).all(), "seeds that differ make it wider"
    assert comparison.curve_points(frame(row()))["interval_over"].tolist() == ["problems"], "a single seed"


@pytest.mark.parametrize("make", [row, bench])
@pytest.mark.parametrize("level", [2.3, 0.0])
def test_the_interval_of_a_point_covers_it_as_often_as_it_says_or_more(make, level):
    """Two tasks of 40 problems and 3 seeds, no seed better than another; a level of 2.3 is 97 % right."""
    covered, rng = 0, np.random.default_rng(1)
    tasks = ("dms_tiny_road", "dms_tiny_ledger")
    drawn = [
        level + rng.normal(0, 0.7, (2, 1 if make is bench else 3, 40)) + rng.normal(0, 1, (2, 3, 40)) for _ in range(200)
    ]
    truth = np.mean([one > 0 for one in drawn])
    for one in drawn:
        rows = [make(seed=s, task=tasks[t], scores=(one[t, s] > 0) * 1.0) for t in range(2) for s in range(3)]
        low, high = ends(*rows)[0]
        covered += low <= truth <= high
    assert covered / 200 >= 0.93


# -- margins --------------------------------------------------------------------------------------------------------------
def test_margins_of_a_record_are_those_that_were_published_of_it():
    long = hyper_scaling()
    long = long[long["max_tokens"] == 96]
    found = {
        (budget, cr): [
            round(100 * one(table, budget=budget, target_cr=cr)["margin"], 1)
            for table in (comparison.margins(long[long["seed"] == seed], by="target_cr") for seed in range(3))
        ]
        for budget in ("kv_reads", "peak_tokens")
        for cr in (4.0, 8.0)
    }
    assert found["kv_reads", 8.0] == [19.3, 5.6, 13.3]
    assert found["kv_reads", 4.0] == [-1.7, 2.9, 0.1]
    assert found["peak_tokens", 4.0] == [-0.0, 4.1, 0.5]
    assert np.isnan(found["peak_tokens", 8.0]).all()


def two_curves(num_seeds=2, num_problems=12, shared=True, seed=0):
    rng, rows = np.random.default_rng(seed), []
    make = bench if shared else row
    for task in ("dms_tiny_road", "dms_tiny_ledger"):
        hardness = rng.random((1 if shared else num_seeds, num_problems))
        for name in range(num_seeds):
            for power, width in enumerate((1, 2, 4)):
                for method, cr, better in (("full", 1.0, 0.0), ("dms", 4.0, 0.1), ("dms", 8.0, 0.0)):
                    level = rng.random() * 0.1 + 0.3 + 0.2 * power + better
                    scores = (hardness[name % len(hardness)] < level) * 1.0
                    budget = 400.0 * width / cr * (1 + 0.01 * name)
                    extra = {"width": width} if shared else {"variant": f"w={width}"}
                    rows.append(make(method, cr=cr, seed=name, task=task, scores=scores, kv_reads=budget, **extra))
    return rows


@settings(deadline=None, max_examples=6)
@given(st.randoms(), st.booleans())
def test_the_order_of_rows_changes_nothing(random, shared):
    rows = two_curves(shared=shared)
    mixed = random.sample(rows, len(rows))
    for compare in (comparison.curve_points, comparison.margins, comparison.equal_accuracy, comparison.equal_budget):
        options = {} if compare is comparison.curve_points else {"against": "full" if shared else "full w=2"}
        assert_frame_equal(compare(frame(*mixed), **options), compare(frame(*rows), **options))


def test_a_margin_turns_when_the_curves_change_places():
    rows = [item for item in two_curves() if item["target_cr"] < 8]
    there, back = comparison.margins(frame(*rows)), comparison.margins(frame(*rows), against="dms")
    assert there["margin"].tolist() == pytest.approx((-back["margin"]).tolist())
    assert there["low"].tolist() == pytest.approx((-back["high"]).tolist())
    assert (there["low"] < there["margin"]).all()
    assert (there["margin"] < there["high"]).all()


def test_rows_that_are_there_twice_count_once():
    rows = two_curves()
    for compare in (comparison.curve_points, comparison.margins, comparison.equal_accuracy):
        assert_frame_equal(compare(frame(*rows, *rows)), compare(frame(*rows)))


def test_a_trial_with_few_problems_changes_nothing_beside_the_whole_and_can_stand_against_it():
    ratios = (("full", 1.0), ("dms", 2.0), ("dms", 4.0))
    rows = [row(method, cr, seed=seed, kv_reads=100 / cr, scores=(1, 1, 0, 1)) for method, cr in ratios for seed in (0, 1)]
    trial = [row(method, cr, kv_reads=100 / cr, scores=(0, 0)) for method, cr in ratios]
    for table in (comparison.curve_points, comparison.equal_accuracy):
        assert_frame_equal(table(frame(*trial, *rows)), table(frame(*rows)))
    found = comparison.equal_accuracy(frame(*rows, row("dms_dialled", 2.0, kv_reads=50.0, scores=(1, 0))))
    assert one(found, method="dms_dialled", budget="kv_reads")["status"] == "not reached"


def test_a_curve_is_the_union_over_ratios_or_one_for_each():
    table = frame(*two_curves())
    whole, each = comparison.margins(table), comparison.margins(table, by="target_cr")
    assert whole[NAMES].drop_duplicates().to_numpy().tolist() == [["tiny", "dms", "", "dms_tiny_ledger, dms_tiny_road"]]
    assert each["target_cr"].tolist() == [4.0, 8.0] * 3
    apart = table[(table["method"] == "full") | (table["target_cr"] == 8.0)]
    assert_frame_equal(
        each[each["target_cr"] == 8.0].drop(columns="target_cr").reset_index(drop=True), comparison.margins(apart)
    )


def test_a_margin_says_where_it_was_taken_and_what_lies_under_the_curve():
    rows = [
        bench("full", cr=1.0, scores=[0, 1], kv_reads=4.0),
        bench("full", cr=1.0, width=2, scores=[1, 1], kv_reads=16.0),
        bench(scores=[1, 0], kv_reads=1.0),
        bench(width=2, scores=[1, 1], kv_reads=8.0),
    ]
    found = one(comparison.margins(frame(*rows)), budget="kv_reads")
    assert (found["budget_low"], found["budget_high"]) == (4.0, 8.0)
    ours, full = (5 / 6 + 1) / 2, (0.5 + 0.75) / 2
    assert (found["margin"], found["area"]) == (pytest.approx(ours - full), pytest.approx(ours))
    assert found["against"] == "full"
    linear = one(comparison.margins(frame(*rows), axis="linear"), budget="kv_reads")
    assert linear["area"] == pytest.approx(4 * (0.5 + 0.5 * 3 / 7 + 1) / 2)


def test_a_margin_says_how_much_of_it_is_held_and_what_it_is_without():
    rows = [
        *(bench("full", cr=1.0, width=w, scores=[1] * w + [0] * (4 - w), kv_reads=4.0 * 4**w) for w in (1, 2)),
        bench(scores=[1, 1, 0, 0], kv_reads=8.0),
        bench(width=2, scores=[1, 1, 1, 0], kv_reads=32.0),
        bench(width=4, scores=[1, 0, 0, 0], kv_reads=64.0),
    ]
    found = one(comparison.margins(frame(*rows)), budget="kv_reads")
    assert (found["budget_low"], found["budget_high"], found["held_share"]) == (16.0, 64.0, 0.5)
    assert found["margin_unheld"] == pytest.approx((0.625 - 0.25 + 0.75 - 0.375) / 2)
    assert found["margin"] == pytest.approx((found["margin_unheld"] + (0.75 - 0.375 + 0.75 - 0.5) / 2) / 2)
    apart = one(comparison.margins(frame(*rows[:-2], rows[-1])), budget="kv_reads")
    assert (apart["held_share"], math.isnan(apart["margin_unheld"])) == (1.0, True)
    assert apart["margin"] == pytest.approx(0.5 - 0.375)


def test_only_means_over_the_same_tasks_are_compared():
    rows = [
        bench("full", cr=1.0, task="a", kv_reads=100.0, max_tokens=32),
        bench("full", cr=1.0, task="b", kv_reads=100.0, max_tokens=64),
        bench(task="a", kv_reads=100.0, max_tokens=32, scores=[1, 1]),
        bench(task="b", kv_reads=100.0, max_tokens=64, scores=[0, 0]),
        row(task="a", kv_reads=100.0, scores=[1, 1]),
        row(task="b", kv_reads=100.0, scores=[1, 1]),
    ]
    table = comparison.margins(frame(*rows))
    table = table[table["budget"] == "kv_reads"].set_index("tasks")["margin"]
    assert table["a"] == 0.5
    assert table["b"] == -0.5
    assert math.isnan(table["a, b"])


def test_a_baseline_is_named_by_its_method_or_with_its_variant():
    rows = [row("full", cr=1.0), row(variant="window=4"), row(variant="window=16"), row("tova")]
    assert set(comparison.margins(frame(*rows), against="tova")["method"]) == {"full", "dms"}
    assert set(comparison.margins(frame(*rows), against="dms window=4")["variant"]) == {"", "window=16"}
    assert set(comparison.margins(frame(*rows[:2]), against="dms")["against"]) == {"dms window=4"}
    with pytest.raises(
        ValueError, match="against='dms' has several variants; choose one of 'dms window=16', 'dms window=4'"
    ):
        comparison.margins(frame(*rows), against="dms")
    with pytest.raises(
        ValueError, match=r"against='quest' is not in these results; choose one of 'dms window=16', .*'tova'"
    ):
        comparison.margins(frame(*rows), against="quest")
    with pytest.raises(ValueError, match="by='cr' is not known"):
        comparison.margins(frame(*rows), by="cr")
    with pytest.raises(ValueError, match="no results to compare"):
        comparison.curve_points(frame())


def test_a_model_without_the_baseline_has_rows_without_numbers():
    rows = [row("full", cr=1.0), row(), row(model="other")]
    table = comparison.margins(frame(*rows))
    assert math.isnan(one(table, model="other", budget="kv_reads")["margin"])
    assert one(table, model="tiny", budget="kv_reads")["margin"] == 0.0
    assert one(comparison.equal_accuracy(frame(*rows)), model="other", budget="kv_reads")["status"] == "no baseline"
    assert math.isnan(one(comparison.equal_budget(frame(*rows)), model="other", budget="kv_reads")["difference"])


def test_intervals_need_the_scores_of_single_problems():
    rows = two_curves()
    assert comparison.margins(frame(*rows))["low"].notna().all()
    rows[0] = rows[0] | {"problem_scores": []}
    table = comparison.margins(frame(*rows))
    assert table["low"].isna().all()
    assert table["margin"].notna().all()


# -- equal accuracy and equal budget --------------------------------------------------------------------------------------
def steps(method, cr, *points):
    """Rows of a curve from (budget, right of 4), a width each."""
    return [
        bench(method, cr=cr, width=place, scores=[right / 4] * 4, kv_reads=budget)
        for place, (budget, right) in enumerate(points, 1)
    ]


def test_what_equal_accuracy_costs_and_why_it_is_not_known():
    rows = [*steps("full", 1.0, (16.0, 1), (64.0, 2), (128.0, 2), (256.0, 4)), *steps("dms", 8.0, (4.0, 2), (16.0, 3))]
    table = comparison.equal_accuracy(frame(*rows))
    table = table[table["budget"] == "kv_reads"].set_index("against_width")
    assert table["status"].to_dict() == {1: "cheaper than measured", 2: "measured", 4: "not reached"}
    assert table["at"].to_dict() == {1: 16.0, 2: 64.0, 4: 256.0}
    assert (table["needed"][2], table["ratio"][2], table["at_least"][2]) == (4.0, 16.0, 16.0)
    assert np.isnan([table["needed"][1], table["ratio"][1], table["ratio"][4], table["at_least"][4]]).all()
    assert table["at_least"][1] == 4.0
    assert table["low"][4] == table["high"][1] * 0 == 0.0
    within = comparison.equal_accuracy(frame(*rows), within=0.25)
    within = within[within["budget"] == "kv_reads"].set_index("against_width")
    assert within["needed"][4] == pytest.approx(16.0)
    assert (within["accuracy"][4], within["ratio"][4]) == (0.75, pytest.approx(16.0))
    half = one(comparison.equal_accuracy(frame(*rows), within=0.375), budget="kv_reads", against_width=4)
    assert half["needed"] == pytest.approx(8.0)  # halfway on the log2 axis


def test_how_accurate_an_equal_budget_is():
    rows = [*steps("full", 1.0, (8.0, 1), (64.0, 2)), *steps("dms", 8.0, (4.0, 2), (16.0, 4))]
    table = comparison.equal_budget(frame(*rows))
    table = table[table["budget"] == "kv_reads"].set_index("against_width")
    assert (table["at"][1], table["accuracy"][1], table["against_accuracy"][1]) == (8.0, 0.75, 0.25)
    assert table["difference"][1] == 0.5
    assert table["low"][1] <= 0.5 <= table["high"][1]
    assert np.isnan([table["accuracy"][2], table["difference"][2]]).all()


def test_an_accuracy_that_is_held_to_an_equal_budget_is_called_so():
    rows = [
        *steps("full", 1.0, (8.0, 1), (16.0, 2), (32.0, 3), (64.0, 4)),
        *steps("dms", 8.0, (8.0, 2), (16.0, 3), (32.0, 1)),
    ]
    table = comparison.equal_budget(frame(*rows))
    table = table[table["budget"] == "kv_reads"]
    assert table["is_held"].tolist() == [False, False, True, False]
    assert table["accuracy"].tolist()[:3] == [0.5, 0.75, 0.75]


def test_a_study_of_many_curves_is_compared_in_seconds():
    """16 variants of 4 ratios on 3 tasks of 3 seeds: what the figures of a sweep ask for."""
    import time

    rng, rows = np.random.default_rng(0), []
    for task in ("ledger", "program", "road"):
        for seed in range(3):
            for variant, cr in [("", 1.0)] + [(f"window={w}", cr) for w in range(16) for cr in (2.0, 4.0, 8.0, 16.0)]:
                method = "dms" if variant else "full"
                scores = rng.integers(0, 2, 64)
                rows.append(row(method, cr=cr, variant=variant, task=task, seed=seed, scores=scores, kv_reads=1e4 / cr))
    started = time.process_time()
    assert len(comparison.margins(frame(*rows), against="dms window=0")) == 16 * 3
    assert len(comparison.curve_points(frame(*rows))) == 65
    assert time.process_time() - started < 15
