"""What is known of each task agrees with its file, its list and its warnings; verdicts are read off the right text."""

import copy
import dataclasses
import importlib
import io
import pickle
import queue
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rich.console import Console

from dms_lab import pareto
from dms_lab.evaluation import benchmarks, listing, progress, scores
from dms_lab.evaluation.benchmarks import BENCHMARKS, TASKS, Benchmark, Graders, Reply, check_graders, judge
from dms_lab.evaluation.math_worker import Result as MathResult
from dms_lab.evaluation.verdict import Verdict
from dms_lab.results import Result

CONF = Path(__file__).parent.parent / "conf" / "model"
MODELS = {path.stem for path in CONF.glob("*.yaml")}


class Loader(yaml.SafeLoader):
    """Reads lm-eval's `!function a.b.c` as the dotted name."""


Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def task_file(path):
    """A task file with what it includes, as plain values."""
    values = yaml.load(path.read_text(), Loader)
    included = values.pop("include", None)
    return (task_file(path.parent / included) if included else {}) | values


# -- tasks -------------------------------------------------------------------------------------------------------------


def test_there_is_a_task_file_for_every_benchmark_and_the_other_way_round():
    assert {path.stem for path in TASKS.glob("dms_*.yaml")} == set(BENCHMARKS)


@pytest.mark.parametrize("task", BENCHMARKS)
def test_a_task_file_names_its_task_and_the_results_of_its_own_kind(monkeypatch, task):
    values = task_file(TASKS / f"{task}.yaml")
    assert values["task"] == task
    module, _, name = values["process_results"].rpartition(".")
    monkeypatch.setattr(benchmarks, "_results", lambda benchmark, doc, results: (benchmark, doc, results))
    benchmark, *given = getattr(importlib.import_module(module), name)({"id": "d"}, ["reply"])
    assert given == [{"id": "d"}, ["reply"]]
    for what in ("kind", "grade", "needs_end", "version", "votes"):
        assert getattr(benchmark, what) == getattr(BENCHMARKS[task], what)


@pytest.mark.parametrize("task", BENCHMARKS)
def test_a_task_s_metrics_hold_its_headline(task):
    metrics = {metric["metric"] for metric in task_file(TASKS / f"{task}.yaml")["metric_list"]}
    assert BENCHMARKS[task].headline in metrics
    assert BENCHMARKS[task].headline in scores.ACCURACIES
    results = benchmarks._results(BENCHMARKS[task], {}, [[Reply("", False, Verdict(1.0))]])
    assert set(results) == (metrics if BENCHMARKS[task].votes else metrics - {"maj"})


@pytest.mark.parametrize("task", BENCHMARKS)
def test_only_programs_are_run_and_expected_scores_are_percentages_of_models_known_here(task):
    benchmark = BENCHMARKS[task]
    assert benchmark.runs_code == (benchmark.kind == "code") == (task == "dms_livecodebench")
    assert set(benchmark.expected) <= MODELS
    assert all(1 < score < 100 for score in benchmark.expected.values())
    of_the_paper = task in ("dms_aime24", "dms_math500", "dms_gpqa_diamond", "dms_livecodebench")
    assert bool(benchmark.expected) == of_the_paper


@pytest.mark.parametrize("model", BENCHMARKS["dms_aime24"].expected)
def test_a_model_has_the_published_scores_of_its_configuration_by_its_hub_id_too(model):
    path = yaml.safe_load((CONF / f"{model}.yaml").read_text())["model"]["path"]
    for benchmark in BENCHMARKS.values():
        score = benchmark.expected.get(model)
        assert benchmark.full_score("hf", path) == benchmark.full_score(model, "a/copy") == score
    assert BENCHMARKS["dms_aime24"].full_score("hf", path) is not None
    assert BENCHMARKS["dms_aime24"].full_score("hf", "a/copy") is None
    assert BENCHMARKS["dms_aime24"].full_score("qwen3_0_6b", "Qwen/Qwen3-0.6B") is None


def test_a_hub_id_is_stronger_than_the_name_that_a_model_was_given():
    assert BENCHMARKS["dms_aime24"].full_score("qwen_r1_7b", "Qwen/Qwen3-8B") == 76.0


