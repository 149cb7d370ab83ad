"""Decode: one query a sequence over its live slots in pages, the slots of a head in parts that go side by side.

    part     grid (rows, parts)   one program: the G query heads of a row over one part of its slots -> output, log-sum-exp
    combine  grid (rows * G)      weighs the parts

A row is a KV head of a sequence. The grid goes by the width of the table, which the host knows; programs beyond a row's
length return at once. How a row is cut depends on its own length alone: so do its bits, whatever stands beside it.
Scores are in powers of 2: log2(e) is folded into the scaling.
Shapes: B batch, H query heads, K KV heads, G = H / K, M pages of a head, D head width.
"""

import triton
import triton.language as tl

from dms_lab.attention.kernels.slots import attend_block, find_slots, load_slots
from dms_lab.attention.kernels.tile import rounded


@triton.jit
def _part_size(length, MAX_PARTS: tl.constexpr, LEAST_PART: tl.constexpr, BLOCK_N: tl.constexpr):
    """Slots of a part of a row of `length` slots: whole blocks."""
    return tl.maximum(LEAST_PART, tl.cdiv(tl.cdiv(length, MAX_PARTS), BLOCK_N) * BLOCK_N)


@triton.jit(do_not_specialize=["num_pages"])  # which grows: one compilation is for all tables
def part_kernel(
    query,
    key,
    value,
    key_scale,
    value_scale,
    table,
    lengths,
    sinks,
    output,
    lse,
    stride_qb,
    stride_qh,
    num_kv_heads,
    num_pages,
    inner,
    outer,
    GROUP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    QUANTISED: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    LEAST_PART: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One part of one row: its normalised output and log-sum-exp in float32, [rows, G, parts]. Sinks count in the first."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + row).to(tl.int32)
    size = _part_size(length, MAX_PARTS, LEAST_PART, BLOCK_N)
    start = tl.program_id(1) * size
    if start >= length:
        return
    stop = tl.minimum(start + size, length)
    batch = row // num_kv_heads
    group = tl.arange(0, BLOCK_G)
    heads = (row % num_kv_heads) * GROUP + group
    columns = tl.arange(0, BLOCK_D)
    is_head = group < GROUP
    pointers = query + batch * stride_qb + heads[:, None] * stride_qh + columns[None, :]
    q = tl.load(pointers, mask=is_head[:, None] & (columns < WIDTH)[None, :], other=0.0)

    acc = tl.zeros([BLOCK_G, BLOCK_V], tl.float32)
    highest = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    if HAS_SINKS:
        sink = tl.load(sinks + heads, mask=is_head, other=0.0).to(tl.float32) * 1.4426950408889634
        highest = tl.where(start == 0, sink, highest)
        total = tl.where(start == 0, 1.0, total)
    table += row * num_pages
    for first in range(start, stop, BLOCK_N):
        slots = first + tl.arange(0, BLOCK_N)
        used = slots < stop
        page, address = find_slots(table, slots, used, PAGE)
        k = load_slots(key, address * WIDTH, used, q.dtype, WIDTH, BLOCK_D, QUANTISED, True, WIDE)
        v = load_slots(value, address * VALUE_WIDTH, used, tl.bfloat16, VALUE_WIDTH, BLOCK_V, QUANTISED, True, WIDE)
        k_scale, v_scale = 1.0, 1.0
        if QUANTISED:
            k_scale = tl.load(key_scale + page, mask=used, other=0.0)
            v_scale = tl.load(value_scale + page, mask=used, other=0.0)
        acc, total, highest = attend_block(
            acc, total, highest, q, k, v, k_scale, v_scale, used[None, :], inner, outer, QUANTISED, True, HAS_SOFTCAP, WIDE
        )

    part = (row * GROUP + group) * tl.num_programs(1) + tl.program_id(1)
    nothing = total == 0.0
    acc = acc / tl.where(nothing, 1.0, total)[:, None]
    columns = tl.arange(0, BLOCK_V)
    mask = is_head[:, None] & (columns < VALUE_WIDTH)[None, :]
    tl.store(output + part[:, None] * VALUE_WIDTH + columns[None, :], acc, mask=mask)
    total = tl.where(nothing, float("-inf"), highest + tl.log2(tl.where(nothing, 1.0, total)))
    tl.store(lse + part, total, mask=is_head)


@triton.jit(do_not_specialize=["num_parts"])
def combine_kernel(
    parts,
    lse,
    lengths,
    output,
    num_parts,
    GROUP: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    LEAST_PART: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The output of one query head from its parts, 0 without any."""
    head = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + head // GROUP).to(tl.int32)
    count = tl.cdiv(length, _part_size(length, MAX_PARTS, LEAST_PART, BLOCK_N))
    columns = tl.arange(0, BLOCK_V)
    parts += head * num_parts * VALUE_WIDTH
    lse += head * num_parts
    every = tl.arange(0, MAX_PARTS)
    highest = tl.max(tl.load(lse + every, mask=every < count, other=float("-inf")), 0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    acc = tl.zeros([BLOCK_V], tl.float32)
    total = 0.0
    for first in range(0, count, BLOCK_P):
        mine = first + tl.arange(0, BLOCK_P)
        weights = tl.exp2(tl.load(lse + mine, mask=mine < count, other=float("-inf")) - highest)
        mask = (mine < count)[:, None] & (columns < VALUE_WIDTH)[None, :]
        x = tl.load(parts + mine[:, None] * VALUE_WIDTH + columns[None, :], mask=mask, other=0.0)
        acc += tl.sum(weights[:, None] * x, 0)
        total += tl.sum(weights, 0)
    acc = acc / tl.where(total == 0.0, 1.0, total)
    found = rounded(acc, output.dtype.element_ty, WIDE)
    tl.store(output + head * VALUE_WIDTH + columns, found, mask=columns < VALUE_WIDTH)
