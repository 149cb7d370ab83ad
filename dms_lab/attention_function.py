"""The attention function that stands in for a model's own: what a forward plan asks for, layer by layer.

    plan.mode  off   the model's own attention function, with its own arguments: equal to the bit
                     (over packed documents: plain attention inside each document)
               soft  relaxed decisions, for training
               hard  decisions as at inference, over the new tokens alone or through a cache

The plan and the layer's residual stream arrive as keywords that the model hands on (see `attachment`): nothing is global.
"""

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dms_lab import eviction
from dms_lab.attention import autocast
from dms_lab.attention.kept import Kept
from dms_lab.attention.soft import soft_attention
from dms_lab.cache.policy import LayerState, PolicyCache, Scores
from dms_lab.policies.dms import DmsConfig, DmsPolicy, NeuronPredictor
from dms_lab.policies.streaming_llm import sink_decisions

_PREFIX = "dms_lab_"
PREDICTOR = "dms_predictor"  # name of the predictor inside an attention module
QUERY = "_dms_query"  # where the queries before RoPE wait for the neuron predictor


class Relaxation:
    """What a soft (training) forward needs beside the weights, and what it leaves behind.

    `noise_key` = (seed, step, micro-batch) seeds the logistic noise of each layer; None draws none. With `decides` off
    nothing is evicted: the stage in which the neuron fades. A model with the neuron predictor multiplies the neuron by
    `neuron_keep`. Filled per layer: `evict_probability` [B, K or 1, T], and `evict`, the noiseless hard decisions; the
    noise, and with `keep_attention` what attention computed, which a recomputation in the backward finds again. So it is
    for one forward, with `keep_attention` of layers that are checkpointed.

    No dataclass: FSDP2 looks for tensors in the dataclasses that a layer is given, and hands it a copy of those that hold
    some, so what a layer leaves here would be lost.
    """

    def __init__(
        self,
        noise_key: tuple[int, int, int] | None,
        neuron_keep: float = 0.0,
        decides: bool = True,
        keep_attention: bool = False,
    ) -> None:
        self.noise_key, self.neuron_keep, self.decides = noise_key, neuron_keep, decides
        self.keep_attention = keep_attention
        self.evict_probability: dict[int, Tensor] = {}
        self.evict: dict[int, Tensor] = {}
        self._noise: dict[int, Tensor] = {}
        self._attention: dict[int, Kept] = {}

    def noisy(self, layer_idx: int, logits: Tensor) -> Tensor:
        """The logits of a layer with its noise, drawn at its first forward."""
        if layer_idx not in self._noise:
            generator = eviction.noise_generator(*self.noise_key, layer_idx)
            self._noise[layer_idx] = sent(eviction.logistic_noise(tuple(logits.shape), generator), logits.device)
        return logits + self._noise[layer_idx]

    def kept(self, layer_idx: int) -> Kept | None:
        """Where the attention of a layer is kept until it is computed again; None: it is not."""
        return self._attention.setdefault(layer_idx, []) if self.keep_attention else None

    def note(self, layer_idx: int, probability: Tensor, evict: Tensor) -> None:
        """Keeps a layer's decisions; the first forward counts, a recomputation in the backward does not."""
        self.evict_probability.setdefault(layer_idx, probability)
        self.evict.setdefault(layer_idx, evict)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on `device`; one of the CPU goes to a GPU without waiting for what that has still to do."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass
class ForwardPlan:
    """How the attention layers of one forward treat eviction. Passed down as the keyword `dms`.

    mode      "off": the original attention; "soft": relaxed decisions; "hard": decisions as at inference
    document  [B, S] int, one id per document, -1 for padding; None: rows are one unpadded document each
    backend   of the attention over packed documents, see `attention.soft`
    """

    mode: str
    config: DmsConfig | None = None
    document: Tensor | None = None
    relaxation: Relaxation | None = None
    cache: PolicyCache | None = None
    backend: str = "auto"

    @property
    def neuron_keep(self) -> float | None:
        """What the neuron predictor's element is multiplied by; None: the query is left alone."""
        if self.mode == "off":
            return None
        return self.relaxation.neuron_keep if self.relaxation else 0.0


