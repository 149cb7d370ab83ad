"""Gradient of the queries: a block of queries over its window and its far keys, as in the forward."""

import triton
import triton.language as tl

from dms_lab.attention.kernels.tile import bounded, dot, load_bias, load_rows, rounded, store_rows
from dms_lab.attention.kernels.visible import far_blocks, near_blocks, row_bounds, visible_keys


@triton.jit
def _add(
    dq,
    q,
    grad,
    lse,
    delta,
    rows,
    row_document,
    keys,
    values,
    stride_k,
    stride_v,
    positions,
    biases,
    documents,
    start,
    count,
    first,
    end,
    num_tokens,
    window,
    sliding,
    inner,
    outer,
    FAR: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Adds dS @ K of blocks of keys: first..end of the `count` from slot `start` on, or, MASKED, all others."""
    num_blocks = count - (end - first) if MASKED else end - first
    for n in range(num_blocks):
        block = tl.where(n < first, n, n + end - first) if MASKED else n + first
        slots = start + block * BLOCK_N + tl.arange(0, BLOCK_N)
        k = load_rows(keys, slots, stride_k, num_tokens, WIDTH, BLOCK_D, MASKED)
        v = load_rows(values, slots, stride_v, num_tokens, WIDTH, BLOCK_D, MASKED)
        scores, tangent = bounded(dot(q, tl.trans(k), WIDE), inner, outer, HAS_SOFTCAP)
        if FAR:
            scores += load_bias(biases, slots, num_tokens, MASKED)[None, :]
        weights = tl.exp2(scores - lse[:, None])
        if MASKED:
            seen = visible_keys(
                rows, row_document, slots, positions, documents, num_tokens, window, sliding, FAR, HAS_DOCUMENTS
            )
            weights = tl.where(seen, weights, 0.0)
        ds = weights * (dot(grad, tl.trans(v), WIDE) - delta[:, None])
        if HAS_SOFTCAP:
            ds *= 1.0 - tangent * tangent
        dq += dot(rounded(ds, k.dtype, WIDE), k, WIDE)
    return dq


@triton.jit
def query_grad_kernel(
    query,
    key,
    value,
    far_key,
    far_value,
    far_position,
    far_bias,
    far_count,
    documents,
    seen_from,
    run_start,
    output_grad,
    lse,
    delta,
    query_grad,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_gb,
    stride_gh,
    stride_gt,
    stride_db,
    stride_dh,
    stride_dt,
    num_heads,
    num_tokens,
    window,
    sliding,
    inner,
    outer,
    scaling,
    GROUP: tl.constexpr,
    HAS_FAR: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One block of BLOCK_M queries of one head: grid (B * H, blocks), the blocks with the most keys first."""
    batch = (tl.program_id(0) // num_heads).to(tl.int64)
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    kv_head = head // GROUP
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    row = (batch * num_heads + head) * num_tokens + rows
    kv = batch * (num_heads // GROUP) + kv_head

    q = load_rows(query + batch * stride_qb + head * stride_qh, rows, stride_qt, num_tokens, WIDTH, BLOCK_D, True)
    g = load_rows(output_grad + batch * stride_gb + head * stride_gh, rows, stride_gt, num_tokens, WIDTH, BLOCK_D, True)
    row_lse = tl.load(lse + row, mask=rows < num_tokens, other=float("inf"))
    row_delta = tl.load(delta + row, mask=rows < num_tokens, other=0.0)
    keys = key + batch * stride_kb + kv_head * stride_kh
    values = value + batch * stride_vb + kv_head * stride_vh

    documents += batch * num_tokens
    seen_from += batch * num_tokens
    run_start += batch * num_tokens
    row_document, lowest, whole = row_bounds(
        rows, first_row, documents, seen_from, run_start, num_tokens, sliding, HAS_DOCUMENTS, BLOCK_M
    )

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    start, count, first, end = near_blocks(first_row, lowest, whole, num_tokens, window, BLOCK_M, BLOCK_N)
    for MASKED in tl.static_range(2):
        dq = _add(
            dq, q, g, row_lse, row_delta, rows, row_document, keys, values, stride_kt, stride_vt,
            far_position, far_bias, documents, start, count, first, end, num_tokens, window, sliding, inner, outer,
            False, MASKED, HAS_DOCUMENTS, HAS_SOFTCAP, WIDTH, BLOCK_D, BLOCK_N, WIDE,
        )  # fmt: skip

    if HAS_FAR:
        keys = far_key + kv * num_tokens * WIDTH
        values = far_value + kv * num_tokens * WIDTH
        far_position += kv * num_tokens
        far_bias += kv * num_tokens
        before = far_count + kv * (num_tokens + 1)
        start, count, first, end = far_blocks(before, first_row, lowest, whole, num_tokens, window, BLOCK_M, BLOCK_N)
        for MASKED in tl.static_range(2):
            dq = _add(
                dq, q, g, row_lse, row_delta, rows, row_document, keys, values, WIDTH, WIDTH,
                far_position, far_bias, documents, start, count, first, end, num_tokens, window, sliding, inner, outer,
                True, MASKED, HAS_DOCUMENTS, HAS_SOFTCAP, WIDTH, BLOCK_D, BLOCK_N, WIDE,
            )  # fmt: skip

    dq = dq * scaling
    store_rows(query_grad + batch * stride_db + head * stride_dh, rows, stride_dt, num_tokens, dq, WIDTH, BLOCK_D, WIDE)
