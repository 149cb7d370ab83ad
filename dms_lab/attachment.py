"""Attaches eviction to a Hugging Face causal LM, and takes it off again, without a copy of its modeling code.

    base model     pre-hook: adds `dms` = ForwardPlan (off, soft or hard; documents from the padding mask)
     decoder layer pre-hook: adds `dms_residual`, the layer's input before its norm
      attention    q, k, v, RoPE as ever -> registered attention function -> plan -> soft attention or the cache's policy

Both keywords travel through the model's own `**kwargs`, so nothing is global and two models never meet. The attention
implementation is registered once per original one, under its own name ("dms_lab_sdpa"), with the mask function of the
original: with eviction off the original function gets its original arguments, and the logits are equal to the bit. Where
`model.generate` would make a dynamic cache, it makes a compact one with the learned policy.
"""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dms_lab.attention_function import PREDICTOR, QUERY, ForwardPlan, Relaxation, register
from dms_lab.cache.compact import CompactCache
from dms_lab.cache.policy import PolicyCache
from dms_lab.lora import attach_lora, detach_lora, switch_lora
from dms_lab.policies.dms import AdapterPredictor, DmsConfig, DmsPolicy, NeuronPredictor
from dms_lab.policies.streaming_llm import StreamingLLMPolicy
from dms_lab.sharding import cut_like, piece
from dms_lab.structure import decoder_layers, find_attentions, num_kv_heads, query_projection, query_source


