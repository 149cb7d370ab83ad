"""Samples survive their writers, whole and once; what is read is what was added, to the bit."""

import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dms_lab.accounting import Trace
from dms_lab.evaluation import store
from dms_lab.evaluation.sample import decode, encode
from dms_lab.evaluation.store import Sample, SampleStore, merge
from dms_lab.evaluation.verdict import Verdict

HEADS = 288
COUNTS = st.floats(allow_nan=False, allow_infinity=False) | st.integers(0, 1 << 40).map(lambda n: n / HEADS)


def make_sample(problem="p", chain=0, num_tokens=5, finish_reason="eos", max_tokens=None, **changes):
    rng = np.random.default_rng([chain, num_tokens])
    live = rng.integers(0, 9000 * HEADS, num_tokens) / HEADS
    read = np.where(rng.random(num_tokens) < 0.3, live - 1 / HEADS, live)
    held_bytes = rng.integers(0, 1 << 40, num_tokens).astype(float)
    values = {
        "task": "aime",
        "problem": problem,
        "chain": chain,
        "seed": 1,
        "run": "r",
        "prompt_hash": "h",
        "max_tokens": max_tokens or num_tokens,
        "num_prompt": 7,
        "text": f"answer {chain} \u2713\x00 end",
        "ids": tuple(rng.integers(0, 150_000, num_tokens).tolist()),
        "finish_reason": finish_reason,
        "trace": Trace(live, read, held_bytes),
        "num_heads": HEADS,
        "seconds": 1.5,
        "created": f"2025-01-01T00:00:{num_tokens % 60:02d}+00:00",
    }
    return Sample(**(values | changes))


def bits(sample):
    return [getattr(sample.trace, name).tobytes() for name in ("live", "read", "held_bytes")]


def same(a, b):
    return replace(a, trace=b.trace) == b and bits(a) == bits(b)


@settings(deadline=None)
@given(st.lists(st.integers(0, 1 << 45), max_size=40), st.integers(1, 5000), st.booleans())
def test_counts_over_heads_come_back_with_the_same_bits_and_stay_small(totals, num_heads, by_reciprocal):
    whole = np.array(totals, float)
    values = whole * (1 / num_heads) if by_reciprocal else whole / num_heads
    blob = encode(values, num_heads)
    assert blob[:1] in ((b"i", b"m") if by_reciprocal else (b"i",))
    assert decode(blob, num_heads).tobytes() == values.tobytes()
    assert decode(blob, num_heads).dtype == np.float64


@settings(deadline=None)
@given(st.lists(st.floats(), max_size=20), st.integers(1, 5000))
def test_any_other_values_come_back_with_the_same_bits(values, num_heads):
    values = np.array(values, float)
    assert decode(encode(values, num_heads), num_heads).tobytes() == values.tobytes()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(*[COUNTS] * 3), max_size=30), st.text())
def test_a_sample_comes_back_as_it_was(tmp_path_factory, steps, text):
    folder = tmp_path_factory.mktemp("store")
    trace = Trace(*(np.array([row[i] for row in steps], float) for i in range(3)))
    sample = make_sample(num_tokens=len(steps), max_tokens=99, text=text, trace=trace)
    with SampleStore(folder, "a") as writer:
        writer.add(sample)
        (found,) = writer.samples("aime", "r")
    assert same(found, sample)


def test_a_negative_zero_keeps_its_sign(tmp_path):
    assert decode(encode(np.array([-0.0, 1.0]), 4), 4).tobytes() == np.array([-0.0, 1.0]).tobytes()
    sample = make_sample(num_tokens=2, trace=Trace(np.array([0.0, -0.0]), np.array([-0.0, 0.0]), np.zeros(2)))
    with SampleStore(tmp_path, "a") as writer:
        writer.add(sample)
        (found,) = writer.samples("aime", "r")
    assert same(found, sample)


def test_a_long_trace_takes_about_a_byte_a_step():
    rng = np.random.default_rng(0)
    totals = 50_000 + np.cumsum(rng.binomial(HEADS, 0.12, 32_768))
    live = totals / HEADS
    assert len(encode(live, HEADS)) < 1.5 * len(live)
    assert len(encode(np.repeat(live[::32], 32), HEADS)) < 0.2 * len(live)


