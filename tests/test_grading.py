"""Verdicts are made in the background, once a cut, and those that were made are kept, whatever happens after."""

import hashlib
import json
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from dms_lab.accounting import Trace
from dms_lab.evaluation.benchmarks import Benchmark, Graders
from dms_lab.evaluation.grading import Grading
from dms_lab.evaluation.sample import Sample
from dms_lab.evaluation.sandbox import SandboxLimits
from dms_lab.evaluation.store import SampleStore
from dms_lab.evaluation.verdict import Verdict

VERSION = "fake-1"
# as `Grading.grader_of` names it: where the answer is looked for, and what it is compared with
GRADER = f"{VERSION}-{hashlib.sha256(json.dumps([None, 'gold', None, None, None]).encode()).hexdigest()[:12]}"


def make_sample(chain=0, num_tokens=5, finish_reason="eos"):
    counts = np.arange(1.0, num_tokens + 1)
    return Sample(
        task="aime",
        problem="p",
        chain=chain,
        seed=0,
        run="r",
        prompt_hash="h",
        max_tokens=num_tokens,
        num_prompt=3,
        text=f"chain {chain} whole",
        ids=tuple(range(10 * chain, 10 * chain + num_tokens)),
        finish_reason=finish_reason,
        trace=Trace(counts, counts, counts),
        num_heads=1,
        seconds=0.0,
        created="2025-01-01T00:00:00+00:00",
    )


class Grader:
    """What it was asked to grade; an answer with "bad" in it raises, and one with "slow" waits for `go`."""

    def __init__(self):
        self.asked, self.ended, self.threads = [], [], set()
        self.began, self.go = threading.Event(), threading.Event()

    def __call__(self, graders, doc, answer):
        self.asked.append(answer)
        self.threads.add(threading.get_ident())
        if "slow" in answer:
            self.began.set()
            self.go.wait(20)
        self.ended.append(answer)
        if "bad" in answer:
            raise RuntimeError(f"no verdict on {answer}")
        return Verdict(1.0, f"{doc['answer']}: {answer}")


class Texts:
    """Stands for the tokenizer: which prefixes it was given."""

    def __init__(self):
        self.asked = []

    def __call__(self, ids):
        self.asked.append(tuple(ids))
        return "ids " + " ".join(map(str, ids))


@pytest.fixture
def grader():
    made = Grader()
    yield made
    made.go.set()


@pytest.fixture
def store(tmp_path):
    with SampleStore(tmp_path / "samples", "a") as made:
        yield made


def grading(grader, store=None, texts=None, threads=1, regrade=False, **changes):
    benchmark = replace(Benchmark("fake", grader, "avg"), **changes)
    return Grading(benchmark, Graders(), texts or Texts(), store, "aime", "r", threads, regrade)


def put_all(open_grading, samples, max_tokens=5):
    """Puts the samples and returns where their verdicts will be, by chain."""
    found = {}
    for sample in samples:
        open_grading.put(
            sample, max_tokens, {"answer": "gold"}, None, lambda v, chain=sample.chain: found.update({chain: v})
        )
    return found


def verdicts_of(store):
    """By (key, cut), of the version at hand, whatever the answers were compared with."""
    found = store.graded("aime", "r").items()
    return {(key, cut): verdict for (key, cut, by), verdict in found if by.startswith(f"{VERSION}-")}


def made(found):
    return {chain: verdict.answer for chain, verdict in found.items()}


# -- what is graded ----------------------------------------------------------------------------------------------------


def test_leaving_waits_for_every_verdict_and_keeps_it(grader, store):
    samples = [make_sample(chain) for chain in range(4)]
    texts = Texts()
    with grading(grader, store, texts, threads=2) as open_grading:
        found = put_all(open_grading, samples)
    assert made(found) == {chain: f"gold: chain {chain} whole" for chain in range(4)}
    assert verdicts_of(store) == {(s.key, 5): found[s.chain] for s in samples}
    assert texts.asked == [], "a whole chain has its text"
    assert threading.get_ident() not in grader.threads


def test_callbacks_run_where_the_samples_are_put(grader):
    threads = []
    with grading(grader, threads=2) as open_grading:
        for chain in range(3):
            open_grading.put(make_sample(chain), 5, {"answer": ""}, None, lambda v: threads.append(threading.get_ident()))
    assert threads == [threading.get_ident()] * 3


