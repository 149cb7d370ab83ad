"""What should be doubted in a frame of results is said, in a sentence that names it, and nothing else is."""

import pytest
from test_comparison import bench, frame, row

from dms_lab import comparison
from dms_lab.comparison.suspicions import longest

MODEL = {"model": "qwen_r1_7b", "task": "dms_aime24"}


def clean():
    """Two seeds of full attention and of a method, on a run's own tasks: nothing to say."""
    rows = [
        row(method, cr, task=task, seed=seed) for seed in (0, 1) for task in ("road", "ledger") for method, cr in METHODS
    ]
    return [one | {"git_revision": "abc", "versions": {"torch": "2.9"}} for one in rows]


METHODS = (("full", 1.0), ("dms", 8.0), ("quest", 8.0))


def warnings(rows):
    return comparison.warnings_of(frame(*rows))


def changed(rows, where, **changes):
    """The rows, those that `where` picks with other values."""
    return [one | changes if where(one) else one for one in rows]


def test_there_is_nothing_to_say_of_results_that_are_as_they_should_be():
    assert warnings(clean()) == []


@pytest.mark.parametrize(("measured", "told"), [(9.7, True), (9.5, False), (6.5, False), (6.3, True), (1.0, True)])
def test_a_budget_that_was_not_reached_is_told(measured, told):
    found = warnings(changed(clean(), lambda one: one["method"] == "dms", measured_cr=measured))
    assert len(found) == told
    if told:
        assert f"tiny: dms at CR 8 measured {measured:.2f} on ledger, road, more than 20 % off" in found[0]


def test_what_drops_nothing_or_has_a_budget_of_tokens_missed_no_ratio():
    rows = changed(clean(), lambda one: one["method"] == "quest", measured_cr=1.0)
    assert warnings(rows) == []
    rule = [one | {"method": "tova", "measured_cr": 1.1, "settings": {"budget": 64}} for one in clean()]
    assert warnings(clean() + [one for one in rule if one["target_cr"] == 8.0]) == []


def test_a_rule_that_stood_beside_runs_with_different_budgets_is_told():
    rule = [one | {"method": "tova", "settings": {"live_tokens": 60}} for one in clean() if one["method"] == "dms"]
    assert warnings(clean() + rule) == []
    seeds = [one | {"settings": {"live_tokens": 60 + one["seed"]}} for one in rule]  # each seed has a run of its own
    assert warnings(clean() + seeds) == []
    (found,) = warnings(clean() + rule + [one | {"settings": {"live_tokens": 75}} for one in rule])
    assert "tova at CR 8 is a mean over budgets of 60, 75 live tokens" in found


def test_a_single_seed_is_told_unless_chains_were_drawn_more_often():
    (found,) = warnings([one for one in clean() if one["seed"] == 0])
    assert "tiny: one seed alone of dms, full and quest on ledger, road" in found
    assert warnings([one | {"sampling_seeds": [0, 1]} for one in clean() if one["seed"] == 0]) == []


def test_curves_of_different_seeds_are_told():
    rows = [one | {"seed": one["seed"] + 1} if one["method"] == "full" else one for one in clean()]
    (found,) = warnings(rows)
    assert "curves on ledger, road are of different seeds (dms: 0, 1; full: 1, 2; quest: 0, 1)" in found


def test_several_configurations_in_one_curve_are_told_and_rivals_measured_beside_each_run_are_not():
    rows = clean() + [one | {"config_hash": "def"} for one in clean()]
    (found,) = warnings(rows)
    assert "tiny: dms at CR 8 is the mean of 2 configurations of one seed; load the results.csv of a sweep" in found
    named = [one | {"variant": one["config_hash"] if one["method"] == "dms" else ""} for one in rows]
    assert warnings(named) == []


def test_points_over_different_tasks_are_told():
    rows = [one for one in clean() if (one["method"], one["task"]) != ("dms", "road")]
    found = warnings(rows)
    assert "points are means over different tasks (ledger; ledger, road)" in found[0]
    assert found[0].endswith("finish what is missing")
    benches = [bench(method, cr=cr, seed=seed) for method, cr in METHODS for seed in (0, 1)]
    assert warnings(clean() + [one | {"versions": {}, "git_revision": "abc"} for one in benches]) == []


