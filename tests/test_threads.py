"""Threads: as many as asked for, else the cores that are free."""

import pytest
import torch

from dms_lab import threads


@pytest.fixture
def machine(monkeypatch):
    """Eight cores, all ours, and as loaded as the test says."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)  # torch counts cores, not hyper-threads
    taken = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)

    def loaded(busy):
        monkeypatch.setattr("os.getloadavg", lambda: (busy, 9.0, 9.0))
        return taken

    return loaded


@pytest.mark.parametrize(("busy", "expected"), [(0.0, 4), (4.4, 4), (4.6, 3), (6.0, 2), (7.4, 1), (30.0, 1)])
def test_of_a_busy_machine_the_free_cores_are_taken(machine, caplog, busy, expected):
    taken = machine(busy)
    assert threads.set_threads(None) == expected
    assert taken == [expected]
    assert ("are busy with other programs" in caplog.text) == (expected < 4)
    assert expected == 4 or "threads=4 takes them all the same" in caplog.text


def test_what_was_asked_for_is_taken_whatever_the_load(machine, caplog):
    taken = machine(30.0)
    assert threads.set_threads(6) == 6
    assert taken == [6]
    assert not caplog.text


def test_where_somebody_shared_the_cores_out_the_load_of_others_does_not_count(machine, monkeypatch, caplog):
    machine(30.0)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    assert threads.set_threads(None) == 4
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert threads.set_threads(None) == 4
    assert not caplog.text
