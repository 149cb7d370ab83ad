"""Live slots of a head as operands of a product: where they stand in the pages, and what they hold.

    slot -> page = table[slot // PAGE] -> address page * PAGE + slot % PAGE -> numbers, and the scale of the page

Quantised numbers are widened in registers, exactly; their scales are applied to scores and weights, in float32.
"""

import triton
import triton.language as tl

from dms_lab.attention.kernels.tile import bounded, dot, rounded


@triton.jit
def find_slots(table, slots, used, PAGE: tl.constexpr):
    """Pages and addresses of the slots of a head, int64; those of page 0 where not `used`."""
    page = tl.load(table + slots // PAGE, mask=used, other=0)
    return page, page * PAGE + slots % PAGE


@triton.jit
def load_slots(
    store,
    offsets,
    used,
    dtype: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    QUANTISED: tl.constexpr,
    MASKED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """[slots, BLOCK_D] of rows of WIDTH columns at `offsets`, with MASKED 0 where not `used`; the QUANTISED in `dtype`."""
    columns = tl.arange(0, BLOCK_D)
    pointers = store + offsets[:, None] + columns[None, :]
    if BLOCK_D != WIDTH:
        mask = (columns < WIDTH)[None, :] & used[:, None] if MASKED else (columns < WIDTH)[None, :]
        x = tl.load(pointers, mask=mask, other=0.0)
    elif MASKED:
        x = tl.load(pointers, mask=used[:, None], other=0.0)
    else:
        x = tl.load(pointers)
    if QUANTISED:
        x = x.to(tl.float32 if WIDE else dtype)
    return x


@triton.jit
def attend_block(
    output,
    total,
    highest,
    q,
    k,
    v,
    key_scale,
    value_scale,
    seen,
    inner,
    outer,
    QUANTISED: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Adds a block of keys to a running softmax in powers of 2; with MASKED only what is `seen`."""
    product = dot(q, tl.trans(k), WIDE)
    if QUANTISED:
        product *= key_scale[None, :]
    scores, _ = bounded(product, inner, outer, HAS_SOFTCAP)
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    peak = tl.maximum(highest, tl.max(scores, 1))
    level = tl.where(peak == float("-inf"), 0.0, peak)  # a row that saw nothing yet: exp2(-inf - 0) is 0
    weights = tl.exp2(scores - level[:, None])
    decay = tl.exp2(highest - level)
    total = total * decay + tl.sum(weights, 1)
    if QUANTISED:
        weights *= value_scale[None, :]
    output = output * decay[:, None] + dot(rounded(weights, v.dtype, WIDE), v, WIDE)
    return output, total, peak
