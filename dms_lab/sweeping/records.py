"""What was submitted for a sweep: `runs/sweeps/<name>/jobs.jsonl`, one JSON object a submitted job, appended whole.

It is no list of points (the sweep file is) and no state (the folders and the queue are): it says which job was asked to
do which point, and where its log is.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

from dms_lab.sweep_config import SweepConfig
from dms_lab.sweeping.locks import try_lock

JOBS = "jobs.jsonl"


@dataclass(frozen=True)
class Submitted:
    """A job: its id, the point it does, when it was submitted (seconds since 1970) and its log; `cluster` as submitted.

    Of one on this machine: the process that started or will start it, by pid, host and the time it began in clock ticks.
    """

    job_id: str
    cluster: str
    hash: str
    folder: str
    submitted: float
    log: str
    pid: int | None = None
    pid_started: int | None = None
    host: str | None = None


QUEUED = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING")
ELSEWHERE = "ELSEWHERE"  # not Slurm's


@dataclass(frozen=True)
class JobState:
    """What is known of a job: the name of its state (Slurm's), '' for nothing; how often it was requeued; the reason."""

    state: str
    restarts: int = 0
    elapsed: str = ""
    reason: str = ""

    @property
    def is_elsewhere(self) -> bool:
        """Whether only another machine knows."""
        return self.state == ELSEWHERE

    @property
    def is_queued(self) -> bool:
        return self.state in QUEUED

    @property
    def is_active(self) -> bool:
        return self.state in QUEUED or self.state in RUNNING


def append_jobs(sweep: SweepConfig, jobs: list[Submitted]) -> None:
    """Notes submitted jobs on lines of their own, whatever a kill cut off before, and waits until the disk has them."""
    sweep.records.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(asdict(job)) + "\n" for job in jobs)
    with (sweep.records / JOBS).open("ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            text = text if file.read(1) == b"\n" else "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def load_jobs(sweep: SweepConfig) -> list[Submitted]:
    """Every job submitted so far, the oldest first; a line cut off by a kill is left out."""
    path = sweep.records / JOBS
    jobs = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with suppress(json.JSONDecodeError, TypeError):
            jobs.append(Submitted(**json.loads(line)))
    return jobs


def last_jobs(sweep: SweepConfig) -> dict[str, Submitted]:
    """The newest job of each point, by the point's hash."""
    return {job.hash: job for job in load_jobs(sweep)}


def failures(sweep: SweepConfig) -> dict[tuple[str, ...], tuple[str, float]]:
    """Why and when (seconds since 1970) points of the last multirun (`-m`) failed, by their overrides.

    Its jobs in Slurm complete all the same: they tell it themselves.
    """
    found = {}
    for path in sorted((sweep.records / "outcomes").glob("*.json")):
        outcome = json.loads(path.read_text())
        if outcome["error"]:
            found[tuple(outcome["overrides"])] = (outcome["error"], path.stat().st_mtime)
    return found


@contextmanager
def submitting(sweep: SweepConfig) -> Iterator[None]:
    """Inside, no other command submits jobs of this sweep; raises `ValueError` if one is doing so."""
    sweep.records.mkdir(parents=True, exist_ok=True)
    with (sweep.records / "submit.lock").open("a") as file:
        if not try_lock(file):
            raise ValueError(f"another command is submitting {sweep.name} at this moment; ask for its status")
        yield
