"""Of every query, the product of its output and the output's gradient: what the backward subtracts from each dP."""

import triton
import triton.language as tl

from dms_lab.attention.kernels.tile import load_rows


@triton.jit
def delta_kernel(
    output,
    output_grad,
    delta,
    stride_ob,
    stride_oh,
    stride_ot,
    stride_gb,
    stride_gh,
    stride_gt,
    num_heads,
    num_tokens,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta [B, H, T] float32: grid (B * H, blocks of queries)."""
    batch = (tl.program_id(0) // num_heads).to(tl.int64)
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = load_rows(output + batch * stride_ob + head * stride_oh, rows, stride_ot, num_tokens, WIDTH, BLOCK_D, True)
    g = load_rows(output_grad + batch * stride_gb + head * stride_gh, rows, stride_gt, num_tokens, WIDTH, BLOCK_D, True)
    product = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    tl.store(delta + (batch * num_heads + head) * num_tokens + rows, product, mask=rows < num_tokens)
