"""Attaches eviction to a Hugging Face causal LM, and takes it off again, without a copy of its modeling code.

    base model     pre-hook: adds `dms` = ForwardPlan (off, soft or hard; documents from the padding mask)
     decoder layer pre-hook: adds `dms_residual`, the layer's input before its norm
      attention    q, k, v, RoPE as ever -> registered attention function -> plan -> soft attention or the cache's policy

Both keywords travel through the model's own `**kwargs`, so nothing is global and two models never meet. The attention
implementation is registered once per original one, under its own name ("dms_lab_sdpa"), with the mask function of the
original: with eviction off the original function gets its original arguments, and the logits are equal to the bit.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dms_lab import eviction
from dms_lab.attention.soft import soft_attention
from dms_lab.cache.masked import MaskedCache
from dms_lab.cache.policy import LayerState, Scores
from dms_lab.policies.dms import AdapterPredictor, DmsConfig, DmsPolicy, NeuronPredictor
from dms_lab.policies.streaming_llm import sink_decisions

_PREFIX = "dms_lab_"
PREDICTOR = "dms_predictor"  # name of the predictor inside an attention module


@dataclass
class Relaxation:
    """What a soft (training) forward needs beside the weights.

    `noise_key` = (seed, step, micro-batch, rank) seeds the logistic noise of each layer; None draws none. A model with
    the neuron predictor multiplies the neuron by `neuron_keep`. `evict_probability` is filled, per layer [B, K or 1, T].
    """

    noise_key: tuple[int, int, int, int] | None
    neuron_keep: float = 0.0
    backend: str = "auto"
    evict_probability: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class ForwardPlan:
    """How the attention layers of one forward treat eviction. Passed down as the keyword `dms`.

    mode      "off": the original attention; "soft": relaxed decisions; "hard": decisions as at inference
    document  [B, S] int, one id per document, -1 for padding; None: rows are one unpadded document each
    """

    mode: str
    config: DmsConfig | None = None
    document: Tensor | None = None
    relaxation: Relaxation | None = None
    cache: MaskedCache | None = None


class Retrofit:
    """The attachment of one policy to one model. Made by `retrofit`, ended by `detach`."""

    def __init__(self, model: PreTrainedModel, config: DmsConfig | None) -> None:
        self.model, self.config = model, config
        self.enabled = True
        self.attentions = find_attentions(model)
        self._original = model.config._attn_implementation
        self._hooks: list[Any] = []
        self._base = model.get_decoder()
        self._attach()

    # -- attaching ---------------------------------------------------------------------------------------------------
    def _attach(self) -> None:
        for attention in self.attentions:
            predictor = self._build_predictor(attention)
            if predictor is not None:
                attention.add_module(PREDICTOR, predictor)
            if isinstance(predictor, NeuronPredictor):
                self._hooks.append(attention.register_forward_pre_hook(_announce_neuron, with_kwargs=True))
                self._hooks.append(_query_source(attention).register_forward_hook(_capture_query(attention)))
        for layer in _decoder_layers(self._base):
            self._hooks.append(layer.register_forward_pre_hook(_pass_residual, with_kwargs=True))
        self._hooks.append(self._base.register_forward_pre_hook(self._plan_forward, with_kwargs=True))
        self.model.set_attn_implementation(_register(self._original))

    def _build_predictor(self, attention: nn.Module) -> nn.Module | None:
        if self.config is None or self.config.predictor == "sinks":
            return None
        heads = num_kv_heads(attention)
        weight = next(attention.parameters())
        if self.config.predictor == "neuron":
            return NeuronPredictor(heads, self.config)
        outputs = heads if self.config.granularity == "head" else 1
        eps = getattr(attention.config, "rms_norm_eps", None) or 1e-6
        # Trained in float32 whatever the base's dtype: a step of a bfloat16 weight would be rounded away.
        predictor = AdapterPredictor(attention.config.hidden_size, outputs, self.config, eps)
        return predictor.to(weight.device)

    def detach(self) -> PreTrainedModel:
        """Takes hooks and predictors off; the model computes what it computed before, to the bit. Returns the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for attention in self.attentions:
            if hasattr(attention, PREDICTOR):
                delattr(attention, PREDICTOR)
        self.model.set_attn_implementation(self._original)
        del self.model.dms_retrofit
        return self.model

    # -- using -------------------------------------------------------------------------------------------------------
    @property
    def predictors(self) -> dict[int, nn.Module]:
        """The predictor of each layer index; empty for policies without one."""
        found = ((a.layer_idx, getattr(a, PREDICTOR, None)) for a in self.attentions)
        return {index: predictor for index, predictor in found if predictor is not None}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, plain forwards run the original model."""
        self.enabled, before = False, self.enabled
        try:
            yield
        finally:
            self.enabled = before

    def policy(self) -> DmsPolicy:
        """The learned policy with hard decisions, for a cache."""
        if self.config is None or self.config.predictor == "sinks":
            raise ValueError("this model was retrofitted without a predictor, so it has no learned policy")
        return DmsPolicy(self.config)

    def _plan_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if kwargs.get("dms") is not None:
            return args, kwargs
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if isinstance(cache, MaskedCache):
            mode = "hard"
        elif self.enabled and self.config is not None and cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                f"a retrofitted model was given a {type(cache).__name__} with tokens in it, which keeps no decisions; "
                "pass past_key_values=MaskedCache(policy), or run the original model inside `with handle.disabled():`"
            )
        else:
            mode = "hard" if self.enabled and self.config is not None else "off"
        document = _document_from_mask(mask) if mode == "hard" else None
        plan = ForwardPlan(mode, self.config, document, cache=cache if isinstance(cache, MaskedCache) else None)
        return args, kwargs | {"dms": plan}

    def off(self, document: Tensor | None = None) -> ForwardPlan:
        """The plan of the original model over packed documents [B, T]: the teacher."""
        return ForwardPlan("off", self.config, document)

    def soft(self, relaxation: Relaxation, document: Tensor | None = None) -> ForwardPlan:
        """The plan of a training forward over packed documents [B, T]: the student."""
        return ForwardPlan("soft", self.config, document, relaxation)


def retrofit(model: PreTrainedModel, config: DmsConfig | None) -> Retrofit:
    """Attaches eviction to `model` in place and returns the handle; `config=None` attaches the seam without a predictor.

    Without a predictor the model serves caches of the other policies, and runs as the original otherwise. A plain
    forward of a model with one applies hard decisions; `handle.disabled()` is the original model. Raises `ValueError`
    if the model is already retrofitted or its attention is of a kind that cannot be served (see `find_attentions`).
    """
    if getattr(model, "dms_retrofit", None) is not None:
        raise ValueError("this model is already retrofitted; call model.dms_retrofit.detach() first")
    handle = Retrofit(model, config)
    model.dms_retrofit = handle
    return handle


def find_attentions(model: PreTrainedModel) -> list[nn.Module]:
    """The self-attention modules of a causal LM in layer order; raises `ValueError` where eviction would be wrong."""
    name = type(model).__name__
    config = model.config.get_text_config()
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder model; DMS retrofits decoder-only models with one KV cache")
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(f"{name} uses multi-head latent attention, which caches a shared latent: no KV head to evict in")
    if getattr(config, "num_kv_shared_layers", 0):
        raise ValueError(f"{name} shares keys and values between layers; one layer's eviction would change another's")
    layers = _decoder_layers(model.get_decoder())
    found = [m for layer in layers for m in layer.modules() if hasattr(m, "layer_idx") and hasattr(m, "o_proj")]
    if len(found) != len(layers):
        kinds = sorted({type(layer).__name__ for layer in layers})
        raise ValueError(
            f"{name} has {len(layers)} decoder layers ({', '.join(kinds)}) but {len(found)} softmax attention modules; "
            "models with linear-attention, state-space or other layers without keys and values cannot be retrofitted"
        )
    if not getattr(type(model), "_supports_attention_backend", True):
        raise ValueError(f"{name} does not take registered attention functions in this version of transformers")
    return sorted(found, key=lambda attention: attention.layer_idx)


def num_kv_heads(attention: nn.Module) -> int:
    """KV heads of an attention module."""
    config = attention.config
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def output_head(model: PreTrainedModel):
    """The function from hidden states to logits, with the soft-cap or scale that some families apply to logits."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    cap = getattr(config, "final_logit_softcapping", None)
    divisor = getattr(config, "logits_scaling", None) or 1.0

    def logits(hidden: Tensor) -> Tensor:
        out = head(hidden) / divisor if divisor != 1.0 else head(hidden)
        return cap * torch.tanh(out / cap) if cap else out

    return logits


