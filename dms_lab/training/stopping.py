"""A run that is told to stop finishes its step, saves `last.ckpt` and ends; the same command goes on from there.

signal in any process -> flag -> agreed at the end of a step -> last.ckpt, once -> all processes leave
SIGUSR2, if somebody (submitit) listens to it: as well, and then that handler is called: it requeues the job. It comes so
many seconds before the job is killed, so a step (or a save) that cannot be expected to end by then is given up: the
processes leave after a micro-batch, and the next job goes on from the `last.ckpt` that there is
"""

import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch

_log = logging.getLogger(__name__)
LAST = "last.ckpt"
_SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR2")  # of several, the last of these counts: it alone brings the run back
NOTICE_SECONDS = 180.0  # between SIGUSR2 and the end of the job, where nobody says otherwise (`signal_delay_s`)
_LONG_STEP_SECONDS = 10.0  # above it, processes talk after every micro-batch; below it, a step ends in time anyway


def num_left_of_step(trainer: L.Trainer, batch_idx: int) -> int:
    """Micro-batches after this one before the optimizer steps."""
    return -(batch_idx + 1) % trainer.accumulate_grad_batches


def ends_a_step(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether the optimizer stepped after this micro-batch; between two such there is nothing to save."""
    return num_left_of_step(trainer, batch_idx) == 0


class GracefulStop(L.Callback):
    """On SIGINT, SIGTERM or SIGUSR2: finishes the step, writes `last.ckpt`, ends the run, in every process at one step.

    Alone, a second signal ends the process at once; among several it is no second wish, because launchers hand signals on
    that the processes got already. `last.ckpt` is also written every `every` steps, and at the end of a step when
    `every_seconds` and twenty times what it took to write the last one have passed since. SIGUSR2 is left alone where
    nobody listens to it; where somebody does, all is over `notice_seconds` after it: what would last longer by the pace of
    the step so far, or of the last save, is not waited for. Of a save that was never timed, half of the notice is thought.
    """

    def __init__(
        self, folder: Path, every: int = 50, every_seconds: float = 120.0, notice_seconds: float = NOTICE_SECONDS
    ) -> None:
        self.path, self.every, self.every_seconds, self.notice_seconds = folder / LAST, every, every_seconds, notice_seconds
        self._saved, self._took = time.monotonic(), 0.0
        self._step_began, self._steps_are_long, self._over_at = time.monotonic(), True, math.inf
        self._is_alone = True
        self._before: dict[int, Any] = {}
        self.stopped_by: str | None = None

    # -- signals -----------------------------------------------------------------------------------------------------
    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, signals are noted; the handlers of before, Lightning's not among them, stand again after it."""
        self._before = {number: signal.getsignal(number) for number in map(signal.Signals.__getitem__, _SIGNALS)}
        try:
            self._listen()
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _listen(self) -> None:
        for number, handler in self._before.items():
            if number != signal.SIGUSR2 or callable(handler):
                signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        self.stopped_by = max(name, self.stopped_by or name, key=_SIGNALS.index)
        if number == signal.SIGUSR2:
            self._over_at = min(self._over_at, time.monotonic() + self.notice_seconds)
        hint = ""
        if self._is_alone and number != signal.SIGUSR2:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            hint = "; once more to end at once"
        _log.warning("%s: the step is finished and saved first%s", name, hint)

    def hand_over(self) -> None:
        """Calls the handler of SIGUSR2 that stood before, if that signal came: submitit's, which requeues the job.

        It may end the process. Call it when nothing is left to write.
        """
        if self.stopped_by == "SIGUSR2" and callable(handler := self._before[signal.SIGUSR2]):
            handler(signal.SIGUSR2, None)

    # -- Lightning ---------------------------------------------------------------------------------------------------
    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._is_alone = trainer.world_size == 1
        self._step_began = time.monotonic()
        self._listen()  # after Lightning's own handlers

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, out: Any, batch: Any, index: int) -> None:
        num_left = num_left_of_step(trainer, index)
        if num_left and not self._steps_are_long:
            return
        now = time.monotonic()
        is_late = now - self._saved > max(self.every_seconds, 20 * self._took)
        is_long = now - self._step_began > _LONG_STEP_SECONDS
        is_over = now + self._seconds_to_save(trainer, num_left, now) > self._over_at
        self.stopped_by, is_late, is_long, is_over = self._agreed(trainer, is_late, is_long, is_over)
        if is_over:
            step = trainer.global_step + bool(num_left)
            _log.warning("step %d cannot be ended and saved in time: it is left to the next job", step)
        elif num_left:
            return
        elif self.stopped_by or is_late or trainer.global_step % self.every == 0:
            self.save(trainer)
        if self.stopped_by:
            trainer.should_stop = True
        self._step_began, self._steps_are_long = time.monotonic(), is_long

    def _seconds_to_save(self, trainer: L.Trainer, num_left: int, now: float) -> float:
        """Seconds until the step has ended and is saved, at the pace of its micro-batches so far."""
        num_done = trainer.accumulate_grad_batches - num_left
        return (now - self._step_began) / num_done * num_left + (self._took or self.notice_seconds / 2)

    def _agreed(self, trainer: L.Trainer, *flags: bool) -> tuple[Any, ...]:
        """The signal that any process got, and each flag as soon as one process has it."""
        if self._is_alone:
            return self.stopped_by, *flags
        mine = [_SIGNALS.index(self.stopped_by) + 1 if self.stopped_by else 0, *map(int, flags)]
        mine = torch.tensor(mine, device=trainer.strategy.root_device)
        number, *agreed = trainer.strategy.reduce(mine, reduce_op="max").tolist()
        return (_SIGNALS[number - 1] if number else None), *map(bool, agreed)

    def save(self, trainer: L.Trainer) -> None:
        """Writes `last.ckpt` under a temporary name and renames it; when it returns, in any process, it is there."""
        start = time.monotonic()
        temporary = self.path.with_suffix(".tmp")
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            temporary.replace(self.path)
        trainer.strategy.barrier("last.ckpt")
        self._saved = time.monotonic()
        self._took = self._saved - start
