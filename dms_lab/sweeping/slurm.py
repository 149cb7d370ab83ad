"""A sweep's jobs in Slurm: submitted by submitit as arrays, asked after by squeue, sacct and what the jobs left behind."""

import json
import os
import pickle
import re
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dms_lab.sweep_config import SweepConfig
from dms_lab.sweeping.job import job_of
from dms_lab.sweeping.points import Point
from dms_lab.sweeping.records import JobState, Submitted, append_jobs
from dms_lab.sweeping.resources import load_cluster, resources_of, slurm_parameters

_SECONDS = 60  # that a Slurm command may take
_ENDED = ("CANCELLED", "COMPLETED", "FAILED", "TIMEOUT", "OUT_OF_MEMORY", "DEADLINE")  # for good: COMPLETING is the rest


class QueueError(ValueError):
    """Slurm does not answer now; it may a moment later."""


def job_name(sweep: SweepConfig) -> str:
    """What Slurm calls the jobs of a sweep."""
    return f"dms-{sweep.name}"


def submit(sweep: SweepConfig, points: Sequence[Point]) -> list[Submitted]:
    """Submits a job a point, as one array for each kind of resources or more where they are long, and returns at once.

    Raises `ValueError` if Slurm takes one of them no more; those before it are queued and noted.
    """
    import submitit

    cluster = load_cluster("slurm")
    kinds: dict[str, list[Point]] = {}
    for point in points:
        kinds.setdefault(_kind(point, sweep, cluster), []).append(point)
    logs = (sweep.records / "slurm").absolute()
    found: list[Submitted] = []
    longest = max_array_size() if len(points) > 1 else 1
    arrays = [kind[i : i + longest] for kind in kinds.values() for i in range(0, len(kind), longest)]
    for members in arrays:
        resources = resources_of(members[0], sweep, cluster)
        executor = submitit.AutoExecutor(logs, cluster="slurm", slurm_max_num_timeout=resources.max_num_timeout)
        executor.update_parameters(**slurm_parameters(members[0], resources, job_name(sweep)))
        try:
            jobs = _submit_array(executor, members, resources.signal_delay_s)
        except (subprocess.CalledProcessError, submitit.core.utils.FailedJobError) as error:
            raise ValueError(_refused(error, len(found), len(points))) from error
        noted = [submitted(job, point) for job, point in zip(jobs, members, strict=True)]
        append_jobs(sweep, noted)
        found += noted
    return found


def max_array_size() -> int:
    """The most jobs that an array may have, as the cluster is configured."""
    told = re.search(r"^MaxArraySize\s*=\s*(\d+)", _call("scontrol", "show", "config"), re.MULTILINE)
    if told is None:
        raise ValueError("`scontrol show config` says no MaxArraySize; is this Slurm?")
    return int(told[1])


def _refused(error: Exception, num_taken: int, num_points: int) -> str:
    said = " ".join((getattr(error, "stderr", None) or str(error)).split())
    if not num_taken:
        return f"Slurm took no job: {said}"
    return (
        f"Slurm took {num_taken} of {num_points} jobs, which are queued, and then no more: {said}; the same submit goes on "
        "with the rest once it takes more"
    )


def submitted(job, point: Point) -> Submitted:
    """What is noted of a job of submitit that has just been submitted for a point."""
    return Submitted(job.job_id, "slurm", point.hash, point.folder, time.time(), str(job.paths.stderr))


def _submit_array(executor, points: Sequence[Point], notice_seconds: float) -> list:
    jobs = [job_of(point, Path.cwd(), notice_seconds) for point in points]
    if len(jobs) == 1:
        return [executor.submit(jobs[0])]
    with executor.batch():
        return [executor.submit(job) for job in jobs]


def _kind(point: Point, sweep: SweepConfig, cluster: dict) -> str:
    return json.dumps(slurm_parameters(point, resources_of(point, sweep, cluster), ""), sort_keys=True, default=str)


def cancel(sweep: SweepConfig, jobs: Iterable[Submitted]) -> None:
    """Cancels jobs, as far as they are this sweep's and this user's."""
    ids = sorted(job.job_id for job in jobs)
    if ids:
        _call("scancel", f"--name={job_name(sweep)}", f"--user={os.getuid()}", *ids)


