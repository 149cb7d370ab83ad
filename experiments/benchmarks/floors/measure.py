"""Kernels against their floors on this machine: python -m experiments.benchmarks.floors.measure [--short] [--device cuda]

a large matrix product, a large copy -> ceilings
one layer's kernels of a model's shape, random weights, in turns with both -> seconds / floor by the ceilings of the turn
whole training and decoding steps -> floors alone, by the highest ceilings of all turns
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dms_lab import distillation
from dms_lab.attention import paged
from dms_lab.attention.soft import choose_backend, soft_attention
from dms_lab.cache.pages import PagePool
from dms_lab.cache.policy import Scores
from experiments.benchmarks import counts, harness

FOLDER = Path(__file__).parent
WINDOW = 256
Kernel = tuple[str, counts.Work, Callable[[], object]]


class Yardsticks:
    """A square matrix product and a copy, each too large for any cache of the device (smaller if `short`)."""

    def __init__(self, device: torch.device, dtype: torch.dtype, short: bool) -> None:
        size = (512 if short else 2048) if device.type == "cpu" else 8192
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        num_bytes = (2**26 if short else 2**28) if device.type == "cpu" else 2**31
        source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        self.work = counts.Work(2 * size**3, 2 * num_bytes)
        self.calls = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}

    def ceilings(self, product: float, copied: float) -> counts.Ceilings:
        """What the device reached where the two took so many seconds."""
        return counts.Ceilings(self.work.flops / product, self.work.bytes / copied)


def kernels(shape: counts.Shape, device: torch.device, dtype: torch.dtype, args: argparse.Namespace) -> Iterator[Kernel]:
    """Name, least work and a call of each kernel of one layer."""

    def random(*size: int, grad: bool = False) -> Tensor:
        return torch.randn(*size, device=device, dtype=dtype).requires_grad_(grad)

    itemsize, rows, tokens = dtype.itemsize, args.rows, args.tokens
    yield f"matrices of a layer, {rows:,} tokens", counts.matrices(shape, rows, itemsize), products(shape, rows, random)

    hidden, teacher = random(rows, shape.hidden, grad=True), random(rows, shape.hidden)
    ours, theirs = random(shape.vocabulary, shape.hidden), random(shape.vocabulary, shape.hidden)

    def loss() -> None:
        hidden.grad = None  # adding to an old gradient would count as the kernel's work
        distillation.kl_loss(hidden, teacher, lambda h: F.linear(h, ours), lambda h: F.linear(h, theirs)).backward()

    yield f"KL and its gradient, {rows:,} tokens", counts.distillation_loss(shape, rows, itemsize), loss

    query = random(1, shape.num_heads, tokens, shape.head_dim, grad=True)
    key, value = (random(1, shape.num_kv_heads, tokens, shape.head_dim, grad=True) for _ in range(2))
    log_keep = F.logsigmoid(5 * torch.randn(1, shape.num_kv_heads, tokens, device=device)).requires_grad_()
    backend, scaling = choose_backend(args.backend, device.type), shape.head_dim**-0.5

    def relaxed() -> Tensor:
        return soft_attention(query, key, value, log_keep, WINDOW, None, scaling, backend=backend)

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)

    for name, attend, is_relaxed in (
        (f"training attention ({backend})", relaxed, True),
        ("dense attention (SDPA)", dense, False),
    ):
        forward = counts.attention_forward(shape, 1, tokens, itemsize, is_relaxed)
        yield f"{name}, forward, {tokens:,} tokens", forward, without_gradient(attend)
        both = forward + counts.attention_backward(shape, 1, tokens, itemsize, is_relaxed)
        yield (
            f"{name}, forward and backward, {tokens:,} tokens",
            both,
            with_gradients(attend, (query, key, value, log_keep)),
        )

    for batch in args.batch:
        work = counts.decode_attention(shape, batch, args.live, itemsize)
        yield (
            f"decoding over {args.live:,} live slots, batch {batch}",
            work,
            decoding(shape, batch, args.live, device, dtype),
        )


def products(shape: counts.Shape, rows: int, random: Callable[..., Tensor]) -> Callable[[], object]:
    """The matrix products of a layer: queries, keys and values in one, and the first two of the MLP."""
    query, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    sizes = (
        (shape.hidden, query + 2 * kv),
        (query, shape.hidden),
        (shape.hidden, 2 * shape.mlp),
        (shape.mlp, shape.hidden),
    )
    pairs = [(random(rows, inner), random(outer, inner)) for inner, outer in sizes]
    return lambda: [F.linear(x, weight) for x, weight in pairs]


def with_gradients(function: Callable[[], Tensor], inputs: Sequence[Tensor]) -> Callable[[], None]:
    """The function and the gradients of its inputs, which are written anew each time."""

    def run() -> None:
        for tensor in inputs:
            tensor.grad = None
        function().sum().backward()

    return run


def without_gradient(function: Callable[[], object]) -> Callable[[], object]:
    """The function, nothing of it recorded."""
    return torch.no_grad()(function)


def decoding(shape: counts.Shape, batch: int, live: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """One query of each sequence over pages of `live` slots a head, as `CompactCache` attends."""
    width, size = shape.head_dim, 32
    pages = -(-live // size)
    pool = PagePool(width, width, dtype, device, size, num_pages=batch * shape.num_kv_heads * pages)
    order = 1 + torch.randperm(batch * shape.num_kv_heads * pages, device=device)  # as after many evictions
    length = torch.full((batch, shape.num_kv_heads), live, device=device)
    slots = paged.Slots(pool, order.view(batch, shape.num_kv_heads, pages), length)
    query = torch.randn(batch, shape.num_heads, 1, width, device=device, dtype=dtype)
    return without_gradient(lambda: paged.decode(query, slots, Scores(width**-0.5)))


def steps(shape: counts.Shape, itemsize: int) -> Iterator[tuple[str, int, counts.Work]]:
    """Whole steps and the tokens of each: training on 4k and 32k, decoding one to 32 sequences of 1k to 40k, CR 1 and 8."""
    yield "training, 32k tokens, predictors", 32768, counts.training_step(shape, 1, 32768, itemsize, "adapter")
    kept = counts.training_step(shape, 1, 32768, itemsize, "adapter", keep_attention=True)
    yield "the same, attention kept", 32768, kept
    yield "training, 4k tokens, all weights", 4096, counts.training_step(shape, 1, 4096, itemsize, "all")
    for context, batch in ((1024, 1), (8192, 8), (32768, 32), (40960, 8)):
        for cr in (1, 8):
            work = counts.decode_step(shape, batch, context / cr, itemsize)
            yield f"decoding, {context:,} tokens x {batch}, CR {cr}", batch, work


def measure(args: argparse.Namespace) -> tuple[list[harness.Row], counts.Ceilings]:
    """Every kernel's seconds, held against the larger of its two floors in each turn; the highest ceilings of all turns."""
    dtype, rows, reached = getattr(torch, args.dtype), [], []
    yardsticks = Yardsticks(args.device, dtype, args.short)
    for name in args.shapes:
        for kernel, work, run in kernels(counts.SHAPES[name], args.device, dtype, args):
            taken = harness.take_turns(yardsticks.calls | {"kernel": run}, args.rounds, args.device)
            turns = [yardsticks.ceilings(*pair) for pair in zip(taken["product"], taken["copy"], strict=True)]
            case = f"{name}: {kernel}"
            rows.append(harness.Row(case, "measured", taken["kernel"], "floor", notes=asdict(work)))
            rows.append(harness.Row(case, "floor", [max(work.floors(ceilings)) for ceilings in turns], "floor"))
            reached += turns
    return rows, counts.Ceilings(max(c.flops for c in reached), max(c.bandwidth for c in reached))


