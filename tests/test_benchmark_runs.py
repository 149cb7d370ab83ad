"""From a checkpoint through lm-eval and the store to results: points, shards, kills, and the project's own evaluation."""

import json
import multiprocessing
import os
import random
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dms_lab import models, results
from dms_lab.attachment import retrofit
from dms_lab.checkpoint import fingerprint, save_checkpoint
from dms_lab.config import ModelConfig
from dms_lab.evaluation import hard
from dms_lab.evaluation.hard import Label
from dms_lab.evaluation.reasoning import chosen, evaluate_benchmarks
from dms_lab.evaluation.store import SampleStore
from dms_lab.evaluation_config import EvaluateConfig, ReasoningConfig
from dms_lab.policies.dms import DmsConfig
from dms_lab.tiny import tasks

TASKS = tuple(f"dms_tiny_{family}" for family in tasks.FAMILIES)
TINY = ModelConfig("tiny", str(models.EMBEDDED), 512, 16, 1e-3, 1e-4, 4, "float32", False)
SAME = ("accuracy", "kv_reads", "peak_tokens", "kv_bytes_peak", "measured_cr", "tokens_generated", "num_problems")
SAME += ("problem_scores",)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The embedded model under an untrained predictor that evicts a part of what it reads, kept as a checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint") / "c"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(models.EMBEDDED).eval()
    mark = fingerprint(model)
    handle = retrofit(model, DmsConfig(window=16, offset=0.253, scale=1.0))
    with torch.no_grad():
        for predictor in handle.predictors.values():
            predictor.weight.normal_(0, 0.02)
    save_checkpoint(folder, handle, "adapter", str(models.EMBEDDED), mark, {"cr": 2.0})
    return folder


def configure(checkpoint, out, **changes):
    values = {
        "tasks": ("dms_tiny_ledger",),
        "samples": None,
        "width": (1,),
        "max_tokens": None,
        "seeds": (0,),
        "headline": "auto",
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "min_p": None,
        "prompt_style": "paper",
        "thinking": "auto",
        "chat": True,
        "full": False,
        "sources": (),
        "choices_seed": 0,
        "release": "release_v6",
        "start": "2024-08-01",
        "end": "2025-01-31",
        "errata": None,
        "lengths": None,
        "num_problems": 6,
        "places": 32,
        "num_pages": None,
        "page_size": None,
        "storage": "model",
        "prefill_chunk": 256,
        "reserve": 0.05,
        "deterministic": False,
        "attention": "auto",
        "step": "auto",
        "graders": 2,
        "seconds_per_test": 6.0,
        "seconds_per_problem": None,
    }
    top = {"limit": None, "shard": (1, 1), "regrade": False, "store": None}
    top |= {name: changes.pop(name) for name in tuple(top) if name in changes}
    settings = ReasoningConfig(**(values | changes))
    rest = (None, None, top["limit"], top["shard"], str(out), top["store"], "bubblewrap", False, top["regrade"], 1)
    return EvaluateConfig(settings, TINY, str(checkpoint), *rest)


def rows_of(folder):
    return [json.loads(line) for line in (Path(folder) / results.RESULTS).read_text().splitlines()]


def points_of(folder):
    """Everything measured but time."""
    kept = [f for f in rows_of(folder)[0] if f not in ("seconds", "versions", "git_revision", "run_id")]
    return [{name: row[name] for name in kept} for row in rows_of(folder)]