def test_a_verdict_that_the_store_has_is_given_at_once_and_not_made_again(grader, store):
    known = Verdict(0.25, "kept", "from before")
    store.add_verdict(make_sample().key, 5, GRADER, known)
    with grading(grader, store) as open_grading:
        assert put_all(open_grading, [make_sample()]) == {0: known}
        assert put_all(open_grading, [make_sample()], max_tokens=100) == {0: known}, "it ended by itself within 5"
    assert grader.asked == []


def test_regrading_makes_known_verdicts_again_and_the_new_ones_stand(grader, store):
    store.add_verdict(make_sample().key, 5, GRADER, Verdict(0.25, "kept"))
    with grading(grader, store, regrade=True) as open_grading:
        put_all(open_grading, [make_sample()])
    assert grader.asked == ["chain 0 whole"]
    assert verdicts_of(store)[make_sample().key, 5] == Verdict(1.0, "gold: chain 0 whole")


def test_another_answer_key_or_another_end_of_the_thought_is_graded_anew(grader, store):
    with grading(grader, store) as open_grading:
        put_all(open_grading, [make_sample()])
    for gold, think_end in (("gold", None), ("other", None), ("gold", "whole"), ("other", None)):
        with grading(grader, store) as open_grading:
            open_grading.put(make_sample(), 5, {"answer": gold}, think_end, lambda verdict: None)
    assert len(grader.asked) == 3
    assert len(store.graded("aime", "r")) == 3


def test_answers_wait_for_a_grader_in_bounded_numbers(grader, store, monkeypatch):
    from dms_lab.evaluation import grading as module

    monkeypatch.setattr(module, "_MOST_OPEN", 4)
    most = []
    with grading(grader, store, threads=2) as open_grading:
        for chain in range(40):
            open_grading.put(make_sample(chain), 5, {"answer": "gold"}, None, lambda verdict: None)
            most.append(len(open_grading._open))
    assert max(most) <= 4
    assert len(verdicts_of(store)) == 40


@pytest.mark.parametrize("changes", [{"version": "2"}, {"kind": "other"}])
def test_the_verdicts_of_another_grader_or_version_of_it_do_not_count(grader, store, changes):
    store.add_verdict(make_sample().key, 5, GRADER, Verdict(0.25, "kept"))
    with grading(grader, store, **changes) as open_grading:
        put_all(open_grading, [make_sample()])
    assert len(grader.asked) == 1
    assert verdicts_of(store)[make_sample().key, 5].score == 0.25


def test_a_chain_cut_earlier_is_graded_on_what_is_left_of_it_and_kept_under_that_cut(grader, store):
    texts, sample = Texts(), make_sample(chain=1)
    store.add_verdict(sample.key, 5, GRADER, Verdict(0.25, "of the whole"))
    with grading(grader, store, texts) as open_grading:
        found = put_all(open_grading, [sample], max_tokens=3)
    assert texts.asked == [(10, 11, 12)]
    assert grader.asked == ["ids 10 11 12"]
    verdicts = verdicts_of(store)
    assert verdicts == {(sample.key, 3): found[1], (sample.key, 5): Verdict(0.25, "of the whole")}


@pytest.mark.parametrize(
    ("finish_reason", "max_tokens", "truncated"),
    [("eos", 5, False), ("eos", 9, False), ("eos", 4, True), ("length", 5, True), ("length", 2, True)],
)
def test_the_grader_hears_whether_the_cut_left_the_answer_unfinished(grader, finish_reason, max_tokens, truncated):
    with grading(grader, needs_end=True) as open_grading:
        found = put_all(open_grading, [make_sample(finish_reason=finish_reason)], max_tokens)
    assert (found[0].note == "cut off within the answer") is truncated
    assert len(grader.asked) == (0 if truncated else 1)


def test_a_chain_that_is_too_short_for_the_limit_is_refused(grader):
    with grading(grader) as open_grading, pytest.raises(ValueError, match="draw it again with max_tokens=6"):
        put_all(open_grading, [make_sample(finish_reason="length")], max_tokens=6)


def test_the_same_cut_is_graded_once_also_while_its_verdict_is_still_being_made(grader, store):
    sample = replace(make_sample(), text="slow")
    with grading(grader, store, threads=2) as open_grading:
        first, longer = put_all(open_grading, [sample]), put_all(open_grading, [sample], max_tokens=50)
        assert (first, longer) == ({}, {})
        grader.go.set()
        open_grading.drain(wait=True)
        assert made(first) == made(longer) == {0: "gold: slow"}
        assert made(put_all(open_grading, [sample], max_tokens=500)) == {0: "gold: slow"}
    assert grader.asked == ["slow"]


