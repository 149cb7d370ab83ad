"""Which blocks of a cache a query reads, where it does not read all: a bound on the scores of a block's keys.

    keys of a block -> lowest and highest per channel -> bound of any score with a query -> the best blocks and the newest

Source: Tang et al. 2024, "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference".
Shapes: B batch, K KV heads, G = H / K, M blocks, D head width.
"""

import torch
from torch import Tensor

from dms_lab.attention.paged import Slots


def choose_blocks(query: Tensor, low: Tensor, high: Tensor, newest: Tensor, count: int) -> Tensor:
    """The `count` best blocks for a query [B, H, 1, D], the newest [B, K] first: indices [B, K, min(count, M)].

    `low`, `high` [B, K, M, D] are the keys' extremes. Blocks behind the newest are last. A block counts by the best of the
    query heads that share its KV head.
    """
    batch, num_kv_heads, num_blocks, width = low.shape
    heads = query.reshape(batch, num_kv_heads, -1, 1, width).float().unbind(2)
    # Products and sums, no matrix product: its order of adding up may follow the number of blocks, that is, the batch.
    bounds = [(q.clamp(min=0) * high.float() + q.clamp(max=0) * low.float()).sum(-1) for q in heads]
    bound = torch.stack(bounds).amax(0)
    index = torch.arange(num_blocks, device=low.device)
    bound = bound.masked_fill(index > newest[:, :, None], -float("inf"))
    bound = bound.masked_fill(index == newest[:, :, None], float("inf"))
    return bound.topk(min(count, num_blocks), 2).indices


def read_blocks(query: Tensor, slots: Slots, count: int) -> Slots:
    """The part of `slots` that a query reads: its `count` best pages, the newest, which may not be full, as the last."""
    pool, page_size = slots.pool, slots.pool.page_size
    newest = (slots.length - 1) // page_size
    chosen = choose_blocks(query, pool.low[slots.table], pool.high[slots.table], newest, count)
    held = (newest + 1).clamp(max=chosen.shape[2])  # pages read of each head
    place = torch.arange(chosen.shape[2], device=chosen.device)
    order = torch.where(place < held[:, :, None] - 1, place + 1, 0)  # the newest from the front to the end
    order = order.clamp(max=chosen.shape[2] - 1)
    table = slots.table.gather(2, chosen.gather(2, order))
    length = (held - 1) * page_size + slots.length - newest * page_size
    return Slots(pool, table, torch.where(slots.length > 0, length, 0), slots.apart, slots.backend)
