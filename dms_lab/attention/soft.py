"""Training attention: relaxed decisions, forward and backward, without a T x T tensor on a GPU.

    reference  dense and eager, the specification
    chunked    exact; queries in chunks over the keys up to them; probabilities are recomputed in the backward
    flex       torch FlexAttention, compiled; CUDA only for training (it has no backward on CPUs)
    triton     kernels of our own (`kernels/`), CUDA only; evicted keys cost nothing. Opt-in: not yet measured on a GPU

The score of key j for query i gets log_keep[j] once i - j >= window. In the backward the gradient of log_keep is the
column sum of dS over those queries and over the G query heads of the group.
Shapes: B batch, T tokens, H query heads, K KV heads, G = H / K, D head width, C queries of a chunk.
"""

import functools
import logging
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dms_lab.attention import autocast, reference
from dms_lab.attention.kept import Kept, once

BACKENDS = ("auto", "reference", "chunked", "flex", "triton")
_FLEX_WIDTH = 16  # of a head, at least
_CHUNK = 64  # queries; on one core a quarter less time than 128 at 512 tokens, and as fast as 32
_BLOCK = 128  # FlexAttention's own block of queries and of keys
_LOG2E = 1 / math.log(2)  # torch's exp of numbers below -87 takes up to 34 times as long on a CPU, its exp2 does not
_log = logging.getLogger(__name__)


@functools.cache
def choose_backend(name: str, device_type: str, width: int = _FLEX_WIDTH) -> str:
    """The backend that `name` means on a device for heads of `width`. Logs a choice once.

    `auto` is flex on CUDA, but for heads narrower than 16, which that cannot compile, and chunked elsewhere.

    Raises `ValueError` for an unknown name, and for flex and triton where they cannot train.
    """
    if name not in BACKENDS:
        raise ValueError(f"attention={name!r} is not known; choose one of {', '.join(BACKENDS)}")
    if name == "flex" and device_type != "cuda":
        raise ValueError(f"attention='flex' has no backward on {device_type}; use attention=chunked, which is exact")
    if name == "triton":
        _check_triton(device_type)
    if name != "auto":
        return name
    chosen = "flex" if device_type == "cuda" and width >= _FLEX_WIDTH else "chunked"
    _log.info("attention=auto: %s on %s", chosen, device_type)
    return chosen


def _check_triton(device_type: str) -> None:
    try:
        from dms_lab.attention.kernels import relaxed
    except ImportError as error:
        raise ValueError(
            f"attention='triton' needs the package triton ({error}): pip install 'dms_lab[gpu]', or use attention=flex on "
            "CUDA and attention=chunked elsewhere"
        ) from error
    if device_type != "cuda" and not relaxed.INTERPRETED:
        raise ValueError(
            f"attention='triton' has kernels for cuda, not for {device_type}; use attention=chunked, which is exact "
            "(TRITON_INTERPRET=1 in the environment interprets the kernels on a CPU, slowly, as the tests do)"
        )


def soft_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_keep: Tensor | None,
    window: int,
    document: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    sliding_window: int | None = None,
    backend: str = "auto",
    kept: Kept | None = None,
) -> Tensor:
    """Causal attention [B, H, T, D] in which key j gets `log_keep` [B, K, T] from distance `window` on.

    `log_keep` is governed already (0: kept, -inf: evicted for sure), [B, 1, T] where the heads share it; None is plain
    attention. `document` [B, T] separates packed documents, -1 is padding, whose rows are 0; None: one unpadded document
    a row. `chunked` and `triton` are differentiable once; `chunked` computes in float32 or better, under autocast too.
    With a list `kept`, empty at first, these two compute once for a forward and its recomputation; see `kept`.
    """
    backend = choose_backend(backend, query.device.type, min(query.shape[-1], _FLEX_WIDTH))
    if log_keep is not None:
        log_keep = log_keep.expand(key.shape[:3])
    if backend == "reference":
        lk = log_keep if log_keep is not None else key.new_zeros(key.shape[:3])
        bias = reference.soft_bias(lk, window, document, sliding_window)
        return reference.attend(query, key, value, bias, scaling, softcap, sinks)[0]
    if backend == "flex":
        return flex_attention(query, key, value, log_keep, window, document, scaling, softcap, sinks, sliding_window)
    if backend == "triton":
        from dms_lab.attention.kernels.relaxed import Scoring, relaxed_attention

        scoring = Scoring(window, scaling, softcap, sliding_window)
        return relaxed_attention(query, key, value, log_keep, document, sinks, scoring, kept)
    padding = None
    if document is not None and _one_document_each(document):
        padding, document = document < 0, None
    if log_keep is None and document is None and softcap is None and sinks is None and sliding_window is None:
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    else:
        output = _ChunkedAttention.apply(
            query, key, value, log_keep, sinks, document, (window, scaling, softcap, sliding_window), kept
        )
    return output if padding is None else output.masked_fill(padding[:, None, :, None], 0.0)


