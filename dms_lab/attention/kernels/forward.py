"""Forward: output and log-sum-exp of a block of queries, over its window and then over the packed far keys.

    near   i - j <  window   keys as they lie, no bias
    far    i - j >= window   packed keys, each with its bias: what cannot count is not among them

Both ranges are bounded by the block's documents. Blocks that every query sees whole take a loop without masks.
Scores are in powers of 2: log2(e) is folded into the scaling and into the bias.
"""

import triton
import triton.language as tl

from dms_lab.attention.kernels.tile import bounded, dot, load_bias, load_rows, rounded, store_rows
from dms_lab.attention.kernels.visible import far_blocks, near_blocks, row_bounds, visible_keys


@triton.jit
def _attend(
    output,
    total,
    highest,
    q,
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
    """Adds blocks of keys to a running softmax: first..end of the `count` from slot `start` on, or, MASKED, all others."""
    num_blocks = count - (end - first) if MASKED else end - first
    for n in range(num_blocks):
        block = tl.where(n < first, n, n + end - first) if MASKED else n + first
        slots = start + block * BLOCK_N + tl.arange(0, BLOCK_N)
        k = load_rows(keys, slots, stride_k, num_tokens, WIDTH, BLOCK_D, MASKED)
        scores, _ = bounded(dot(q, tl.trans(k), WIDE), inner, outer, HAS_SOFTCAP)
        if FAR:
            scores += load_bias(biases, slots, num_tokens, MASKED)[None, :]
        if MASKED:
            seen = visible_keys(
                rows, row_document, slots, positions, documents, num_tokens, window, sliding, FAR, HAS_DOCUMENTS
            )
            scores = tl.where(seen, scores, float("-inf"))
        peak = tl.maximum(highest, tl.max(scores, 1))
        level = tl.where(peak == float("-inf"), 0.0, peak)  # a row that saw nothing yet: exp2(-inf - 0) is 0
        weights = tl.exp2(scores - level[:, None])
        decay = tl.exp2(highest - level)
        highest = peak
        total = total * decay + tl.sum(weights, 1)
        v = load_rows(values, slots, stride_v, num_tokens, WIDTH, BLOCK_D, MASKED)
        output = output * decay[:, None] + dot(rounded(weights, v.dtype, WIDE), v, WIDE)
    return output, total, highest


@triton.jit
def forward_kernel(
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
    sinks,
    output,
    lse,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_ob,
    stride_oh,
    stride_ot,
    num_heads,
    num_tokens,
    window,
    sliding,
    inner,
    outer,
    GROUP: tl.constexpr,
    HAS_FAR: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
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
    keys = key + batch * stride_kb + kv_head * stride_kh
    values = value + batch * stride_vb + kv_head * stride_vh

    documents += batch * num_tokens
    seen_from += batch * num_tokens
    run_start += batch * num_tokens
    row_document, lowest, whole = row_bounds(
        rows, first_row, documents, seen_from, run_start, num_tokens, sliding, HAS_DOCUMENTS, BLOCK_M
    )

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if HAS_SINKS:
        highest = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks + head).to(tl.float32) * 1.4426950408889634
        total = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)

    start, count, first, end = near_blocks(first_row, lowest, whole, num_tokens, window, BLOCK_M, BLOCK_N)
    for MASKED in tl.static_range(2):
        acc, total, highest = _attend(
            acc, total, highest, q, rows, row_document, keys, values, stride_kt, stride_vt,
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
            acc, total, highest = _attend(
                acc, total, highest, q, rows, row_document, keys, values, WIDTH, WIDTH,
                far_position, far_bias, documents, start, count, first, end, num_tokens, window, sliding, inner, outer,
                True, MASKED, HAS_DOCUMENTS, HAS_SOFTCAP, WIDTH, BLOCK_D, BLOCK_N, WIDE,
            )  # fmt: skip

    nothing = total == 0.0
    acc = acc / tl.where(nothing, 1.0, total)[:, None]
    store_rows(output + batch * stride_ob + head * stride_oh, rows, stride_ot, num_tokens, acc, WIDTH, BLOCK_D, WIDE)
    # A row that sees nothing gets +inf, so that its weights are 0 again in the backward.
    total = tl.where(nothing, float("inf"), highest + tl.log2(tl.where(nothing, 1.0, total)))
    tl.store(lse + row, total, mask=rows < num_tokens)
