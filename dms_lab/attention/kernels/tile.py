"""What the kernels share: rows of a tensor, products, scores."""

import triton
import triton.language as tl


@triton.jit
def load_rows(base, rows, stride, num_rows, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDED: tl.constexpr):
    """[rows, BLOCK_D] of a matrix of WIDTH columns, 0 outside it. Only with BOUNDED may `rows` reach beyond `num_rows`."""
    columns = tl.arange(0, BLOCK_D)
    pointers = base + rows[:, None] * stride + columns[None, :]
    if BOUNDED:
        if BLOCK_D != WIDTH:
            return tl.load(pointers, mask=(rows < num_rows)[:, None] & (columns < WIDTH)[None, :], other=0.0)
        else:
            return tl.load(pointers, mask=(rows < num_rows)[:, None], other=0.0)
    else:
        if BLOCK_D != WIDTH:
            return tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)
        else:
            return tl.load(pointers)


@triton.jit
def rounded(x, dtype: tl.constexpr, WIDE: tl.constexpr):
    """float32 `x` in `dtype`, to the nearest even; the interpreter would cut bfloat16 off, and comes here with WIDE."""
    if WIDE and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = (bits & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def store_rows(base, rows, stride, num_rows, tile, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr):
    """Writes the rows below `num_rows` of a tile, rounded to the tensor's type."""
    columns = tl.arange(0, BLOCK_D)
    pointers = base + rows[:, None] * stride + columns[None, :]
    mask = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    tl.store(pointers, rounded(tile, base.dtype.element_ty, WIDE), mask=mask)


@triton.jit
def load_bias(biases, slots, num_slots, BOUNDED: tl.constexpr):
    """Biases of packed keys, -inf outside."""
    if BOUNDED:
        return tl.load(biases + slots, mask=slots < num_slots, other=float("-inf"))
    else:
        return tl.load(biases + slots)


@triton.jit
def dot(a, b, WIDE: tl.constexpr):
    """a @ b in float32. WIDE: of float32 operands, not rounded; on the interpreter all are, which has no bfloat16."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b)


@triton.jit
def bounded(product, inner, outer, HAS_SOFTCAP: tl.constexpr):
    """Scores in powers of 2 from q . k, and the tangent they were bounded by: outer * tanh(inner * x), or outer * x."""
    if HAS_SOFTCAP:
        doubled = tl.exp2(product * (inner * 2.8853900817779268))  # e^2x; the tangent is right to 1e-7, not relatively so
        tangent = 1.0 - 2.0 / (doubled + 1.0)
        return tangent * outer, tangent
    else:
        return product * outer, product