def test_programs_and_lists_of_what_was_found_have_no_votes():
    assert {name: benchmark.votes for name, benchmark in BENCHMARKS.items()} == {
        name: benchmark.kind not in ("code", "ruler") for name, benchmark in BENCHMARKS.items()
    }


# -- verdicts ----------------------------------------------------------------------------------------------------------

ECHO = Benchmark("echo", lambda graders, doc, answer: Verdict(float(answer == doc["answer"]), answer), "avg")
TO_THE_END = dataclasses.replace(ECHO, needs_end=True)


@pytest.mark.parametrize(
    ("benchmark", "text", "truncated", "think_end", "verdict"),
    [
        (ECHO, "7", False, None, Verdict(1.0, "7")),
        (ECHO, "8", False, None, Verdict(0.0, "8")),
        (ECHO, "a thought</think>7", False, "</think>", Verdict(1.0, "7")),
        (ECHO, "a thought</think>7", False, None, Verdict(0.0, "a thought</think>7")),
        (ECHO, "a thought</think>7", True, "</think>", Verdict(1.0, "7")),
        (ECHO, "7", True, None, Verdict(1.0, "7")),
        (ECHO, "7", False, "</think>", Verdict(0.0, None, "the thought never ended")),
        (ECHO, "7", True, "</think>", Verdict(0.0, None, "cut off within the thought")),
        (TO_THE_END, "7", True, None, Verdict(0.0, None, "cut off within the answer")),
        (TO_THE_END, "a thought</think>7", True, "</think>", Verdict(0.0, None, "cut off within the answer")),
        (TO_THE_END, "7", True, "</think>", Verdict(0.0, None, "cut off within the thought")),
        (TO_THE_END, "7", False, None, Verdict(1.0, "7")),
    ],
)
def test_the_answer_is_what_follows_the_thought(benchmark, text, truncated, think_end, verdict):
    assert judge(benchmark, Graders(), {"answer": "7"}, text, truncated, think_end) == verdict


@pytest.fixture
def no_worker(monkeypatch):
    """math-verify's place is taken by a comparison of what stands in the box."""

    def verify(gold, text):
        inside = text.rpartition("boxed{")[2].partition("}")[0]
        return MathResult(inside == gold, inside)

    monkeypatch.setattr(benchmarks, "MathWorker", lambda: SimpleNamespace(verify=verify))
    monkeypatch.setattr(benchmarks, "_IDLE", queue.SimpleQueue())


@pytest.mark.parametrize(
    ("task", "gold", "right", "wrong", "answer"),
    [
        ("dms_aime24", "7", r"so \boxed{007}", r"\boxed{8}", "7"),
        ("dms_aime25", "7", r"\boxed{7}", r"\boxed{6}", "7"),
        ("dms_math500", "x+1", r"\boxed{x+1}", r"\boxed{x}", "x+1"),
        ("dms_gpqa_diamond", "C", "Answer: C", "Answer: D", "C"),
        ("dms_niah_single", '["12"]', "it is 12", "13", None),
        ("dms_niah_multikey", '["12"]', "it is 12", "13", None),
        ("dms_vt", '["AB", "CD"]', "CD AB", "nothing", None),
        ("dms_tiny_ledger", "7", "7", " 7", "7"),
        ("dms_tiny_road", "b", "b", "c", "b"),
        ("dms_tiny_program", "7", "7", "77", "7"),
    ],
)
def test_each_task_has_the_grader_of_its_answers(no_worker, task, gold, right, wrong, answer):
    verdict = judge(BENCHMARKS[task], Graders(), {"answer": gold}, right, False, None)
    assert (verdict.score, verdict.answer) == (1.0, answer)
    assert judge(BENCHMARKS[task], Graders(), {"answer": gold}, wrong, False, None).score == 0


def test_programs_are_graded_with_the_limits_and_in_the_sandbox_that_were_asked_for(monkeypatch):
    monkeypatch.setattr(benchmarks.livecodebench, "grade", lambda *asked: asked)
    graders = Graders("none", benchmarks.SandboxLimits(1.0))
    asked = judge(BENCHMARKS["dms_livecodebench"], graders, {"id": "d"}, "a thought</think>a program", False, "</think>")
    assert asked == ({"id": "d"}, "a program", graders.limits, "none")


