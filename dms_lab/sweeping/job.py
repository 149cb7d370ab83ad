"""What a job does for one point: whatever of it is not done yet, so that any job may be killed and started again.

    train (last.ckpt) -> done.json -> its own evaluation -> evaluated.json -> each evaluation that follows -> evaluated.json

A done point is found so before torch is imported. Run by submitit as a pickled callable, or on this machine as
``python -m dms_lab.sweeping.job <description>.json``.
"""

import fcntl
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dms_lab.config import TrainConfig, config_hash, resolve, run_folder
from dms_lab.evaluation.evaluated import drop_cut_off_line, is_recorded, num_rows, own_evaluation, record
from dms_lab.evaluation_config import resolve_evaluate
from dms_lab.sweeping.points import Point, evaluation_hash

DONE = "done.json"  # as `training.run` writes it
LOCK = "run.lock"
_PATIENCE_SECONDS = 60.0


class StoppedError(RuntimeError):
    """A signal ended the job early; what it saved is where the next job for the point goes on."""

    exit_code = 128 + signal.SIGTERM


@dataclass(frozen=True)
class PointJob:
    """A callable that completes one point. All of it is plain, so that it is pickled by a few kilobytes.

    `root` is the folder that runs are relative to; `composed` and `then` are configurations before they are resolved.
    """

    root: str
    command: str
    hash: str
    composed: dict[str, Any]
    then: tuple[dict[str, Any], ...] = ()

    def __call__(self) -> None:
        """Trains and evaluates what is missing; raises whatever goes wrong, so that the job fails in Slurm too."""
        os.chdir(self.root)
        os.environ["TQDM_DISABLE"] = "1"  # read on import; a log needs no bars
        self.check()
        remaining = [step for step in self.steps() if not step.is_done()]
        if not remaining:
            print(f"{self.folder} is done already")
            return
        if _rank() > 0:  # of several processes, only the first has a lock, and evaluates
            if isinstance(remaining[0], Training):
                remaining[0].run()
            return
        with locked(self.folder):
            for step in remaining:
                if not step.is_done():
                    step.run()

    def checkpoint(self) -> Any:
        """The same job again: what it goes on from are files."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    @property
    def folder(self) -> Path:
        """The folder of the point."""
        return self.steps()[0].folder

    def steps(self) -> list["Training | OwnEvaluation | Benchmarks"]:
        """What there is to do for the point, in order."""
        then = [Benchmarks(resolve_evaluate(composed)) for composed in self.then]
        if self.command == "evaluate":
            return [Benchmarks(resolve_evaluate(self.composed))]
        config = resolve(self.composed)
        own = [OwnEvaluation(config)] if config.eval_after else []
        return [Training(config), *own, *then]

    def check(self) -> None:
        """Raises `ValueError` if the code makes another point of the configuration than when it was submitted."""
        first = self.steps()[0].config
        found = config_hash(first) if isinstance(first, TrainConfig) else evaluation_hash(first)
        if found != self.hash:
            raise ValueError(
                f"the point was submitted as {self.hash} and is {found} for the code as it is now; cancel the sweep and "
                "submit it again"
            )


def job_of(point: Point, root: Path) -> PointJob:
    """The job that completes a point of a sweep whose folders lie below `root`."""
    then = tuple(evaluation.composed for evaluation in point.then)
    return PointJob(str(root.absolute()), point.command, point.hash, point.composed, then)


# -- steps -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Training:
    """The training of a point."""

    config: TrainConfig

    @property
    def folder(self) -> Path:
        return Path(run_folder(self.config))

    def is_done(self) -> bool:
        done = self.folder / DONE  # with out=, perhaps that of another run: then training refuses
        return done.is_file() and json.loads(done.read_text())["config_hash"] == config_hash(self.config)

    def run(self) -> None:
        _train(self.config)


@dataclass(frozen=True)
class OwnEvaluation:
    """The evaluation at the end of a training."""

    config: TrainConfig

    @property
    def folder(self) -> Path:
        return Path(run_folder(self.config))

    def is_done(self) -> bool:
        return is_recorded(self.folder, own_evaluation(self.config))

    def run(self) -> None:
        from dms_lab.evaluation.report import evaluate_once
        from dms_lab.terminal import quiet

        quiet()
        evaluate_once(self.config, self.folder)


@dataclass(frozen=True)
class Benchmarks:
    """A run of `dms_lab.evaluate` on benchmarks, whose sample store is where it goes on."""

    config: Any

    @property
    def folder(self) -> Path:
        if self.config.out:
            return Path(self.config.out)
        place = Path(self.config.checkpoint)
        return place.parent.parent if (place / "dms.json").is_file() else place

    def is_done(self) -> bool:
        return is_recorded(self.folder, self._what)

    @property
    def _what(self) -> dict[str, Any]:
        return {"benchmarks": evaluation_hash(self.config), "tasks": list(self.config.eval.tasks)}

    def run(self) -> None:
        from dms_lab.terminal import quiet

        quiet()
        if self.config.threads is not None:
            import torch

            torch.set_num_threads(self.config.threads)
        from dms_lab.evaluation.reasoning import evaluate_benchmarks

        drop_cut_off_line(self.folder)
        before = num_rows(self.folder)
        evaluate_benchmarks(self.config)
        record(self.folder, self._what, num_rows(self.folder) - before)


def _train(config: TrainConfig) -> None:
    from dms_lab import models
    from dms_lab.terminal import quiet

    quiet()
    models.resolve_path(config.model.path)
    from dms_lab.training.run import train

    outcome = train(config, progress=False)
    if not outcome.finished:
        raise StoppedError(f"stopped by {outcome.stopped_by}; the next job for {outcome.folder} goes on from there")


def _rank() -> int:
    """Which process of the job this is: srun's, or torchrun's."""
    return int(os.environ.get("SLURM_PROCID", os.environ.get("RANK", "0")))


# -- one job at a time -------------------------------------------------------------------------------------------------
@contextmanager
def locked(folder: Path, patience_seconds: float = _PATIENCE_SECONDS) -> Iterator[None]:
    """Inside, no other job works in `folder`; raises `ValueError` if one still does after `patience_seconds`.

    The lock is the kernel's (`flock`) and ends with the process, however that dies. On NFS it holds between nodes as long
    as the mount does not say `nolock` or `local_lock`, on Lustre with the mount option `flock`; elsewhere it may hold on
    one node only, and then it is the queue that keeps a point from being submitted twice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        deadline = time.monotonic() + patience_seconds
        while not _taken(file):
            if time.monotonic() > deadline:
                file.seek(0)
                raise ValueError(f"another job works in {folder} ({file.read().strip() or 'unknown'}); its results will do")
            time.sleep(0.5)
        file.truncate(0)
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "job": os.environ.get("SLURM_JOB_ID")}
        file.write(json.dumps(owner) + "\n")
        file.flush()
        yield


def _taken(file: Any) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_locked(folder: Path) -> bool:
    """Whether a job works in `folder` at this moment, as far as this machine can see."""
    if not (folder / LOCK).is_file():
        return False
    with (folder / LOCK).open("a+") as file:
        return not _taken(file)


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