def _decoder_layers(base: nn.Module) -> list[nn.Module]:
    layers = getattr(base, "layers", None)
    if layers is None:
        raise ValueError(f"{type(base).__name__} has no list of decoder layers named `layers`; it cannot be retrofitted")
    return list(layers)


# -- hooks -----------------------------------------------------------------------------------------------------------
def _pass_residual(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    residual = args[0] if args else kwargs["hidden_states"]
    return args, kwargs | {"dms_residual": residual}


def _announce_neuron(module: nn.Module, args: tuple, kwargs: dict) -> None:
    plan: ForwardPlan = kwargs["dms"]
    keep = None if plan.mode == "off" else plan.relaxation.neuron_keep if plan.relaxation else 0.0
    module.__dict__["_dms_neuron_keep"] = keep


def _query_source(attention: nn.Module) -> nn.Module:
    """The module whose output holds the queries before RoPE: the query norm where there is one, else the projection."""
    for name in ("q_norm", "q_proj", "qkv_proj"):
        if hasattr(attention, name):
            return getattr(attention, name)
    raise ValueError(f"{type(attention).__name__} has no query projection that the neuron predictor knows of")


def _capture_query(attention: nn.Module):
    """A forward hook that notes the queries before RoPE and zeroes the neuron in what goes on."""

    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        keep = attention.__dict__.get("_dms_neuron_keep")
        if keep is None:
            return output
        config = attention.config
        heads, width = config.num_attention_heads, attention.head_dim
        batch, tokens = output.shape[:2]
        flat = output.reshape(batch, tokens, -1)
        query = flat[..., : heads * width].reshape(batch, tokens, heads, width)
        attention.__dict__["_dms_query"] = query
        query = getattr(attention, PREDICTOR).zeroed(query, keep).reshape(batch, tokens, -1)
        return torch.cat([query, flat[..., heads * width :]], -1).reshape(output.shape)

    return hook


# -- the attention function --------------------------------------------------------------------------------------------
def _register(original: str) -> str:
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
        output = _evicting_attention(module, query, key, value, scores, plan, residual)
        return output.transpose(1, 2).contiguous(), None

    AttentionInterface.register(name, attention)
    if original in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping:
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[original])
    return name


