"""What a request's cache really holds, and what of it is live. Keys and values [1, K, S, D] a layer.

Two counts, because some presses free nothing: they keep a list of slots, `masked_key_indices`, whose keys kvpress
overwrites so that attention does not see them. Held counts them, live does not. Needs torch and transformers, not kvpress.
"""

from dataclasses import dataclass, field

from lines import Counts
from transformers import Cache, DynamicCache, PreTrainedModel


class MeteredCache(DynamicCache):
    """A DynamicCache that notes what it holds each time a layer has stored its tokens, before any press removes some."""

    def __init__(self):
        super().__init__()
        self.peak_bytes = 0

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Stores the tokens of a layer; afterwards `peak_bytes` has seen them."""
        found = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.layers[layer_idx].attended = found[0].shape[-2]
        self.peak_bytes = max(self.peak_bytes, held_bytes(self))
        return found


@dataclass
class Meter:
    """Slots of one request: held by the tensors, and live, without those that the model's attention hides.

    Counted as dms_lab does: after the prefill, and at every later forward those that it attended to.
    """

    model: PreTrainedModel
    cache: MeteredCache = field(default_factory=MeteredCache)
    steps: list[tuple[float, float]] = field(default_factory=list)
    peak: tuple[float, float] = (0.0, 0.0)

    def prefilled(self) -> None:
        """Counts what the prefill left."""
        self.peak = self._now()
        if self.peak[1] < self.peak[0] and self.model.config._attn_implementation == "eager":
            raise ValueError("this press masks keys, which kvpress does not do in eager attention: use --attention sdpa")

    def step(self, masked: float) -> None:
        """Counts one forward of decoding, with `masked` slots hidden from it."""
        held = sum(layer.attended for layer in self.cache.layers) / len(self.cache.layers)
        self.steps.append((held, held - masked))
        self.peak = (max(self.peak[0], held), max(self.peak[1], held - masked))

    def masked(self) -> float:
        """Slots that the next forward will not see though they are held, mean over layers and KV heads."""
        indices = [getattr(layer.self_attn, "masked_key_indices", None) for layer in _layers(self.model)]
        num_heads = self.cache.layers[0].keys.shape[1]
        return sum(len(found[2]) for found in indices if found is not None) / len(indices) / num_heads

    def counts(self) -> tuple[Counts, Counts]:
        """Held and live counts of the whole request."""
        end = self._now()
        return tuple(Counts(sum(step[i] for step in self.steps), self.peak[i], end[i]) for i in range(2))

    def _now(self) -> tuple[float, float]:
        held = sum(layer.keys.shape[-2] for layer in self.cache.layers) / len(self.cache.layers)
        return held, held - self.masked()


def held_bytes(cache: Cache) -> int:
    """Bytes of the storages behind a cache's keys and values, each counted once, whatever part of it is in view."""
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _layers(model: PreTrainedModel):
    return getattr(model.model, "language_model", model.model).layers