def test_a_part_of_what_was_to_be_found_is_a_part_of_the_score():
    assert judge(BENCHMARKS["dms_vt"], Graders(), {"answer": '["AB", "CD"]'}, "ab", False, None).score == 0.5


def test_an_answer_that_ran_out_of_tokens_is_wrong_for_the_embedded_tasks_alone():
    wrong = {task for task, benchmark in BENCHMARKS.items() if benchmark.needs_end}
    assert wrong == {"dms_tiny_ledger", "dms_tiny_road", "dms_tiny_program"}


def test_a_reply_is_its_text_and_is_still_one_after_it_was_copied_or_stored():
    reply = Reply("text", True, Verdict(1.0, "7"))
    assert reply == "text"
    assert isinstance(reply, str)
    for again in (copy.copy(reply), copy.deepcopy(reply), pickle.loads(pickle.dumps(reply))):
        assert (type(again), again, again.truncated, again.verdict) == (Reply, "text", True, Verdict(1.0, "7"))
    assert Reply("text", False).verdict is None


# -- what lm-eval is given ---------------------------------------------------------------------------------------------


def chains(*verdicts, truncated=()):
    return [[Reply("text", place in truncated, Verdict(*verdict)) for place, verdict in enumerate(verdicts)]]


@pytest.mark.parametrize(
    ("replies", "avg", "maj", "pass_all", "truncated"),
    [
        (chains((1.0, "7")), 1, 1, 1, 0),
        (chains((0.0, "8")), 0, 0, 0, 0),
        (chains((1.0, "7"), (0.0, "8"), (0.0, "8"), (0.0, None)), 0.25, 0, 1, 0),
        (chains((1.0, "7"), (1.0, "7"), (0.0, "8"), (0.0, None)), 0.5, 1, 1, 0),
        (chains((0.0, None), (0.0, None), (1.0, "7")), 1 / 3, 1, 1, 0),  # who has no answer does not vote
        (chains((0.0, "8"), (1.0, "7")), 0.5, 0, 1, 0),  # of equals the first
        (chains((0.5, None), (0.25, None)), 0.375, 0, 0.5, 0),  # nobody votes
        (chains((1.0, "7"), (0.0, None), truncated={1}), 0.5, 1, 1, 0.5),
    ],
)
def test_chains_become_the_numbers_of_a_problem(replies, avg, maj, pass_all, truncated):
    found = benchmarks.results_of_embedded({"answer": "not looked at"}, replies)
    assert found == pytest.approx({"avg": avg, "maj": maj, "pass_all": pass_all, "truncated": truncated})


@pytest.mark.parametrize("results_of", [benchmarks.results_of_code, benchmarks.results_of_ruler])
def test_chains_without_votes_have_no_majority_even_if_some_have_answers(results_of):
    found = results_of({"answer": "not looked at"}, chains((1.0, "7"), (0.0, "7"), (0.0, "7"), (1.0, None), truncated={3}))
    assert found == {"avg": 0.5, "pass_all": 1, "truncated": 0.25}


def test_text_of_another_model_is_graded_as_it_comes():
    texts = ["<think>B?</think>Answer: C", "Answer: C", "Answer: D", "<think>Answer: C", "Answer: D</think>Answer: C"]
    found = benchmarks.results_of_choice({"answer": "C"}, [texts])
    assert found == pytest.approx({"avg": 0.6, "maj": 1, "pass_all": 1, "truncated": 0.2})
    alone = benchmarks.results_of_choice({"answer": "C"}, ["Answer: C"])  # one text instead of a list of them
    assert alone == {"avg": 1, "maj": 1, "pass_all": 1, "truncated": 0}
    assert benchmarks.results_of_choice({"answer": "C"}, [[Reply("<think>so", False)]])["truncated"] == 0


@pytest.mark.parametrize(
    ("text", "end"), [("7", None), ("<think>7", "</think>"), ("7</think>8", "</think>"), ("<THINK>", None)]
)
def test_a_text_of_which_nothing_is_known_holds_a_thought_if_there_is_a_sign_of_one(text, end):
    assert benchmarks.thought_end(text) == end


