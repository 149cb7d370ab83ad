"""Which settings hold for a task, what is said of those that do not, and what is refused before a model is loaded."""

import dataclasses
import json
from pathlib import Path

import datasets
import pytest
from test_benchmark_runs import FOREIGN, configure

from dms_lab import models
from dms_lab.evaluation.benchmarks import BENCHMARKS
from dms_lab.evaluation.loading import load_task

DATA = Path(__file__).parent / "data"
EMBEDDED = str(models.EMBEDDED)  # 2048 positions
AIME = {"sources": (f"dms_aime24:{DATA / 'aime24.jsonl'}",)}


def load(name, sandbox="bubblewrap", trusted=False, **changes):
    config = configure("c", "out", **({"num_problems": 2} | changes))
    return load_task(name, dataclasses.replace(config, sandbox=sandbox, i_trust_the_code=trusted), EMBEDDED)


def drawn(task):
    """Chains of a problem, widths and seeds; the first as lm-eval has it, too."""
    (leaf,) = task.leaves.values()
    assert leaf.get_config("repeats") == task.settings.num_samples
    return task.settings.num_samples, task.settings.width, task.settings.seeds


def generation(task):
    (leaf,) = task.leaves.values()
    return leaf.get_config("generation_kwargs")


# -- sampling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("dms_tiny_ledger", {"samples": 4}),
        ("dms_tiny_ledger", {"width": (1, 4)}),
        ("dms_tiny_ledger", {"width": (4,)}),
        ("dms_tiny_ledger", {"samples": 8, "width": (2, 4), "temperature": 0.0}),
        ("dms_tiny_ledger", {"seeds": (0, 1)}),
        ("dms_vt", {"samples": 4, "seeds": (0, 1), "lengths": (512,)}),
        ("dms_aime24", {"samples": 4, "seeds": (0, 1), "temperature": 0.0} | AIME),
    ],
)
def test_a_greedy_task_draws_one_chain_a_problem_and_says_so(name, changes):
    task = load(name, **changes)
    assert drawn(task) == (1, (1,), (0,))
    assert task.settings.samples == 1
    assert not generation(task)["do_sample"]
    (notice,) = task.notices
    assert notice.startswith(f"{name} is greedy")
    assert "eval.temperature=" in notice


@pytest.mark.parametrize("changes", [{}, {"samples": 1}, {"seeds": (5,)}, {"temperature": 0.0}, {"max_tokens": (16, 32)}])
def test_nothing_is_said_of_a_greedy_task_that_was_asked_for_one_chain(changes):
    task = load("dms_tiny_ledger", **changes)
    assert task.notices == ()
    assert drawn(task) == (1, (1,), changes.get("seeds", (0,)))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("dms_tiny_ledger", {"temperature": 0.7}),
        ("dms_niah_single", {"temperature": 0.7, "lengths": (512,)}),
        ("dms_aime24", AIME),
        ("dms_aime24", {"temperature": 0.7} | AIME),
    ],
)
def test_a_task_that_samples_keeps_its_chains_widths_and_seeds(name, changes):
    asked = {"samples": 6, "width": (1, 4), "seeds": (0, 3)} | changes
    task = load(name, **asked)
    assert drawn(task) == (6, (1, 4), (0, 3))
    assert task.settings == configure("c", "out", num_problems=2, **asked).eval
    assert task.notices == ()
    assert generation(task)["do_sample"] is True
    assert generation(task)["temperature"] == changes.get("temperature", 0.6)


def test_the_longest_limit_is_generated_and_what_is_not_given_is_as_the_task_s_file_says():
    task = load("dms_aime24", max_tokens=(64, 256, 128), top_k=20, **AIME)
    assert generation(task)["max_gen_toks"] == 256
    assert (generation(task)["top_p"], generation(task)["top_k"]) == (0.95, 20)
    assert generation(load("dms_aime24", **AIME))["max_gen_toks"] == 32768
    assert generation(load("dms_aime24", top_p=0.9, **AIME))["top_p"] == 0.9


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("dms_tiny_ledger", {"top_p": 0.9}, "eval.top_p has"),
        ("dms_tiny_road", {"top_k": 5, "min_p": 0.1}, "eval.top_k, eval.min_p has"),
        ("dms_tiny_ledger", {"top_p": 0.9, "temperature": 0.0}, "eval.top_p has"),
        ("dms_aime24", {"top_p": 0.9, "temperature": 0.0} | AIME, "eval.top_p has"),
    ],
)
def test_a_filter_of_a_greedy_task_is_refused(name, changes, told):
    with pytest.raises(ValueError, match=f"^{told} no effect on {name}, which is greedy; add eval.temperature="):
        load(name, **changes)


