"""The retrofit as a Lightning module.

    batch -> teacher (eviction off) -> hidden states --+
          -> student (relaxed decisions) -> hidden ----+-> chunked KL --+-> loss
                                   evict probabilities ----> retention -+

The teacher is the very same module with eviction off while only predictors are trained, and a frozen copy once the base
weights move. Source: Lancucki et al. 2025, section 3; the one-sided retention loss is the paper's auxiliary loss.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dms_lab import distillation, eviction
from dms_lab.attachment import Retrofit, retrofit
from dms_lab.attention_function import PREDICTOR, ForwardPlan, Relaxation, sent
from dms_lab.checkpoint import trained_parameters
from dms_lab.structure import output_head


@dataclass(frozen=True)
class Objective:
    """What is minimised, and how CR rises. With `count="live"`, `cr` is measured at the end of the training documents.

    `accumulate` counts the micro-batches of a step over all processes. `keep_attention`: where layers are checkpointed,
    their attention is computed once. `mixed`: products and attention in bfloat16, of weights in float32.
    """

    cr: float
    steps: int
    ramp: float = 0.8
    count: str = "live"
    retention: str = "one_sided"
    retention_weight: float = 1.0
    kl_direction: str = "forward"
    neuron_zeroing_steps: int = 0
    accumulate: int = 1
    seed: int = 0
    attention: str = "auto"
    keep_attention: bool = False
    mixed: bool = False
    chunk_tokens: int = 1024
    measure_every: int = 1

    def cr_at(self, step: int) -> float:
        """Compression ratio aimed at in `step`; it starts to rise when the neuron, if there is one, has faded."""
        return eviction.cr_at(step, self.cr, self.steps, self.ramp, self.neuron_zeroing_steps)

    def neuron_keep(self, step: int) -> float:
        """What is left of the neuron in `step`."""
        return max(0.0, 1.0 - step / self.neuron_zeroing_steps) if self.neuron_zeroing_steps else 0.0


@dataclass(frozen=True)
class Optimizer:
    """AdamW; `adapter_lr` is for predictors, `lr` for every other trained weight."""

    lr: float = 3e-5
    adapter_lr: float = 3e-5
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    decay: float = 0.0

    def factor(self, step: int, steps: int) -> float:
        """What both rates are multiplied by: linear over the warm-up, 1, linear to 0 over the last `decay` share."""
        rising = min(1.0, (step + 1) / max(1, self.warmup_steps))
        falling = min(1.0, (steps - step) / (self.decay * steps)) if self.decay else 1.0
        return rising * max(0.0, falling)


class RetrofitModule(L.LightningModule):
    """Trains a retrofitted model to match its teacher while it evicts more and more."""

    def __init__(
        self,
        handle: Retrofit,
        teacher: PreTrainedModel | None,
        trained: str,
        objective: Objective,
        optimizer: Optimizer,
    ) -> None:
        super().__init__()
        self.strict_loading = False  # a Lightning checkpoint holds the trained weights alone
        self.model = handle.model
        self.handle, self.objective, self.optimizer = handle, objective, optimizer
        if trained == "all" and teacher is None:
            raise ValueError(f"trained={trained!r} moves the base weights, so a frozen copy must be given as teacher")
        if teacher is not None and objective.mixed:
            _round_products(teacher)
        # In a list, so that Lightning neither registers nor saves it.
        self._teacher = [retrofit(teacher.requires_grad_(False).eval(), None)] if teacher is not None else []
        chosen = trained_parameters(self.model, trained)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in chosen)
        self.trained_names = frozenset(chosen)

    @property
    def teacher_handles(self) -> tuple[Retrofit, ...]:
        """The teacher, where it is a model of its own."""
        return tuple(self._teacher)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by their names in the model."""
        return {name: p for name, p in self.model.named_parameters() if name in self.trained_names}

    # -- Lightning ---------------------------------------------------------------------------------------------------
    def configure_model(self) -> None:
        """Nothing is left to do: weights that several processes share were cut when they were loaded."""

    def on_fit_start(self) -> None:
        for teacher in self._teacher:
            teacher.model.to(self.device)
        self.model.eval()  # no dropout: teacher and student must differ by eviction alone
        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer):  # checkpoints in training mode alone; its parts stay as set
                module.training = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if k.removeprefix("model.") in self.trained_names}
        checkpoint["micro_batches"] = self.trainer.accumulate_grad_batches

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Counts the micro-batches that are done as this process would have, had there been as many processes before."""
        now = self.trainer.accumulate_grad_batches
        before = checkpoint.get("micro_batches", self.objective.accumulate)
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for part in ("total", "current"):  # between two steps all counts are alike, but the last batch is not completed yet
            more = progress[part]["ready"] * now // before - progress[part]["ready"]
            progress[part] = {name: count + more for name, count in progress[part].items()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        adapters = [p for n, p in named if PREDICTOR in n]
        others = [p for n, p in named if PREDICTOR not in n]
        groups = [{"params": others, "lr": self.optimizer.lr}, {"params": adapters, "lr": self.optimizer.adapter_lr}]
        for group in groups:
            group["initial_lr"] = group["lr"]
        optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            betas=self.optimizer.betas,
            weight_decay=self.optimizer.weight_decay,
            fused=True if self.device.type == "cuda" else None,  # else a copy of all that is trained for a moment
        )
        factor = partial(self.optimizer.factor, steps=self.objective.steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # -- one step ------------------------------------------------------------------------------------------------------
    def training_step(self, number: Tensor, batch_idx: int) -> Tensor:
        turn = batch_idx % self.trainer.accumulate_grad_batches
        if turn == 0 and self.global_step == self.objective.neuron_zeroing_steps:
            self.handle.clear_neuron()
        micro_batch = turn * self.trainer.world_size + self.global_rank
        return self.loss(self.trainer.datamodule.batch(self.global_step, micro_batch), self.global_step, micro_batch)

    def loss(self, batch: dict[str, Tensor], step: int, micro_batch: int = 0) -> Tensor:
        """Distillation plus retention loss of one packed batch; what was measured on the way is left in `last`.

        `micro_batch` is its number within the step, over all processes. What is counted in a batch on the CPU makes nobody
        wait for a GPU. Every `measure_every` steps, and in the last, `last` holds what the decisions were as well.
        """
        objective = self.objective
        cr = objective.cr_at(step)
        target, real = self._target(cr, batch["document"]), _real_tokens(batch["document"])
        batch = {name: sent(batch[name], self.device) for name in ("ids", "document", "position_ids")}
        document, real = batch["document"], real if real is None else sent(real, self.device)
        relaxation = Relaxation(
            noise_key=(objective.seed, step, micro_batch),
            neuron_keep=objective.neuron_keep(step),
            decides=step >= objective.neuron_zeroing_steps,
            keep_attention=objective.keep_attention,
        )
        with torch.no_grad():
            teacher_handle = self._teacher[0] if self._teacher else self.handle
            teacher_hidden = self._hidden(teacher_handle.model, batch, teacher_handle.off(document, objective.attention))
        hidden = self._hidden(self.model, batch, self.handle.soft(relaxation, document, objective.attention))
        with self._autocast():
            kd = distillation.kl_loss(
                _chosen(hidden, real),
                _chosen(teacher_hidden, real),
                output_head(self.model),
                output_head(teacher_handle.model),
                direction=objective.kl_direction,
                chunk_tokens=objective.chunk_tokens,
            )
        probabilities = [relaxation.evict_probability[i] for i in sorted(relaxation.evict_probability)]
        retention = eviction.retention_loss(probabilities, document >= 0, target, objective.retention)
        self.last = {"tokens": (document >= 0).sum()}
        if (step + 1) % objective.measure_every == 0 or step + 1 == objective.steps:
            self.last |= self._measured(batch, relaxation, hidden.detach())
            self.last |= {
                "kl": kd.detach(),
                "retention_loss": retention.detach(),
                "target_cr": torch.tensor(cr),
                "evict_target": torch.tensor(target),
            }
        return kd + objective.retention_weight * retention

    @torch.no_grad()
    def _measured(self, batch: dict[str, Tensor], relaxation: Relaxation, hidden: Tensor) -> dict[str, Tensor]:
        """What the decisions of this batch were, relaxed and hard, and the language model's loss."""
        document, window = batch["document"], self.handle.config.window
        real = document >= 0
        soft, hard = (
            [found[i].detach().float() for i in sorted(found)] for found in (relaxation.evict_probability, relaxation.evict)
        )
        self.last_evicted = torch.stack([_mean_over_real(e, real) for e in hard])  # [L, K or 1]
        follows = real[:, 1:] & (document[:, 1:] == document[:, :-1])
        labels = batch["ids"][:, 1:][follows]
        with self._autocast():
            lm_loss = distillation.lm_loss(hidden[:, :-1][follows], labels, output_head(self.model))
        return {
            "cr_soft": eviction.live_ratio(soft, document, window),
            "cr_hard": eviction.live_ratio(hard, document, window),
            "evicted_soft": torch.stack([_mean_over_real(e, real).mean() for e in soft]).mean(),
            "evicted_hard": self.last_evicted.mean(),
            "lm_loss": lm_loss,
        }

    def _hidden(self, model: PreTrainedModel, batch: dict[str, Tensor], plan: ForwardPlan) -> Tensor:
        with self._autocast(is_used_again=False):
            return model.get_decoder()(
                input_ids=batch["ids"],
                position_ids=batch["position_ids"],
                use_cache=False,
                dms=plan,
            ).last_hidden_state

    def _autocast(self, is_used_again: bool = True) -> AbstractContextManager:
        """Inside, products are of bfloat16 if the objective is mixed, and the weights cast for it stay to be used again."""
        if not self.objective.mixed:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=is_used_again)

    def _target(self, cr: float, document: Tensor) -> float:
        """Wanted share of evicted decisions, for the documents that this batch really holds."""
        num_tokens, num_old = (document >= 0).sum(), eviction.old_tokens(document, self.handle.config.window).sum()
        return eviction.evict_target(cr, int(num_tokens), int(num_old), self.objective.count)


def _round_products(model: PreTrainedModel) -> None:
    """Holds the weights of linear layers in bfloat16, as autocast would round them at every use; a tied head is untied."""
    for part in model.modules():
        if isinstance(part, nn.Linear):
            for name, parameter in list(part.named_parameters(recurse=False)):
                setattr(part, name, nn.Parameter(parameter.to(torch.bfloat16), requires_grad=False))


def _real_tokens(document: Tensor) -> Tensor | None:
    """The places of real tokens in a batch's rows end to end; None if all are real."""
    real = document.flatten() >= 0
    return None if bool(real.all()) else real.nonzero()[:, 0]


def _chosen(hidden: Tensor, places: Tensor | None) -> Tensor:
    """Of [B, T, d] the tokens at these places, [N, d]."""
    rows = hidden.flatten(0, 1)
    return rows if places is None else rows.index_select(0, places)


def _mean_over_real(probability: Tensor, real: Tensor) -> Tensor:
    """Mean over real tokens of [B, K, T], per head."""
    weight = real[:, None].to(probability.dtype)
    return (probability * weight).sum((0, 2)) / weight.sum()