@pytest.mark.parametrize(
    ("tasks", "sandbox", "is_checked"),
    [
        (["dms_aime24", "dms_livecodebench"], "bubblewrap", True),
        (["dms_livecodebench"], "none", False),
        (["dms_aime24", "dms_vt"], "bubblewrap", False),
        (["arc_easy", "humaneval"], "bubblewrap", False),
        ([], "bubblewrap", False),
    ],
)
def test_the_sandbox_is_tried_if_programs_are_to_run_in_it_and_only_then(monkeypatch, tasks, sandbox, is_checked):
    def refuse():
        raise ValueError("no sandbox here")

    monkeypatch.setattr(benchmarks, "check_sandbox", refuse)
    if is_checked:
        with pytest.raises(ValueError, match="no sandbox here"):
            check_graders(tasks, Graders(sandbox))
    else:
        check_graders(tasks, Graders(sandbox))


# -- the list of tasks -------------------------------------------------------------------------------------------------

SIZES_AND_LICENCES = {
    "dms_aime24": ("30", "see page"),
    "dms_aime25": ("30", "see page"),
    "dms_math500": ("500", "see page"),
    "dms_gpqa_diamond": ("198", "CC-BY-4.0"),
    "dms_livecodebench": ("1055; fewer between", "see page"),
    "dms_niah_single": ("per length", "Apache-2.0"),
    "dms_niah_multikey": ("per length", "Apache-2.0"),
    "dms_vt": ("per length", "Apache-2.0"),
    "dms_tiny_ledger": ("for the embedded model", "Apache-2.0"),
    "dms_tiny_road": ("for the embedded model", "Apache-2.0"),
    "dms_tiny_program": ("for the embedded model", "Apache-2.0"),
}


def test_the_list_has_each_task_with_its_size_licence_access_and_expected_scores():
    console = Console(record=True, width=400, file=io.StringIO())
    console.print(listing.task_table())
    lines = {
        task: line for task in BENCHMARKS for line in console.export_text(clear=False).splitlines() if f" {task} " in line
    }
    assert set(lines) == set(SIZES_AND_LICENCES)
    for task, line in lines.items():
        assert all(word in line for word in SIZES_AND_LICENCES[task]), line
        assert ("gated: accept the terms on https://" in line) is (task == "dms_gpqa_diamond")
        assert f" {BENCHMARKS[task].headline} " in line
    assert "qwen_r1_1_5b 28.9, qwen_r1_7b 55.5, qwen_r1_32b 72.6, qwen3_8b 76 (± 5)" in lines["dms_aime24"]
    assert "±" not in lines["dms_aime25"]
    assert "livecodebench/code_generation_lite" in lines["dms_livecodebench"]


def test_printing_the_list_says_where_the_task_files_are(capsys):
    listing.print_tasks()
    text = capsys.readouterr().out
    assert all(task in text for task in BENCHMARKS)
    assert str(TASKS) in text


# -- how far it is -----------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """What `progress` reads as the time: `clock.now`, in seconds."""
    made = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def test_the_state_counts_complete_problems_and_shows_accuracy_with_its_interval(clock):
    with progress.Meter("t", ["a", "b", "a", "b"], 100) as meter:
        assert meter.state() == "0/2 problems, 0/4 chains"
        meter.chain("a", truncated=False, is_new=True)
        meter.graded("a", 1.0)
        meter.chain("b", truncated=True, is_new=False)
        low, high = pareto.wilson_interval(1, 1)
        interval = f"[{100 * low:.0f}-{100 * high:.0f}]"
        assert interval == "[21-100]"
        assert meter.state() == f"0/2 problems, 2/4 chains, 100.0 % {interval}, 50 % truncated"
        meter.chain("a", truncated=False, is_new=True)
        meter.graded("a", 0.0)
        meter.graded("b", 1.0)
        for _ in range(50):
            meter.token()
        clock.now += 2
        # One problem in a half and one in full, whatever number of chains: 1.5 of 2.
        assert meter.state() == "1/2 problems, 3/4 chains, 25 tokens/s, 75.0 % [20-97], 33 % truncated"
        meter.chain("b", truncated=True, is_new=True)
        assert meter.state().startswith("2/2 problems, 4/4 chains, 25 tokens/s")
        assert meter.state().endswith("50 % truncated")