def test_plain_sql_reads_what_a_sample_cost(tmp_path):
    sample = make_sample(num_tokens=6, max_tokens=9)
    with SampleStore(tmp_path, "a") as writer:
        writer.add(sample)
        frame = writer.to_frame()
    cost = sample.trace.request(7)
    shard = sqlite3.connect(tmp_path / "a.sqlite")
    found = shard.execute(
        "SELECT problem, num_tokens, kv_reads, peak_tokens, kv_bytes_peak, text, typeof(text) FROM samples"
    )
    assert found.fetchall() == [("p", 6, cost.kv_reads, cost.peak_tokens, cost.kv_bytes_peak, sample.text, "text")]
    assert frame.loc[0, ["max_tokens", "num_tokens", "peak_tokens"]].tolist() == [9, 6, cost.peak_tokens]
    assert not {"text", "ids", "live"} & set(frame.columns)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finish_reason": "error"}, "eos, stop, length"),
        ({"finish_reason": "length", "max_tokens": 6}, "max_tokens=6"),
        ({"max_tokens": 4}, "max_tokens=4"),
        ({"trace": Trace(np.zeros(4), np.zeros(5), np.zeros(5))}, "trace.live"),
        ({"trace": Trace(np.zeros(5), np.zeros(5, np.float32), np.zeros(5))}, "trace.read"),
        ({"trace": Trace(np.zeros(5), np.zeros(5), np.full(5, np.nan))}, "trace.held_bytes.*finite"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"seed": 1 << 63}, "63 bits"),
        ({"created": "2025-01-01T00:00:00"}, "time zone"),
    ],
)
def test_what_no_chain_is_like_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_sample(**changes)


# -- one of several samples serves -------------------------------------------------------------------------------------


def served(folder):
    return [(s.problem, s.chain, s.finish_reason, s.num_tokens) for s in SampleStore(folder).samples("aime", "r")]


def test_a_longer_chain_supersedes_and_one_that_ended_supersedes_all(tmp_path):
    with SampleStore(tmp_path, "b") as b, SampleStore(tmp_path, "a") as a:
        b.add(make_sample(num_tokens=4, finish_reason="length"))
        (cut,) = a.summaries()
        assert (cut.serves(4), cut.serves(5)) == (True, False)
        a.add(make_sample(num_tokens=9, finish_reason="length"))
        assert served(tmp_path) == [("p", 0, "length", 9)]
        b.add(make_sample(num_tokens=6, finish_reason="length"))
        assert served(tmp_path) == [("p", 0, "length", 9)]
        b.add(make_sample(num_tokens=8, max_tokens=20))
        assert served(tmp_path) == [("p", 0, "eos", 8)]
        assert a.summaries()[0].serves(10_000)
        a.add(make_sample(num_tokens=50, finish_reason="length"))
        assert served(tmp_path) == [("p", 0, "eos", 8)]


@pytest.mark.parametrize("reverse", [False, True])
def test_of_equals_the_earliest_serves_whatever_the_zone_and_the_shard(tmp_path, reverse):
    early, late = "2025-01-01T11:00:00+05:00", "2025-01-01T07:00:00+00:00"
    with SampleStore(tmp_path, "b") as b, SampleStore(tmp_path, "a") as a:
        for writer, created, seconds in ((a, late, 1.0), (b, early, 2.0))[:: -1 if reverse else 1]:
            writer.add(make_sample(num_tokens=4, created=created, seconds=seconds))
        assert [s.seconds for s in a.samples("aime", "r")] == [2.0]
        assert [s.seconds for s in b.summaries()] == [2.0]


def test_samples_come_sorted_with_their_own_texts_and_summaries_agree(tmp_path):
    added = [make_sample(p, c, 3 + c) for p in ("q", "p") for c in (2, 0, 1)] + [
        make_sample(run="other"),
        make_sample(task="x"),
    ]
    with SampleStore(tmp_path, "b") as b, SampleStore(tmp_path, "a") as a:
        for number, sample in enumerate(added):
            (a, b)[number % 2].add(sample)
    reader = SampleStore(tmp_path)
    found = list(reader.samples("aime", "r"))
    assert [s.key for s in found] == sorted(s.key for s in added[:6])
    assert all(same(s, next(x for x in added if x.key == s.key)) for s in found)
    assert [s.summary() for s in found] == reader.summaries("aime", "r")
    assert len(reader.summaries()) == len(reader.to_frame()) == 8


