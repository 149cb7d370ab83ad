"""Where each point of a sweep stands: its folder says what is done, the queue whether a job is at it, the log why not."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dms_lab.config import TrainConfig
from dms_lab.sweep_config import SweepConfig
from dms_lab.sweeping import local, slurm
from dms_lab.sweeping.job import PointJob, Training, is_locked, job_of
from dms_lab.sweeping.points import Point
from dms_lab.sweeping.records import JobState, Submitted, failures, last_jobs

STATES = ("done", "evaluating", "running", "pending", "requeued", "failed", "stopped", "missing", "unknown", "elsewhere")
LOG_LINES = 8
_FAILED = ("FAILED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL", "DEADLINE")
_STOPPED = ("CANCELLED", "PREEMPTED", "REVOKED")
_TAIL_BYTES = 65536


@dataclass(frozen=True)
class PointState:
    """Where a point stands. `state` is one of `STATES`; `reason` in a few words; `log` the last lines of a failed job's."""

    point: Point
    state: str
    job: Submitted | None = None
    elapsed: str = ""
    restarts: int = 0
    step: int | None = None
    steps: int | None = None
    cr: float | None = None
    reason: str = ""
    log: tuple[str, ...] = ()
    log_path: str = ""

    @property
    def is_active(self) -> bool:
        """Whether a job is queued for it or at it."""
        return self.state in ("evaluating", "running", "pending", "requeued")

    @property
    def is_free(self) -> bool:
        """Whether a submission would add a job for it: what another machine may be at is left to that."""
        return self.state not in ("done", "elsewhere") and not self.is_active

    def plain(self) -> dict[str, Any]:
        """The state as JSON."""
        found = {"point": self.point.name, "folder": self.point.folder, "hash": self.point.hash, "state": self.state}
        found |= {"overrides": list(self.point.overrides), "variant": self.point.variant}
        found |= {name: getattr(self, name) for name in ("elapsed", "restarts", "step", "steps", "cr", "reason")}
        job_id, log = (self.job.job_id, self.log_path or self.job.log) if self.job else (None, None)
        return found | {"job_id": job_id, "log": log, "log_lines": list(self.log)}


def point_states(sweep: SweepConfig, points: Sequence[Point]) -> list[PointState]:
    """The state of every point, in their order; `ValueError` if a queue that has jobs of the sweep cannot be asked."""
    jobs = last_jobs(sweep)
    done = {point.hash for point in points if is_done(point)}
    asked = [jobs[point.hash] for point in points if point.hash in jobs and point.hash not in done]
    known = slurm.job_states(sweep, [job for job in asked if job.cluster == "slurm"])
    known |= local.job_states(sweep, [job for job in asked if job.cluster == "local"])
    found = [_state_of(point, point.hash in done, jobs.get(point.hash), known) for point in points]
    errors = failures(sweep)
    return [_told(state, errors.get(state.point.overrides)) for state in found]


def _told(state: PointState, failure: tuple[str, float] | None) -> PointState:
    """The state of a point that no job is at, if a multirun has tried it since the last job was submitted, and failed."""
    if failure is None or state.state != "missing" or (state.job is not None and state.job.submitted > failure[1]):
        return state
    return replace(state, state="failed", reason=failure[0])


def is_done(point: Point) -> bool:
    """Whether all of a point stands in its folder."""
    return all(step.is_done() for step in _job(point).steps())


def _job(point: Point) -> PointJob:
    return job_of(point, Path.cwd())


def _state_of(point: Point, is_done: bool, job: Submitted | None, known: dict[str, JobState]) -> PointState:
    if is_done:
        return PointState(point, "done", job)
    first = _job(point).steps()[0]
    progress = _progress(point) if isinstance(first, Training) else {}
    is_trained = isinstance(first, Training) and first.is_done()
    at_work = "evaluating" if is_trained or not isinstance(first, Training) else "running"
    found = known[job.job_id] if job is not None else JobState("")
    if not found.is_active and is_locked(Path(point.folder)):  # by another sweep, a command, or what is left of its job
        return PointState(point, at_work, job=job, elapsed=found.elapsed, restarts=found.restarts, **progress)
    if job is None:
        return PointState(point, "missing", **progress)
    if found.is_elsewhere:
        return PointState(point, "elsewhere", job=job, reason=found.reason, **progress)
    progress |= {"job": job, "elapsed": found.elapsed, "restarts": found.restarts}
    if found.is_queued:
        return PointState(point, "requeued" if found.restarts else "pending", reason=found.reason, **progress)
    if found.is_active:
        return PointState(point, at_work, **progress)
    return _ended(point, job, found, progress)


def _ended(point: Point, job: Submitted, found: JobState, progress: dict[str, Any]) -> PointState:
    """The state of a point that is not done and whose last job has ended, or is not known any more."""
    if found.state in _STOPPED:
        return PointState(point, "stopped", reason=found.state, **progress)
    if found.state == "COMPLETED":  # for all that was asked when it was submitted
        return PointState(point, "missing", reason="more is asked than was submitted", **progress)
    left = slurm.outcome(job) if job.cluster == "slurm" else None
    if found.state in _FAILED or (left is not None and left.error):
        path = left.log if left is not None and left.error else Path(job.log)
        log = tail(path, LOG_LINES)
        return PointState(point, "failed", reason=_reason(found, left, log), log=log, log_path=str(path), **progress)
    if left is not None:
        return PointState(point, "missing", reason="more is asked than was submitted", **progress)
    told = found.reason or "neither the queue nor accounting (sacct) knows the job, and it left no result"
    log = tail(Path(job.log), LOG_LINES)
    return PointState(point, "unknown", reason=told, log=log, log_path=job.log, **progress)


def _reason(found: JobState, left: slurm.Outcome | None, log: Sequence[str]) -> str:
    """Why a job failed, in a line: the state that it ended in, and the exception's last line, else the log's."""
    own = [line for line in log if not line.startswith(("srun: ", "slurmstepd: "))] or log
    said = left.error.strip().splitlines()[-1] if left and left.error else own[-1] if own else "no log was written"
    why = [found.state or "FAILED", *([found.reason] if found.reason not in ("None", "") else []), said]
    return ": ".join(why)


def _progress(point: Point) -> dict[str, Any]:
    """The step that a training has logged last, and its measured CR."""
    config = point.config
    assert isinstance(config, TrainConfig)
    for line in reversed(tail(Path(point.folder) / "metrics.jsonl", 2)):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # it is being written
            continue
        return {"step": row["step"], "steps": config.steps, "cr": row["cr_hard"]}
    return {"steps": config.steps}


def tail(path: Path, num_lines: int) -> tuple[str, ...]:
    """The last lines of a file that say something; () if there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return ()
    return tuple(line for line in text.splitlines() if line.strip())[-num_lines:]