def test_a_log_gets_a_line_a_minute(clock, capsys):
    meter = progress.Meter("t", ["a", "b", "c", "d"], 100)
    said = lambda: capsys.readouterr().out  # noqa: E731
    clock.now += 59.9
    meter.chain("a", truncated=False, is_new=False)
    assert said() == ""
    clock.now += 0.1
    meter.chain("b", truncated=False, is_new=True)  # 60 seconds for the first that was generated here, two to go
    assert said() == "t: 2/4 problems, 2/4 chains, 0 % truncated, 2 min left\n"
    clock.now += 59.9
    meter.chain("c", truncated=False, is_new=True)
    assert said() == ""
    clock.now += 0.1
    for _ in range(255):
        meter.token()
    assert said() == ""
    meter.token()
    assert said() == "t: 3/4 problems, 3/4 chains, 2 tokens/s, 0 % truncated, 1 min left\n"


def test_no_time_is_foretold_before_a_chain_was_generated(clock, capsys):
    meter = progress.Meter("t", ["a", "b"], 100)
    clock.now += 61
    meter.chain("a", truncated=False, is_new=False)
    assert capsys.readouterr().out == "t: 1/2 problems, 1/2 chains, 0 % truncated\n"


def test_a_terminal_gets_a_line_that_is_drawn_over_and_no_log(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stdout", terminal)
    with progress.Meter("a task", ["a", "b"], 100) as meter:
        clock.now += 120
        meter.chain("a", truncated=False, is_new=True)
        meter._bar.refresh()
    assert "1/2 problems, 1/2 chains, 0 % truncated, 2 min left" in terminal.getvalue()
    assert "a task: " not in terminal.getvalue()


# -- warnings ----------------------------------------------------------------------------------------------------------

ROW = Result(
    run_id="r",
    model="qwen_r1_7b",  # AIME 2024: 55.5, give or take 5
    method="full",
    task="dms_aime24",
    target_cr=1.0,
    measured_cr=1.0,
    window=None,
    seed=0,
    num_problems=30,
    accuracy=0.4,
    accuracy_low=0.35,
    accuracy_high=0.45,
    perplexity=None,
    kv_reads=1.0,
    peak_tokens=1.0,
    kv_bytes_peak=1.0,
    tokens_generated=1,
    seconds=1.0,
    config_hash="",
    max_tokens=32768,
    headline="avg",
    metrics={"avg": [0.4, 0.35, 0.45]},
    truncation_rate=0.1,
    versions={},
    git_revision="",
)


def warnings(*rows, limit=None, name="qwen_r1_7b", path="somewhere/else", **changes):
    """What is said of `rows`, or of one that differs from `ROW`, by a plan of a model of this name and path."""
    suspicions = pytest.importorskip("dms_lab.evaluation.reasoning", reason="the extra `eval` is not installed").suspicions
    what = SimpleNamespace(model=SimpleNamespace(name=name, path=path), config=SimpleNamespace(limit=limit))
    return list(suspicions(rows or [dataclasses.replace(ROW, **changes)], what))


@pytest.mark.parametrize("avg", [[0.4, 0.35, 0.45], [0.7, 0.61, 0.78], [0.5, 0.5, 0.504]])
def test_a_full_attention_score_outside_of_what_others_measured_is_suspected(avg):
    (sentence,) = warnings(metrics={"avg": avg})
    value, low, high = (100 * x for x in avg)
    assert f"qwen_r1_7b with full attention scores {value:.1f} % [{low:.0f}-{high:.0f}] on dms_aime24" in sentence
    assert "published is 55.5: outside 5 points, so suspect the pipeline" in sentence


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": {"avg": [0.55, 0.45, 0.65]}},
        {"metrics": {"avg": [0.4, 0.3, 0.51]}},  # the interval reaches 50.5
        {"metrics": {"avg": [0.7, 0.6, 0.8]}},  # and 60.5
        {"limit": 10},
        {"max_tokens": 16384},
        {"max_tokens": None},
        {"name": "qwen3_0_6b"},
        {"name": "hf", "path": "someone/DeepSeek-R1-Distill-Qwen-7B"},
        {"method": "dms"},
        {"method": "tova"},
        {"task": "dms_aime25"},
        {"task": "dms_vt"},
        {"task": "arc_easy"},
    ],
)
def test_what_is_inside_or_cannot_be_compared_is_not_suspected(changes):
    assert len(warnings()) == 1
    assert warnings(**changes) == []


