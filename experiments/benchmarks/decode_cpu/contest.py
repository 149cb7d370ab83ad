"""What is compared: a random model of Qwen3-0.6B's geometry, forced decisions, caches by name, and clocks.

    name      hf: transformers' DynamicCache and SDPA     full: CompactCache that evicts nothing
              dms: decisions forced to CR 8, window 256    unequal: the same mean, heads from 0.02 to 0.33
              fp8, int8: as dms, stored in 8 bits             window: nothing older than the window stays
    fill      keys and values put into the layers by the cache's own storing, without attention
    clock     seconds inside `cache.attend`, or for hf inside `cache.update` and the attention function

Shapes: B batch, K KV heads, D head width.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import dms_lab
from dms_lab.cache.policy import Scores, WindowedRule
from dms_lab.policies.full import FullPolicy

NUM_LAYERS, NUM_KV_HEADS, WIDTH = 4, 8, 128
CR, WINDOW = 8, 256
STORAGE = {"fp8": "fp8", "int8": "int8"}
CACHES = ("hf", "full", "dms", "unequal", "fp8", "int8", "window")
_PERIOD = 2**16  # positions after which the forced decisions repeat


def make_config() -> Qwen3Config:
    """Qwen3-0.6B with 4 of 28 layers, and a seventh of the vocabulary as well, so that the head costs its share."""
    return Qwen3Config(
        vocab_size=151936 // 7,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=16,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=WIDTH,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )


@dataclass(frozen=True)
class Models:
    """The retrofitted model and the original, two modules over the same weights."""

    retrofitted: PreTrainedModel
    original: PreTrainedModel

    def of(self, name: str) -> PreTrainedModel:
        """The model that the cache `name` goes with."""
        return self.original if name == "hf" else self.retrofitted


def make_models(dtype: torch.dtype, seed: int = 0) -> Models:
    """Random weights, in evaluation mode, attention by SDPA."""
    torch.manual_seed(seed)
    first = Qwen3ForCausalLM._from_config(make_config(), attn_implementation="sdpa").to(dtype).eval()
    with torch.device("meta"):
        second = Qwen3ForCausalLM._from_config(make_config(), attn_implementation="sdpa").eval()
    second.load_state_dict(first.state_dict(), assign=True)
    second.tie_weights()
    second.model.rotary_emb = first.model.rotary_emb  # its buffer is in no state dict
    dms_lab.retrofit(second, None)
    return Models(second, first)


class ForcedPolicy(WindowedRule):
    """Keeps a random share of the tokens, drawn once per (position, head): `kept` in every head, or in their mean.

    What a predictor computes is not in its time; it is one product with a [1024, 8] matrix a layer.
    """

    name = "forced"
    window = WINDOW

    def __init__(self, unequal: bool = False, kept: float = 1 / CR, num_kv_heads: int = NUM_KV_HEADS) -> None:
        spread = torch.linspace(-2, 2, num_kv_heads).exp2() if unequal else torch.ones(num_kv_heads)
        kept = kept * spread / spread.mean()
        drawn = torch.rand(num_kv_heads, _PERIOD, generator=torch.Generator().manual_seed(0))
        self._evict = drawn >= kept[:, None]

    def flags(self, evict_logit: Tensor | None, position: Tensor, num_kv_heads: int) -> Tensor:
        row = 7919 * torch.arange(position.shape[0])[:, None]  # sequences differ
        return self._evict[:, (position + row) % _PERIOD].transpose(0, 1)


def make_cache(name: str) -> Cache:
    """An empty cache by name."""
    if name == "hf":
        return DynamicCache()
    policy = FullPolicy() if name == "full" else ForcedPolicy(name == "unequal", 0.0 if name == "window" else 1 / CR)
    return dms_lab.CompactCache(policy, storage=STORAGE.get(name, "model"))


@torch.no_grad()
def fill(cache: Cache, num_tokens: int, batch: int, dtype: torch.dtype, models: Models | None = None) -> None:
    """Puts `num_tokens` random tokens a sequence into every layer; heads and sequences get the same numbers.

    `models`: which the cache is to serve afterwards.
    """
    block = torch.randn(1, 1, num_tokens, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    block = block.expand(batch, NUM_KV_HEADS, -1, -1)
    for layer in range(NUM_LAYERS):
        if isinstance(cache, DynamicCache):
            cache.update(block, block, layer)
        else:
            cache.announce("nobody") if models is None else models.retrofitted.dms_retrofit.hard(cache)
            fill_layer(cache, layer, block)


def fill_layer(cache: dms_lab.CompactCache, index: int, block: Tensor) -> None:
    """Puts keys and values, both `block` [B, K, T, D], into an empty layer by its own storing."""
    batch, num_kv_heads, num_tokens, _ = block.shape
    cache.update(block, block, index)
    layer = cache.layers[index]
    layer.slots = cache.new_table(index, batch, block, block, Scores(WIDTH**-0.5))
    piece = num_tokens if cache.policy.window is None else 1024
    for start in range(0, num_tokens, piece):
        part = block[:, :, start : start + piece]
        position = start + torch.arange(part.shape[2]).expand(batch, -1)
        flags = cache.policy.flags(None, position, num_kv_heads)
        layer.slots.note_columns(None, part.shape[2])
        layer.slots.append_chunk(part, part, flags, torch.full((batch,), part.shape[2]))
    layer.columns = num_tokens


def held_bytes(cache: Cache) -> int:
    """Bytes that the cache's tensors take up, pages, tables and rings included."""
    if isinstance(cache, DynamicCache):
        return sum(x.keys.untyped_storage().nbytes() + x.values.untyped_storage().nbytes() for x in cache.layers)
    return cache.allocated_bytes


