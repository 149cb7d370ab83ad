"""Sweeps on a real Slurm come to the results of a sweep that nobody disturbs, whatever happens to their jobs."""

import json
import mmap
import os
import signal
import subprocess
import time
from contextlib import contextmanager

import pytest
from cluster import wait_until
from lab import Lab, Undisturbed, assert_undisturbed, swept
from processes import kill, of_jobs, step_managers

pytestmark = pytest.mark.slurm
TWO = swept(windows=(2, 4), seeds=(0,))


def test_completion_of_a_sweep_of_six_points(lab: Lab, undisturbed: Undisturbed):
    lab.describe(swept())
    assert len(lab.submit()) == 6
    lab.complete()
    assert_undisturbed(lab, undisturbed)
    assert lab.submit() == []  # what is done is not submitted again


def test_preemption_sends_jobs_back_and_they_go_on_from_what_they_saved(lab: Lab, undisturbed: Undisturbed):
    lab.describe(TWO)
    submitted = lab.submit()
    lab.halt(submitted)
    before = lab.steps_until_save(submitted)
    lab.preempt()
    lab.wait_for_requeue()
    lab.complete()
    assert lab.steps_until_save(submitted) == before
    assert_undisturbed(lab, undisturbed)


def test_a_preempted_job_that_ends_within_its_time_of_grace_is_queued_again(lab: Lab, undisturbed: Undisturbed):
    lab.describe(TWO, partition="graced")
    submitted = lab.submit()
    lab.halt(submitted)
    began = time.monotonic()
    lab.preempt()  # wakes them, to tell them
    lab.wait_for_requeue(100)
    assert time.monotonic() - began < 100  # long before Slurm would have done so
    lab.complete()
    assert_undisturbed(lab, undisturbed)


def test_a_job_at_its_time_limit_is_queued_again_and_goes_on(lab: Lab, undisturbed: Undisturbed):
    lab.describe(swept(windows=(2,), seeds=(0,)), timeout_min=2, signal_delay_s=5)
    submitted = lab.submit()
    lab.halt(submitted)  # until Slurm wakes it, to tell it that its time is over
    before = lab.steps_until_save(submitted)
    lab.wait_for_requeue()
    lab.complete()
    assert lab.steps_until_save(submitted) == before
    assert_undisturbed(lab, undisturbed)


def test_a_step_that_is_killed_fails_its_job_and_a_resubmission_goes_on(lab: Lab, undisturbed: Undisturbed):
    lab.describe(TWO)
    (point, job), (_, fine) = lab.submit()
    halted = lab.halt([(point, job)])
    before = lab.steps_until_save([(point, job)])
    kill(halted[job])
    assert lab.cluster.wait_for_jobs([job, fine]) == {job: "FAILED", fine: "COMPLETED"}
    assert point.folder.rpartition("/")[2] in lab.status()
    [(again, _)] = lab.submit()
    assert again.hash == point.hash
    lab.complete()
    assert lab.steps_until_save([(point, job)]) == before
    assert_undisturbed(lab, undisturbed)


def test_a_job_that_is_killed_amid_its_results_is_not_trained_again(lab: Lab, undisturbed: Undisturbed):
    lab.describe(swept(windows=(2,), seeds=(0,)))
    [(point, job)] = submitted = lab.submit()
    kill(lab.halt(submitted, after="results.jsonl")[job])
    assert lab.cluster.wait_for_jobs([job]) == {job: "FAILED"}
    before = lab.steps(point)
    lab.submit()
    lab.complete()
    assert lab.steps(point) == before
    assert_undisturbed(lab, undisturbed)


def test_jobs_survive_their_node_daemon(lab: Lab, undisturbed: Undisturbed):
    lab.describe(TWO)
    submitted = lab.submit()
    halted = lab.halt(submitted)
    node = _node_of(lab, submitted[0][1])
    lab.cluster.stop(node, signal.SIGKILL)
    for pids in halted.values():
        kill(pids, signal.SIGCONT)
    time.sleep(3)
    lab.cluster.start_node(node)
    lab.complete()
    assert [lab.cluster.restarts(job) for _, job in submitted] == [0, 0]
    assert_undisturbed(lab, undisturbed)


def test_jobs_of_a_node_that_dies_run_again_and_go_on_from_what_they_saved(lab: Lab, undisturbed: Undisturbed):
    lab.describe(TWO)
    submitted = lab.submit()
    lab.halt(submitted)
    before = lab.steps_until_save(submitted)
    nodes = {_node_of(lab, job) for _, job in submitted}
    for node in nodes:
        lab.cluster.stop(node, signal.SIGKILL)
    kill(step_managers(lab.cluster.conf) + of_jobs(lab.cluster.conf))
    lab.wait_for_requeue()
    for node in nodes:
        lab.cluster.start_node(node)
    lab.complete()
    assert lab.steps_until_save(submitted) == before
    assert_undisturbed(lab, undisturbed)


