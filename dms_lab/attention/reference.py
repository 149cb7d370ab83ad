"""Dense attention under a mask or a bias per KV head: the specification that every other path is compared with.

Eager, differentiable in everything, exact in the dtype it is given. Materialises [B, H, Q, S]: for tests and short
sequences. Shapes: B batch, H query heads, K KV heads, G = H / K, Q queries, S keys, D head width.
"""

import torch
from torch import Tensor

from dms_lab import eviction


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, Q, D] and weights [B, H, Q, S] of `query` [B, H, Q, D] over `key`, `value` [B, K, S, D].

    `bias` [B, K, Q, S] is added to the scores, or, if boolean, tells what is visible. `softcap` bounds the scores before
    the bias, `sinks` [H] is one more score a head that takes weight and gives nothing. A row that sees nothing is 0.
    """
    batch, num_heads, num_queries, width = query.shape
    num_kv_heads = key.shape[1]
    grouped = query.reshape(batch, num_kv_heads, -1, num_queries, width)
    scores = torch.einsum("bkgqd,bksd->bkgqs", grouped, key) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias.dtype == torch.bool:
        scores = scores.masked_fill(~bias[:, :, None], float("-inf"))
    else:
        scores = scores + bias[:, :, None].to(scores.dtype)
    if sinks is not None:
        extra = sinks.to(scores.dtype).view(1, num_kv_heads, -1, 1, 1).expand(batch, -1, -1, num_queries, 1)
        scores = torch.cat([scores, extra], -1)
    highest = scores.detach().amax(-1, keepdim=True)
    weights = (scores - highest.masked_fill(highest == float("-inf"), 0.0)).exp()
    total = weights.sum(-1, keepdim=True)
    weights = weights / total.masked_fill(total == 0, 1.0)
    if sinks is not None:
        weights = weights[..., :-1]
    output = torch.einsum("bkgqs,bksd->bkgqd", weights, value)
    return output.reshape(batch, num_heads, num_queries, -1), weights.reshape(batch, num_heads, num_queries, -1)


def soft_bias(log_keep: Tensor, window: int, document: Tensor | None = None, sliding_window: int | None = None) -> Tensor:
    """The additive bias [B, K, T, T] of the relaxed decisions: `log_keep` [B, K, T] of key j at distance >= window.

    Keys after the query, of another document (`document` [B, T], -1: padding) or outside `sliding_window` get -inf.
    """
    num_tokens = log_keep.shape[-1]
    kept = torch.zeros_like(log_keep, dtype=torch.bool)
    seen = eviction.visible(kept, window, key_document=document)
    distance = torch.arange(num_tokens, device=log_keep.device)
    distance = distance[:, None] - distance[None, :]
    if sliding_window is not None:
        seen = seen & (distance < sliding_window)
    bias = torch.where(distance >= window, log_keep[:, :, None, :], torch.zeros_like(log_keep[:, :, None, :]))
    return bias.masked_fill(~seen, float("-inf"))
