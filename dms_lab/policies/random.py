"""Random eviction: the floor that every rule has to beat."""

import torch
from torch import Tensor

from dms_lab.cache.policy import LayerState
from dms_lab.policies.base import RankedPolicy


class RandomPolicy(RankedPolicy):
    """Drops, per KV head, a live token drawn uniformly, never the newest. Equal `seed`, equal draws."""

    name = "random"

    def __init__(self, budget: int, seed: int = 0) -> None:
        super().__init__(budget)
        self._generator = torch.Generator().manual_seed(seed)

    def rank(self, state: LayerState, weights: Tensor, live: Tensor) -> Tensor:
        ranks = torch.rand(live.shape, generator=self._generator).to(live.device)
        ranks[:, :, -1] = float("inf")
        return ranks
