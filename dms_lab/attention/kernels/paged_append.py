"""One new token a sequence: its slot, its page, its key and value, and the ring over the window, in one launch.

    the token that leaves the window marked for eviction gives its slot, or the head grows: by a page where its last is full
    quantised: the page's scale grows if it must, and what the page holds is rescaled

As `SlotTable.append_one` and `PagePool.write`, for rules with a decision per token. Programs draw pages from the stack by
an atomic: which page a head gets may differ, what it holds does not.
Shapes: P places, K KV heads, W window, M pages of a head, D head width; a program is a sequence with all its heads.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_pages"])
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
    key_scale,
    value_scale,
    position,
    flag,
    freed,
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
    HAS_FREED: tl.constexpr,
    HAS_REAL: tl.constexpr,
    IS_OWN: tl.constexpr,
    STORAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Grid (sequences,), of one warp: it reads what it then overwrites. IS_OWN: `flag` decides on the token that leaves.

    HAS_FREED: whatever leaves, `freed` [P, K] has the slot that the new token takes over, -1 for none.
    STORAGE: "model", "fp8" (stores are given as bytes) or "int8".
    """
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
    ring = place * window + now % window if HAS_FLAG else place
    if HAS_FREED:
        taken = tl.load(freed + sequence * num_kv_heads + heads, mask=inside, other=-1)
    elif HAS_FLAG:
        decider = tl.load(flag + sequence * num_kv_heads + heads, mask=inside, other=0)
        if not IS_OWN:
            decider = tl.load(ring_flag + place * window + (now % window + shift) % window, mask=inside, other=0)
        leaving = tl.load(ring_slot + ring, mask=inside, other=0).to(tl.int64)
        taken = tl.where((decider != 0) & (now >= window), leaving, -1)
    if HAS_FREED or HAS_FLAG:
        slot = tl.where(taken >= 0, taken, held)
        grown = inside & (taken < 0)
        tl.store(freed_at + place, tl.zeros([BLOCK_K], tl.int64) + now, mask=inside & (taken >= 0))
    if HAS_FLAG:
        newest = tl.load(flag + sequence * num_kv_heads + heads, mask=inside, other=0)
        tl.store(ring_slot + ring, slot.to(tl.int32), mask=inside)
        tl.store(ring_flag + ring, newest, mask=inside)
    wanted = grown & (held % PAGE == 0)
    rank = tl.cumsum(wanted.to(tl.int32), 0)
    top = tl.atomic_add(num_free, -tl.sum(wanted.to(tl.int64), 0))
    new = tl.load(free + top - rank, mask=wanted, other=0)
    entry = table + place * num_pages + slot // PAGE
    page = tl.where(wanted, new, tl.load(entry, mask=inside & (wanted == 0), other=0))
    tl.store(entry, new, mask=wanted)
    tl.store(position + page * PAGE + slot % PAGE, tl.zeros([BLOCK_K], tl.int32) + now.to(tl.int32), mask=inside)
    tl.store(length + place, held + grown.to(tl.int64), mask=inside)
    tl.store(seen + row, now + step)
    tl.store(tail + row, (tl.load(tail + row) + 1) * step)

    key += sequence * stride_kb
    value += sequence * stride_vb
    _put(key, stride_kh, key_store, key_scale, page, slot % PAGE, inside, wanted, num_kv_heads,
         STORAGE, WIDTH, BLOCK_K, BLOCK_D, BLOCK_P, PAGE)  # fmt: skip
    _put(value, stride_vh, value_store, value_scale, page, slot % PAGE, inside, wanted, num_kv_heads,
         STORAGE, VALUE_WIDTH, BLOCK_K, BLOCK_V, BLOCK_P, PAGE)  # fmt: skip


