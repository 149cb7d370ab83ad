"""The masked cache: keeps every key and value, and hides what its policy evicted. The oracle of the real caches.

    model.generate(..., past_key_values=MaskedCache(policy))
      layer: update(keys, values) -> all S keys -> policy.attend -> output; live slots -> accounting

It saves nothing: what a policy would have freed is counted, not freed. Works on any retrofitted model (see `retrofit`).
"""

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from dms_lab.cache.policy import LayerState, Policy, PolicyCache, Scores


class MaskedLayer(DynamicLayer):
    """One layer's keys and values [B, K, S, D] with what its policy knows of them."""

    def __init__(self) -> None:
        super().__init__()
        self.state = LayerState()
        self.live: Tensor | None = None  # live slots of the newest query, [B, K]

    def reset(self) -> None:
        super().reset()
        self.state, self.live = LayerState(), None

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("a masked cache cannot be cropped: what its policy evicted meanwhile is not undone")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx.to(self.keys.device))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        state = self.state
        state.document = None if state.document is None else state.document[indices]
        state.evict_logit = None if state.evict_logit is None else state.evict_logit[indices]
        state.notes = {name: note[indices] for name, note in state.notes.items()}
        self.live = None if self.live is None else self.live[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        batch = self.keys.shape[0]
        self.batch_select_indices(torch.arange(batch, device=self.keys.device).repeat_interleave(repeats))


class MaskedCache(PolicyCache):
    """A Hugging Face cache with one `policy` (of `dms_lab.policies`) for all layers."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(layer_class_to_replicate=MaskedLayer)
        self.policy = policy

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scores: Scores,
        evict_logit: Tensor | None,
        document: Tensor | None,
    ) -> Tensor:
        layer = self.layers[layer_idx]
        state = layer.state
        state.document, state.layer = document, layer_idx
        if evict_logit is not None:
            old = state.evict_logit
            state.evict_logit = evict_logit if old is None else torch.cat([old, evict_logit], dim=2)
        output, live = self.policy.attend(state, query, key, value, scores)
        layer.live = live[:, :, -1]
        return output

    def live_slots(self) -> Tensor:
        return torch.stack([layer.live for layer in self.layers], dim=1)
