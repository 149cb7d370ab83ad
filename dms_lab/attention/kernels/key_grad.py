"""Gradients of keys, values and biases: a block of keys over its queries, all G query heads of its group in one program.

    far    packed keys, queries at distance >= window: float32 gradients of the packed rows, and the column sums of dS,
           which are the gradients of log_keep
    near   keys as they lie, queries within the window; begins with the far gradients of its keys

The same kernel in two launches, far first. Tiles are transposed: keys along the rows, queries along the columns.
"""

import triton
import triton.language as tl

from dms_lab.attention.kernels.tile import bounded, dot, load_rows, rounded, store_rows
from dms_lab.attention.kernels.visible import split


@triton.jit
def _add(
    dk,
    dv,
    dbias,
    k,
    v,
    bias,
    position,
    key_document,
    query,
    output_grad,
    lse,
    delta,
    documents,
    stride_qh,
    stride_qt,
    stride_gh,
    stride_gt,
    start,
    count,
    first,
    end,
    num_tokens,
    window,
    sliding,
    inner,
    outer,
    GROUP: tl.constexpr,
    FAR: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Adds blocks of queries, head by head: first..end of the `count` from row `start` on, or, MASKED, all others."""
    num_blocks = count - (end - first) if MASKED else end - first
    divisor = tl.maximum(num_blocks, 1)  # the compiler may divide before it looks whether there is a block
    for n in range(GROUP * num_blocks):  # one loop, so that loads of the next head are under way early
        head = n // divisor
        block = n % divisor
        if MASKED:
            block = tl.where(block < first, block, block + end - first)
        else:
            block += first
        rows = start + block * BLOCK_M + tl.arange(0, BLOCK_M)
        q = load_rows(query + head.to(tl.int64) * stride_qh, rows, stride_qt, num_tokens, WIDTH, BLOCK_D, MASKED)
        g = load_rows(output_grad + head.to(tl.int64) * stride_gh, rows, stride_gt, num_tokens, WIDTH, BLOCK_D, MASKED)
        if MASKED:
            row_lse = tl.load(lse + head * num_tokens + rows, mask=rows < num_tokens, other=float("inf"))
            row_delta = tl.load(delta + head * num_tokens + rows, mask=rows < num_tokens, other=0.0)
        else:
            row_lse = tl.load(lse + head * num_tokens + rows)
            row_delta = tl.load(delta + head * num_tokens + rows)
        scores, tangent = bounded(dot(k, tl.trans(q), WIDE), inner, outer, HAS_SOFTCAP)
        if FAR:
            scores += bias[:, None]
        weights = tl.exp2(scores - row_lse[None, :])
        if MASKED:
            distance = rows[None, :] - position[:, None]
            if FAR:
                seen = (distance >= window) & (distance < sliding)
            else:
                seen = (distance >= 0) & (distance < window) & (distance < sliding)
            if HAS_DOCUMENTS:
                row_document = tl.load(documents + rows, mask=rows < num_tokens, other=-1)
                seen &= key_document[:, None] == row_document[None, :]
            weights = tl.where(seen, weights, 0.0)
        dv += dot(rounded(weights, g.dtype, WIDE), g, WIDE)
        ds = weights * (dot(v, tl.trans(g), WIDE) - row_delta[None, :])
        if FAR:
            dbias += tl.sum(ds, 1)
        if HAS_SOFTCAP:
            ds *= 1.0 - tangent * tangent
        dk += dot(rounded(ds, q.dtype, WIDE), q, WIDE)
    return dk, dv, dbias


@triton.jit
def key_grad_kernel(
    query,
    key,
    value,
    far_position,
    far_bias,
    far_count,
    documents,
    seen_until,
    run_end,
    output_grad,
    lse,
    delta,
    key_grad,
    value_grad,
    bias_grad,
    far_key_grad,
    far_value_grad,
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
    stride_dkb,
    stride_dkh,
    stride_dkt,
    stride_dvb,
    stride_dvh,
    stride_dvt,
    num_kv_heads,
    num_tokens,
    window,
    sliding,
    inner,
    outer,
    scaling,
    GROUP: tl.constexpr,
    FAR: tl.constexpr,
    HAS_FAR: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One block of BLOCK_N keys of one KV head: grid (B * K, blocks). FAR: `key`, `value` and the gradients are packed."""
    batch = (tl.program_id(0) // num_kv_heads).to(tl.int64)
    kv_head = (tl.program_id(0) % num_kv_heads).to(tl.int64)
    kv = batch * num_kv_heads + kv_head
    slots = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    documents += batch * num_tokens
    before = far_count + kv * (num_tokens + 1)

    num_slots = num_tokens
    position = slots
    first_key = tl.program_id(1) * BLOCK_N
    last_key = first_key + BLOCK_N - 1
    bias = tl.zeros([BLOCK_N], tl.float32)
    if FAR:
        num_slots = tl.load(before + num_tokens)
        held = slots < num_slots
        position = tl.load(far_position + kv * num_tokens + slots, mask=held, other=num_tokens)
        bias = tl.load(far_bias + kv * num_tokens + slots, mask=held, other=float("-inf"))
        first_key = tl.min(position)
        last_key = tl.max(tl.where(held, position, 0))

    until, whole = num_tokens, num_tokens  # queries from `until` on are of other documents; before `whole`, of the keys'
    key_document = position
    if HAS_DOCUMENTS:
        inside = position < num_tokens
        key_document = tl.load(documents + position, mask=inside, other=-1)
        key_document = tl.where(key_document < 0, -2, key_document)  # padding equals no query
        until = tl.max(tl.load(seen_until + batch * num_tokens + position, mask=inside, other=0))
        whole = tl.min(tl.load(run_end + batch * num_tokens + position, mask=inside, other=num_tokens))
    until = tl.minimum(until, last_key + sliding)
    whole = tl.minimum(whole, first_key + sliding)
    if FAR:
        start = first_key + window
        free_start = last_key + window
    else:
        start = first_key
        free_start = last_key
        until = tl.minimum(tl.minimum(until, last_key + window), num_tokens)
        whole = tl.minimum(whole, first_key + window)
    count, first, end = split(start, until, free_start, whole, BLOCK_M)

    k = load_rows(key + batch * stride_kb + kv_head * stride_kh, slots, stride_kt, num_slots, WIDTH, BLOCK_D, True)
    v = load_rows(value + batch * stride_vb + kv_head * stride_vh, slots, stride_vt, num_slots, WIDTH, BLOCK_D, True)
    if HAS_FAR and not FAR:
        # void rows are never read: a row without far gradients is beyond every limit
        rank = tl.load(before + slots, mask=slots < num_tokens, other=0)
        alive = tl.load(before + slots + 1, mask=slots < num_tokens, other=0) > rank
        packed = tl.where(alive, rank, num_tokens)
        dk = load_rows(far_key_grad + kv * num_tokens * WIDTH, packed, WIDTH, num_tokens, WIDTH, BLOCK_D, True)
        dv = load_rows(far_value_grad + kv * num_tokens * WIDTH, packed, WIDTH, num_tokens, WIDTH, BLOCK_D, True)
    else:
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_N], tl.float32)

    head = kv_head * GROUP
    query += batch * stride_qb + head * stride_qh
    output_grad += batch * stride_gb + head * stride_gh
    lse += kv * GROUP * num_tokens
    delta += kv * GROUP * num_tokens
    for MASKED in tl.static_range(2):
        dk, dv, dbias = _add(
            dk, dv, dbias, k, v, bias, position, key_document, query, output_grad, lse, delta, documents,
            stride_qh, stride_qt, stride_gh, stride_gt, start, count, first, end, num_tokens, window, sliding, inner, outer,
            GROUP, FAR, MASKED, HAS_DOCUMENTS, HAS_SOFTCAP, WIDTH, BLOCK_D, BLOCK_M, WIDE,
        )  # fmt: skip

    if FAR:
        tl.store(bias_grad + kv * num_tokens + slots, dbias, mask=slots < num_slots)
    else:
        dk = dk * scaling
    dk_rows = key_grad + batch * stride_dkb + kv_head * stride_dkh
    dv_rows = value_grad + batch * stride_dvb + kv_head * stride_dvh
    store_rows(dk_rows, slots, stride_dkt, num_slots, dk, WIDTH, BLOCK_D, WIDE)
    store_rows(dv_rows, slots, stride_dvt, num_slots, dv, WIDTH, BLOCK_D, WIDE)