def print_kernels(rows: Sequence[harness.Row], ceilings: counts.Ceilings) -> None:
    """What was measured beside its floors, as Markdown."""
    print(f"{ceilings.flops / 1e9:,.0f} G operations/s, {ceilings.bandwidth / 1e9:,.1f} GB/s at most\n")
    ratios, cells = harness.ratios(rows), []
    for row, floor in zip(rows[::2], rows[1::2], strict=True):
        work, *middles = counts.Work(**row.notes), *(f"{1e3 * statistics.median(x.values):,.2f}" for x in (floor, row))
        sizes = f"{work.flops / 1e9:,.2f}", f"{work.bytes / 1e6:,.1f}"
        cells.append((row.case, *sizes, *middles, f"{ratios[row.case, row.name]:.2f}"))
    print(harness.table(("kernel", "G operations", "MB", "floor ms", "measured ms", "measured / floor"), cells))


def print_steps(ceilings: counts.Ceilings, itemsize: int) -> None:
    """The floors of whole steps, and the tokens a second that no program exceeds, as Markdown."""
    head = ("shape", "step", "T operations", "GB", "operations ms", "bytes ms", "tokens/s at most")
    cells = []
    for name, shape in counts.SHAPES.items():
        for step, tokens, work in steps(shape, itemsize):
            floors = work.floors(ceilings)
            cell = [name, step, f"{work.flops / 1e12:,.3f}", f"{work.bytes / 1e9:,.2f}"]
            cells.append([*cell, *(f"{1e3 * least:,.3g}" for least in floors), f"{tokens / max(floors):,.0f}"])
    print("\n" + harness.table(head, cells))


def main() -> None:
    """The command."""
    parser = harness.parser(__doc__, FOLDER)
    add = parser.add_argument
    add("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32", choices=("float32", "bfloat16"))
    add("--shapes", nargs="+", default=["Llama-3.2-1B"], choices=tuple(counts.SHAPES))
    add("--backend", default="auto", help="of the training attention, as attention= of a run")
    add("--tokens", type=int, default=2048, help="of the training attention")
    add("--rows", type=int, default=512, help="of matrix products and of the loss")
    add("--live", type=int, default=4096, help="live slots a head when decoding")
    add("--batch", type=int, nargs="+", default=[1, 8], help="sequences when decoding")
    add("--rounds", type=int, default=7)
    add("--count", action="store_true", help="measure nothing: floors of steps on an H100 as in its data sheet")
    args = parser.parse_args()
    if args.count:
        print_steps(counts.H100, 2)
        return
    if args.short:
        args.tokens, args.rows, args.live, args.batch, args.rounds = 256, 16, 2048, [2], 5
    rows, ceilings = measure(args)
    print_kernels(rows, ceilings)
    print_steps(ceilings, getattr(torch, args.dtype).itemsize)
    harness.write(harness.out(args), rows, args.device, dtype=args.dtype, ceilings=asdict(ceilings))


if __name__ == "__main__":
    main()
