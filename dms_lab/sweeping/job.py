"""What a job does for one point: whatever of it is not done yet, so that any job may be killed and started again.

    train (last.ckpt) -> done.json -> its own evaluation -> evaluated.json -> each evaluation that follows -> evaluated.json

A done point is found so before torch is imported. Run by submitit as a pickled callable, or on this machine as
``python -m dms_lab.sweeping.job <description>.json``.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dms_lab.config import TrainConfig, config_hash, num_processes, resolve
from dms_lab.sweep_config import Resources
from dms_lab.sweeping.evaluations import evaluation_hash, resolve_evaluation
from dms_lab.sweeping.locks import try_lock
from dms_lab.sweeping.points import Point
from dms_lab.sweeping.preemption import come_back_if_preempted
from dms_lab.sweeping.steps import OwnEvaluation, Step, StoppedError, Training, evaluation_step

LOCK = "run.lock"
_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class PointJob:
    """A callable that completes one point. All of it is plain, so that it is pickled by a few kilobytes.

    `root` is the folder that runs are relative to; `composed` and `then` are configurations before they are resolved;
    `notice_seconds` is how long before its end the job is told of it.
    """

    root: str
    command: str
    hash: str
    composed: dict[str, Any]
    then: tuple[dict[str, Any], ...] = ()
    notice_seconds: float = Resources.signal_delay_s

    def __call__(self) -> None:
        """Trains and evaluates what is missing; raises whatever goes wrong, so that the job fails in Slurm too.

        Several processes meet in the training even if it is done: by files, each might see something else than the next.
        """
        os.chdir(self.root)
        os.environ["TQDM_DISABLE"] = "1"  # read on import; a log needs no bars
        self.check()
        steps = self.steps()
        if _rank() > 0:  # of several processes, only the first has a lock, and evaluates
            if isinstance(steps[0], Training):
                with suppress(StoppedError):  # by raising it, srun might end the first before that has queued the job again
                    steps[0].run()
            return
        together = [step for step in steps if isinstance(step, Training) and num_processes(step.config) > 1]
        if not together and all(step.is_done() for step in steps):
            print(f"{self.folder} is done already")
            return
        try:
            with locked(self.folder):
                for step in steps:
                    if step in together or not step.is_done():
                        step.run()
        except StoppedError as error:
            if error.signal == "SIGTERM":
                come_back_if_preempted()
            raise

    def checkpoint(self) -> Any:
        """The same job again: what it goes on from are files."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    @property
    def folder(self) -> Path:
        """The folder of the point."""
        return self.steps()[0].folder

    def steps(self) -> list[Step]:
        """What there is to do for the point, in order."""
        if self.command == "evaluate":
            return [evaluation_step(resolve_evaluation(self.composed))]
        config = resolve(self.composed)
        own = [OwnEvaluation(config)] if config.eval_after else []
        then = [evaluation_step(resolve_evaluation(composed), config) for composed in self.then]
        return [Training(config, self.notice_seconds), *own, *then]

    def check(self) -> None:
        """Raises `ValueError` if the code makes another point of the configuration than when it was submitted."""
        first = self.steps()[0].config
        found = config_hash(first) if isinstance(first, TrainConfig) else evaluation_hash(first)
        if found != self.hash:
            raise ValueError(
                f"the point was submitted as {self.hash} and is {found} for the code as it is now; cancel the sweep and "
                "submit it again"
            )


def job_of(point: Point, root: Path, notice_seconds: float = Resources.signal_delay_s) -> PointJob:
    """The job that completes a point of a sweep whose folders lie below `root`, and is told of its end so long before."""
    then = tuple(evaluation.composed for evaluation in point.then)
    return PointJob(str(root.absolute()), point.command, point.hash, point.composed, then, notice_seconds)


def _rank() -> int:
    """Which process of the job this is: torchrun's, also within a job of Slurm, or srun's."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


# -- one job at a time -------------------------------------------------------------------------------------------------
@contextmanager
def locked(folder: Path, patience_seconds: float = _PATIENCE_SECONDS) -> Iterator[None]:
    """Inside, no other job works in `folder`; raises `ValueError` if one still does after `patience_seconds`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        deadline = time.monotonic() + patience_seconds
        while not try_lock(file):
            if time.monotonic() > deadline:
                file.seek(0)
                raise ValueError(f"another job works in {folder} ({file.read().strip() or 'unknown'}); its results will do")
            time.sleep(0.5)
        file.truncate(0)
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
        file.write(json.dumps(owner) + "\n")
        file.flush()
        yield


def is_locked(folder: Path) -> bool:
    """Whether a job works in `folder` at this moment, as far as this machine can see."""
    if not (folder / LOCK).is_file():
        return False
    with (folder / LOCK).open("a+") as file:
        return not try_lock(file, shared=True)


def main() -> None:
    """Runs the job that a file describes; a `ValueError` ends it with one sentence."""
    job = PointJob(**json.loads(Path(sys.argv[1]).read_text()))
    try:
        job()
    except ValueError as error:
        sys.exit(f"error: {error}")
    except StoppedError as error:
        print(error, file=sys.stderr)
        sys.exit(StoppedError.exit_code)


def write_job(path: Path, job: PointJob) -> None:
    """Describes a job in a file that `main` runs."""
    path.write_text(json.dumps(asdict(job)) + "\n")


if __name__ == "__main__":
    main()
