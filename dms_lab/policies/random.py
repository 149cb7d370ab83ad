"""Random eviction: the floor that every rule has to beat."""

import torch
from torch import Tensor

from dms_lab.cache.policy import Ranking
from dms_lab.policies.base import RankedPolicy


class RandomPolicy(RankedPolicy):
    """Drops, per KV head, a live token drawn uniformly, never the newest.

    The draws are a hash of (seed, layer, KV head, step, token): they depend neither on the batch nor on the order of slots.
    """

    name = "random"
    needs_weights = False

    def __init__(self, budget: int, seed: int = 0) -> None:
        super().__init__(budget)
        self.seed = seed

    def rank(self, seen: Ranking) -> Tensor:
        head = torch.arange(seen.position.shape[1], device=seen.position.device)[None, :, None]
        mixed = _hashed(torch.full_like(head, self.seed * 1000003 + seen.layer))
        for part in (head, seen.now[:, None, None], seen.position.long()):
            mixed = _hashed(mixed ^ _hashed(part + 0x632BE5AB))
        return mixed.double().masked_fill(seen.position == seen.now[:, None, None], float("inf"))


def _hashed(x: Tensor) -> Tensor:
    """A bijective mixing of 32-bit whole numbers (the finalizer of MurmurHash3), in int64."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return x ^ (x >> 16)