def test_many_chains_that_ran_out_of_tokens_are_told():
    inside = {"metrics": {"avg": [0.55, 0.45, 0.65]}}
    assert warnings(**inside, truncation_rate=0.31) == ["31 % of the chains of full on dms_aime24 ran out of 32768 tokens"]
    assert warnings(**inside, truncation_rate=0.2) == warnings(**inside, truncation_rate=None) == []
    assert len(warnings(truncation_rate=0.5)) == 2


INSIDE = dataclasses.replace(ROW, metrics={"avg": [0.55, 0.45, 0.65]})


def rows(*changes):
    """Rows that nothing but truncation can be said of."""
    return [dataclasses.replace(INSIDE, **change) for change in changes]


def test_a_score_is_compared_by_the_hub_id_of_the_model():
    (sentence,) = warnings(name="hf", path="deepseek-ai/DeepSeek-R1-Distill-Qwen-7B")
    assert "published is 55.5" in sentence


def test_a_score_is_compared_once_whatever_the_widths():
    wide = [dataclasses.replace(ROW, width=width, max_tokens=most) for most in (16384, 32768) for width in (4, 8)]
    (sentence,) = warnings(*wide)
    assert "published is 55.5" in sentence


def test_the_score_at_the_longest_limit_is_the_one_that_is_compared():
    right = dataclasses.replace(INSIDE, max_tokens=65536)
    for order in ((ROW, right), (right, ROW)):
        assert warnings(*order) == []
    wrong = dataclasses.replace(ROW, max_tokens=65536)
    for order in ((INSIDE, wrong), (wrong, INSIDE)):
        assert len(warnings(*order)) == 1


@pytest.mark.parametrize(
    "changes", [{"method": "full"}, {"method": "dms", "target_cr": 8.0}, {"method": "tova"}, {"task": "dms_tiny_road"}]
)
def test_truncation_is_told_of_any_model_and_method_of_parts_and_of_short_chains(changes):
    (row,) = rows({"truncation_rate": 0.5, "max_tokens": 96} | changes)
    told = f"50 % of the chains of {row.method} on {row.task} ran out of 96 tokens"
    assert warnings(row, name="hf", path="someone/model", limit=3) == [told]


def test_truncation_is_told_once_of_each_method_and_compression():
    found = rows(
        *({"width": width, "method": "full", "truncation_rate": 0.3} for width in (1, 4)),
        *({"method": "dms", "target_cr": cr, "truncation_rate": rate} for cr, rate in ((2.0, 0.4), (4.0, 0.1), (8.0, 0.6))),
    )
    assert sorted(sentence.partition(" on ")[0] for sentence in warnings(*found)) == [
        "30 % of the chains of full",
        "40 % of the chains of dms",
        "60 % of the chains of dms",
    ]


@pytest.mark.parametrize("changes", [{"method": "full"}, {"method": "dms", "target_cr": 8.0}])
def test_truncation_at_a_shorter_limit_is_not_told(changes):
    short, long = rows({"max_tokens": 8192, "truncation_rate": 0.9} | changes, {"truncation_rate": 0.1} | changes)
    assert len(warnings(short)) == 1
    assert warnings(short, long) == warnings(long, short) == []


def test_truncation_at_a_shorter_limit_is_not_told_of_a_rule_whose_compression_grows_with_the_limit():
    same = {"method": "tova", "settings": {"budget": 512}}
    short, long = rows(
        same | {"max_tokens": 8192, "target_cr": 16.5, "truncation_rate": 0.9},
        same | {"max_tokens": 32768, "target_cr": 64.5, "truncation_rate": 0.1},
    )
    assert warnings(short, long) == warnings(long, short) == []


def test_truncation_of_prompts_of_each_length_is_told():
    found = rows(*({"task": f"dms_vt_{n}", "max_tokens": 128, "truncation_rate": n / 8192} for n in (1024, 4096)))
    assert warnings(*found) == ["50 % of the chains of full on dms_vt_4096 ran out of 128 tokens"]
