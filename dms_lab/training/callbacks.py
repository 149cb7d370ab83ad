"""What happens beside the steps: metrics to a file, a checkpoint a family member, a clean stop, a progress bar."""

import json
import logging
import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dms_lab.checkpoint import save_checkpoint
from dms_lab.config import TrainConfig
from dms_lab.tracking import Tracker
from dms_lab.training.module import RetrofitModule

_log = logging.getLogger(__name__)
LAST = "last.ckpt"


class JsonlMetrics(L.Callback):
    """Appends one JSON object to `metrics.jsonl` every `every` steps, with the retained share of each layer and head."""

    def __init__(self, folder: Path, every: int, tracker: Tracker | None = None) -> None:
        self.path, self.every, self.tracker = folder / "metrics.jsonl", every, tracker
        self._tokens, self._since = 0, time.monotonic()

    def on_train_start(self, trainer: L.Trainer, module: RetrofitModule) -> None:
        """Drops what a run that was killed wrote after its last save, or only half wrote: these steps come again."""
        if not self.path.is_file():
            return
        rows = []
        for line in self.path.read_text().splitlines():
            with suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
        kept = [row for row in rows if row["step"] <= trainer.global_step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.replace(self.path)

    def on_train_batch_end(self, trainer: L.Trainer, module: RetrofitModule, out: Any, batch: Any, index: int) -> None:
        self._tokens += int(module.last["tokens"])
        is_due = trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps
        if not (is_due and ends_a_step(trainer, index)):
            return
        seconds = time.monotonic() - self._since
        row = {"step": trainer.global_step}
        row |= {key: round(float(value), 6) for key, value in module.last.items() if key != "tokens"}
        row |= {
            "retained_per_head": [[round(1 - v, 4) for v in layer] for layer in module.last_evicted.tolist()],
            "tokens_per_second": round(self._tokens / seconds, 1),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.tracker is not None:
            self.tracker.log(row)
        self._tokens, self._since = 0, time.monotonic()


def ends_a_step(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether the optimizer stepped after this micro-batch; between two of them there is nothing to save or stop at."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


def peak_memory_bytes() -> int:
    """Peak of the GPU's allocator where there is one, else of the process's resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class WeightAverage(L.Callback):
    """Keeps the exponential moving average of the trained weights: `decay` of what it was, the rest of the newest.

    Decisions near the threshold flip from step to step; their average is what a checkpoint should hold. A `decay` of 0 is
    the newest weights. The average is part of `last.ckpt`, so a resumed run goes on with it.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._average: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, module: RetrofitModule, out: Any, batch: Any, index: int) -> None:
        if not self.decay or not ends_a_step(trainer, index):
            return
        for name, parameter in _trained(module):
            if name in self._average:
                self._average[name] = self._average[name].to(parameter.device).lerp_(parameter, 1 - self.decay)
            else:
                self._average[name] = parameter.detach().clone()

    def state_dict(self) -> dict[str, Any]:
        return {"average": self._average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._average = state["average"]

    @contextmanager
    def applied(self, module: RetrofitModule) -> Iterator[None]:
        """Inside, the trained weights are their average."""
        newest = {name: p.detach().clone() for name, p in _trained(module) if name in self._average}
        with torch.no_grad():
            for name, parameter in _trained(module):
                parameter.copy_(self._average.get(name, parameter))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in _trained(module):
                    parameter.copy_(newest.get(name, parameter))


def _trained(module: RetrofitModule) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in module.model.named_parameters() if name in module.trained_names]


class FamilyCheckpoints(L.Callback):
    """Keeps a checkpoint each time the schedule passes a member of the CR family, the last at the end of the run.

    It holds the weights' `average`, which must stand before this in the list of callbacks.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        base_fingerprint: str,
        provenance: dict[str, Any],
        average: WeightAverage,
    ) -> None:
        self.folder, self.config, self.average = folder, config, average
        self.base_fingerprint, self.provenance = base_fingerprint, provenance

    def on_train_batch_end(self, trainer: L.Trainer, module: RetrofitModule, out: Any, batch: Any, index: int) -> None:
        if not ends_a_step(trainer, index):
            return
        config, step = self.config, trainer.global_step
        before, now = module.objective.cr_at(step - 1), module.objective.cr_at(step)
        for cr in config.cr_family:
            if (before < cr <= now and cr < config.cr) or (cr == config.cr and step == config.steps):
                self._save(module, cr, step)

    def _save(self, module: RetrofitModule, cr: float, step: int) -> None:
        with self.average.applied(module):
            save_checkpoint(
                self.folder / f"cr{cr:g}",
                module.handle,
                self.config.trained,
                self.config.model.path,
                self.base_fingerprint,
                self.provenance | {"cr": cr, "step": step},
            )


@contextmanager
def handlers_restored() -> Iterator[None]:
    """Inside, Lightning and `GracefulStop` may set handlers of SIGINT and SIGTERM; those of before stand again after it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class GracefulStop(L.Callback):
    """On SIGINT or SIGTERM: finishes the step, writes `last.ckpt`, ends the run. A second signal ends it at once.

    Also writes it every `every` steps, and at the end of a step when `every_seconds` have passed since.
    """

    def __init__(self, folder: Path, every: int = 50, every_seconds: float = 600.0) -> None:
        self.path, self.every, self.every_seconds = folder / LAST, every, every_seconds
        self._saved = time.monotonic()
        self.stopped_by: str | None = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:  # after Lightning's own handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.stopped_by = signal.Signals(number).name
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        _log.warning("%s: the step is finished and saved first; once more to end at once", self.stopped_by)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, out: Any, batch: Any, index: int) -> None:
        if not ends_a_step(trainer, index):
            return
        is_due = trainer.global_step % self.every == 0 or time.monotonic() - self._saved > self.every_seconds
        if self.stopped_by or is_due:
            self.save(trainer)
            self._saved = time.monotonic()
        if self.stopped_by:
            trainer.should_stop = True

    def save(self, trainer: L.Trainer) -> None:
        """Writes `last.ckpt` under a temporary name and renames it."""
        temporary = self.path.with_suffix(".tmp")
        trainer.save_checkpoint(temporary)
        temporary.replace(self.path)


class ProgressBar(L.Callback):
    """A bar with the measured and the wanted CR, KL and the time left."""

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._bar = Progress(
            TextColumn("[bold]retrofit"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}  CR {task.fields[cr]:.2f} of {task.fields[target]:.2f}"),
            TextColumn("KL {task.fields[kl]:.4f}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=trainer.max_steps, completed=trainer.global_step, cr=1, target=1, kl=0)

    def on_train_batch_end(self, trainer: L.Trainer, module: RetrofitModule, *_: Any) -> None:
        last = module.last
        self._bar.update(
            self._task,
            completed=trainer.global_step,
            cr=float(last["cr_hard"]),
            target=float(last["target_cr"]),
            kl=float(last["kl"]),
        )

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self._bar.stop()
