"""Where the document of every token begins and ends: what bounds the loops of the kernels over packed documents.

Shapes: B batch, T tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GRANULE = 64  # tokens that share a lower and an upper bound


class Spans(NamedTuple):
    """int32 [B, T] each, of a token t of document d = document[b, t]; padding has empty spans.

    seen_from, seen_until  no token of d lies before `seen_from` or at `seen_until` or later: bounds, rounded to granules
    run_start, run_end     all tokens of this range are of document d: the run of equal ids around t, exact
    """

    seen_from: Tensor
    seen_until: Tensor
    run_start: Tensor
    run_end: Tensor


def document_spans(document: Tensor) -> Spans:
    """The spans of `document` [B, T], one id per document, -1 for padding. An id may come back after another one."""
    num_tokens = document.shape[1]
    padding = document < 0
    position = torch.arange(num_tokens, device=document.device).expand_as(document)
    starts = torch.ones_like(padding)
    starts[:, 1:] = document[:, 1:] != document[:, :-1]
    ends = starts.roll(-1, 1)  # the first token always starts a run, so the last one ends one
    run_start = torch.where(starts, position, 0).cummax(1).values
    run_end = torch.where(ends, position + 1, num_tokens).flip(1).cummin(1).values.flip(1)
    seen_from, seen_until = (
        bound.repeat_interleave(GRANULE, 1)[:, :num_tokens] for bound in _granule_bounds(document, padding)
    )
    empty = ((seen_from, num_tokens), (seen_until, 0), (run_start, num_tokens), (run_end, 0))
    return Spans(*(x.masked_fill(padding, value).int().contiguous() for x, value in empty))


def _granule_bounds(document: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
    """Of each granule, the first and the end of the tokens in granules whose range of ids meets its own."""
    num_tokens = document.shape[1]
    num_granules = -(-num_tokens // GRANULE)
    fill = (0, num_granules * GRANULE - num_tokens)
    low = document.masked_fill(padding, torch.iinfo(document.dtype).max)
    low = F.pad(low, fill, value=torch.iinfo(document.dtype).max).view(-1, num_granules, GRANULE).amin(2)
    high = F.pad(document.clamp(min=-1), fill, value=-1).view(-1, num_granules, GRANULE).amax(2)
    meets = (low[:, :, None] <= high[:, None]) & (low[:, None] <= high[:, :, None])
    granule = torch.arange(num_granules, device=document.device)
    first = torch.where(meets, granule, num_granules).amin(2)
    last = torch.where(meets, granule, -1).amax(2)
    return first * GRANULE, ((last + 1) * GRANULE).clamp(max=num_tokens)