# -- what became of them -----------------------------------------------------------------------------------------------
def job_states(sweep: SweepConfig, jobs: Iterable[Submitted]) -> dict[str, JobState]:
    """What is known of each job, by its id: from the queue, which keeps a job for minutes after its end, and accounting.

    Raises `ValueError` if the queue cannot be asked. A job that neither knows has the state '' and the reason for that; so
    has one that accounting takes to be at work, and that the queue does not have: its end was not written down.
    """
    ids = {job.job_id for job in jobs}
    if not ids:
        return {}
    queued = _queued(sweep)
    accounted, why_not = _accounted(ids)
    found = {}
    for job_id in ids:
        known = accounted.get(job_id, JobState("", reason=why_not))
        state = queued.get(job_id)
        if state is None and known.is_active:
            lost = f"accounting has it as {known.state}, but it has left the queue: it ended, or was lost"
            known = replace(known, state="", reason=lost)
        is_leaving = state is not None and state.state == "COMPLETING" and known.state in _ENDED
        if state is not None and not is_leaving and (state.is_active or not known.state):
            known = replace(state, restarts=max(state.restarts, known.restarts))
        found[job_id] = known  # of what has ended, what accounting has
    return found


def _queued(sweep: SweepConfig) -> dict[str, JobState]:
    fields = "JobArrayID:64,State:32,RestartCnt:12,TimeUsed:24,Reason:64"
    text = _call("squeue", "--noheader", "--array", "--states=all", f"--name={job_name(sweep)}", f"--Format={fields}")
    found = {}
    for line in text.splitlines():
        job_id, state, restarts, elapsed, *reason = line.split(None, 4)
        found[job_id] = JobState(state, int(restarts), elapsed, "".join(reason).strip())
    return found


def _accounted(ids: set[str]) -> tuple[dict[str, JobState], str]:
    """The last state of each job in accounting, and how many runs of it ended before; else why nothing is known."""
    arrays = ",".join(sorted({job_id.partition("_")[0] for job_id in ids}))
    words = ("--noheader", "--parsable2", "--allocations", "--duplicates", "--format=JobID,State,Elapsed,Reason")
    try:
        text = _call("sacct", f"--jobs={arrays}", *words)
    except ValueError as error:  # the queue and the files have to do
        return {}, f"accounting has no answer ({error})"
    found: dict[str, JobState] = {}
    for line in text.splitlines():
        job_ids, state, elapsed, reason = line.split("|")
        for job_id in _expanded(job_ids):
            runs = found[job_id].restarts + 1 if job_id in found else 0
            found[job_id] = JobState(state.split()[0], runs, elapsed, reason)  # "CANCELLED by 0"
    return found, ""


def _expanded(job_ids: str) -> Iterator[str]:
    """`7_[0-2,5%4]`, as Slurm writes what waits of an array, one by one."""
    array, bracket, members = job_ids.partition("_[")
    if not bracket:
        yield job_ids
        return
    for member in members.rstrip("]").partition("%")[0].split(","):
        first, _, last = member.partition("-")
        yield from (f"{array}_{index}" for index in range(int(first), int(last or first) + 1))


@dataclass(frozen=True)
class Outcome:
    """What submitit left of a job that ended: the traceback that it ended by, '' for none; the log of that process."""

    error: str
    log: Path


def outcome(job: Submitted) -> Outcome | None:
    """What a job left, of several processes the first one that failed; None if it left nothing."""
    results = Path(job.log).parent.glob(f"{job.job_id}_*_result.pkl")
    found = []
    for path in sorted(results, key=lambda path: int(path.name.split("_")[-2])):
        kind, value = pickle.loads(path.read_bytes())
        log = path.with_name(path.name.replace("_result.pkl", "_log.err"))
        found.append(Outcome("" if kind == "success" else str(value), log))
    return next((end for end in found if end.error), found[0] if found else None)


def _call(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS)
    except FileNotFoundError as error:
        raise ValueError(f"{words[0]} is not installed here: ask where Slurm's commands are") from error
    except subprocess.TimeoutExpired as error:
        raise QueueError(f"{words[0]} did not answer within {_SECONDS} seconds; is Slurm's controller up?") from error
    if done.returncode:
        raise QueueError(f"{words[0]} failed: {' '.join((done.stderr or done.stdout).split())}")
    return done.stdout
