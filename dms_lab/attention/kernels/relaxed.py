"""Training attention by Triton kernels: relaxed decisions, forward and backward, deterministic, any number of tokens.

Opt-in: right on a CPU by Triton's interpreter (TRITON_INTERPRET=1), not yet measured on a GPU.
Shapes: B batch, H query heads, K KV heads, G = H / K, T tokens, D head width.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from dms_lab.attention.kept import Kept, once
from dms_lab.attention.kernels.delta import delta_kernel
from dms_lab.attention.kernels.device import where_its_tensors_are
from dms_lab.attention.kernels.far import LOG2E, FarKeys, select_far
from dms_lab.attention.kernels.forward import forward_kernel
from dms_lab.attention.kernels.key_grad import key_grad_kernel
from dms_lab.attention.kernels.query_grad import query_grad_kernel
from dms_lab.attention.kernels.spans import Spans, document_spans
from dms_lab.attention.kernels.tiles import Tile, Tiles, choose_tiles

INTERPRETED = type(forward_kernel).__name__ == "InterpretedFunction"
WIDEST = 256
_NO_LIMIT = 1 << 30  # of tokens: longer than any row
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Scoring:
    """What makes a score of a product, beside the decisions. Windows in tokens; `floor`, see `far.select_far`."""

    window: int
    scaling: float
    softcap: float | None = None
    sliding_window: int | None = None
    floor: float | None = None
    tiles: Tiles | None = None

    def arguments(self, num_tokens: int, has_far: bool) -> dict:
        """The kernels' arguments: scores in powers of 2 are outer * product, or outer * tanh(inner * product).

        Without far keys all keys are near: the kernels add no bias to those.
        """
        inner, outer = 0.0, self.scaling * LOG2E
        if self.softcap is not None:
            inner, outer = self.scaling / self.softcap, self.softcap * LOG2E
        sliding = _NO_LIMIT if self.sliding_window is None else self.sliding_window
        window = self.window if has_far else num_tokens
        return {"window": window, "sliding": sliding, "inner": inner, "outer": outer}


def relaxed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_keep: Tensor | None,
    document: Tensor | None,
    sinks: Tensor | None,
    scoring: Scoring,
    kept: Kept | None = None,
) -> Tensor:
    """Causal attention [B, H, T, D] in which key j gets `log_keep` [B, K, T] from distance `window` on; see `soft`.

    bfloat16, float16 or float32, products of the two former in their precision with float32 sums; differentiable once.
    Raises `ValueError` for other types and for heads wider than 256.
    """
    dtypes = {x.dtype for x in (query, key, value)}
    if len(dtypes) > 1 or query.dtype not in _DTYPES:
        found = ", ".join(str(x.dtype).removeprefix("torch.") for x in (query, key, value))
        raise ValueError(
            f"attention=triton needs queries, keys and values of one type, bfloat16, float16 or float32, not {found}; "
            "use attention=chunked, which widens them"
        )
    if query.shape[-1] > WIDEST or value.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"attention=triton takes heads of one width up to {WIDEST}, not {query.shape[-1]} and {value.shape[-1]}; "
            "use attention=flex or attention=chunked"
        )
    return _RelaxedAttention.apply(query, key, value, log_keep, document, sinks, scoring, kept)


class _RelaxedAttention(torch.autograd.Function):
    """Saves inputs, output, log-sum-exp and a few integers a token; keys are packed again in the backward."""

    @staticmethod
    @where_its_tensors_are
    def forward(ctx, query, key, value, log_keep, document, sinks, scoring, kept):
        query, key, value = (_rows(x) for x in (query, key, value))
        far = None
        if log_keep is not None and scoring.window < query.shape[2]:  # else no pair is that far apart
            far = select_far(query, key, log_keep, document, scoring.scaling, scoring.floor)
        spans = None if document is None else document_spans(document)
        document = None if document is None else document.int().contiguous()
        output, lse = once(kept, lambda: _forward(query, key, value, far, document, spans, sinks, scoring))
        ctx.scoring, ctx.has = scoring, (far is not None, spans is not None)
        ctx.keep_dtype = None if log_keep is None else log_keep.dtype
        tables = (*(far or ()), *((document, *spans) if spans else ()))
        ctx.save_for_backward(query, key, value, sinks, output, lse, *tables)
        return output

    @staticmethod
    @once_differentiable
    @where_its_tensors_are
    def backward(ctx, grad):
        query, key, value, sinks, output, lse, *tables = ctx.saved_tensors
        has_far, has_documents = ctx.has
        far = FarKeys(*tables[:4]) if has_far else None
        document, spans = (tables[-5], Spans(*tables[-4:])) if has_documents else (None, None)
        grad = _rows(grad.to(query.dtype))
        delta = _delta(output, grad)
        packed = _packed(key, value, far)
        shared = (query, key, value, packed, far, document, spans, grad, lse, delta, ctx.scoring)
        query_grad = _query_grad(*shared)
        key_grad, value_grad, keep_grad = _key_grad(*shared)
        if far is not None:
            keep_grad = far.unpack(keep_grad).to(ctx.keep_dtype)
        elif ctx.keep_dtype is not None:
            keep_grad = torch.zeros(key.shape[:3], dtype=ctx.keep_dtype, device=key.device)
        sinks_grad = None
        if sinks is not None:
            weight = torch.exp2(sinks.float()[None, :, None] * LOG2E - lse)
            sinks_grad = -(weight * delta).sum((0, 2)).to(sinks.dtype)
        return query_grad, key_grad, value_grad, keep_grad, None, sinks_grad, None, None


# -- launches ----------------------------------------------------------------------------------------------------------
def _forward(query, key, value, far, document, spans, sinks, scoring) -> tuple[Tensor, Tensor]:
    """Output [B, H, T, D] and log-sum-exp [B, H, T] in powers of 2, +inf for a query that sees nothing."""
    batch, num_heads, num_tokens, _ = query.shape
    tile = (scoring.tiles or choose_tiles(query.shape[-1], query.dtype)).forward
    output = torch.empty_like(query)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    forward_kernel[(batch * num_heads, triton.cdiv(num_tokens, tile.queries))](
        query, key, value, *_packed(key, value, far), *_far_tables(far, query), *_query_spans(document, spans, query),
        sinks if sinks is not None else query, output, lse,
        *_strides(query, key, value, output), num_heads, num_tokens, **scoring.arguments(num_tokens, far is not None),
        HAS_FAR=far is not None, HAS_SINKS=sinks is not None, **_flags(query, key, document, scoring, tile),
    )  # fmt: skip
    return output, lse


def _delta(output: Tensor, grad: Tensor) -> Tensor:
    """Rowwise products [B, H, T] float32."""
    batch, num_heads, num_tokens, width = output.shape
    delta = output.new_empty(output.shape[:3], dtype=torch.float32)
    rows = 64
    delta_kernel[(batch * num_heads, triton.cdiv(num_tokens, rows))](
        output, grad, delta, *_strides(output, grad), num_heads, num_tokens,
        WIDTH=width, BLOCK_D=triton.next_power_of_2(width), BLOCK_M=rows,
    )  # fmt: skip
    return delta


def _query_grad(query, key, value, packed, far, document, spans, grad, lse, delta, scoring) -> Tensor:
    batch, num_heads, num_tokens, _ = query.shape
    tile = (scoring.tiles or choose_tiles(query.shape[-1], query.dtype)).query_grad
    query_grad = torch.empty_like(query)
    query_grad_kernel[(batch * num_heads, triton.cdiv(num_tokens, tile.queries))](
        query, key, value, *packed, *_far_tables(far, query), *_query_spans(document, spans, query),
        grad, lse, delta, query_grad,
        *_strides(query, key, value, grad, query_grad), num_heads, num_tokens,
        **scoring.arguments(num_tokens, far is not None), scaling=scoring.scaling,
        HAS_FAR=far is not None, **_flags(query, key, document, scoring, tile),
    )  # fmt: skip
    return query_grad


def _key_grad(
    query, key, value, packed, far, document, spans, grad, lse, delta, scoring
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of keys and values, and of the packed biases, whose void entries are arbitrary."""
    batch, num_kv_heads, num_tokens, _ = key.shape
    tile = (scoring.tiles or choose_tiles(query.shape[-1], query.dtype)).key_grad
    key_grad, value_grad = torch.empty_like(key), torch.empty_like(value)
    far_grads, bias_grad = (lse, lse), None
    if far is not None:
        far_grads = tuple(torch.empty(key.shape, dtype=torch.float32, device=key.device) for _ in range(2))
        bias_grad = torch.empty_like(far.bias)
    limits = (query, query, query) if spans is None else (document, spans.seen_until, spans.run_end)

    def launch(keys, grads, is_far: bool) -> None:
        key_grad_kernel[(batch * num_kv_heads, triton.cdiv(num_tokens, tile.keys))](
            query, *keys, *_far_tables(far, query), *limits, grad, lse, delta,
            *grads, bias_grad if far is not None else lse, *far_grads,
            *_strides(query, *keys, grad, *grads), num_kv_heads, num_tokens,
            **scoring.arguments(num_tokens, far is not None), scaling=scoring.scaling,
            FAR=is_far, HAS_FAR=far is not None, **_flags(query, key, document, scoring, tile),
        )  # fmt: skip

    if far is not None:
        launch(packed, far_grads, True)
    launch((key, value), (key_grad, value_grad), False)
    return key_grad, value_grad, bias_grad