def _evicting_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Scores,
    plan: ForwardPlan,
    residual: Tensor | None,
) -> Tensor:
    """Attention [B, H, Q, D] as the plan says: relaxed, hard over the new tokens alone, or hard over a cache."""
    if plan.mode == "off":
        return _soft(query, key, value, None, key.shape[2], plan, scores)
    predictor = getattr(module, PREDICTOR, None)
    logits = None
    if isinstance(predictor, NeuronPredictor):
        keep = plan.relaxation.neuron_keep if plan.relaxation else 0.0
        logits = predictor(module.__dict__.pop("_dms_query"))
        query = predictor.zeroed(query.transpose(1, 2), keep).transpose(1, 2)
    elif predictor is not None:
        logits = predictor(residual)
    if plan.cache is not None:
        wide = None if logits is None else logits.expand(-1, key.shape[1], -1)
        return plan.cache.attend(module.layer_idx, query, key, value, scores, wide, plan.document)
    if plan.mode == "hard" and logits is not None:
        state = LayerState(plan.document, logits)
        return DmsPolicy(plan.config).attend(state, query, key, value, scores)[0]
    return _trained_attention(module, query, key, value, scores, plan, logits)


def _trained_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scores: Scores,
    plan: ForwardPlan,
    logits: Tensor | None,
) -> Tensor:
    """Relaxed decisions of a predictor, or the fixed decisions of a window with sinks."""
    config, relaxation = plan.config, plan.relaxation
    batch, num_kv_heads, num_tokens = key.shape[:3]
    if logits is None:
        document = plan.document
        if document is None:
            document = torch.zeros(batch, num_tokens, dtype=torch.long, device=key.device)
        evict = sink_decisions(document, config.num_sinks)[:, None]
        log_keep = torch.zeros(evict.shape, device=key.device).masked_fill_(evict, -math.inf)
        if relaxation is not None:
            relaxation.evict_probability.setdefault(module.layer_idx, evict.float())
        return _soft(query, key, value, log_keep.expand(-1, num_kv_heads, -1), config.window, plan, scores)
    if relaxation.noise_key is not None:
        generator = eviction.noise_generator(*relaxation.noise_key, module.layer_idx)
        logits = logits + eviction.logistic_noise(tuple(logits.shape), generator).to(logits.device)
    governed = eviction.govern(logits, config.decided_by, config.window, plan.document, fill=-math.inf)
    zero = torch.zeros((), device=governed.device)
    relaxation.evict_probability.setdefault(module.layer_idx, eviction.evict_probability(governed, zero, config.tau))
    log_keep = eviction.log_keep(governed, zero, config.tau)
    return _soft(query, key, value, log_keep.expand(-1, num_kv_heads, -1), config.window, plan, scores)


def _soft(query, key, value, log_keep, window: int, plan: ForwardPlan, scores: Scores) -> Tensor:
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
        backend=plan.relaxation.backend if plan.relaxation else "auto",
    )


def _document_from_mask(mask: Any) -> Tensor | None:
    """0 for real tokens, -1 for padding; None if nothing is padded."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise ValueError(
            "a retrofitted model needs a padding mask of shape [B, S] or none; prepared 4D masks hide what is padding"
        )
    if bool(mask.all()):
        return None
    return mask.long() - 1