@pytest.mark.parametrize("name", sorted(name for name, benchmark in BENCHMARKS.items() if not benchmark.votes))
def test_a_majority_is_refused_where_there_is_no_vote(name):
    with pytest.raises(
        ValueError, match=f"^eval.headline=maj: there is no vote in {name}; it has avg, pass_at_k and pass_all"
    ):
        load(name, headline="maj", lengths=(512,))


def test_a_majority_is_taken_where_there_are_votes_and_other_headlines_where_there_are_none():
    assert load("dms_tiny_ledger", headline="maj").settings.headline == "maj"
    assert load("dms_vt", headline="pass_all", lengths=(512,)).settings.headline == "pass_all"


# -- needles and variables ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "too_long", "fit"),
    [
        ((512, 4096, 2048, 8192), "4096, 8192", "512,2048"),
        ((2049,), "2049", "<shorter ones>"),
        (None, "4096, 8192, 16384, 32768, 65536, 131072", "<shorter ones>"),
    ],
)
@pytest.mark.parametrize("name", ["dms_niah_single", "dms_niah_multikey", "dms_vt"])
def test_lengths_beyond_the_positions_of_the_model_are_refused_with_those_that_fit(name, lengths, too_long, fit):
    told = f"^{name}: prompts of {too_long} tokens exceed the model's 2048 positions; give eval.lengths={fit}$"
    with pytest.raises(ValueError, match=told):
        load(name, lengths=lengths)


def test_embedded_problems_come_in_several_lengths_and_beyond_the_positions_that_is_said():
    task = load("dms_tiny_road", lengths=(256, 4096), num_problems=2)
    docs = task.leaves["dms_tiny_road"].eval_docs
    assert [doc["max_length"] for doc in docs] == [256, 256, 4096, 4096]
    assert len(docs[2]["prompt"]) > 8 * len(docs[0]["prompt"])
    assert task.notices == ("dms_tiny_road: 4096 tokens are more than the 2048 positions of the model",)
    assert "max_length" not in load("dms_tiny_road", num_problems=2).leaves["dms_tiny_road"].eval_docs[0]


def test_prompts_have_the_lengths_and_the_number_asked_for_and_end_where_the_answer_begins():
    for max_tokens, most in ((None, 128), ((16, 200), 200), ((24,), 24)):
        task = load("dms_vt", lengths=(512, 2048), max_tokens=max_tokens)
        assert task.options.get("answer_tokens") == (max(max_tokens) if max_tokens else None)
        assert generation(task)["max_gen_toks"] == most
        docs = list(task.leaves["dms_vt"].eval_docs)
        assert [doc["max_length"] for doc in docs] == [512, 512, 2048, 2048]
        # The haystack grows in lines of about 60 of this tokenizer's tokens.
        assert all(doc["max_length"] - most - 100 < doc["num_tokens"] <= doc["max_length"] - most for doc in docs)


@pytest.mark.parametrize(
    ("name", "asked", "thinking"),
    [
        ("dms_niah_single", "auto", "no"),
        ("dms_vt", "auto", "no"),
        ("dms_vt", "yes", "yes"),
        ("dms_vt", "no", "no"),
        ("dms_tiny_ledger", "auto", "auto"),
        ("dms_tiny_ledger", "yes", "yes"),
        ("dms_tiny_ledger", "no", "no"),
    ],
)
def test_retrieval_is_asked_for_at_once_unless_thoughts_are_wanted(name, asked, thinking):
    task = load(name, thinking=asked, lengths=(512,))
    assert task.thinking == task.record()["thinking"] == thinking


# -- tasks that are lm-eval's own --------------------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """Writes a task file of one of the kinds of `FOREIGN`, with lines added; returns its path."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")  # the variable was read at import
    doc = {"q": "def f(x):\n    return", "choices": [" x", " f", ":"], "a": 0, "text": "import os\n" * 9}
    (tmp_path / "d.jsonl").write_text(json.dumps(doc) + "\n")

    def write(kind, *more):
        head = f"task: local_{kind}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'd.jsonl'}}}}}\n"
        lines = [f"{head}test_split: test\ndoc_to_text: '{{{{q}}}}'\n{FOREIGN[kind]}", *more]
        (tmp_path / f"{kind}.yaml").write_text("\n".join(lines) + "\n")
        return str(tmp_path / f"{kind}.yaml")

    return write


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_task_file_is_loaded_as_it_is_and_nothing_is_said(foreign, kind):
    task = load(foreign(kind))
    assert list(task.leaves) == [f"local_{kind}"]
    assert (task.benchmark, task.options, task.notices) == (None, {}, ())
    assert task.thinking == "auto"