def test_another_prompt_of_the_same_problem_is_another_chain(tmp_path):
    with SampleStore(tmp_path, "a") as writer:
        for problem, prompt_hash, run in (("p", "h", "r"), ("p", "i", "r"), ("q", "h", "r"), ("p", "j", "other")):
            writer.add(make_sample(problem, prompt_hash=prompt_hash, run=run))
        assert len(list(writer.samples("aime", "r"))) == 3


def test_a_new_verdict_stands_for_the_old_one(tmp_path):
    key = make_sample().key
    with SampleStore(tmp_path, "b") as b, SampleStore(tmp_path, "a") as a:
        b.add_verdict(key, 100, "math 1", Verdict(0, None, "no answer"))
        b.add_verdict(key, 200, "math 1", Verdict(1, "7"))
        b.add_verdict(key, 100, "math 2", Verdict(0.5, "8"))
        assert a.verdicts("aime", "r", "math 1") == {(key, 100): Verdict(0, None, "no answer"), (key, 200): Verdict(1, "7")}
        a.add_verdict(key, 100, "math 1", Verdict(1, "9"))
        assert b.verdicts("aime", "r", "math 1")[key, 100] == Verdict(1, "9")
        b.add_verdict(key, 100, "math 1", Verdict(0, "10"))
        assert a.verdicts("aime", "r", "math 1")[key, 100] == Verdict(0, "10")
        assert a.verdicts("aime", "r", "math 2") == {(key, 100): Verdict(0.5, "8")}
        assert a.verdicts("aime", "other", "math 1") == {}


def test_verdicts_are_added_all_or_none(tmp_path):
    key = make_sample().key
    with SampleStore(tmp_path, "a") as writer:
        with pytest.raises(ValueError, match=r"a\.sqlite"):
            writer.add_verdicts([(key, 1, "g", Verdict(1)), (key, None, "g", Verdict(1))])
        assert writer.verdicts("aime", "r", "g") == {}
        writer.add_verdicts([(key, 1, "g", Verdict(1)), (key, 2, "g", Verdict(1))])
        assert len(writer.verdicts("aime", "r", "g")) == 2


def test_merging_twice_adds_nothing(tmp_path):
    one, two, into = (tmp_path / name for name in ("one", "two", "into"))
    key = make_sample().key
    with SampleStore(one, "a") as a, SampleStore(one, "b") as b, SampleStore(two, "a") as c:
        a.add(make_sample(num_tokens=4, finish_reason="length"))
        b.add(make_sample(num_tokens=6, finish_reason="length"))
        c.add(make_sample(num_tokens=5, finish_reason="length"))
        c.add(make_sample(chain=1))
        a.add_verdict(key, 4, "g", Verdict(0))
        c.add_verdict(key, 4, "g", Verdict(1, "new"))
        assert merge([one, two], into) == 2
        assert merge([two, one, into], into) == 0
        assert served(into) == [("p", 0, "length", 6), ("p", 1, "eos", 5)]
        assert SampleStore(into).verdicts("aime", "r", "g") == {(key, 4): Verdict(1, "new")}
        first, second = SampleStore(into).samples("aime", "r")
        assert same(first, make_sample(num_tokens=6, finish_reason="length"))
        assert same(second, make_sample(chain=1))
        c.add(make_sample(num_tokens=8, finish_reason="length"))
        assert merge([one, two], into) == 1
    assert served(into)[0] == ("p", 0, "length", 8)
    rows = sqlite3.connect(into / "merged.sqlite").execute("SELECT count(*) FROM verdicts").fetchone()
    assert rows == (2,), "the older verdict and the newer, each copied once"


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_store_is_opened_right_or_not_at_all(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        SampleStore(tmp_path / "none")
    with pytest.raises(ValueError, match="plain file name"):
        SampleStore(tmp_path, "a/b")
    with pytest.raises(ValueError, match="reading only"):
        SampleStore(tmp_path).add(make_sample())
    with (
        SampleStore(tmp_path, "a") as writer,
        pytest.raises(ValueError, match=r"another process writes the shard a .*wait"),
    ):
        SampleStore(tmp_path, "a")
    with pytest.raises(ValueError, match="closed"):
        writer.add(make_sample())
    with SampleStore(tmp_path, "a") as writer:
        writer.add(make_sample())


def test_a_damaged_shard_is_named(tmp_path):
    with SampleStore(tmp_path, "fine") as writer:
        writer.add(make_sample())
    (tmp_path / "broken.sqlite").write_bytes(b"not a database, whatever it is called " * 300)
    for use in (lambda s: list(s.samples("aime", "r")), lambda s: s.verdicts("aime", "r", "g"), lambda s: s.to_frame()):
        with pytest.raises(ValueError, match=r"broken\.sqlite.*move it out"):
            use(SampleStore(tmp_path))
    with pytest.raises(ValueError, match=r"broken\.sqlite"):
        SampleStore(tmp_path, "broken")
    (tmp_path / "broken.sqlite").unlink()
    whole = (tmp_path / "fine.sqlite").read_bytes()
    (tmp_path / "fine.sqlite").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"fine\.sqlite"):
        list(SampleStore(tmp_path).samples("aime", "r"))