def test_jobs_that_run_and_wait_survive_the_controller(lab: Lab, undisturbed: Undisturbed):
    lab.describe(swept(windows=(2, 4, 8), seeds=(0,)))
    running = lab.submit()[:2]
    halted = lab.halt(running)
    lab.cluster.stop("slurmctld", signal.SIGKILL)
    for pids in halted.values():
        kill(pids, signal.SIGCONT)
    time.sleep(3)
    lab.cluster.start_controller()
    lab.complete()
    assert [lab.cluster.restarts(job) for job in lab.jobs] == [0, 0, 0]
    assert_undisturbed(lab, undisturbed)


def test_a_full_disk_fails_one_job_and_leaves_nothing_half_written(lab: Lab, undisturbed: Undisturbed):
    lab.describe(TWO)
    full = lab.points[0]
    with small_disk(lab.run_of(full), "24k"):
        submitted = lab.submit()
        states = lab.cluster.wait_for_jobs(lab.jobs)
        assert [states[job] for _, job in submitted] == ["FAILED", "COMPLETED"]
        assert "No space left on device" in lab.status()
        found = {path.name for path in lab.run_of(full).rglob("*")}
        assert not found & {"last.ckpt", "done.json", "results.jsonl", "dms.safetensors"}
        resize(lab.run_of(full), "64m")
        [(again, _)] = lab.submit()
        assert again.hash == full.hash
        lab.complete()
        assert_undisturbed(lab, undisturbed)


def test_a_disk_that_fills_amid_the_results_costs_no_training_and_no_row(lab: Lab, undisturbed: Undisturbed):
    lab.describe(swept(windows=(2,), seeds=(0,)))
    point = lab.points[0]
    with small_disk(lab.run_of(point), "16m"):
        [(_, job)] = submitted = lab.submit()
        halted = lab.halt(submitted, after="done.json")
        before = lab.steps(point)
        filler = fill(lab.run_of(point))
        os.truncate(filler, filler.stat().st_size - 2 * mmap.PAGESIZE)  # some lines fit, and the beginning of one more
        kill(halted[job], signal.SIGCONT)
        assert lab.cluster.wait_for_jobs([job]) == {job: "FAILED"}
        assert "No space left on device" in lab.status()
        lines = (lab.run_of(point) / "results.jsonl").read_text().splitlines()
        assert 0 < len([json.loads(line) for line in lines]) < 12
        filler.unlink()
        lab.submit()
        lab.complete()
        assert lab.steps(point) == before
        assert_undisturbed(lab, undisturbed)


def test_a_point_that_fails_fails_in_slurm_and_is_shown_with_the_end_of_its_log(lab: Lab, undisturbed: Undisturbed):
    lab.describe([*swept(windows=(2,), seeds=(0,)), "model.path=embedded,/nowhere/at/all"])
    submitted = lab.submit()
    states = lab.cluster.wait_for_jobs(lab.jobs)
    assert [states[job] for _, job in submitted] == ["COMPLETED", "FAILED"]
    shown = lab.status()
    assert "FAILED" in shown
    assert "no weights for" in shown
    assert "/nowhere/at/all" in shown


def test_a_cancelled_sweep_leaves_the_queue_and_is_finished_by_a_resubmission(lab: Lab, undisturbed: Undisturbed):
    lab.describe(TWO)
    submitted = lab.submit()
    lab.halt(submitted)
    lab.ask("cancel", str(lab.sweep))
    assert set(lab.cluster.wait_for_jobs(lab.jobs).values()) == {"CANCELLED"}
    wait_until("they have left the queue", lambda: not lab.cluster.run("squeue", "-h"))
    assert len(lab.submit()) == 2
    lab.complete()
    assert_undisturbed(lab, undisturbed)


def test_processes_on_two_nodes_are_sent_back_together_and_train_what_one_does(lab: Lab, undisturbed: Undisturbed):
    shared = "accumulate=2"  # a micro-batch for each process: two numbers have one sum, in whatever order
    two_nodes, one_node = ([*swept(windows=(window,), seeds=(0,)), shared] for window in (2, 4))
    loopback = ["export MASTER_ADDR=127.0.0.1 GLOO_SOCKET_IFNAME=lo"]  # the nodes' names are known to Slurm alone
    lab.describe([*two_nodes, "num_nodes=2"], [*one_node, "devices=2"], setup=loopback)
    submitted = lab.submit()
    halted = lab.halt(submitted)
    assert [len(pids) for pids in halted.values()] == [2, 2]
    before = lab.steps_until_save(submitted)
    for job, pids in halted.items():
        lab.cluster.run("scancel", "--signal=USR2", job)
        kill(pids, signal.SIGCONT)
    lab.wait_for_requeue()
    lab.complete()
    assert lab.steps_until_save(submitted) == before
    assert_undisturbed(lab, undisturbed)


# -- what disturbs -----------------------------------------------------------------------------------------------------
def _node_of(lab: Lab, job: str) -> str:
    return lab.cluster.run("squeue", "-h", "-j", job, "-o", "%N").strip()


@contextmanager
def small_disk(folder, size: str):
    """Inside, `folder` is a file system of its own that holds `size`; skips where none can be mounted."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def resize(folder, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


def fill(folder):
    """No byte is left on the file system of `folder`, but for what the file given back takes."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 4096):
                pass
        except OSError:
            os.fsync(file.fileno())
    return filler