def test_it_agrees_to_the_digit_with_the_projects_own_evaluation(checkpoint, tmp_path):
    evaluate_benchmarks(configure(checkpoint, tmp_path / "out", tasks=TASKS, full=True, num_problems=12))
    found = {(row["method"], row["task"]): row for row in rows_of(tmp_path / "out")}
    tokenizer = models.load_tokenizer(TINY)
    model = AutoModelForCausalLM.from_pretrained(models.EMBEDDED, dtype=torch.float32).eval()
    from dms_lab.checkpoint import load_checkpoint
    from dms_lab.policies import FullPolicy

    handle = load_checkpoint(checkpoint, model)
    problems = {family: hard.make_problems(family, 12, 512, 0) for family in tasks.FAMILIES}
    for method, make_policy in (("dms", handle.policy), ("full", FullPolicy)):
        with handle.disabled() if method == "full" else torch.no_grad():
            label = Label("r", "tiny", method, 2.0, 16, 0, "")
            own, _ = hard.evaluate_tasks(handle, make_policy, tokenizer, problems, label)
        for row in own:
            other = found[method, f"dms_tiny_{row.task}"]
            if method == "full":  # there the whole model is under the rule; here it runs as it is
                assert (other["accuracy"], other["problem_scores"]) == (row.accuracy, row.problem_scores)
                continue
            assert {name: other[name] for name in SAME} == {name: getattr(row, name) for name in SAME}
    assert found["dms", "dms_tiny_ledger"]["measured_cr"] > 1.1
    assert {len(row["problem_scores"]) for row in found.values()} == {12}


def test_a_shorter_limit_is_what_a_shorter_run_would_have_measured(checkpoint, tmp_path):
    sampled = {"temperature": 2.0, "samples": 3, "tasks": ("dms_tiny_ledger", "dms_tiny_road")}
    evaluate_benchmarks(configure(checkpoint, tmp_path / "all", width=(1, 3), max_tokens=(20, 45, 96), **sampled))
    rows = points_of(tmp_path / "all")
    assert len(rows) == 12
    assert len({row["accuracy"] for row in rows}) > 2
    for row in rows:
        assert sum(row["problem_scores"]) / 6 == pytest.approx(row["accuracy"])
    assert len({tuple(row["problem_scores"]) for row in rows}) == 4
    for limit in (20, 45):
        out = tmp_path / str(limit)
        evaluate_benchmarks(configure(checkpoint, out, width=(1, 3), max_tokens=(limit,), **sampled))
        assert points_of(out) == [row for row in rows if row["max_tokens"] == limit]


def test_more_widths_of_the_same_chains_are_drawn_from_the_store(checkpoint, tmp_path, monkeypatch):
    evaluate_benchmarks(configure(checkpoint, tmp_path, samples=4, temperature=1.0))
    from dms_lab.evaluation import lm

    monkeypatch.delattr(lm, "Engine")
    evaluate_benchmarks(configure(checkpoint, tmp_path, samples=4, temperature=1.0, width=(1, 2, 4), regrade=True))
    rows = points_of(tmp_path)
    assert [row["width"] for row in rows] == [1, 2, 4]  # the point that was there already is not written twice
    assert rows[2]["kv_reads"] == pytest.approx(4 * rows[0]["kv_reads"])


def test_seeds_are_runs_of_their_own(checkpoint, tmp_path):
    evaluate_benchmarks(configure(checkpoint, tmp_path, seeds=(0, 1), temperature=1.5, samples=2))
    (row,) = rows_of(tmp_path)
    assert row["sampling_seeds"] == [0, 1]
    with SampleStore(tmp_path / "samples") as store:
        frame = store.to_frame()
    assert len(frame) == 2 * 2 * 6
    assert set(frame["seed"]) == {0, 1}
    assert frame["run"].nunique() == 2


def test_parts_make_the_whole(checkpoint, tmp_path):
    sampled = {"temperature": 1.0, "samples": 2, "deterministic": True, "places": 3}
    evaluate_benchmarks(configure(checkpoint, tmp_path / "one", **sampled))
    for part in (3, 1, 2):
        evaluate_benchmarks(configure(checkpoint, tmp_path / "parts", shard=(part, 3), **sampled))
        assert not (tmp_path / "parts" / results.RESULTS).exists()
    with SampleStore(tmp_path / "parts" / "samples") as store:
        assert len(store.summaries()) == 12
    evaluate_benchmarks(configure(checkpoint, tmp_path / "parts", **sampled))
    assert points_of(tmp_path / "parts") == points_of(tmp_path / "one")
    names = {path.name for path in (tmp_path / "parts" / "samples").glob("*.sqlite")}
    assert names == {"shard-1-of-3.sqlite", "shard-2-of-3.sqlite", "shard-3-of-3.sqlite", "shard-1-of-1.sqlite"}


