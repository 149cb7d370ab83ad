"""Threads: as many as asked for, else the cores that are free."""

import pytest
import torch

from dms_lab import threads


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Eight cores, all ours, as busy as the test says, for a new process that torch gives four threads."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    number = [4]  # torch counts cores, not hyper-threads
    monkeypatch.setattr(torch, "get_num_threads", lambda: number[-1])
    monkeypatch.setattr(torch, "set_num_threads", number.append)
    stat = tmp_path / "stat"
    monkeypatch.setattr(threads, "_STAT", stat)
    threads._usual.cache_clear()
    threads._chosen.cache_clear()

    def loaded(busy):
        """While the process sleeps, 800 ticks pass, of which so many cores work."""
        work = round(100 * busy)
        stat.write_text("cpu  1000 0 500 7000 500 0 0 0 0 0\ncpu0 1 1 1 1\n")
        after = f"cpu  {1000 + work} 0 500 {7700 - work} 600 0 0 0 0 0\n"
        monkeypatch.setattr("time.sleep", lambda _: stat.write_text(after))
        return number

    yield loaded
    threads._usual.cache_clear()
    threads._chosen.cache_clear()


@pytest.mark.parametrize(("busy", "expected"), [(0.0, 4), (4.4, 4), (4.6, 3), (6.0, 2), (7.4, 1), (8.0, 1)])
def test_of_a_busy_machine_the_free_cores_are_taken(machine, caplog, busy, expected):
    number = machine(busy)
    assert threads.busy_cores() == pytest.approx(busy)
    machine(busy)
    assert threads.set_threads(None) == expected
    assert number[-1] == expected
    assert ("are busy with other programs" in caplog.text) == (expected < 4)
    assert expected == 4 or "threads=4 takes them all the same" in caplog.text


def test_a_process_chooses_once_and_among_all_cores_whatever_was_set_before(machine):
    machine(6.0)
    assert threads.set_threads(1) == 1
    assert threads.set_threads(None) == 2
    machine(0.0)
    assert threads.set_threads(None) == 2
    assert threads.set_threads(6) == 6


def test_where_somebody_shared_the_cores_out_the_load_of_others_does_not_count(machine, monkeypatch, caplog):
    machine(8.0)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    assert threads.set_threads(None) == 4
    threads._chosen.cache_clear()
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert threads.set_threads(None) == 4
    assert not caplog.text


def test_where_the_system_does_not_tell_nothing_is_busy(machine):
    assert threads.busy_cores() == 0.0
    assert threads.set_threads(None) == 4
