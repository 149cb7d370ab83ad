"""What there is to do for a point, one step after the other. Whether a step is done is read from files, without torch."""

import json
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dms_lab.config import TrainConfig, config_hash, run_folder
from dms_lab.evaluation.evaluated import (
    dialled_evaluation,
    drop_cut_off_line,
    is_recorded,
    own_evaluation,
    record,
)
from dms_lab.evaluation_config import EvaluateConfig
from dms_lab.sweep_config import Resources
from dms_lab.sweeping.evaluations import DialConfig, evaluation_hash

DONE = "done.json"  # as `training.run` writes it


class StoppedError(RuntimeError):
    """A signal ended the job early; what it saved is where the next job for the point goes on."""

    exit_code = 128 + signal.SIGTERM

    def __init__(self, sentence: str, signal_name: str | None = None) -> None:
        super().__init__(sentence)
        self.signal = signal_name


@dataclass(frozen=True)
class Training:
    """The training of a point; `notice_seconds` lie between SIGUSR2 and the end of its job."""

    config: TrainConfig
    notice_seconds: float = Resources.signal_delay_s

    @property
    def folder(self) -> Path:
        return Path(run_folder(self.config))

    def is_done(self) -> bool:
        done = self.folder / DONE  # with out=, perhaps that of another run: then training refuses
        return done.is_file() and json.loads(done.read_text())["config_hash"] == config_hash(self.config)

    def run(self) -> None:
        """Trains, or goes on; raises `StoppedError` if a signal ended it."""
        from dms_lab import models
        from dms_lab.terminal import quiet

        quiet(trains=True)
        models.resolve_path(self.config.model.path)
        from dms_lab.training.run import train

        outcome = train(self.config, progress=False, notice_seconds=self.notice_seconds)
        if not outcome.finished:
            sentence = f"stopped by {outcome.stopped_by}; the next job for {outcome.folder} goes on from there"
            raise StoppedError(sentence, outcome.stopped_by)


@dataclass(frozen=True)
class OwnEvaluation:
    """The evaluation at the end of a training."""

    config: TrainConfig

    @property
    def folder(self) -> Path:
        return Path(run_folder(self.config))

    @property
    def what(self) -> dict[str, Any]:
        """What is recorded of it in the folder."""
        return own_evaluation(self.config)

    def is_done(self) -> bool:
        return is_recorded(self.folder, self.what)

    def run(self) -> None:
        """Evaluates the run's family and its rivals, or goes on."""
        from dms_lab.evaluation.once import evaluate_once
        from dms_lab.terminal import quiet

        quiet()
        evaluate_once(self.config, self.folder)


@dataclass(frozen=True)
class Dialled:
    """The own evaluation of a run at other ratios than it was trained to."""

    config: DialConfig
    run_config: TrainConfig

    @property
    def folder(self) -> Path:
        return Path(run_folder(self.run_config))

    @property
    def what(self) -> dict[str, Any]:
        """What is recorded of it in the folder."""
        return dialled_evaluation(self._asked(), self.config.cr, self.config.calibrate)

    def is_done(self) -> bool:
        return is_recorded(self.folder, self.what)

    def run(self) -> None:
        """Evaluates at each ratio, or goes on."""
        from dms_lab.evaluation.once import evaluate_dialled_once
        from dms_lab.terminal import quiet
        from dms_lab.threads import set_threads

        quiet()
        set_threads(self.config.threads)
        evaluate_dialled_once(self._asked(), self.folder, self.config.cr, self.config.calibrate)

    def _asked(self) -> TrainConfig:
        """The run's configuration, with the number of problems asked for."""
        config = self.run_config
        if self.config.num_problems is None:
            return config
        return replace(config, eval=replace(config.eval, num_problems=self.config.num_problems))


@dataclass(frozen=True)
class Benchmarks:
    """A run of `dms_lab.evaluate` on benchmarks, whose sample store is where it goes on."""

    config: EvaluateConfig

    @property
    def folder(self) -> Path:
        if self.config.out:
            return Path(self.config.out)
        place = Path(self.config.checkpoint)
        return place.parent.parent if (place / "dms.json").is_file() else place

    @property
    def what(self) -> dict[str, Any]:
        """What is recorded of it in the folder."""
        return {"benchmarks": evaluation_hash(self.config), "tasks": list(self.config.eval.tasks)}

    def is_done(self) -> bool:
        return is_recorded(self.folder, self.what)

    def run(self) -> None:
        """Generates and grades what the store does not have; `ValueError` of a run that is not trained to its end."""
        self._check_trained()
        os.environ["TQDM_DISABLE"] = "1"  # read on import; a log needs no bars
        from dms_lab.terminal import quiet
        from dms_lab.threads import set_threads

        quiet()
        set_threads(self.config.threads)
        from dms_lab.evaluation.reasoning import evaluate_benchmarks

        drop_cut_off_line(self.folder)
        record(self.folder, self.what, evaluate_benchmarks(self.config))

    def _check_trained(self) -> None:
        """A run leaves checkpoints on its way: what is measured of it before its end would be recorded as the whole."""
        run = Path(self.config.checkpoint) if self.config.checkpoint is not None else None
        if run is not None and (run / "config.json").is_file() and not (run / DONE).is_file():
            raise ValueError(
                f"checkpoint={run} is a run that is not trained to its end, it has no {DONE}: submit again when it is "
                f"done, or give one of the checkpoints in {run / 'checkpoints'}, which stay as they are"
            )


Step = Training | OwnEvaluation | Dialled | Benchmarks


def evaluation_step(config: EvaluateConfig | DialConfig, run: TrainConfig | None = None) -> Step:
    """The step of an evaluation, of `run` if it follows a training."""
    return Dialled(config, run) if isinstance(config, DialConfig) else Benchmarks(config)
