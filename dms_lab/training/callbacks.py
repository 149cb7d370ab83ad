"""What happens beside the steps: metrics to a file, a checkpoint a family member, a progress bar."""

import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from dms_lab.checkpoint import save_checkpoint
from dms_lab.config import TrainConfig
from dms_lab.sharding import cut_like, gathered, piece
from dms_lab.tracking import Tracker
from dms_lab.training.module import RetrofitModule
from dms_lab.training.stopping import ends_a_step


class JsonlMetrics(L.Callback):
    """Appends one JSON object to `metrics.jsonl` every `every` steps, with the retained share of each layer and head.

    It is the mean over the micro-batches of that step, on all processes; of ratios, that of their inverses, the live
    shares. Tokens a second are summed over processes, the memory is that of the process with the highest peak. The first
    process writes.
    """

    def __init__(self, folder: Path, every: int, tracker: Tracker | None = None) -> None:
        self.path, self.every, self.tracker = folder / "metrics.jsonl", every, tracker
        self._tokens, self._since = torch.tensor(0), time.monotonic()
        self._measured: list[tuple[dict[str, Tensor], Tensor]] = []  # of the micro-batches of a step that is logged

    def on_train_start(self, trainer: L.Trainer, module: RetrofitModule) -> None:
        """Drops what a run that was killed wrote after its last save, or only half wrote: these steps come again."""
        if not (trainer.is_global_zero and self.path.is_file()):
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
        self._tokens = self._tokens + module.last["tokens"]
        is_end = ends_a_step(trainer, index)
        step = trainer.global_step + (not is_end)
        if step % self.every and step != trainer.max_steps:
            return
        self._measured.append((module.last, module.last_evicted))
        if not is_end:
            return
        row = {"step": step} | self._mean(trainer) | self._costs(trainer)
        self._tokens, self._since = torch.tensor(0), time.monotonic()
        self._measured.clear()
        if not trainer.is_global_zero:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if self.tracker is not None:
            self.tracker.log(row)

    def _mean(self, trainer: L.Trainer) -> dict[str, Any]:
        names = [name for name in self._measured[0][0] if name != "tokens"]
        num = len(self._measured) * trainer.world_size
        inverted = {"cr_soft", "cr_hard"} if num > 1 else ()
        total = torch.zeros(len(names) + self._measured[0][1].numel(), dtype=torch.float64)
        for last, evicted in self._measured:
            values = [1 / float(last[name]) if name in inverted else float(last[name]) for name in names]
            total += torch.cat([torch.tensor(values, dtype=torch.float64), evicted.flatten().double().cpu()])
        mean = (trainer.strategy.reduce(total.to(trainer.strategy.root_device), reduce_op="sum") / num).cpu()
        row = dict(zip(names, mean.tolist(), strict=False))
        row = {name: round(1 / value if name in inverted else value, 6) for name, value in row.items()}
        heads = mean[len(names) :].view(self._measured[0][1].shape)
        return row | {"retained_per_head": [[round(1 - value, 4) for value in layer] for layer in heads.tolist()]}

    def _costs(self, trainer: L.Trainer) -> dict[str, Any]:
        strategy = trainer.strategy
        tokens, seconds = self._tokens.to(strategy.root_device), time.monotonic() - self._since
        peak = torch.tensor(peak_memory_bytes(), device=strategy.root_device)
        return {
            "tokens_per_second": round(int(strategy.reduce(tokens, reduce_op="sum")) / seconds, 1),
            "peak_memory_bytes": int(strategy.reduce(peak, reduce_op="max")),
        }


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

    def on_train_start(self, trainer: L.Trainer, module: RetrofitModule) -> None:
        for name, parameter in module.trained.items():  # one that was loaded is whole, and on the CPU
            if name in self._average:
                self._average[name] = cut_like(self._average[name], parameter)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, module: RetrofitModule, out: Any, batch: Any, index: int) -> None:
        if not self.decay or not ends_a_step(trainer, index):
            return
        for name, parameter in module.trained.items():
            if name in self._average:
                piece(self._average[name]).lerp_(piece(parameter), 1 - self.decay)
            else:
                self._average[name] = parameter.detach().clone()

    def state_dict(self) -> dict[str, Any]:
        return {"average": gathered(self._average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._average = state["average"]

    @contextmanager
    @torch.no_grad()
    def applied(self, module: RetrofitModule) -> Iterator[None]:
        """Inside, the trained weights are their average."""
        averaged = {name: p for name, p in module.trained.items() if name in self._average}
        newest = {name: piece(p).clone() for name, p in averaged.items()}
        for name, parameter in averaged.items():
            piece(parameter).copy_(piece(self._average[name]))
        try:
            yield
        finally:
            for name, parameter in averaged.items():
                piece(parameter).copy_(newest[name])


class FamilyCheckpoints(L.Callback):
    """Keeps a checkpoint each time the schedule passes a member of the CR family, the last at the end of the run.

    It holds the weights' `average`, which must stand before this in the list of callbacks. The first process writes.
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
        found = {"cr": "cr_hard", "target": "target_cr", "kl": "kl"}  # read in steps that measure: it waits for the device
        measured = {field: float(module.last[name]) for field, name in found.items() if name in module.last}
        self._bar.update(self._task, completed=trainer.global_step, **measured)

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        self._bar.stop()
