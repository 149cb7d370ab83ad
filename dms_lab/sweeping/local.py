"""A sweep's jobs on this machine: submitted to a detached supervisor, asked after by its notes and by their processes.

Processes are told apart by their number and the time they began, so a number that is used again is nobody's.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from dms_lab.sweep_config import SweepConfig
from dms_lab.sweeping.job import job_of, write_job
from dms_lab.sweeping.points import Point
from dms_lab.sweeping.records import ELSEWHERE, JobState, Submitted, append_jobs
from dms_lab.sweeping.steps import StoppedError
from dms_lab.sweeping.supervisor import Note, is_alive, read_note, started_at


# -- submitting --------------------------------------------------------------------------------------------------------
def submit(sweep: SweepConfig, points: Sequence[Point]) -> list[Submitted]:
    """Starts a supervisor for the points, and returns at once."""
    for point in points:
        if getattr(point.config, "num_nodes", 1) > 1:
            raise ValueError(f"{point.name}: num_nodes={point.config.num_nodes} needs cluster=slurm")
    batch = (sweep.records / "local" / f"{time.time_ns():x}").absolute()
    batch.mkdir(parents=True)
    specs = [batch / f"{index:04d}.json" for index in range(len(points))]
    for spec, point in zip(specs, points, strict=True):
        write_job(spec, job_of(point, Path.cwd()))
    words = [sys.executable, "-m", "dms_lab.sweeping.supervisor", str(batch), str(sweep.workers)]
    with (batch / "supervisor.log").open("w") as log:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    owner = {"pid": process.pid, "pid_started": started_at(process.pid), "host": socket.gethostname()}
    jobs = [
        Submitted(
            f"{batch.name}-{spec.stem}", "local", p.hash, p.folder, time.time(), str(spec.with_suffix(".log")), **owner
        )
        for spec, p in zip(specs, points, strict=True)
    ]
    append_jobs(sweep, jobs)
    return jobs


def cancel(sweep: SweepConfig, jobs: Iterable[Submitted]) -> None:
    """Tells the processes of these jobs to save and end, and their supervisors to start no more."""
    here = [job for job in jobs if job.host == socket.gethostname()]
    supervisors = {(job.pid, job.pid_started) for job in here if is_alive(job.pid, job.pid_started)}
    for pid, _ in supervisors:
        os.kill(pid, signal.SIGTERM)
    for job in here:  # whose supervisor is dead; a second signal to the others would end them before they have saved
        note = read_note(Path(job.log))
        if (job.pid, job.pid_started) in supervisors or note is None or note.code is not None:
            continue
        if is_alive(note.pid, note.pid_started):
            os.killpg(note.pid, signal.SIGTERM)


# -- what became of them -----------------------------------------------------------------------------------------------
def job_states(sweep: SweepConfig, jobs: Iterable[Submitted]) -> dict[str, JobState]:
    """What is known of each job, by its id, named as Slurm would; `ELSEWHERE` if another machine has it and alone knows."""
    return {job.job_id: _state(job) for job in jobs}


def _state(job: Submitted) -> JobState:
    note = read_note(Path(job.log))
    if note is not None and note.code is not None:
        return _ended(note)
    if job.host != socket.gethostname():
        return JobState(ELSEWHERE, reason=f"submitted on {job.host}, ask there")
    if note is not None and is_alive(note.pid, note.pid_started):
        return JobState("RUNNING", elapsed=_elapsed(time.time() - note.began))
    if is_alive(job.pid, job.pid_started):
        return JobState("PENDING") if note is None else JobState("RUNNING")  # it ended a moment ago
    return JobState("CANCELLED" if note is None else "", reason="its supervisor was killed")


def _ended(note: Note) -> JobState:
    elapsed = _elapsed(note.ended - note.began)
    if note.code == 0:
        return JobState("COMPLETED", elapsed=elapsed)
    if note.is_stopped or note.code in (StoppedError.exit_code, -signal.SIGTERM):
        return JobState("CANCELLED", elapsed=elapsed)
    return JobState(
        "FAILED", elapsed=elapsed, reason=f"killed by {signal.Signals(-note.code).name}" if note.code < 0 else ""
    )


def _elapsed(seconds: float) -> str:
    return f"{int(seconds // 3600)}:{int(seconds // 60) % 60:02d}:{int(seconds) % 60:02d}"
