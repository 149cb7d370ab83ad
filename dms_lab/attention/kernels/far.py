"""Which keys still count beyond the window, packed together: what makes evicted tokens cost nothing in training.

A query gives a key beyond its window the weight exp(log_keep + s_ij - lse_i), and lse_i >= s_ii because it sees itself. So

    weight <= exp(log_keep_j + scaling * |q_i| * |k_j - k_i|)

A soft-cap has slope 1 at most and a sink raises lse_i, so both leave the bound. Keys whose bound, over all queries of the
head's group, is below the noise floor are left out: all of them together weigh less than half a unit in the last place of a
float32 weight of 1. Their gradient is 0.

    alive      x . . x x . x .     count    0 1 1 1 2 3 3 4 4     (alive keys before a position: bounds of the loops)
    position   0 3 4 6 - - - -     key, value, bias: those rows, packed

Shapes: B batch, H query heads, K KV heads, T tokens, D head width.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2E = math.log2(math.e)


class FarKeys(NamedTuple):
    """The keys of each KV head that count beyond the window, in order. Entries at `count[..., T]` and behind are void.

    alive     [B, K, T] bool: which keys these are
    count     [B, K, T + 1] int32: how many of them lie before a position
    position  [B, K, T] int32: where they lie; T for void entries
    bias      [B, K, T] float32: their log_keep, times log2(e); -inf for void entries
    """

    alive: Tensor
    count: Tensor
    position: Tensor
    bias: Tensor

    def pack(self, x: Tensor) -> Tensor:
        """The rows of `x` [B, K, T, D] that these keys have, packed; void rows are those of some key."""
        index = self.position.clamp(max=x.shape[2] - 1).long()
        return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3]))

    def unpack(self, x: Tensor) -> Tensor:
        """`x` [B, K, T] of packed keys at the keys' own places, 0 elsewhere."""
        index = self.count[..., :-1].clamp(max=x.shape[2] - 1).long()
        return torch.where(self.alive, x.gather(2, index), 0.0)


def noise_floor(num_tokens: int) -> float:
    """The bound, as a logarithm, below which a key is left out: `num_tokens` of them weigh less than 2^-25."""
    return -(25 + math.log2(num_tokens)) * math.log(2)


@torch.no_grad()
def select_far(
    query: Tensor, key: Tensor, log_keep: Tensor, document: Tensor | None, scaling: float, floor: float | None = None
) -> FarKeys:
    """The keys that count beyond the window, by their `log_keep` [B, K, T] and the bound above; never padding.

    `floor` replaces the noise floor; -inf keeps every key but those of log_keep = -inf. Values that are no numbers keep
    their keys, and so reach the loss.
    """
    num_tokens = key.shape[2]
    bias = log_keep.float()
    alive = ~(bias + _reach(query, key, scaling) <= (noise_floor(num_tokens) if floor is None else floor))
    if document is not None:
        alive &= (document >= 0)[:, None]
    count = F.pad(alive.cumsum(2, dtype=torch.int32), (1, 0))
    position = torch.arange(num_tokens, device=key.device).expand(alive.shape)
    packed = position.new_full((*alive.shape[:2], num_tokens + 1), num_tokens)
    # Dead keys all write the entry behind the last one.
    packed.scatter_(2, torch.where(alive, count[..., :-1].long(), num_tokens), position)
    packed = packed[..., :num_tokens]
    packed_bias = bias.gather(2, packed.clamp(max=num_tokens - 1)).masked_fill(packed == num_tokens, -math.inf)
    return FarKeys(alive, count, packed.int().contiguous(), packed_bias * LOG2E)


def _reach(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """By how much a query's score of each key [B, K, T] can lie above its score of itself, over all queries."""
    batch, num_kv_heads = key.shape[:2]
    longest = torch.linalg.vector_norm(query, dim=-1, dtype=torch.float32).view(batch, num_kv_heads, -1).amax(2)
    key = key.float()
    spread = torch.linalg.vector_norm(key - key.mean(2, keepdim=True), dim=-1)  # |k_j - k_i| <= both distances to any point
    return abs(scaling) * longest[..., None] * (spread + spread.amax(2, keepdim=True))
