"""One new token a sequence: its slot, its page, its key and value, and the ring over the window, in one launch.

    the token that leaves the window marked for eviction gives its slot, or the head grows: by a page where its last is full

As `SlotTable.append_one` and `PagePool.write`, for rules with a decision per token and slots in the model's dtype. Programs
draw pages from the stack by an atomic: which page a head gets may differ, what it holds does not.
Shapes: P places, K KV heads, W window, M pages of a head, D head width; a program is a sequence with all its heads.
"""

import triton
import triton.language as tl


@triton.jit
def append_kernel(
    rows,
    table,
    length,
    seen,
    tail,
    ring_slot,
    ring_flag,
    freed_at,
    free,
    num_free,
    key_store,
    value_store,
    position,
    flag,
    real,
    key,
    value,
    stride_kb,
    stride_kh,
    stride_vb,
    stride_vh,
    num_kv_heads,
    num_pages,
    window,
    shift,
    HAS_ROWS: tl.constexpr,
    HAS_FLAG: tl.constexpr,
    HAS_REAL: tl.constexpr,
    IS_OWN: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Grid (sequences,), of one warp: it reads what it then overwrites. IS_OWN: `flag` decides on the token that leaves."""
    sequence = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + sequence) if HAS_ROWS else sequence
    heads = tl.arange(0, BLOCK_K)
    step = 1
    if HAS_REAL:
        step = (tl.load(real + sequence) != 0).to(tl.int64)
    inside = (heads < num_kv_heads) & (step > 0)
    place = row * num_kv_heads + heads
    now = tl.load(seen + row)
    held = tl.load(length + place, mask=inside, other=0)
    slot, grown = held, inside
    if HAS_FLAG:
        newest = tl.load(flag + sequence * num_kv_heads + heads, mask=inside, other=0)
        ring = place * window + now % window
        decider = newest
        if not IS_OWN:
            decider = tl.load(ring_flag + place * window + (now % window + shift) % window, mask=inside, other=0)
        leaving = tl.load(ring_slot + ring, mask=inside, other=0).to(tl.int64)
        reuse = (decider != 0) & (now >= window)
        slot = tl.where(reuse, leaving, held)
        grown = inside & (reuse == 0)
        tl.store(ring_slot + ring, slot.to(tl.int32), mask=inside)
        tl.store(ring_flag + ring, newest, mask=inside)
        tl.store(freed_at + place, tl.zeros([BLOCK_K], tl.int64) + now, mask=inside & reuse)
    wanted = grown & (held % PAGE == 0)
    rank = tl.cumsum(wanted.to(tl.int32), 0)
    top = tl.atomic_add(num_free, -tl.sum(wanted.to(tl.int64), 0))
    new = tl.load(free + top - rank, mask=wanted, other=0)
    entry = table + place * num_pages + slot // PAGE
    page = tl.where(wanted, new, tl.load(entry, mask=inside & (wanted == 0), other=0))
    tl.store(entry, new, mask=wanted)
    address = page * PAGE + slot % PAGE
    tl.store(position + address, tl.zeros([BLOCK_K], tl.int32) + now.to(tl.int32), mask=inside)
    tl.store(length + place, held + grown.to(tl.int64), mask=inside)
    tl.store(seen + row, now + step)
    tl.store(tail + row, (tl.load(tail + row) + 1) * step)

    columns = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (columns < WIDTH)[None, :]
    x = tl.load(key + sequence * stride_kb + heads[:, None] * stride_kh + columns[None, :], mask=mask)
    tl.store(key_store + address[:, None] * WIDTH + columns[None, :], x, mask=mask)
    columns = tl.arange(0, BLOCK_V)
    mask = inside[:, None] & (columns < VALUE_WIDTH)[None, :]
    x = tl.load(value + sequence * stride_vb + heads[:, None] * stride_vh + columns[None, :], mask=mask)
    tl.store(value_store + address[:, None] * VALUE_WIDTH + columns[None, :], x, mask=mask)
    for head in range(num_kv_heads):  # of a new page, what its last holder left behind the first slot
        first = tl.sum(tl.where((heads == head) & wanted, new, 0), 0)
        places = 1 + tl.arange(0, BLOCK_P)
        used = (places < PAGE) & (first > 0)
        _clear(key_store, first * PAGE + places, used, WIDTH, BLOCK_P, BLOCK_D)
        _clear(value_store, first * PAGE + places, used, VALUE_WIDTH, BLOCK_P, BLOCK_V)


@triton.jit
def _clear(store, address, used, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    pointers = store + address[:, None] * WIDTH + columns[None, :]
    tl.store(
        pointers, tl.zeros([BLOCK_P, BLOCK_D], store.dtype.element_ty), mask=used[:, None] & (columns < WIDTH)[None, :]
    )
