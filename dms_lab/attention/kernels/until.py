"""Which keys a chunk's queries see, as numbers: the first query of the chunk that does not see a key any more.

    until = j + window where evicted, j + sliding window where there is one, the lower of the two, or NO_LIMIT

Query i of the chunk sees key j <= i iff i < until[j]; positions count from the chunk's first token, which has 0. What is
beyond a head's length has 0: nobody sees it. Shapes: B batch, K KV heads, C new tokens, S slots, N keys of a block.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dms_lab.attention.paged import Chunk, Slots

NO_LIMIT = 1 << 29  # of tokens: more than any sequence has


class PastKeys(NamedTuple):
    """int32, of the slots: until [B, K, S]; of their blocks, those first that are seen whole for ever, then by age:

    order   [B, K, blocks]   which block
    last    [B, K, blocks]   until when any of its keys is seen, falling
    whole   [B, K]           how many of the first are seen whole by every query
    """

    until: Tensor
    order: Tensor
    last: Tensor
    whole: Tensor


class NewKeys(NamedTuple):
    """int32, of the new tokens: until [B, K, C]; those kept, in order [B, K, C], and how many before each [B, K, C + 1].

    `window`: before it, a query looks at what is listed alone. C without a list: `kept` and `before` then mean nothing.
    """

    until: Tensor
    kept: Tensor
    before: Tensor
    window: int


def past_keys(chunk: Chunk, slots: Slots, sliding: int | None, block: int) -> PastKeys:
    """Until when the slots are seen, in blocks of `block`."""
    position = (chunk.past_position - chunk.position[:, :1, None]).int()
    until = _until(position, chunk.past_evicted, chunk.window, sliding)
    used = torch.arange(until.shape[2], device=until.device) < slots.length[:, :, None]
    until = until.masked_fill(~used, 0)
    blocks = F.pad(until, (0, -until.shape[2] % block)).unflatten(2, (-1, block))
    last, is_whole = blocks.amax(3), blocks.amin(3) >= NO_LIMIT
    rank, order = (2 * last + is_whole).sort(dim=2, descending=True, stable=True)
    return PastKeys(until, order.int(), rank // 2, is_whole.sum(2, dtype=torch.int32))


def new_keys(chunk: Chunk, sliding: int | None) -> NewKeys:
    """Until when the new tokens are seen, and which of them outlive the window."""
    num_new = chunk.key.shape[2]
    position = torch.arange(num_new, dtype=torch.int32, device=chunk.key.device)
    until = _until(position.expand(chunk.evicted.shape), chunk.evicted, chunk.window, sliding)
    if chunk.window is None or chunk.window >= num_new:
        return NewKeys(until, until, until, num_new)
    kept = ~chunk.evicted
    before = F.pad(kept.cumsum(2), (1, 0)).int()
    place = torch.where(kept, before[:, :, :-1].long(), num_new)
    listed = F.pad(torch.zeros_like(until), (0, 1)).scatter_(2, place, position.expand(place.shape))[:, :, :num_new]
    return NewKeys(until, listed.contiguous(), before, chunk.window)


def _until(position: Tensor, evicted: Tensor, window: int | None, sliding: int | None) -> Tensor:
    """int32 of the shape of `position`, not below 0."""
    until = torch.full_like(position, NO_LIMIT)
    if window is not None:
        until = torch.where(evicted, position + window, until)
    if sliding is not None:
        until = until.minimum(position + sliding)
    return until.clamp(min=0).contiguous()
