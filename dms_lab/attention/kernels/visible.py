"""Which keys a block of queries sees: the ranges that its loops run over, and the mask where a block is not seen whole.

keys    lowest ... whole ... first_row - window ... first_row ...
        |  masked  |   far, free   |  masked  |  near, free  | masked
"""

import triton
import triton.language as tl


@triton.jit
def split(start, stop, free_start, free_stop, BLOCK: tl.constexpr):
    """Blocks of the range start..stop: how many in all, and the first and the end of those inside free_start..free_stop."""
    count = tl.cdiv(tl.maximum(stop - start, 0), BLOCK)
    first = tl.minimum(tl.cdiv(tl.maximum(free_start - start, 0), BLOCK), count)
    end = tl.minimum(tl.maximum(free_stop - start, 0) // BLOCK, count)
    return count, first, tl.maximum(first, end)


@triton.jit
def row_bounds(
    rows,
    first_row,
    documents,
    seen_from,
    run_start,
    num_tokens,
    sliding,
    HAS_DOCUMENTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Documents of the rows; where no row sees a key before; from where on documents and `sliding` hide none from any."""
    row_document = rows
    lowest = first_row - sliding + 1
    whole = first_row + BLOCK_M - sliding
    if HAS_DOCUMENTS:
        inside = rows < num_tokens
        row_document = tl.load(documents + rows, mask=inside, other=-1)
        row_document = tl.where(row_document < 0, -2, row_document)  # padding equals no key
        lowest = tl.maximum(lowest, tl.min(tl.load(seen_from + rows, mask=inside, other=num_tokens)))
        whole = tl.maximum(whole, tl.max(tl.load(run_start + rows, mask=inside, other=0)))
    return row_document, tl.maximum(lowest, 0), tl.maximum(whole, 0)


@triton.jit
def near_blocks(first_row, lowest, whole, num_tokens, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First key of a block's window, blocks of keys in it, and the first and the end of those that all rows see whole."""
    start = tl.maximum(lowest, first_row - window + 1)
    stop = tl.minimum(first_row + BLOCK_M, num_tokens)
    free_start = tl.maximum(whole, first_row + BLOCK_M - window)
    count, first, end = split(start, stop, free_start, first_row + 1, BLOCK_N)
    return start, count, first, end


@triton.jit
def far_blocks(before, first_row, lowest, whole, num_tokens, window, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The same of the packed keys beyond the window; `before` holds how many of them lie before a position."""
    start = tl.load(before + tl.minimum(lowest, num_tokens))
    stop = tl.load(before + tl.minimum(tl.maximum(first_row + BLOCK_M - window, 0), num_tokens))
    free_start = tl.load(before + tl.minimum(whole, num_tokens))
    free_stop = tl.load(before + tl.minimum(tl.maximum(first_row - window + 1, 0), num_tokens))
    count, first, end = split(start, stop, free_start, free_stop, BLOCK_N)
    return start, count, first, end


@triton.jit
def visible_keys(
    rows,
    row_document,
    slots,
    positions,
    documents,
    num_tokens,
    window,
    sliding,
    FAR: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
):
    """Which keys each row sees in this part, [rows, slots]; all of one batch entry."""
    position = tl.load(positions + slots, mask=slots < num_tokens, other=num_tokens) if FAR else slots
    distance = rows[:, None] - position[None, :]
    if FAR:
        seen = (distance >= window) & (distance < sliding)
    else:
        seen = (distance >= 0) & (distance < window) & (distance < sliding)
    if HAS_DOCUMENTS:
        document = tl.load(documents + position, mask=position < num_tokens, other=-1)
        seen &= row_document[:, None] == document[None, :]
    return seen