# -- arguments ---------------------------------------------------------------------------------------------------------
def _rows(x: Tensor) -> Tensor:
    """`x` with rows of consecutive elements, within reach of 32 bits from a head's first one."""
    return x if x.stride(3) == 1 and x.stride(2) * x.shape[2] < 2**31 else x.contiguous()


def _packed(key: Tensor, value: Tensor, far: FarKeys | None) -> tuple[Tensor, Tensor]:
    return (key, value) if far is None else (far.pack(key), far.pack(value))


def _far_tables(far: FarKeys | None, unused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (unused, unused, unused) if far is None else (far.position, far.bias, far.count)


def _query_spans(document: Tensor | None, spans: Spans | None, unused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (unused, unused, unused) if spans is None else (document, spans.seen_from, spans.run_start)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _flags(query: Tensor, key: Tensor, document: Tensor | None, scoring: Scoring, tile: Tile) -> dict:
    """What the kernels are compiled for."""
    width = query.shape[-1]
    flags = {
        "GROUP": query.shape[1] // key.shape[1],
        "HAS_DOCUMENTS": document is not None,
        "HAS_SOFTCAP": scoring.softcap is not None,
        "WIDTH": width,
        "BLOCK_D": max(16, triton.next_power_of_2(width)),
        "BLOCK_M": tile.queries,
        "BLOCK_N": tile.keys,
        "WIDE": INTERPRETED or query.dtype == torch.float32,
    }
    return flags if INTERPRETED else flags | {"num_warps": tile.warps, "num_stages": tile.stages}
