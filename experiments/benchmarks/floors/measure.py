"""Kernels against their floors on this machine: python experiments/benchmarks/floors/measure.py [--short] [--device cuda]

    a large matrix product, a large copy -> ceilings
    one layer's kernels of a model's shape, random weights -> seconds, medians -> seconds / floor
    whole training and decoding steps -> floors alone

Writes results.json beside this file (hardware, versions, revision), --short into runs/, and prints the tables in Markdown.
"""

import argparse
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import counts
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

from dms_lab import distillation
from dms_lab.attention import paged
from dms_lab.attention.soft import choose_backend, soft_attention
from dms_lab.cache.pages import PagePool
from dms_lab.cache.policy import Scores
from dms_lab.results import git_revision, versions

FOLDER = Path(__file__).parent
WINDOW = 256
Kernel = tuple[str, counts.Work, Callable[[], object]]


def seconds(function: Callable[[], object], least: float) -> float:
    """The median time of a call, measured for `least` seconds or more."""
    return (
        Timer("run()", globals={"run": function}, num_threads=torch.get_num_threads())
        .blocked_autorange(min_run_time=least)
        .median
    )


def measured_ceilings(device: torch.device, dtype: torch.dtype, short: bool) -> counts.Ceilings:
    """Of a square matrix product and of a copy, each too large for any cache of the device (smaller if `short`)."""
    size = (512 if short else 2048) if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = seconds(lambda: a @ b, 0.2 if short else 2.0)
    source = torch.zeros((2**26 if short else 2**28) if device.type == "cpu" else 2**31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = seconds(lambda: target.copy_(source), 0.2 if short else 2.0)
    return counts.Ceilings(2 * size**3 / product, 2 * source.numel() / copied)


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


def steps(shape: counts.Shape, itemsize: int) -> Iterator[tuple[str, counts.Work]]:
    """Whole steps: training on 4k and 32k tokens, decoding one to 32 sequences of 1k to 40k, at full and an eighth."""
    yield "training step, 32k tokens, predictors", counts.training_step(shape, 1, 32768, itemsize, "adapter")
    yield "training step, 4k tokens, all weights", counts.training_step(shape, 1, 4096, itemsize, "all")
    for context, batch in ((1024, 1), (8192, 8), (32768, 32), (40960, 8)):
        for cr in (1, 8):
            work = counts.decode_step(shape, batch, context / cr, itemsize)
            yield f"decoding step, {context:,} tokens x {batch}, CR {cr}", work


def measure(args: argparse.Namespace) -> dict:
    """Everything that is written."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    ceilings = measured_ceilings(device, dtype, args.short)
    found = {"hardware": hardware(device), "versions": versions(), "git_revision": git_revision()}
    found |= {
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "ceilings": asdict(ceilings),
        "kernels": [],
        "steps": [],
    }
    for name in args.shapes:
        shape = counts.SHAPES[name]
        for kernel, work, run in kernels(shape, device, dtype, args):
            taken, floor = seconds(run, 0.1 if args.short else 1.0), max(work.floors(ceilings))
            row = {"shape": name, "kernel": kernel, **asdict(work), "floor_seconds": floor, "seconds": taken}
            found["kernels"].append(row | {"over_floor": taken / floor})
    for name, shape in counts.SHAPES.items():
        for step, work in steps(shape, dtype.itemsize):
            arithmetic, memory = work.floors(ceilings)
            row = {"shape": name, "step": step, **asdict(work), "flops_seconds": arithmetic, "bytes_seconds": memory}
            found["steps"].append(row)
    return found


def hardware(device: torch.device) -> str:
    """The processor or GPU by its own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [
        line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return names[0] if names else platform.machine()


def tables(found: dict) -> str:
    """What was found, for a README."""
    ceilings = found["ceilings"]
    lines = [
        f"{found['hardware']}, {found['dtype']}, {found['threads']} thread(s): "
        f"{ceilings['flops'] / 1e9:,.0f} G operations/s, {ceilings['bandwidth'] / 1e9:,.1f} GB/s",
        "",
        "| shape | kernel | G operations | MB | floor ms | measured ms | measured / floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["kernels"]:
        lines.append(
            f"| {row['shape']} | {row['kernel']} | {row['flops'] / 1e9:,.2f} | {row['bytes'] / 1e6:,.1f} | "
            f"{row['floor_seconds'] * 1e3:,.2f} | {row['seconds'] * 1e3:,.2f} | {row['over_floor']:.2f} |"
        )
    lines += ["", "| shape | step | T operations | GB | operations s | bytes s |", "|---|---|---|---|---|---|"]
    for row in found["steps"]:
        lines.append(
            f"| {row['shape']} | {row['step']} | {row['flops'] / 1e12:,.3f} | {row['bytes'] / 1e9:,.2f} | "
            f"{row['flops_seconds']:,.4g} | {row['bytes_seconds']:,.4g} |"
        )
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--short", action="store_true", help="small sizes, seconds in all: that it runs, not what it measures")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32", choices=("float32", "bfloat16"))
    add("--shapes", nargs="+", default=["Llama-3.2-1B"], choices=tuple(counts.SHAPES))
    add("--backend", default="auto", help="of the training attention, as attention= of a run")
    add("--tokens", type=int, default=2048, help="of the training attention")
    add("--rows", type=int, default=512, help="of matrix products and of the loss")
    add("--live", type=int, default=4096, help="live slots a head when decoding")
    add("--batch", type=int, nargs="+", default=[1, 8], help="sequences when decoding")
    add("--out", type=Path)
    args = parser.parse_args()
    if args.short:
        args.tokens, args.rows, args.live, args.batch = 256, 16, 256, [2]
    found = measure(args)
    path = args.out or (Path("runs/benchmarks/floors.json") if args.short else FOLDER / "results.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(tables(found))
    print(f"\nresults: {path}")


if __name__ == "__main__":
    main()