def register(original: str) -> str:
    """Registers the attention and the mask function that stand for `original`; returns their name."""
    name = _PREFIX + original
    if original.startswith(_PREFIX):
        raise ValueError(f"the model's attention implementation is already {original!r}")

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any):
        plan: ForwardPlan | None = kwargs.pop("dms", None)
        residual = kwargs.pop("dms_residual", None)
        if plan is None:
            raise RuntimeError(f"{type(module).__name__} was called outside its retrofitted model")
        if plan.mode == "off" and plan.document is None:
            eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
            function = ALL_ATTENTION_FUNCTIONS.get_interface(original, eager)
            return function(module, query, key, value, attention_mask, **kwargs)
        scores = Scores(
            kwargs.get("scaling") or module.scaling,
            kwargs.get("softcap"),
            kwargs.get("s_aux"),
            kwargs.get("sliding_window"),
        )
        output = _planned(module, query, key, value, scores, plan, residual)
        return output.transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, attention)
    if original in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    return name


def _planned(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Scores,
    plan: ForwardPlan,
    residual: Tensor | None,
) -> Tensor:
    """Attention [B, H, Q, D] as the plan says: off, relaxed, hard over the new tokens alone, or hard over a cache.

    Under autocast in its precision: RoPE and norms with weights in float32 leave queries and keys in float32.
    """
    query, key, value = autocast.cast(query, key, value)
    if plan.mode == "off":
        return _soft(query, key, value, None, key.shape[2], plan, scores)
    predictor = getattr(module, PREDICTOR, None)
    logits = None
    if isinstance(predictor, NeuronPredictor):
        logits = predictor(module.__dict__.pop(QUERY))
        query = predictor.zeroed(query.transpose(1, 2), plan.neuron_keep).transpose(1, 2)
    elif predictor is not None:
        logits = predictor(residual)
    if plan.cache is not None:
        wide = None if logits is None else logits.expand(-1, key.shape[1], -1)
        return plan.cache.attend(module.layer_idx, query, key, value, scores, wide, plan.document)
    if plan.mode == "hard" and logits is not None:
        state = LayerState(plan.document, logits)
        return DmsPolicy(plan.config).attend(state, query, key, value, scores)[0]
    log_keep = _relaxed_log_keep(module.layer_idx, logits, plan, key)
    kept = None if plan.relaxation is None else plan.relaxation.kept(module.layer_idx)
    return _soft(query, key, value, log_keep, plan.config.window, plan, scores, kept)


def _relaxed_log_keep(layer_idx: int, logits: Tensor | None, plan: ForwardPlan, key: Tensor) -> Tensor | None:
    """log(1 - decision) [B, K, T] of a predictor's relaxed decisions, or of a window's fixed ones; None: nothing goes."""
    config, relaxation = plan.config, plan.relaxation
    batch, num_kv_heads, num_tokens = key.shape[:3]
    if logits is None:
        document = plan.document
        if document is None:
            document = torch.zeros(batch, num_tokens, dtype=torch.long, device=key.device)
        evict = sink_decisions(document, config.num_sinks)[:, None]
        log_keep = torch.zeros(evict.shape, device=key.device).masked_fill_(evict, -math.inf)
        if relaxation is not None:
            relaxation.note(layer_idx, evict.float(), evict)
        return log_keep.expand(-1, num_kv_heads, -1)
    governed = eviction.govern(logits, config.decided_by, config.window, plan.document)
    evict = governed.detach() > 0
    if not relaxation.decides:
        relaxation.note(layer_idx, torch.zeros_like(governed), torch.zeros_like(evict))
        return None
    if relaxation.noise_key is not None:
        noisy = relaxation.noisy(layer_idx, logits)
        governed = eviction.govern(noisy, config.decided_by, config.window, plan.document)
    zero = torch.zeros((), device=governed.device)
    relaxation.note(layer_idx, eviction.evict_probability(governed, zero, config.tau), evict)
    return eviction.log_keep(governed, zero, config.tau).expand(-1, num_kv_heads, -1)


def _soft(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_keep: Tensor | None,
    window: int,
    plan: ForwardPlan,
    scores: Scores,
    kept: Kept | None = None,
) -> Tensor:
    return soft_attention(
        query,
        key,
        value,
        log_keep,
        window,
        plan.document,
        scores.scaling,
        softcap=scores.softcap,
        sinks=scores.sinks,
        sliding_window=scores.sliding_window,
        backend=plan.backend,
        kept=kept,
    )
