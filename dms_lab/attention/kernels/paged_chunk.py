"""Attention of a chunk of new tokens over the live slots and the chunk itself, by the visibility rule; no mask in memory.

    past   blocks of slots in their pages: those that all see without masks, then, with masks, those that any still sees
    far    new tokens before the window: those that were kept, from a list
    near   new tokens of the window, as they lie

`until` (see there) says which query is the first that does not see a key: what none of a block's queries sees is not read.
The G query heads of a row go together: a block has BLOCK_M / G tokens. Scores are in powers of 2.
Shapes: B batch, H query heads, K KV heads, G = H / K, C new tokens, S slots, D head width.
"""

import triton
import triton.language as tl

from dms_lab.attention.kernels.slots import attend_block, find_slots, load_slots
from dms_lab.attention.kernels.tile import rounded
from dms_lab.attention.kernels.visible import split


@triton.jit
def _attend_past(
    output,
    total,
    highest,
    q,
    tokens,
    first_token,
    key,
    value,
    key_scale,
    value_scale,
    table,
    until,
    order,
    start,
    stop,
    num_slots,
    inner,
    outer,
    MASKED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    QUANTISED: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Adds the blocks start..stop of the order to a running softmax."""
    for n in range(start, stop):
        slots = tl.load(order + n) * BLOCK_N + tl.arange(0, BLOCK_N)
        used = slots < num_slots
        seen = used[None, :]
        if MASKED:
            last = tl.load(until + slots, mask=used, other=0)
            used = last > first_token
            seen = tokens[:, None] < last[None, :]
        page, address = find_slots(table, slots, used, PAGE)
        k = load_slots(key, address * WIDTH, used, q.dtype, WIDTH, BLOCK_D, QUANTISED, MASKED, WIDE)
        v = load_slots(value, address * VALUE_WIDTH, used, tl.bfloat16, VALUE_WIDTH, BLOCK_V, QUANTISED, MASKED, WIDE)
        k_scale, v_scale = 1.0, 1.0
        if QUANTISED:
            k_scale = tl.load(key_scale + page, mask=used, other=0.0)
            v_scale = tl.load(value_scale + page, mask=used, other=0.0)
        output, total, highest = attend_block(
            output, total, highest, q, k, v, k_scale, v_scale, seen, inner, outer, QUANTISED, MASKED, HAS_SOFTCAP, WIDE
        )
    return output, total, highest


@triton.jit
def _attend_new(
    output,
    total,
    highest,
    q,
    tokens,
    first_token,
    keys,
    values,
    stride_k,
    stride_v,
    until,
    kept,
    start,
    count,
    first,
    end,
    limit,
    inner,
    outer,
    FAR: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Adds blocks of new tokens: first..end of the `count` from place `start` on, or, MASKED, all others.

    A place is one in the list `kept` or, without FAR, a token; none at `limit` or beyond is seen.
    """
    num_blocks = count - (end - first) if MASKED else end - first
    for n in range(num_blocks):
        block = tl.where(n < first, n, n + end - first) if MASKED else n + first
        places = start + block * BLOCK_N + tl.arange(0, BLOCK_N)
        used = places < limit
        token = tl.load(kept + places, mask=used, other=0) if FAR else places
        seen = used[None, :]
        if MASKED:
            last = tl.load(until + token, mask=used, other=0)
            used = last > first_token
            seen = (token[None, :] <= tokens[:, None]) & (tokens[:, None] < last[None, :])
        k = load_slots(keys, token * stride_k, used, q.dtype, WIDTH, BLOCK_D, False, MASKED, WIDE)
        v = load_slots(values, token * stride_v, used, q.dtype, VALUE_WIDTH, BLOCK_V, False, MASKED, WIDE)
        output, total, highest = attend_block(
            output, total, highest, q, k, v, 1.0, 1.0, seen, inner, outer, False, MASKED, HAS_SOFTCAP, WIDE
        )
    return output, total, highest


# What grows with the tokens: one compilation is for all of them.
@triton.jit(do_not_specialize=["num_new", "num_pages", "num_slots", "num_blocks"])
def chunk_kernel(
    query,
    new_key,
    new_value,
    key,
    value,
    key_scale,
    value_scale,
    table,
    past_until,
    past_order,
    past_last,
    past_whole,
    new_until,
    new_kept,
    new_before,
    sinks,
    output,
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
    num_kv_heads,
    num_new,
    num_pages,
    num_slots,
    num_blocks,
    window,
    sliding,
    inner,
    outer,
    GROUP: tl.constexpr,
    HAS_FAR: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    QUANTISED: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """BLOCK_M rows, a row a token and one of its G heads: grid (B * K, blocks), the blocks with the most keys first."""
    head = tl.program_id(0).to(tl.int64)
    batch, kv_head = head // num_kv_heads, head % num_kv_heads
    first_row = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    tokens, group = rows // GROUP, rows % GROUP
    first_token = first_row // GROUP
    last_token = tl.minimum((first_row + BLOCK_M - 1) // GROUP, num_new - 1)
    num_rows = num_new * GROUP

    columns = tl.arange(0, BLOCK_D)
    pointers = query + batch * stride_qb + (kv_head * GROUP + group)[:, None] * stride_qh + tokens[:, None] * stride_qt
    q = tl.load(pointers + columns[None, :], mask=(rows < num_rows)[:, None] & (columns < WIDTH)[None, :], other=0.0)

    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    if HAS_SINKS:
        highest = tl.load(sinks + kv_head * GROUP + group).to(tl.float32) * 1.4426950408889634
        total = tl.full([BLOCK_M], 1.0, tl.float32)
    else:
        highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)

    past_last += head * num_blocks
    whole = tl.load(past_whole + head)
    alive = 0
    for n in range(0, num_blocks, 64):
        blocks = n + tl.arange(0, 64)
        last = tl.load(past_last + blocks, mask=blocks < num_blocks, other=0)
        alive += tl.sum((last > first_token).to(tl.int32), 0)
    for MASKED in tl.static_range(2):
        acc, total, highest = _attend_past(
            acc, total, highest, q, tokens, first_token, key, value, key_scale, value_scale, table + head * num_pages,
            past_until + head * num_slots, past_order + head * num_blocks,
            whole if MASKED else 0, alive if MASKED else whole, num_slots, inner, outer,
            MASKED, HAS_SOFTCAP, QUANTISED, WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_V, BLOCK_N, PAGE, WIDE,
        )  # fmt: skip

    new_key += batch * stride_kb + kv_head * stride_kh
    new_value += batch * stride_vb + kv_head * stride_vh
    new_until += head * num_new
    lowest = tl.maximum(first_token - sliding + 1, 0)
    always = tl.maximum(last_token - sliding + 1, 0)  # from here on the sliding window hides none from any
    edge = tl.maximum(first_token - window + 1, 0)
    if HAS_FAR:
        new_kept += head * num_new
        new_before += head * (num_new + 1)
        stop = tl.load(new_before + edge)
        start = tl.load(new_before + tl.minimum(lowest, edge))
        count, first, end = split(start, stop, tl.load(new_before + tl.minimum(always, edge)), stop, BLOCK_N)
        for MASKED in tl.static_range(2):
            acc, total, highest = _attend_new(
                acc, total, highest, q, tokens, first_token, new_key, new_value, stride_kt, stride_vt, new_until, new_kept,
                start, count, first, end, stop, inner, outer,
                True, MASKED, HAS_SOFTCAP, WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_V, BLOCK_N, WIDE,
            )  # fmt: skip
    start = tl.maximum(edge, lowest)
    everyone = tl.maximum(always, last_token - window + 1)
    count, first, end = split(start, last_token + 1, everyone, first_token + 1, BLOCK_N)
    for MASKED in tl.static_range(2):
        acc, total, highest = _attend_new(
            acc, total, highest, q, tokens, first_token, new_key, new_value, stride_kt, stride_vt, new_until, new_kept,
            start, count, first, end, last_token + 1, inner, outer,
            False, MASKED, HAS_SOFTCAP, WIDTH, VALUE_WIDTH, BLOCK_D, BLOCK_V, BLOCK_N, WIDE,
        )  # fmt: skip

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    columns = tl.arange(0, BLOCK_V)
    pointers = output + batch * stride_ob + (kv_head * GROUP + group)[:, None] * stride_oh + tokens[:, None] * stride_ot
    mask = (rows < num_rows)[:, None] & (columns < VALUE_WIDTH)[None, :]
    tl.store(pointers + columns[None, :], rounded(acc, output.dtype.element_ty, WIDE), mask=mask)