def test_a_verdict_is_taken_in_as_the_next_chain_is_put_and_nobody_waits_for_another(grader, store):
    with grading(grader, store, threads=2) as open_grading:
        waiting = put_all(open_grading, [replace(make_sample(0), text="slow")])
        open_grading._pool.submit(grader.began.wait, 20)  # the other thread
        quick = put_all(open_grading, [make_sample(1)])
        while not grader.ended:
            time.sleep(0.001)
        open_grading._pool.submit(int).result(20)  # the thread is done with it
        put_all(open_grading, [replace(make_sample(2), text="slow")])
        assert (waiting, made(quick)) == ({}, {1: "gold: chain 1 whole"})
        assert set(verdicts_of(store)) == {(make_sample(1).key, 5)}
        grader.go.set()
    assert made(waiting) == {0: "gold: slow"}


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_what_a_grader_raises_comes_out_at_leaving_and_verdicts_made_before_are_kept(grader, store):
    open_grading = grading(grader, store, threads=1)  # one after the other
    found = put_all(open_grading, [replace(make_sample(0), text="slow"), replace(make_sample(1), text="slow, bad")])
    grader.go.set()
    with pytest.raises(RuntimeError, match="no verdict on slow, bad"):
        open_grading.__exit__(None, None, None)
    assert made(found) == {0: "gold: slow"}
    assert {key.chain for key, _ in verdicts_of(store)} == {0}


def test_verdicts_that_are_there_beside_an_error_are_kept_and_the_error_is_raised_once(grader, store):
    open_grading = grading(grader, store)
    open_grading._pool.submit(grader.go.wait, 20)  # the one thread is busy until both are put
    found = put_all(open_grading, [replace(make_sample(0), text="bad"), make_sample(1)])
    grader.go.set()
    next(future for (key, *_), (future, _) in open_grading._open.items() if key.chain == 1).result(20)
    with pytest.raises(RuntimeError, match="no verdict on bad"):
        open_grading.drain()
    assert made(found) == {1: "gold: chain 1 whole"}
    assert {key.chain for key, _ in verdicts_of(store)} == {1}
    open_grading.__exit__(None, None, None)


def test_after_an_error_the_rest_is_not_waited_for(grader, store):
    open_grading, both_are_put = grading(grader, store), threading.Event()
    open_grading._pool.submit(both_are_put.wait, 20)
    found = put_all(open_grading, [replace(make_sample(0), text="bad"), replace(make_sample(1), text="slow")])
    both_are_put.set()
    with pytest.raises(RuntimeError, match="no verdict on bad"):
        open_grading.drain(wait=True)
    assert grader.ended == ["bad"]
    grader.go.set()
    open_grading.__exit__(None, None, None)
    assert made(found) == {1: "gold: slow"}


def test_leaving_by_an_exception_waits_for_nothing_and_begins_nothing_more(grader, store):
    open_grading = grading(grader, store)

    def interrupted():
        with open_grading:
            put_all(open_grading, [replace(make_sample(chain), text=f"slow {chain}") for chain in range(4)])
            assert grader.began.wait(20)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert grader.ended == []
    grader.go.set()
    open_grading._pool.shutdown(wait=True)
    assert grader.asked == ["slow 0"]


# -- the version of a grader -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limits",
    [
        SandboxLimits(seconds_per_test=12.0),
        SandboxLimits(memory_bytes=1 << 30),
        SandboxLimits(seconds_per_problem=100.0),
    ],
)
def test_the_limits_of_the_sandbox_are_part_of_the_grader_s_version_where_code_runs_and_only_there(limits):
    def version(runs_code, limits):
        benchmark = Benchmark("fake", lambda *_: Verdict(1.0), "avg", runs_code=runs_code)
        with Grading(benchmark, Graders(limits=limits), str, None, "t", "r") as open_grading:
            return open_grading.version

    assert version(False, limits) == version(False, SandboxLimits()) == VERSION
    assert version(True, limits) != version(True, SandboxLimits())
    assert version(True, limits) == version(True, replace(limits))
    assert version(True, SandboxLimits()).startswith(VERSION)