def _one_document_each(document: Tensor) -> bool:
    """Whether every row is one document and then padding: causality alone then keeps real tokens from padding."""
    first = document[:, :1]
    real = document >= 0
    return bool(((document == first) | ~real).all()) and bool((real[:, :-1] | ~real[:, 1:]).all())


def _as_given(function):
    """`function(ctx, tensor, ...)` without autocast, which would round scores that are kept in float32 on purpose."""

    @functools.wraps(function)
    def run(ctx, tensor, *rest):
        with autocast.off(tensor.device):
            return function(ctx, tensor, *rest)

    return run


class _ChunkedAttention(torch.autograd.Function):
    """Exact attention over chunks of queries; saves inputs, output and log-sum-exp. Scores are to the base of 2."""

    @staticmethod
    @_as_given
    def forward(ctx, query, key, value, log_keep, sinks, document, settings, kept):
        ctx.settings = settings
        output, lse = once(kept, lambda: _chunked_forward(query, key, value, log_keep, sinks, document, settings))
        ctx.save_for_backward(query, key, value, log_keep, sinks, document, output, lse)
        return output.view(query.shape).to(query.dtype)

    @staticmethod
    @once_differentiable
    @_as_given
    def backward(ctx, grad_output):
        query, key, value, log_keep, sinks, document, output, lse = ctx.saved_tensors
        window, scaling = ctx.settings[:2]
        batch, _, num_tokens, width = query.shape
        num_kv_heads = key.shape[1]
        q, k, v, lk = _wide(query), _wide(key), _wide(value), None if log_keep is None else _wide(log_keep) * _LOG2E
        q = q.reshape(batch, num_kv_heads, -1, num_tokens, width)
        g = _wide(grad_output).reshape(q.shape)
        delta = (g * output).sum(-1)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        dlk = None if lk is None else torch.zeros_like(lk)
        for start in range(0, num_tokens, _CHUNK):
            stop = min(start + _CHUNK, num_tokens)
            scores, slope = _chunk_scores(q, k, lk, document, start, stop, ctx.settings)
            weights = scores.sub_(lse[:, :, :, start:stop, None]).exp2_()
            gc = g[:, :, :, start:stop].flatten(2, 3)
            dv[:, :, :stop].add_(weights.flatten(2, 3).transpose(2, 3) @ gc)
            ds = (gc @ v[:, :, :stop].transpose(2, 3)).view(weights.shape)
            ds.sub_(delta[:, :, :, start:stop, None]).mul_(weights)
            if dlk is not None:
                old = max(0, start - window + 1)  # keys before it are out of the window for the whole chunk
                dlk[:, :, :old].add_(ds[..., :old].sum((2, 3)))
                near = _distance(start, stop, old, ds.device) >= window
                dlk[:, :, old:stop].add_((ds[..., old:].sum(2) * near).sum(2))
            if slope is not None:
                ds.mul_(slope)
            flat = ds.flatten(2, 3).mul_(scaling)
            dq[:, :, :, start:stop] = (flat @ k[:, :, :stop]).view(*ds.shape[:4], width)
            dk[:, :, :stop].add_(flat.transpose(2, 3) @ q[:, :, :, start:stop].flatten(2, 3))
        dsinks = None
        if sinks is not None:
            weight = (_wide(sinks).view(1, num_kv_heads, -1, 1) * _LOG2E - lse).exp2()
            dsinks = -(weight * delta).sum((0, 3)).flatten().to(sinks.dtype)
        dlk = None if dlk is None else dlk.to(log_keep.dtype)
        dq = dq.view(query.shape).to(query.dtype)
        return dq, dk.to(key.dtype), dv.to(value.dtype), dlk, dsinks, None, None, None