def count_slots(cache: Cache) -> int:
    """Slots that hold a token the next query sees, over sequences, layers and KV heads: kept ones and the window's."""
    if isinstance(cache, DynamicCache):
        return sum(x.keys.shape[0] * x.keys.shape[1] * x.keys.shape[2] for x in cache.layers)
    return int(cache.live_slots().sum())


def ideal_bytes(cache: Cache, dtype: torch.dtype) -> int:
    """Keys and values of the live slots and nothing else."""
    stored = dtype.itemsize if isinstance(cache, DynamicCache) else cache.pool.key.data.element_size()
    return count_slots(cache) * 2 * WIDTH * stored


class Clock:
    """Seconds spent in what it wraps, up to now."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function):
        """`function`, timed by this clock."""

        def timed(*args, **kwargs):
            started = time.perf_counter()
            found = function(*args, **kwargs)
            self.seconds += time.perf_counter() - started
            return found

        return timed

    def watch(self, cache: Cache) -> None:
        """Times the attention of `cache`, and its storing: for a dynamic cache with the function that attends to it."""
        if isinstance(cache, DynamicCache):
            cache.update = self.wrap(cache.update)
        else:
            cache.attend = self.wrap(cache.attend)


SDPA_CLOCK = Clock()  # of every plain attention of this process: registered once
ALL_ATTENTION_FUNCTIONS["sdpa"] = SDPA_CLOCK.wrap(ALL_ATTENTION_FUNCTIONS["sdpa"])


class Contestant:
    """A filled cache and the model that decodes with it; every step's times are noted in milliseconds."""

    def __init__(self, name: str, models: Models, num_tokens: int, batch: int) -> None:
        self.name, self.model, self.clock = name, models.of(name), Clock()
        self.dtype = self.model.dtype
        self.cache = make_cache(name)
        fill(self.cache, num_tokens, batch, self.dtype, models)
        self.bytes = {
            "held_bytes": held_bytes(self.cache),
            "ideal_bytes": ideal_bytes(self.cache, self.dtype),
            "slots": count_slots(self.cache),
        }
        self.clock.watch(self.cache)
        self.ids = torch.arange(batch)[:, None]
        self.step_ms: list[float] = []
        self.attend_ms: list[float] = []

    @torch.no_grad()
    def step(self) -> None:
        """One token a sequence."""
        attended, started = self.clock.seconds + SDPA_CLOCK.seconds, time.perf_counter()
        logits = self.model(input_ids=self.ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.ids = logits[:, -1].argmax(-1, keepdim=True)
        self.step_ms.append(1e3 * (time.perf_counter() - started))
        self.attend_ms.append(1e3 * (self.clock.seconds + SDPA_CLOCK.seconds - attended))

    def forget(self) -> None:
        """Drops the times so far: of steps to warm up."""
        self.step_ms.clear()
        self.attend_ms.clear()