def test_a_damaged_column_is_named(tmp_path):
    with SampleStore(tmp_path, "a") as writer:
        writer.add(make_sample())
    with sqlite3.connect(tmp_path / "a.sqlite") as shard:
        shard.execute("UPDATE samples SET live = x'6900'")
    with pytest.raises(ValueError, match=r"a\.sqlite"):
        list(SampleStore(tmp_path).samples("aime", "r"))


def test_another_version_and_other_databases_are_refused_and_an_empty_shard_is_not(tmp_path):
    (tmp_path / "starting.sqlite").touch()
    assert SampleStore(tmp_path).summaries() == []
    with SampleStore(tmp_path, "starting") as writer:
        writer.add(make_sample())
    assert len(SampleStore(tmp_path).summaries()) == 1
    with sqlite3.connect(tmp_path / "starting.sqlite") as shard:
        shard.execute("UPDATE meta SET value = '99' WHERE name = 'schema_version'")
    for opened in (lambda: SampleStore(tmp_path).summaries(), lambda: SampleStore(tmp_path, "starting")):
        with pytest.raises(ValueError, match=r"starting\.sqlite is a sample store of version 99"):
            opened()
    with sqlite3.connect(tmp_path / "starting.sqlite") as shard:
        shard.execute("DROP TABLE meta")
    with pytest.raises(ValueError, match="is no sample store"):
        SampleStore(tmp_path).summaries()


def test_commits_wait_for_the_disk_and_need_no_shared_memory(tmp_path):
    with SampleStore(tmp_path, "a") as writer, writer._transaction() as shard:
        assert shard.execute("PRAGMA synchronous").fetchone() == (2,)
        assert shard.execute("PRAGMA journal_mode").fetchone() == ("truncate",)


# -- writers that are killed -------------------------------------------------------------------------------------------

CHILD = """
import sys
import numpy as np
from dms_lab.evaluation.store import Sample, SampleStore, now
from dms_lab.accounting import Trace
assert "torch" not in sys.modules, "a store needs no torch"
folder, first = sys.argv[1], int(sys.argv[2])
with SampleStore(folder, "shard") as store:
    for chain in range(first, 100_000):
        ids = np.random.default_rng(chain).integers(0, 150_000, 20_000)
        trace = Trace(ids / 7, (ids + 1) / 7, ids * 64.0)
        made = ("x" * 50_000, tuple(ids.tolist()), "eos", trace, 7, 1.0, now())
        store.add(Sample("t", "p", chain, 0, "r", "h", 20_000, 9, *made))
        print(chain, flush=True)
"""