def _chunked_forward(query, key, value, log_keep, sinks, document, settings) -> tuple[Tensor, Tensor]:
    """Output [B, K, G, T, D] and log-sum-exp [B, K, G, T], to the base of 2, both in a precision to accumulate in."""
    batch, _, num_tokens, width = query.shape
    num_kv_heads = key.shape[1]
    q, k, v, lk = _wide(query), _wide(key), _wide(value), None if log_keep is None else _wide(log_keep) * _LOG2E
    q = q.reshape(batch, num_kv_heads, -1, num_tokens, width)
    output = torch.empty_like(q)
    lse = q.new_empty(q.shape[:-1])
    sink = None if sinks is None else _wide(sinks).view(1, num_kv_heads, -1, 1) * _LOG2E
    for start in range(0, num_tokens, _CHUNK):
        stop = min(start + _CHUNK, num_tokens)
        scores, _ = _chunk_scores(q, k, lk, document, start, stop, settings)
        highest = scores.amax(-1)
        if sink is not None:
            highest = torch.maximum(highest, sink)
        highest = highest.masked_fill(highest == -math.inf, 0.0)
        weights = scores.sub_(highest[..., None]).exp2_()
        total = weights.sum(-1)
        if sink is not None:
            total = total + (sink - highest).exp2()
        chunk = weights.flatten(2, 3) @ v[:, :, :stop]
        safe = total.masked_fill(total == 0, 1.0)
        output[:, :, :, start:stop] = chunk.view(*weights.shape[:4], width).div_(safe[..., None])
        lse[:, :, :, start:stop] = highest + safe.log2()  # 0 for a row that sees nothing: exp2(-inf - 0) is 0 again
    return output, lse


