"""Steps of single tokens that the host does not follow: room is made beforehand, then the same kernels run in place.

    secure   lengths are read once -> pages promised, tables widened: room for so many tokens of each sequence in any case
    inside   a forward over a token for each of the leading places: fused append, paged decode; nothing waits
    noted    what the host counts of it, also where a graph runs and the forward's own code does not

A step adds at most one slot to each (sequence, layer, KV head), and where the model has a sliding window, none beyond that:
these are the bounds that room is made by.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from dms_lab.cache.compact import CompactCache
from dms_lab.cache.layer import in_any_mode
from dms_lab.cache.policy import OffloadingRule


def check(cache: CompactCache) -> None:
    """Raises `ValueError` unless tokens can be stored in `cache` one at a time without a look from the host."""
    if cache.attention != "triton":
        raise ValueError(
            f"step=graph needs attention=triton, not {cache.attention}: what else there is looks at lengths on the host"
        )
    if not cache.appends_at_once or isinstance(cache.policy, OffloadingRule):
        raise ValueError(
            "step=graph stores a token by one kernel, which there is for rules that decide about every token (full, dms, "
            f"streaming_llm), not for policy {cache.policy.name}; use step=eager"
        )


@in_any_mode
def secure(cache: CompactCache, rows: Sequence[int], most: int) -> int:
    """Makes room for further single tokens of the sequences `rows`, and returns for how many: `most`, or what fits.

    In a pool of fixed size fewer may fit, or none. A pool that grows, grows by a quarter at least, tables by half, so that
    tensors are seldom replaced. Waits for the device. Any other use of the cache ends what was secured.
    """
    pool, page_size = cache.pool, cache.page_size
    pool.settle()
    every = torch.stack([layer.slots.length for layer in cache.layers]).cpu()
    length, limit = every[:, list(rows)], torch.tensor([layer.slots.limit for layer in cache.layers])
    free, held = pool.count_free(), -(-length // page_size)

    def needed(count: int) -> int:
        reached = (length + count).minimum(limit[:, None, None])
        return int((-(-reached // page_size) - held).sum())

    if pool.grows and needed(most) > free:
        pool.grow(max(needed(most) - free, pool.num_pages // 4))
        free = pool.count_free()
    while needed(most) > free:
        most -= 1
    longest = int(every.max()) + most
    pages = -(-longest // page_size)
    is_narrow = any(layer.slots.is_narrow(longest) for layer in cache.layers)
    for layer in cache.layers:
        layer.slots.reach(longest, pages + pages // 2 if is_narrow else 0)
    pool.promise(needed(most))
    cache.secured = most
    return most


@contextmanager
def inside(cache: CompactCache, num_rows: int) -> Iterator[None]:
    """Inside, a forward over one token for each of the leading `num_rows` sequences is a fixed sequence of kernels.

    No tensor is replaced. Room must have been secured for those that are real.
    """
    rows = cache.rows
    cache.rows, cache.is_fixed, cache.reads_prompt = slice(num_rows), True, False
    try:
        yield
    finally:
        cache.rows, cache.is_fixed = rows, False


def noted(cache: CompactCache) -> None:
    """Counts a token of each sequence whose kernels were launched."""
    cache.secured -= 1
    for layer in cache.layers:
        layer.columns += 1


def tensors(cache: CompactCache) -> list[Tensor]:
    """All tensors of tables and pool, by which a step's kernels know them."""
    return [x for layer in cache.layers for x in layer.slots.tensors()] + cache.pool.tensors()