def test_parts_are_disjoint_and_complete():
    for number, limit, parts in ((10, None, 3), (10, 7, 4), (2, None, 5)):
        found = [chosen(number, limit, (part, parts)) for part in range(1, parts + 1)]
        assert sorted(position for part in found for position in part) == list(range(min(number, limit or number)))


def num_chains(place):
    return len(SampleStore(place).summaries()) if place.is_dir() else 0


def run_quietly(config):
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    evaluate_benchmarks(config)


def test_a_run_killed_again_and_again_ends_as_one_that_was_not(checkpoint, tmp_path):
    sampled = {
        "temperature": 1.0,
        "samples": 4,
        "deterministic": True,
        "places": 4,
        "num_problems": 6,
        "max_tokens": (40, 96),
    }
    evaluate_benchmarks(configure(checkpoint, tmp_path / "whole", width=(1, 4), **sampled))
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["dms_lab.evaluation.reasoning"])
    config = configure(checkpoint, tmp_path / "killed", width=(1, 4), **sampled)
    place, rng, counts = tmp_path / "killed" / "samples", random.Random(0), [0]
    for _ in range(6):
        child = processes.Process(target=partial(run_quietly, config))
        child.start()
        wanted = counts[-1] + rng.choice((0, 1, 2, 3))
        while child.exitcode is None and num_chains(place) < wanted:
            child.join(0.02)
        child.join(rng.uniform(0, 0.5 if wanted > counts[-1] else 2.0))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        counts.append(num_chains(place))
    assert counts == sorted(counts)  # nothing that was there is lost
    run_quietly(config)
    assert points_of(tmp_path / "killed") == points_of(tmp_path / "whole")
    with SampleStore(tmp_path / "killed" / "samples") as killed, SampleStore(tmp_path / "whole" / "samples") as whole:
        for task, run in {(s.task, s.run) for s in whole.summaries()}:
            pairs = zip(killed.samples(task, run), whole.samples(task, run), strict=True)
            assert all(a.ids == b.ids and a.key == b.key for a, b in pairs)
    assert len(set(counts)) > 3


FOREIGN = {
    "choice": "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: a\ntarget_delimiter: ''\n"
    "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]",
    "text": "output_type: generate_until\ndoc_to_target: '{{choices[0]}}'\n"
    'generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}\n'
    "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_target: '{{text}}'\n"
    "metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]",
}


def test_other_tasks_of_lm_eval_run_under_the_policy_too(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    docs = [
        {"q": f"def f{i}(x):\n    return", "choices": [" x", " f", ":"], "a": 0, "text": "import os\n" * 9}
        for i in range(3)
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, text in FOREIGN.items():
        head = f"task: local_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'd.jsonl'}}}}}\n"
        (tmp_path / f"{name}.yaml").write_text(f"{head}test_split: test\ndoc_to_text: '{{{{q}}}}'\n{text}\n")
    files = tuple(str(tmp_path / f"{name}.yaml") for name in FOREIGN)
    evaluate_benchmarks(configure(checkpoint, tmp_path / "out", tasks=files, limit=2))
    found = {row["task"]: row for row in rows_of(tmp_path / "out")}
    assert list(found) == ["local_choice", "local_text", "local_rolling"]
    choice, text, rolling = found.values()
    assert (choice["headline"], choice["num_problems"]) == ("acc,none", 2)
    assert 0 <= choice["accuracy_low"] <= choice["accuracy"] <= choice["accuracy_high"] <= 1
    assert choice["kv_reads"] is None
    assert text["kv_reads"] > 0
    assert text["truncation_rate"] is not None
    assert rolling["accuracy"] is None
    assert rolling["perplexity"] > 1
    assert rolling["metrics"]["word_perplexity,none"][1:] == [None, None]
