"""Attention over slots in pages: python -m experiments.benchmarks.paged_attention.measure [all|decode|prefill|floors]

decode    one query a sequence over ragged live slots: `triton`, the `torch` path, the packages flash-attn and flashinfer
          where they are installed and can read the slots, and dense attention over all tokens
prefill   a prompt through one layer of the compact cache in chunks, storing included, against dense causal attention
floors    operations and bytes of the real shapes, by arithmetic

Contestants take turns. What is wrong is not timed: outputs first have to err at most twice as much as the torch path in
bfloat16 does. Decisions come in runs of tokens, heads keep unequal shares. Decoding goes over more copies of the layer than
the second-level cache holds; its share is live bytes a second of what a large copy moves, read and written.
On a CPU, which has the short form alone, the kernels run through the interpreter: that says nothing about speed.
"""

import argparse
import gc
import itertools
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dms_lab.attention import paged
from dms_lab.cache.compact import CompactCache
from dms_lab.cache.pages import PagePool
from dms_lab.cache.policy import Scores
from dms_lab.policies import DmsPolicy
from dms_lab.policies.dms import DmsConfig
from experiments.benchmarks import counts, harness

HERE = Path(__file__).parent
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16
DENSE = SDPBackend.FLASH_ATTENTION if CUDA else SDPBackend.MATH
SHAPES = counts.SHAPES | {"tiny": counts.TINY}
PAGE = 32
RUN = 64  # tokens of a run that share a decision
CACHED_BYTES = 2**28  # more than a GPU's second-level cache holds
Contestants = dict[str, Callable[[], object]]


def normal(*size: int) -> Tensor:
    return torch.randn(*size, device=DEVICE, dtype=DTYPE)


def dense(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """Attention over everything, which knows no decisions."""
    with sdpa_kernel(DENSE):
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=True)


# -- correctness -------------------------------------------------------------------------------------------------------
def check(name: str, storage: str, args: argparse.Namespace) -> float:
    """How much more than the torch path the kernels err, both in bfloat16, over a prompt and a token; exits above 2."""
    tensors = prompt(SHAPES[name], args.check_tokens, 4, 2)
    exact = through_cache(tensors, args, "torch", storage, torch.float32)
    plain, found = (through_cache(tensors, args, backend, storage, DTYPE).float() for backend in ("torch", "triton"))
    allowed = (plain - exact).abs().max() + torch.finfo(DTYPE).eps / 2 * exact.abs().max()
    error = float((found - exact).abs().max() / allowed)
    if not error <= 2:
        sys.exit(f"{name}, storage={storage}: triton errs {error:.2f} times as much as torch does in bfloat16")
    return error