def test_a_missing_baseline_is_told():
    (found,) = warnings([one for one in clean() if one["method"] != "full"])
    assert "tiny: full attention was not measured on ledger, road" in found


def test_missing_intervals_and_scores_are_told():
    (found,) = warnings(changed(clean(), lambda one: one["method"] == "dms", accuracy_low=None))
    assert found == "tiny: results of dms have no interval"
    (found,) = warnings(changed(clean(), lambda one: one["method"] != "full", problem_scores=[]))
    assert "what single problems scored is not known of dms and quest" in found
    assert "evaluate again" in found


def test_rows_asked_in_different_ways_are_told_and_how_a_method_was_set_is_not():
    ways = ({"generation": {"temperature": 0.6}}, {"generation": {"temperature": 1.0}})
    rows = [one | {"settings": ways[one["method"] == "dms"]} for one in clean()]
    found = warnings(rows)
    assert len(found) == 2  # a sentence a task
    assert 'rows of ledger differ in generation ({"temperature": 0.6} and {"temperature": 1.0})' in found[0]
    set_to = [{"dialled_from": "a", "threshold": 0.1}, {"dialled_from": "b", "threshold": 0.2}]
    assert warnings([one | {"settings": set_to[one["seed"]]} for one in clean()]) == []


def test_a_trial_with_fewer_problems_among_the_rows_is_told():
    trial = row(seed=0, scores=(1.0,)) | {"git_revision": "abc", "versions": {"torch": "2.9"}}
    assert trial["num_problems"] < clean()[0]["num_problems"]
    (found,) = warnings([*clean(), trial])
    assert "rows of road differ in num_problems (1 and 2)" in found


def test_versions_and_revisions_that_differ_are_told():
    first = changed(clean(), lambda one: one["seed"] == 1, git_revision="def+", versions={"torch": "2.10"})
    assert warnings(first) == [
        "the results were computed by 2 revisions of the code (abc, def+)",
        "the code had changes that are in no commit (def+)",
        "the results were computed by 2 versions of torch (2.10, 2.9)",
    ]


def benchmark(**changes):
    """Full attention on a benchmark, at full length, twice drawn; its published score is 55.5."""
    values = MODEL | {"max_tokens": 32768, "metrics": {"avg": [0.4, 0.35, 0.45]}, "truncation_rate": 0.1}
    values |= {"sampling_seeds": [0, 1], "git_revision": "abc", "versions": {}}
    return bench("full", cr=1.0) | values | changes


@pytest.mark.parametrize("model", ["qwen_r1_7b", "deepseek-ai_DeepSeek-R1-Distill-Qwen-7B"])
def test_full_attention_off_its_published_score_is_told(model):
    (found,) = warnings([benchmark(model=model)])
    assert f"{model} with full attention scores 40.0 % [35-45] on dms_aime24, published is 55.5" in found


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": {"avg": [0.5, 0.45, 0.6]}},
        {"max_tokens": 16384},
        {"settings": {"limit": 10}},
        {"model": "tiny"},
        {"task": "dms_aime25"},
    ],
)
def test_scores_that_agree_or_cannot_be_compared_are_not_told(changes):
    assert warnings([benchmark(**changes)]) == []


def test_chains_that_ran_out_of_tokens_are_told_at_the_longest_limit():
    inside = {"metrics": {"avg": [0.55, 0.5, 0.6]}}
    short, long = benchmark(truncation_rate=0.9, max_tokens=8192, **inside), benchmark(truncation_rate=0.21, **inside)
    assert warnings([long, short]) == ["21 % of the chains of full on dms_aime24 ran out of 32768 tokens"]
    assert warnings([long | {"truncation_rate": 0.2}, short]) == []
    assert longest([short, long, long | {"truncation_rate": 0.5}])[0]["truncation_rate"] == 0.5


def test_the_order_of_rows_changes_no_sentence():
    rows = [*clean()[:7], benchmark(), benchmark(model="other", truncation_rate=0.4), bench("dms", seed=3)]
    assert len(warnings(rows)) > 6
    assert warnings(rows[::-1]) == warnings(rows)
