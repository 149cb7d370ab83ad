"""What a cache costs in memory and time, by arithmetic: bytes of a token, what fits, one step of decoding, a retrofit.

    KVGeometry -> bytes_per_token -> tokens_that_fit, chains_that_fit
    ModelShape, Accelerator, batch, context, CR -> decode_step -> bytes, flops, seconds, share of KV reads

The compression ratio is full / kept, as measured at the length in question, window included. Nothing here is measured: a
roofline says what no implementation can beat.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KVGeometry:
    """What a model keeps of a token: a key and a value for each layer and KV head. `dtype_bytes` 2 for bfloat16."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype_bytes: int = 2

    @classmethod
    def of(cls, config: Any, dtype_bytes: int = 2) -> "KVGeometry":
        """The geometry of a Hugging Face configuration of a model with one attention layer like another."""
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, head_dim, dtype_bytes)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token kept in every layer and head."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype_bytes


def tokens_that_fit(memory_bytes: float, geometry: KVGeometry, cr: float = 1.0) -> int:
    """How many tokens a cache of that size can have seen. Raises `ValueError` for a ratio below 1."""
    return int(memory_bytes * _checked(cr) // geometry.bytes_per_token)


def chains_that_fit(memory_bytes: float, geometry: KVGeometry, length: int, cr: float = 1.0) -> int:
    """How many chains of `length` tokens, prompt included, fit side by side, each at its full length.

    Raises `ValueError` for a length or a ratio below 1, and for a memory below 0 or without end.
    """
    if length < 1:
        raise ValueError(f"length={length} must be at least 1")
    if not 0 <= memory_bytes < float("inf"):
        raise ValueError(f"memory_bytes={memory_bytes} must be a number of bytes, at least 0")
    return int(memory_bytes * _checked(cr) // (length * geometry.bytes_per_token))


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a dense decoder with gated MLPs that its cost depends on."""

    num_layers: int
    hidden: int
    mlp: int
    kv_width: int
    vocabulary: int


@dataclass(frozen=True)
class Accelerator:
    """Peak floating point operations and bytes of memory traffic, each a second, and how many bytes it has."""

    flops: float
    bandwidth_bytes: float
    memory_bytes: float


H100_SXM = Accelerator(989.4e12, 3.35e12, 80e9)  # bfloat16 without sparsity, HBM3; NVIDIA's data sheet


@dataclass(frozen=True)
class DecodeStep:
    """The least that one step of decoding moves, computes and takes. `kv_bytes` are a part of `total_bytes`.

    `fits`: what it reads, weights and kept keys and values, is no more than the device has: the time of a step that does
    not fit cannot be had on one device. Activations and input embeddings come on top, so one that fits may still not.
    """

    total_bytes: float
    kv_bytes: float
    flops: float
    seconds: float
    kv_share: float
    fits: bool


def decode_step(model: ModelShape, device: Accelerator, batch: int, context: int, cr: float = 1.0) -> DecodeStep:
    """The cost of a token for each of `batch` sequences that have seen `context` tokens, in bfloat16.

    Weights are read once, kept keys and values once a sequence; the step takes as long as the slower of arithmetic and
    memory, and `kv_share` is the time of reading keys and values in that (at most 1). The query is as wide as the model.
    Source: the cost model of Lancucki et al. 2025. Raises `ValueError` for sizes or a ratio below 1.
    """
    if batch < 1 or context < 1:
        raise ValueError(f"batch={batch} and context={context} must be at least 1")
    layers, d, kept = model.num_layers, model.hidden, context / _checked(cr)
    weights = 2 * layers * (3 * d * model.mlp + 2 * d**2 + 2 * d * model.kv_width) + 2 * d * model.vocabulary
    kv_bytes = 4 * layers * batch * kept * model.kv_width
    per_token = layers * (6 * d * model.mlp + 4 * d**2 + 4 * d * model.kv_width + 4 * d * kept) + 2 * d * model.vocabulary
    flops = batch * per_token
    seconds = max(flops / device.flops, (weights + kv_bytes) / device.bandwidth_bytes)
    kv_share, total = kv_bytes / device.bandwidth_bytes / seconds, weights + kv_bytes
    return DecodeStep(total, kv_bytes, flops, seconds, kv_share, fits=total <= device.memory_bytes)


@dataclass(frozen=True)
class RetrofitCost:
    """What a retrofit takes: optimiser steps, tokens seen, hours of one accelerator."""

    steps: int
    tokens: int
    hours: float


def retrofit_cost(
    cr: float, steps_per_unit: int, batch_sequences: int, context: int, hours_per_unit: float
) -> RetrofitCost:
    """The cost of a retrofit from ratio 1 to `cr` at so many steps and hours for each unit of ratio.

    The published recipes are in `published.retrofit_costs`. One run leaves every ratio that it passes.
    """
    units = _checked(cr) - 1
    steps = round(units * steps_per_unit)
    return RetrofitCost(steps, steps * batch_sequences * context, units * hours_per_unit)


def _checked(cr: float) -> float:
    if not cr >= 1:
        raise ValueError(f"cr={cr} must be at least 1: the ratio is full / kept")
    return cr