def prompt(shape: counts.Shape, num_tokens: int, ratio: float, batch: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values as a model gives them, and logits [B, K, T] that keep one run of tokens in `ratio`."""
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    parts = (normal(batch, num_tokens, number, shape.head_dim).transpose(1, 2) for number in heads)
    runs = torch.rand(batch, shape.num_kv_heads, -(-num_tokens // RUN), device=DEVICE) < 1 - 1 / ratio
    return *parts, torch.where(runs.repeat_interleave(RUN, 2)[:, :, :num_tokens], 1.0, -1.0)


def through_cache(tensors, args: argparse.Namespace, backend: str, storage: str, dtype: torch.dtype) -> Tensor:
    """The attention [B, H, T, D] of a prompt in chunks, its last token on its own, through one layer of a compact cache."""
    *parts, logit = tensors
    query, key, value = (x.to(dtype) for x in parts)
    policy = DmsPolicy(DmsConfig(window=args.window, decided_by="self"))
    cache = CompactCache(policy, storage, PAGE, chunk=args.chunk, attention=backend)
    outputs, last, scores = [], query.shape[2] - 1, Scores(query.shape[3] ** -0.5)
    for span in (slice(0, last), slice(last, None)):
        cache.announce("benchmark")
        new = cache.update(key[:, :, span], value[:, :, span], 0)
        outputs.append(cache.attend(0, query[:, :, span], *new, scores, logit[:, :, span], None))
    return torch.cat(outputs, 2)


# -- decode ------------------------------------------------------------------------------------------------------------
def live_slots(shape: counts.Shape, batch: int, num_tokens: int, ratio: float, storage: str) -> paged.Slots:
    """Slots of heads that keep from next to nothing to three times the mean share, their pages anywhere in the pool."""
    share = torch.rand(batch, shape.num_kv_heads, device=DEVICE).square() * 3 / ratio
    length = (share * num_tokens).long().clamp(1, num_tokens)
    need = -(-length // PAGE)
    pool = PagePool(shape.head_dim, shape.head_dim, DTYPE, DEVICE, PAGE, int(need.sum()), storage)
    table = pool.take(torch.arange(int(need.max()), device=DEVICE) < need[:, :, None])
    shuffled = torch.cat([table.new_zeros(1), 1 + torch.randperm(pool.num_pages, device=DEVICE)])
    for store in (pool.key, pool.value):
        numbers = torch.randint(-100, 100, store.data.shape, device=DEVICE, dtype=torch.int8)
        store.data = numbers.to(store.data.dtype)
        if store.scale is not None:
            store.scale.fill_(0.01)
        else:
            store.data *= 0.01
    return paged.Slots(pool, shuffled[table], length)


def measure_decode(args: argparse.Namespace) -> list[harness.Row]:
    """Every shape, batch, length, ratio and storage."""
    rows = []
    cases = itertools.product(args.shapes, args.batches, args.tokens, args.ratios, args.storage)
    for name, batch, num_tokens, ratio, storage in cases:
        shape = SHAPES[name]
        case = f"decode {name}, batch {batch}, {num_tokens:,} tokens, CR {ratio:g}, {storage}"
        whole = counts.decode_attention(shape, batch, num_tokens, DTYPE.itemsize).bytes
        if CUDA and 2 * whole > torch.cuda.mem_get_info()[0]:
            print(f"{case}: left out, its dense keys and values do not fit")
            continue
        first = live_slots(shape, batch, num_tokens, ratio, storage)
        live = float(first.length.sum()) / (batch * shape.num_kv_heads)
        least = counts.decode_attention(shape, batch, live, first.pool.key.data.itemsize).bytes
        copies = min(args.copies, 1 + int(CACHED_BYTES // least))
        layers = [first, *(live_slots(shape, batch, num_tokens, ratio, storage) for _ in range(copies - 1))]
        query = normal(batch, shape.num_heads, 1, shape.head_dim)
        key, value = (normal(batch, shape.num_kv_heads, num_tokens, shape.head_dim) for _ in range(2))
        scores = Scores(shape.head_dim**-0.5)

        def over(backend: str, layers=layers, query=query, scores=scores) -> Callable[[], object]:
            mine = [replace(slots, backend=backend) for slots in layers]
            return lambda: [paged.decode(query, slots, scores) for slots in mine]

        def over_all(query=query, key=key, value=value, copies=copies) -> object:
            return [dense(query, key, value, False) for _ in range(copies)]

        names = ("triton", *others(query, first, scores), "torch")
        contestants = {name: over(name) for name in names} | {"dense": over_all}
        notes = {"calls": copies, "live_bytes": copies * least}
        rows += compete(case, contestants, args.rounds, notes)
    return rows


def others(query: Tensor, slots: paged.Slots, scores: Scores) -> Iterator[str]:
    """The packages whose paged kernels can read these slots here; exits where one computes something else."""
    for name in ("flash_attn", "flashinfer"):
        try:
            paged.choose_backend(name, slots.pool)
        except ValueError:
            continue
        plain, found = (paged.decode(query, replace(slots, backend=b), scores).float() for b in ("torch", name))
        if not (found - plain).norm() <= 0.02 * plain.norm():
            sys.exit(f"{name} differs from torch by {float((found - plain).norm() / plain.norm()):.3f} of its norm")
        yield name


# -- prefill -----------------------------------------------------------------------------------------------------------
def measure_prefill(args: argparse.Namespace) -> list[harness.Row]:
    """Every shape, prompt length, ratio and storage, one sequence."""
    rows = []
    for name, num_tokens, ratio, storage in itertools.product(args.shapes, args.prompts, args.ratios, args.storage):
        tensors = prompt(SHAPES[name], num_tokens, ratio)

        def through(backend: str, tensors=tensors, storage=storage) -> Callable[[], object]:
            return lambda: through_cache(tensors, args, backend, storage, DTYPE)

        contestants = {"triton": through("triton"), "torch": through("torch")}
        contestants["dense"] = lambda tensors=tensors: dense(*tensors[:3], True)
        case = f"prefill {name}, {num_tokens:,} tokens in chunks of {args.chunk}, CR {ratio:g}, {storage}"
        rows += compete(case, contestants, args.rounds, {"calls": 1})
    return rows


# -- rows and tables ---------------------------------------------------------------------------------------------------
def compete(case: str, contestants: Contestants, rounds: int, notes: dict) -> list[harness.Row]:
    """Seconds of each contestant, in turns; one that runs out of memory is named and left out."""
    for name, run in list(contestants.items()):
        try:
            run()
        except torch.OutOfMemoryError as error:
            print(f"{case}: {name} is left out, {str(error).splitlines()[0]}")
            del contestants[name]
            gc.collect()
    taken = harness.take_turns(contestants, rounds, DEVICE)
    return [harness.Row(case, name, values, "dense", notes=notes) for name, values in taken.items()]


def copy_bandwidth(num_bytes: int) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    taken = harness.take_turns({"copy": lambda: target.copy_(source)}, 5, DEVICE)["copy"]
    return 2 * num_bytes / statistics.median(taken)


def print_times(rows: list[harness.Row], bandwidth: float) -> None:
    """Medians a call, what they are of dense attention's, and of decoding the share of the copy's bandwidth."""
    ratios, cells = harness.ratios(rows), []
    for row in rows:
        seconds = statistics.median(row.values)
        moved = row.notes.get("live_bytes") if row.name != "dense" else None
        share = "" if moved is None else f"{moved / seconds / bandwidth:.3f}"
        ratio = ratios.get((row.case, row.name), 1.0)
        cells.append((row.case, row.name, f"{1e3 * seconds / row.notes['calls']:.3f}", f"{ratio:.2f}", share))
    print(harness.table(("what", "contestant", "ms", "of dense", "of the copy's bandwidth"), cells))


def print_floors(args: argparse.Namespace) -> list[harness.Row]:
    """The least that a layer's attention moves and computes, against dense attention."""
    cells = []
    for (name, shape), ratio in itertools.product(counts.SHAPES.items(), (1, 4, 8)):
        for batch, num_tokens in ((1, 8192), (1, 131072), (64, 8192), (64, 131072)):
            live = num_tokens / ratio + (args.window * (1 - 1 / ratio))
            memory = counts.decode_attention(shape, batch, live, 2).floors(counts.H100)[1]
            cells.append((name, "decode", batch, num_tokens, ratio, f"{1e3 * memory:.4f}", "bytes"))
        for num_tokens in (32768, 131072):
            work = counts.prefill_attention(shape, 1, num_tokens, 2, args.window, 1 / ratio)
            arithmetic = work.floors(counts.H100)[0]
            cells.append((name, "prefill", 1, num_tokens, ratio, f"{1e3 * arithmetic:.2f}", "operations"))
    print(harness.table(("shape", "what", "batch", "tokens", "CR", "least ms a layer", "bound by"), cells))
    return []


def measure_all(args: argparse.Namespace) -> list[harness.Row]:
    return measure_decode(args) + measure_prefill(args)


def main() -> None:
    """Runs one command and writes what it measured."""
    parser = harness.parser(__doc__, HERE)
    commands = {"all": measure_all, "decode": measure_decode, "prefill": measure_prefill, "floors": print_floors}
    parser.add_argument("command", choices=commands, nargs="?", default="all")
    parser.add_argument("--shapes", nargs="+", default=[*counts.SHAPES], choices=SHAPES)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64], help="of decode")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768, 131072], help="of decode")
    parser.add_argument("--prompts", type=int, nargs="+", default=[32768, 131072], help="tokens of prefill")
    parser.add_argument("--ratios", type=float, nargs="+", default=[4, 8])
    parser.add_argument("--storage", nargs="+", default=["model", "fp8", "int8"], choices=("model", "fp8", "int8"))
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of a prompt at once")
    parser.add_argument("--copies", type=int, default=36, help="of a layer in a turn of decode, at most")
    parser.add_argument("--check-tokens", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=20)
    if "--short" in sys.argv:
        short = {"shapes": ["tiny"], "batches": [2], "tokens": [96], "prompts": [70], "ratios": [4], "window": 8}
        parser.set_defaults(**short, chunk=40, copies=1, check_tokens=50, rounds=1)
    args = parser.parse_args()
    if not CUDA and not args.short and args.command != "floors":
        parser.error("no CUDA device is here: the interpreter would take days; use --short, or the command floors")
    torch.manual_seed(0)
    if args.command != "floors":
        for name, storage in itertools.product(args.shapes, args.storage):
            print(
                f"{name}, {storage}: errs {check(name, storage, args):.2f} times as much as torch in bfloat16", flush=True
            )
    rows = commands[args.command](args)
    if rows:
        bandwidth = copy_bandwidth(2**31 if CUDA else 2**22)
        print_times(rows, bandwidth)
        harness.write(harness.out(args), rows, DEVICE, dtype=str(DTYPE).removeprefix("torch."), copy_bandwidth=bandwidth)


if __name__ == "__main__":
    main()