@triton.jit
def _put(
    source,
    stride,
    store,
    scales,
    page,
    place,
    inside,
    is_new,
    num_kv_heads,
    STORAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PAGE: tl.constexpr,
):
    """A row of each head at `place` in its page; of a page that `is_new`, the other places are emptied."""
    heads, columns = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (columns < WIDTH)[None, :]
    pointers = store + (page * PAGE + place)[:, None] * WIDTH + columns[None, :]
    x = tl.load(source + heads[:, None] * stride + columns[None, :], mask=mask, other=0.0)
    if STORAGE == "model":
        tl.store(pointers, x, mask=mask)
        for head in range(num_kv_heads):
            first = tl.sum(tl.where((heads == head) & is_new, page, 0), 0)
            _clear(store, first, first > 0, WIDTH, BLOCK_P, BLOCK_D, PAGE)
    else:
        x = x.to(tl.float32)
        old = tl.load(scales + page, mask=inside & (is_new == 0), other=7.888609052210118e-31)  # 2 ** -100
        scale = _scale(x, old, STORAGE)
        tl.store(scales + page, scale, mask=inside)
        grown = inside & (is_new == 0) & (scale > old)
        factor = tl.div_rn(old, scale)
        for head in range(num_kv_heads):
            mine = heads == head
            first = tl.sum(tl.where(mine & is_new, page, 0), 0)
            _clear(store, first, first > 0, WIDTH, BLOCK_P, BLOCK_D, PAGE)
            if tl.sum((mine & grown).to(tl.int32), 0) > 0:
                begin = tl.sum(tl.where(mine, page, 0), 0) * PAGE
                own, by = tl.sum(tl.where(mine, place, 0), 0), tl.sum(tl.where(mine, factor, 0.0), 0)
                _rescale(store, begin, own, by, STORAGE, WIDTH, BLOCK_D, PAGE)
        tl.store(pointers, _coded(tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape)), STORAGE), mask=mask)


@triton.jit
def _clear(store, page, used, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr):
    """Empties what the last holder of a new page left behind its first slot."""
    columns, places = tl.arange(0, BLOCK_D), 1 + tl.arange(0, BLOCK_P)
    mask = ((places < PAGE) & used)[:, None] & (columns < WIDTH)[None, :]
    pointers = store + (page * PAGE + places)[:, None] * WIDTH + columns[None, :]
    tl.store(pointers, tl.zeros([BLOCK_P, BLOCK_D], store.dtype.element_ty), mask=mask)


@triton.jit
def _rescale(
    store, first, own, factor, STORAGE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr
):
    """Multiplies what the slots of a page hold, from address `first` on, by `factor`, but for the new token's own place."""
    columns = tl.arange(0, BLOCK_D)
    for row in range(PAGE):
        mask = (columns < WIDTH) & (row != own)
        pointers = store + (first + row) * WIDTH + columns
        held = tl.load(pointers, mask=mask, other=0)
        if STORAGE == "fp8":
            held = held.to(tl.float8e4nv, bitcast=True)
        tl.store(pointers, _coded(held.to(tl.float32) * factor, STORAGE), mask=mask)


@triton.jit
def _scale(x, old, STORAGE: tl.constexpr):
    """The scales of pages after rows `x` [K, D] came into them, see `storage.SlotStore`; NaN spoils a page for good."""
    highest = tl.max(tl.abs(x), 1)
    if STORAGE == "fp8":
        bits = tl.maximum(highest / 448.0, 7.888609052210118e-31).to(tl.int32, bitcast=True)
        wanted = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)  # the next power of 2
    else:
        wanted = highest / 127.0
        wanted = tl.where(wanted > old, tl.maximum(wanted, 1.25 * old), old)
    spoilt = (old != old) | (tl.sum((x - x != 0.0).to(tl.int32), 1) > 0)  # infinity less itself is no number either
    return tl.where(spoilt, float("nan"), tl.maximum(old, wanted))


@triton.jit
def _coded(x, STORAGE: tl.constexpr):
    """Numbers as they are stored: rounded to the nearest, of two the even one, and cut off at the largest."""
    if STORAGE == "fp8":
        size = tl.minimum(tl.abs(x), 448.0)
        bits = size.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # the exponent's bias is 127 there and 7 here
        small = ((size * 512.0 + 12582912.0) - 12582912.0).to(tl.int32)  # steps of 2 ** -9 below 2 ** -6
        code = tl.where(size < 0.015625, small, normal)
        found = (tl.where(x != x, 127, code) | tl.where(x < 0.0, 128, 0)).to(tl.uint8)
    else:
        x = tl.minimum(tl.maximum(x, -127.0), 127.0)
        found = ((x + 12582912.0) - 12582912.0).to(tl.int8)  # 1.5 * 2 ** 23: what is added to it is rounded
    return found