@pytest.mark.parametrize(("sandbox", "trusted"), [("bubblewrap", False), ("none", False), ("bubblewrap", True)])
def test_a_task_that_runs_programs_itself_is_refused_unless_there_is_no_sandbox_and_trust(foreign, sandbox, trusted):
    file = foreign("text", "unsafe_code: true")
    with pytest.raises(
        ValueError, match=r"^local_text is lm-eval's own and runs what a model wrote without .* sandbox=none"
    ):
        load(file, sandbox, trusted)
    assert list(load(file, "none", True).leaves) == ["local_text"]
    assert list(load(foreign("text"), sandbox, trusted).leaves) == ["local_text"]


@pytest.mark.parametrize("kind", ["choice", "rolling"])
def test_a_task_that_is_scored_by_likelihood_has_no_parts(foreign, kind):
    file = foreign(kind)
    with pytest.raises(ValueError, match=f"^local_{kind} is scored by likelihood, .* without shard="):
        load(file, shard=(2, 2))
    assert list(load(file, shard=(1, 1)).leaves) == [f"local_{kind}"]
    assert list(load(foreign("text"), shard=(2, 2)).leaves) == ["local_text"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"samples": 1}, "eval.samples"),
        ({"max_tokens": (16,)}, "eval.max_tokens"),
        ({"temperature": 0.0}, "eval.temperature"),
        ({"width": (1, 4)}, "eval.width"),
        ({"width": (4,)}, "eval.width"),
        ({"seeds": (0, 1)}, "eval.seeds"),
        (
            {"samples": 4, "width": (2, 4), "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seeds": (1, 2)},
            "eval.samples, eval.top_p, eval.top_k, eval.min_p, eval.width, eval.seeds",
        ),
    ],
)
def test_settings_that_a_task_file_does_not_take_are_said(foreign, changes, told):
    file = foreign("text")
    before = generation(load(file))
    task = load(file, **changes)
    assert task.notices == (f"{file} is lm-eval's own and runs as its file says: {told} has no effect on it",)
    assert generation(task) == before


def test_a_task_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^there is no task file .*nothing\.yaml$"):
        load(str(tmp_path / "nothing.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ValueError, match=r"^there is no task file .*folder\.yaml$"):
        load(str(tmp_path / "folder.yaml"))


# -- what is kept of it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.7},
        {"top_p": 0.9},
        {"storage": "fp8"},
        {"thinking": "yes"},
        {"prompt_style": "card"},
        {"chat": False},
        {"deterministic": True},
        {"attention": "triton"},
        {"step": "graph"},
        {"num_problems": 3},
    ],
)
def test_a_record_tells_what_decides_the_results(changes):
    before, after = load("dms_aime24", **AIME).record(), load("dms_aime24", **AIME, **changes).record()
    assert before != after
    assert json.loads(json.dumps(after)) == after


@pytest.mark.parametrize(
    "changes",
    [
        {"places": 3},
        {"samples": 4, "width": (1, 4)},  # columns of their own
        {"seeds": (1, 2)},
        {"max_tokens": (16, 32)},
        {"graders": 1},
        {"attention": "torch"},
        {"step": "eager"},
        {"headline": "avg"},
        {"full": True},
        {"sources": (f"dms_aime24:{DATA / 'aime25.jsonl'}",)},  # prompts are hashed
    ],
)
def test_a_record_leaves_out_what_does_not_or_is_told_elsewhere(changes):
    assert load("dms_aime24", **(AIME | changes)).record() == load("dms_aime24", **AIME).record()


def test_places_are_in_the_record_of_a_deterministic_run_alone():
    few, many = (load("dms_aime24", deterministic=True, places=places, **AIME).record() for places in (3, 4))
    assert (few["deterministic"], few["places"], many["places"]) == (True, 3, 4)
    assert {**few, "places": 4} == many
    assert "places" not in load("dms_aime24", **AIME).record()


def test_a_record_of_a_sampled_and_of_a_greedy_task_have_the_sampling_in_force():
    assert load("dms_aime24", **AIME).record()["generation"] == {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
    assert load("dms_tiny_ledger").record()["generation"] == {"do_sample": False}
    lengths = {"lengths": (512, 1024), "max_tokens": (16, 32)}
    data = load("dms_vt", **lengths).record()["data"]
    assert (data["lengths"], data["answer_tokens"], data["num_problems"]) == ([512, 1024], 32, 2)
    assert not any(EMBEDDED in str(value) for value in data.values())


def test_a_record_of_a_task_file_has_its_sampling(foreign):
    record = load(foreign("text")).record()
    assert (record["generation"], record["data"]) == ({"do_sample": False}, {})
    assert load(foreign("choice"), storage="int8").record()["storage"] == "int8"