def start(*arguments):
    return subprocess.Popen([sys.executable, "-c", CHILD, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def acknowledged(child):
    return [int(line) for line in child.stdout.read().splitlines()]


def test_a_writer_killed_at_any_moment_loses_nothing_that_it_was_told_is_there(tmp_path):
    rng, known, next_chain = random.Random(0), [], 0
    for _ in range(12):
        child = start(tmp_path, next_chain)
        known.append(int(child.stdout.readline()))
        time.sleep(rng.uniform(0, 0.08))
        child.send_signal(signal.SIGKILL)
        known += acknowledged(child)
        assert child.wait() == -signal.SIGKILL
        found = list(SampleStore(tmp_path).samples("t", "r"))  # the next reader, before any writer
        chains = [s.chain for s in found]
        assert set(known) <= set(chains)
        assert len(chains) == len(set(chains)) <= len(known) + 12
        next_chain = max(chains) + 1
    for sample in found:
        ids = np.random.default_rng(sample.chain).integers(0, 150_000, 20_000)
        assert sample.ids == tuple(ids.tolist())
        assert (sample.trace.live == ids / 7).all()
        assert (sample.trace.read == (ids + 1) / 7).all()
        assert sample.text == "x" * 50_000
    rows = sqlite3.connect(tmp_path / "shard.sqlite").execute("SELECT count(*) FROM samples").fetchone()[0]
    assert rows == len(found)


def test_a_transaction_that_was_killed_after_it_touched_the_file_is_rolled_back_by_a_reader(tmp_path):
    with SampleStore(tmp_path, "a") as writer:
        writer.add(make_sample())
    script = """
import os, signal, sqlite3, sys
shard = sqlite3.connect(sys.argv[1], isolation_level=None)
shard.execute("PRAGMA journal_mode=TRUNCATE")
shard.execute("PRAGMA cache_size=1")
shard.execute("BEGIN IMMEDIATE")
for chain in range(1, 200):
    shard.execute("INSERT INTO samples SELECT * FROM samples WHERE chain = 0 LIMIT 1")
    shard.execute("UPDATE samples SET chain = ? WHERE rowid = last_insert_rowid()", (chain,))
os.kill(os.getpid(), signal.SIGKILL)
"""
    before = (tmp_path / "a.sqlite").read_bytes()
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.sqlite")])
    assert (tmp_path / "a.sqlite").read_bytes() != before, "the test must leave a file that is half written"
    (found,) = SampleStore(tmp_path).samples("aime", "r")
    assert same(found, make_sample())


def test_a_second_process_cannot_write_a_shard_until_the_first_is_gone(tmp_path):
    child = start(tmp_path, 0)
    child.stdout.readline()
    try:
        with pytest.raises(ValueError, match="another process writes the shard shard"):
            SampleStore(tmp_path, "shard")
        SampleStore(tmp_path, "other").close()
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    SampleStore(tmp_path, "shard").close()


def test_readers_see_whole_samples_while_a_shard_is_written_and_the_writer_goes_on(tmp_path):
    child = start(tmp_path, 0)
    first = int(child.stdout.readline())
    try:
        reader, counts, end = SampleStore(tmp_path), [], time.monotonic() + 1.5
        while time.monotonic() < end:
            found = list(reader.samples("t", "r"))
            assert all(len(s.ids) == 20_000 for s in found)
            counts.append(len(found))
        assert child.poll() is None
    finally:
        child.kill()
        known = acknowledged(child)
        child.wait()
        child.stdout.close()
    assert counts == sorted(counts)
    assert counts[-1] > counts[0] >= first
    assert len(known) >= counts[-1] - 2


def test_a_transaction_waits_for_a_reader(tmp_path):
    with SampleStore(tmp_path, "a") as writer:
        writer.add(make_sample())
        slow = sqlite3.connect(tmp_path / "a.sqlite", isolation_level=None, check_same_thread=False)
        slow.execute("BEGIN")
        slow.execute("SELECT count(*) FROM samples").fetchone()
        threading.Timer(0.3, lambda: slow.execute("COMMIT")).start()
        began = time.monotonic()
        writer.add(make_sample(chain=1))
        assert time.monotonic() - began > 0.2


def test_a_shard_that_stays_locked_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_BUSY_SECONDS", 0.1)
    with SampleStore(tmp_path, "a") as writer:
        other = sqlite3.connect(tmp_path / "a.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(ValueError, match=r"a\.sqlite was locked by others"):
            writer.add(make_sample())
        other.execute("ROLLBACK")
        writer.add(make_sample())
        assert len(writer.summaries()) == 1