def _wide(x: Tensor) -> Tensor:
    """`x` in a precision to accumulate in."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _distance(start: int, stop: int, first_key: int, device: torch.device) -> Tensor:
    """i - j for the queries `start..stop` and the keys `first_key..stop`."""
    return torch.arange(start, stop, device=device)[:, None] - torch.arange(first_key, stop, device=device)[None, :]


def _chunk_scores(
    q: Tensor,
    k: Tensor,
    log_keep: Tensor | None,
    document: Tensor | None,
    start: int,
    stop: int,
    settings: tuple[int, float, float | None, int | None],
) -> tuple[Tensor, Tensor | None]:
    """Biased scores [B, K, G, C, stop] of one chunk, to the base of 2 as `log_keep` is, and the slope of a soft-cap."""
    window, scaling, softcap, sliding_window = settings
    chunk = q[:, :, :, start:stop]
    unit = scaling * _LOG2E if softcap is None else scaling
    scores = (chunk.flatten(2, 3) * unit) @ k[:, :, :stop].transpose(2, 3)
    scores = scores.view(*chunk.shape[:4], stop)
    slope = None
    if softcap is not None:
        bounded = torch.tanh(scores / softcap)
        scores, slope = bounded * (softcap * _LOG2E), 1 - bounded.square()
    old = max(0, start - window + 1)
    if log_keep is not None:
        scores[..., :old] += log_keep[:, :, None, None, :old]
    distance = _distance(start, stop, old, q.device)
    if log_keep is not None:
        recent = torch.where(distance >= window, log_keep[:, :, None, old:stop], 0.0)
        scores[..., old:] += recent.masked_fill(distance < 0, -math.inf)[:, :, None]
    else:
        scores[..., old:].masked_fill_(distance < 0, -math.inf)
    if sliding_window is not None:
        scores.masked_fill_(_distance(start, stop, 0, q.device) >= sliding_window, -math.inf)
    if document is not None:
        same = document[:, start:stop, None] == document[:, None, :stop]
        same &= document[:, None, :stop] >= 0
        scores.masked_fill_(~same[:, None, None], -math.inf)
    return scores, slope


# -- FlexAttention -----------------------------------------------------------------------------------------------------
@functools.cache
def _compiled_flex(device_type: str):
    from torch.nn.attention.flex_attention import flex_attention as flex

    return torch.compile(flex) if device_type == "cuda" else flex


def flex_attention(query, key, value, log_keep, window, document, scaling, softcap, sinks, sliding_window) -> Tensor:
    """`soft_attention` by FlexAttention: compiled on CUDA, eager elsewhere (forward only)."""
    from torch.nn.attention.flex_attention import AuxRequest

    num_tokens = query.shape[2]
    group = query.shape[1] // key.shape[1]
    log_keep = None if log_keep is None else log_keep.contiguous()

    def score_mod(score, b, h, i, j):
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if log_keep is None:
            return score
        return score + torch.where(i - j >= window, log_keep[b, h // group, j], 0.0)

    def mask_mod(b, h, i, j):
        seen = i >= j
        if sliding_window is not None:
            seen = seen & (i - j < sliding_window)
        if document is not None:
            seen = seen & (document[b, i] == document[b, j]) & (document[b, j] >= 0)
        return seen

    mask = _block_mask(mask_mod, document, num_tokens, sliding_window, query.device)
    output, aux = _compiled_flex(query.device.type)(
        query,
        key,
        value,
        score_mod=score_mod,
        block_mask=mask,
        scale=scaling,
        enable_gqa=True,
        return_aux=AuxRequest(lse=sinks is not None),
    )
    if sinks is not None:
        output = output * torch.sigmoid(aux.lse - sinks.view(1, -1, 1))[..., None].to(output.dtype)
    return output


def _block_mask(mask_mod, document: Tensor | None, num_tokens: int, sliding_window: int | None, device: torch.device):
    """The FlexAttention mask, from the blocks' first and last positions and documents.

    Torch's `create_block_mask` would evaluate `mask_mod` on all T x T pairs first. A block that holds a visible pair is
    always listed; one that is visible throughout is listed as full, so that `mask_mod` is not evaluated in it.
    """
    from torch.nn.attention.flex_attention import BlockMask

    num_blocks = -(-num_tokens // _BLOCK)
    block = torch.arange(num_blocks, device=device)
    ahead = (block[:, None] - block[None, :]) * _BLOCK  # distance of the first query from the first key
    inside = (block + 1) * _BLOCK <= num_tokens
    some = (ahead >= 0)[None]
    full = ((ahead > 0) & inside[:, None])[None]
    if sliding_window is not None:
        some = some & (ahead - (_BLOCK - 1) < sliding_window)
        full = full & (ahead + (_BLOCK - 1) < sliding_window)
    if document is not None:
        ids = F.pad(document, (0, num_blocks * _BLOCK - num_tokens), value=-1).view(-1, num_blocks, _BLOCK)
        low = ids.masked_fill(ids < 0, torch.iinfo(ids.dtype).max).amin(-1)
        high = ids.amax(-1)
        some = some & (low[:, :, None] <= high[:, None]) & (low[:, None] <= high[:, :, None])
        single = (low == high) & (ids >= 0).all(-1)
        full = full & single[:, :, None] & single[:, None] & (low[:, :, None] == low[:, None])
    lists = []
    for listed in (some & ~full, full):
        listed = listed[:, None].int()
        lists += [listed.sum(-1, dtype=torch.int32), listed.argsort(dim=-1, descending=True, stable=True).int()]
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=_BLOCK, mask_mod=mask_mod, seq_lengths=(num_tokens, num_tokens))
