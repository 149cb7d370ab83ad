"""A sweep's jobs on this machine: detached processes, so many at a time, that outlive the command.

    submit -> one supervisor a submission -> a process a point, in a session of its own

The supervisor holds the queue and notes what became of each process. A place at work is a lock on a file that the point's
process inherits: two submissions together run no more points than one, and a place is free when its process is dead.
"""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dms_lab.sweep_config import SweepConfig
from dms_lab.sweeping.job import StoppedError, job_of, write_job
from dms_lab.sweeping.points import Point
from dms_lab.sweeping.records import JobState, Submitted, append_jobs


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
    words = [sys.executable, "-m", "dms_lab.sweeping.local", str(batch), str(sweep.workers)]
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
    jobs = list(jobs)
    for pid, began in {(job.pid, job.pid_started) for job in jobs if job.host == socket.gethostname()}:
        if is_alive(pid, began):
            os.kill(pid, signal.SIGTERM)
    for job in jobs:
        note = _note(job)
        if (
            job.host == socket.gethostname()
            and note
            and note["code"] is None
            and is_alive(note["pid"], note["pid_started"])
        ):
            with suppress(ProcessLookupError):
                os.killpg(note["pid"], signal.SIGTERM)


# -- what became of them -----------------------------------------------------------------------------------------------
def job_states(sweep: SweepConfig, jobs: Iterable[Submitted]) -> dict[str, JobState]:
    """What is known of each job, by its id, named as Slurm would; '' if it was submitted on another machine."""
    return {job.job_id: _state(job) for job in jobs}


def _state(job: Submitted) -> JobState:
    note = _note(job)
    if note is not None and note["code"] is not None:
        return _ended(note)
    if job.host != socket.gethostname():
        return JobState("", reason=f"it was submitted on {job.host}: ask there")
    if note is not None and is_alive(note["pid"], note["pid_started"]):
        return JobState("RUNNING", elapsed=_elapsed(time.time() - note["began"]))
    if is_alive(job.pid, job.pid_started):
        return JobState("PENDING") if note is None else JobState("RUNNING")  # it ended a moment ago
    return JobState("CANCELLED" if note is None else "", reason="its supervisor was killed")


def _ended(note: dict[str, Any]) -> JobState:
    elapsed = _elapsed(note["ended"] - note["began"])
    if note["code"] == 0:
        return JobState("COMPLETED", elapsed=elapsed)
    if note["stopped"] or note["code"] in (StoppedError.exit_code, -signal.SIGTERM):
        return JobState("CANCELLED", elapsed=elapsed)
    killed = note["code"] < 0
    return JobState("FAILED", elapsed=elapsed, reason=f"killed by {signal.Signals(-note['code']).name}" if killed else "")


def _note(job: Submitted) -> dict[str, Any] | None:
    """What the supervisor noted of a job; None before it has started it."""
    try:
        return json.loads(Path(job.log).with_suffix(".state").read_text())
    except (OSError, json.JSONDecodeError):
        return None


def _elapsed(seconds: float) -> str:
    return f"{int(seconds // 3600)}:{int(seconds // 60) % 60:02d}:{int(seconds) % 60:02d}"


def started_at(pid: int) -> int | None:
    """When a process began, in the kernel's clock ticks, which tells it from a later one of the same number."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError):
        return None


def is_alive(pid: int | None, began: int | None) -> bool:
    """Whether the process still runs; one that ended and that nobody has waited for does not."""
    if pid is None:
        return False
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z" and started_at(pid) == began


# -- the supervisor ----------------------------------------------------------------------------------------------------
@dataclass
class Running:
    """A process at work on a point, and the file whose lock is its place."""

    spec: Path
    process: subprocess.Popen
    place: Any
    began: float


class Supervisor:
    """Runs the jobs described in a folder, `workers` at a time; after SIGTERM it starts no more, and stops the others."""

    def __init__(self, batch: Path, workers: int) -> None:
        self.workers = workers
        self.waiting = sorted(batch.glob("*.json"))
        self.places = batch.parent
        self.running: list[Running] = []
        self.is_stopped = False

    def run(self) -> None:
        """Returns when every job has ended."""
        signal.signal(signal.SIGTERM, self._stop)
        while self.waiting or self.running:
            while self.waiting and not self.is_stopped and (place := self._free_place()) is not None:
                self._start(self.waiting.pop(0), *place)
            self._reap()
            if self.is_stopped:
                self._drop_waiting()
            time.sleep(0.1)

    def _stop(self, number: int, frame: Any) -> None:
        self.is_stopped = True
        for job in self.running:
            with suppress(ProcessLookupError):
                os.killpg(job.process.pid, signal.SIGTERM)

    def _free_place(self) -> tuple[int, Any] | None:
        for index in range(self.workers):
            file = (self.places / f"place{index}.lock").open("a")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            return index, file
        return None

    def _start(self, spec: Path, index: int, place: Any) -> None:
        environment = os.environ | device_of(index)
        if self.workers > 1:
            environment.setdefault("OMP_NUM_THREADS", "1")  # processes that share processors gain nothing from threads
        with spec.with_suffix(".log").open("w") as log:
            process = subprocess.Popen(
                command_of(spec),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
                pass_fds=(place.fileno(),),
            )
        job = Running(spec, process, place, time.time())
        self.running.append(job)
        self._write_note(job, None)
        if self.is_stopped:  # between the two the signal came
            self._stop(signal.SIGTERM, None)

    def _reap(self) -> None:
        for job in list(self.running):
            if (code := job.process.poll()) is not None:
                self._write_note(job, code)
                job.place.close()
                self.running.remove(job)

    def _drop_waiting(self) -> None:
        now = time.time()
        for spec in self.waiting:
            _write(spec.with_suffix(".state"), {"pid": None, "pid_started": None, "code": 1, "began": now, "ended": now})
        self.waiting = []

    def _write_note(self, job: Running, code: int | None) -> None:
        note = {"pid": job.process.pid, "pid_started": started_at(job.process.pid), "began": job.began, "code": code}
        _write(
            job.spec.with_suffix(".state"),
            note | {"ended": time.time() if code is not None else None} | self._stopped(code),
        )

    def _stopped(self, code: int | None) -> dict[str, bool]:
        return {"stopped": self.is_stopped and bool(code)}


def _write(path: Path, note: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"stopped": True} | note) + "\n")
    temporary.replace(path)


def command_of(spec: Path) -> list[str]:
    """What runs a described job: Python, or torchrun where a run has several processes."""
    described = json.loads(spec.read_text())
    devices = described["composed"].get("devices") or 1
    if described["command"] == "evaluate" or devices == 1:
        return [sys.executable, "-m", "dms_lab.sweeping.job", str(spec)]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"]
    return [sys.executable, *launcher, "-m", "dms_lab.sweeping.job", str(spec)]


def device_of(place: int) -> dict[str, str]:
    """The GPU of a place, where CUDA_VISIBLE_DEVICES names several; {} where it does not."""
    devices = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return {"CUDA_VISIBLE_DEVICES": devices[place % len(devices)]} if len(devices) > 1 else {}


if __name__ == "__main__":
    Supervisor(Path(sys.argv[1]), int(sys.argv[2])).run()