class Retrofit:
    """The attachment of one policy to one model. Made by `retrofit`, ended by `detach`."""

    def __init__(self, model: PreTrainedModel, config: DmsConfig | None) -> None:
        self.model, self.config = model, config
        self.enabled = True
        self.attentions = find_attentions(model)
        self._original = model.config._attn_implementation
        self._hooks: list[Any] = []
        self._lora: list[nn.Module] = []
        self._base = model.get_decoder()
        self._name = uuid.uuid4().hex  # caches know their attachment by it, copies and pickles of them too
        if "flash" in self._original:
            raise ValueError(
                f"{type(model).__name__} was loaded with attn_implementation={self._original!r}, which takes no decisions; "
                'load it with attn_implementation="sdpa" or "eager"'
            )
        try:
            self._attach()
        except BaseException:
            self._take_off()
            raise

    # -- attaching ---------------------------------------------------------------------------------------------------
    def _attach(self) -> None:
        if self.config is not None and self.config.lora_rank:
            self._lora = attach_lora(self.model, self.attentions, self.config.lora_rank, self.config.lora_alpha)
        for attention in self.attentions:
            predictor = self._build_predictor(attention)
            if predictor is not None:
                attention.add_module(PREDICTOR, predictor)
            if isinstance(predictor, NeuronPredictor):
                self._hooks.append(attention.register_forward_pre_hook(_announce_neuron, with_kwargs=True))
                source = query_source(attention)
                source.__dict__["_dms_attention"] = attention  # no submodule; a deep copy of the model has its own
                self._hooks.append(source.register_forward_hook(_capture_query))
        for layer in decoder_layers(self._base):
            self._hooks.append(layer.register_forward_pre_hook(_pass_residual, with_kwargs=True))
        self._hooks.append(self._base.register_forward_pre_hook(self._plan_forward, with_kwargs=True))
        self._hooks.append(self._base.register_forward_hook(_close_cache, with_kwargs=True, always_call=True))
        self.model.set_attn_implementation(register(self._original))
        self.model._prepare_cache_for_generation = self._prepare_cache

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
        self._check_attached()
        self._take_off()
        del self.model.dms_retrofit
        return self.model

    def _check_attached(self) -> None:
        if getattr(self.model, "dms_retrofit", None) is not self:
            raise ValueError("this attachment was taken off its model; attach a policy again with dms_lab.retrofit")

    def _take_off(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for attention in self.attentions:
            if hasattr(attention, PREDICTOR):
                delattr(attention, PREDICTOR)
                query_source(attention).__dict__.pop("_dms_attention", None)
        detach_lora(self.attentions)
        self.model.__dict__.pop("_prepare_cache_for_generation", None)
        self.model.set_attn_implementation(self._original)

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

    def set_offset(self, offset: float) -> None:
        """Makes `offset` what every predictor subtracts: a larger one evicts less. Earlier caches refuse to go on."""
        if not self.predictors:
            raise ValueError("this model has no predictor whose offset could be set; attach a learned policy first")
        self.config = replace(self.config, offset=offset)
        for predictor in self.predictors.values():
            predictor.offset = offset

    def policy(self) -> DmsPolicy | StreamingLLMPolicy:
        """The policy that the model was trained with, with hard decisions, for a cache."""
        self._check_attached()
        if self.config is None:
            raise ValueError("this model was retrofitted without a policy of its own; choose one of dms_lab.policies")
        if self.config.predictor == "sinks":
            return StreamingLLMPolicy(self.config.window + self.config.num_sinks, self.config.num_sinks)
        return DmsPolicy(self.config)

    def _prepare_cache(self, generation_config, model_kwargs: dict, *args) -> None:
        """What `generate` calls for a cache: a compact one, unless the user has one or eviction is switched off."""
        wants_none = generation_config.use_cache is False or not self.enabled or self.config is None
        if wants_none or model_kwargs.get("past_key_values") is not None:
            type(self.model)._prepare_cache_for_generation(self.model, generation_config, model_kwargs, *args)
            return
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} is the original model's; a retrofitted "
                "one makes a CompactCache. Leave it out, pass past_key_values=dms_lab.CompactCache(policy, storage=...), "
                "or generate inside `with handle.disabled():`"
            )
        model_kwargs["past_key_values"] = CompactCache(self.policy())

    @torch.no_grad()
    def clear_neuron(self) -> None:
        """Zeroes what the projections put into the neuron predictor's element, so that its decisions start from keep.

        For the end of the stage in which the element fades: attention does without it then, and whatever the base model
        had there would be read as decisions. Nothing happens for other predictors.
        """
        for attention in self.attentions:
            predictor = getattr(attention, PREDICTOR, None)
            if isinstance(predictor, NeuronPredictor):
                projection = query_projection(attention)
                is_cleared = torch.zeros(projection.weight.shape[0], dtype=torch.bool)
                is_cleared[predictor.rows(attention.config.num_attention_heads, attention.head_dim)] = True
                for parameter in (projection.weight, projection.bias):
                    if parameter is not None:
                        piece(parameter)[piece(cut_like(is_cleared, parameter))] = 0.0

    def _plan_forward(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if kwargs.get("dms") is None:
            kwargs = self._with_asked_cache(kwargs)
            kwargs = kwargs | {"dms": self._plan(args, kwargs)}
        plan: ForwardPlan = kwargs["dms"]
        switch_lora(self._lora, plan.mode != "off")
        if plan.mode != "off" or plan.document is not None:
            # The plan knows what is padding. A mask of four dimensions is handed on as it is, so that the model builds
            # none: one of queries times all columns would grow with the context.
            kwargs = kwargs | {"attention_mask": torch.zeros(1, 1, 1, 1, device=self.model.device)}
        return args, kwargs

    def _with_asked_cache(self, kwargs: dict) -> dict:
        """Puts a compact cache where a forward asks for one (`use_cache=True`) and brings none."""
        if kwargs.get("use_cache") and kwargs.get("past_key_values") is None and self.enabled and self.config is not None:
            return kwargs | {"past_key_values": CompactCache(self.policy())}
        return kwargs

    def _plan(self, args: tuple, kwargs: dict) -> ForwardPlan:
        """The plan of a forward that was given none: by the cache it got, and by whether eviction is switched on."""
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if isinstance(cache, PolicyCache):
            self._claim(cache)
            tokens = kwargs.get("inputs_embeds")
            tokens = tokens if tokens is not None else args[0] if args else kwargs["input_ids"]
            newest = tokens.shape[1] if isinstance(cache, CompactCache) else None
            if mask is not None and mask.ndim == 2 and mask.shape[1] != cache.get_seq_length() + tokens.shape[1]:
                raise ValueError(
                    f"the attention mask has {mask.shape[1]} columns, but the cache holds {cache.get_seq_length()} and "
                    f"{tokens.shape[1]} are new: the mask must cover both"
                )
            return ForwardPlan("hard", self.config, _document_from_mask(mask, newest), cache=cache)
        if not self.enabled or self.config is None:
            return ForwardPlan("off", self.config)
        if cache is not None:
            raise ValueError(
                f"a retrofitted model was given a {type(cache).__name__}, which keeps no decisions; leave it out, pass "
                "past_key_values=dms_lab.CompactCache(policy), or run the original model inside `with handle.disabled():`"
            )
        return ForwardPlan("hard", self.config, _document_from_mask(mask))

    def _claim(self, cache: PolicyCache) -> None:
        """Lets a forward with `cache` begin; raises `ValueError` for one that serves another model or policy."""
        self._check_attached()
        policy = cache.policy
        if isinstance(policy, DmsPolicy) and self.config is not None and policy.config != self.config:
            raise ValueError(
                f"this cache's policy is {policy.config}, but the model was retrofitted with {self.config}; make the cache "
                "with handle.policy()"
            )
        cache.announce(self._name)

    def hard(self, cache: PolicyCache, real: Tensor | None = None) -> ForwardPlan:
        """The plan of a forward over new tokens through `cache`; `real` [B, Q] is False for padding, None: no padding."""
        self._claim(cache)
        return ForwardPlan("hard", self.config, None if real is None else real.long() - 1, cache=cache)

    def off(self, document: Tensor | None = None, backend: str = "auto") -> ForwardPlan:
        """The plan of the original model over packed documents [B, T]: the teacher."""
        return ForwardPlan("off", self.config, document, backend=backend)

    def soft(self, relaxation: Relaxation, document: Tensor | None = None, backend: str = "auto") -> ForwardPlan:
        """The plan of a training forward over packed documents [B, T]: the student."""
        return ForwardPlan("soft", self.config, document, relaxation, backend=backend)


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


# -- hooks -----------------------------------------------------------------------------------------------------------
def _pass_residual(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    residual = args[0] if args else kwargs["hidden_states"]
    return args, kwargs | {"dms_residual": residual}


def _close_cache(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    if isinstance(cache := kwargs.get("past_key_values"), PolicyCache):
        cache.close()


def _announce_neuron(module: nn.Module, args: tuple, kwargs: dict) -> None:
    module.__dict__["_dms_neuron_keep"] = kwargs["dms"].neuron_keep


def _capture_query(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Notes the queries before RoPE and fades or zeroes the neuron in what goes on."""
    attention = module.__dict__["_dms_attention"]
    keep = attention.__dict__.get("_dms_neuron_keep")
    if keep is None:
        return output
    heads, width = attention.config.num_attention_heads, attention.head_dim
    if _heads_first(args[0], output, heads):
        query = output.transpose(1, 2)
        attention.__dict__[QUERY] = query
        return getattr(attention, PREDICTOR).zeroed(query, keep).transpose(1, 2)
    batch, tokens = output.shape[:2]
    flat = output.reshape(batch, tokens, -1)
    query = flat[..., : heads * width].reshape(batch, tokens, heads, width)
    attention.__dict__[QUERY] = query
    query = getattr(attention, PREDICTOR).zeroed(query, keep).reshape(batch, tokens, -1)
    return torch.cat([query, flat[..., heads * width :]], -1).reshape(output.shape)


def _heads_first(x: Tensor, output: Tensor, heads: int) -> bool:
    """Whether a query norm got [B, H, T, D] (Gemma-3) and not [B, T, H, D] or [B, T, H * D]."""
    if output.ndim != 4:
        return False
    if output.shape[1] != output.shape[2]:
        return output.shape[1] == heads
    return x.stride(1) < x.stride(2)  # as many tokens as heads: a transposed view of the projection's output


def _document_from_mask(mask: Any, newest: int | None = None) -> Tensor | None:
    """0 for real tokens, -1 for padding; None if nothing is padded. Of the `newest` columns alone, if that is given."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise ValueError(
            "a retrofitted model needs a padding mask of shape [B, S] or none; prepared 4D masks hide what is padding"
        )
    mask = mask if newest is None else mask[:, -newest:]
    if newest != 1 and bool(mask.all()):  # for a single token, to look would be to wait for the device
        return None
    return mask.long() - 1
