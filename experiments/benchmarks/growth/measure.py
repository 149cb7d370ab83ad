"""How time and memory grow: python -m experiments.benchmarks.growth.measure [--short] [--quantities ...]

    a quantity at growing context, heads or batch, everything else fixed -> exponent, and share of a quadratic term

step      one token through a filled layer of the compact cache: decision noted, slot written, attention over live slots
notes     of that the bookkeeping alone: append_one and the write
piece     256 more tokens through a filled layer; a prompt is the sum of its pieces
bytes     what the filled layer holds
train     training attention of one sequence, forward and backward
peak      the most memory that it takes beyond its inputs

One layer, heads of 64, two query heads a KV head, float32; decisions are forced, window 256. The exponent is the slope of
log time over log size in the upper half of the sizes; the quadratic share that of c n^2 in a + b n + c n^2 at the largest
size, none of them negative, fitted to the whole range with relative errors.
"""

import argparse
import copy
import ctypes
import functools
import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import nnls

import dms_lab
from dms_lab.attention.soft import soft_attention
from dms_lab.cache.policy import Scores
from dms_lab.policies.full import FullPolicy
from experiments.benchmarks import harness
from experiments.benchmarks.decode_cpu.contest import ForcedPolicy, fill_layer

HERE = Path(__file__).parent
CPU = torch.device("cpu")
WIDTH, GROUP, PIECE, WINDOW = 64, 2, 256, 256
SCORES = Scores(WIDTH**-0.5)
MOST_TURNS = 8  # with those to warm up
SLACK = 0.15  # by which a fitted exponent may exceed what is expected: caches of the processor overflow on the way


class Place(NamedTuple):
    """What a quantity is measured at."""

    context: int
    cr: int
    heads: int = 4
    batch: int = 1


class Series(NamedTuple):
    """A quantity along one axis of `Place`, and the exponent that it should have at most."""

    quantity: str
    axis: str
    places: Sequence[Place]
    expected: float

    @property
    def name(self) -> str:
        """What grows along what, and what is fixed."""
        fixed = self.places[0]._asdict()
        fixed.pop(self.axis)
        return f"{self.quantity} against {self.axis} ({', '.join(f'{k} {v}' for k, v in fixed.items())})"


# -- what is measured --------------------------------------------------------------------------------------------------
def filled(place: Place) -> dms_lab.CompactCache:
    """A cache of one layer with `context` tokens a sequence, of which one in `cr` of the old ones is kept."""
    policy = FullPolicy() if place.cr == 1 else ForcedPolicy(kept=1 / place.cr, num_kv_heads=place.heads)
    cache = dms_lab.CompactCache(policy)
    block = torch.randn(1, 1, place.context, WIDTH, generator=torch.Generator().manual_seed(1))
    cache.announce("nobody")
    with torch.no_grad():
        fill_layer(cache, 0, block.expand(place.batch, place.heads, -1, -1))
    return cache


def new_tokens(place: Place, count: int) -> list[torch.Tensor]:
    """Query, key and value of so many tokens a sequence."""
    g = torch.Generator().manual_seed(2)
    heads = (GROUP * place.heads, place.heads, place.heads)
    return [torch.randn(place.batch, n, count, WIDTH, generator=g) for n in heads]


def step(place: Place) -> Callable[[], object]:
    """One token, again and again: the context grows by a few dozen over all turns."""
    cache, tensors = filled(place), new_tokens(place, 1)
    return lambda: cache.attend(0, *tensors, SCORES, None, None)


def notes(place: Place) -> Callable[[], object]:
    """The slot of a new token, and its write."""
    cache, (_, key, value) = filled(place), new_tokens(place, 1)
    slots, policy = cache.layers[0].slots, cache.policy
    key, value = key.flatten(0, 2), value.flatten(0, 2)

    def run() -> None:
        now = slots.seen
        flag = None if place.cr == 1 else policy.flags(None, now[:, None], place.heads)[:, :, 0]
        address = slots.append_one(flag, None)
        cache.pool.write(address.flatten(), key, value, now[:, None].expand(address.shape).flatten(), one_a_page=True)

    return run


def piece(place: Place) -> Callable[[], object]:
    """256 tokens at once, each time after `context` of them: a call uses up a copy of the cache."""
    cache, tensors = filled(place), new_tokens(place, PIECE)
    fresh = [copy.deepcopy(cache) for _ in range(MOST_TURNS)]
    return lambda: fresh.pop().attend(0, *tensors, SCORES, None, None)


def train(place: Place) -> Callable[[], object]:
    """Relaxed decisions that are nearly certain, as after training; gradients of everything."""
    query, key, value = (x.requires_grad_() for x in new_tokens(place, place.context))
    gone = torch.rand(key.shape[:3], generator=torch.Generator().manual_seed(3)) > 1 / place.cr
    log_keep = F.logsigmoid(torch.where(gone, -50.0, 50.0)).requires_grad_()

    def run() -> None:
        output = soft_attention(query, key, value, log_keep, WINDOW, None, WIDTH**-0.5)
        torch.autograd.grad(output.sum(), (query, key, value, log_keep))

    return run


def peak_bytes(run: Callable[[], object]) -> int:
    """The most resident memory of this process while it runs, less that before."""
    run()  # what torch loads or keeps at a first call is there before
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    run()
    return max(1, _status("VmHWM") - before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name + ":")))


TIMED = {"step": step, "notes": notes, "piece": piece, "train": train}
QUANTITIES = (*TIMED, "bytes", "peak")


def values(quantity: str, places: Sequence[Place], rounds: int) -> tuple[list[list[float]], str]:
    """What a quantity is at each place, turn by turn, and its unit; what is timed takes turns."""
    if quantity == "bytes":
        return [[float(filled(place).allocated_bytes)] for place in places], "byte"
    if quantity == "peak":  # what the allocator has kept is another tenth in every turn
        calls = [train(place) for place in places]
        turns = [[float(peak_bytes(call)) for call in calls] for _ in range(rounds)]
        return [list(found) for found in zip(*turns, strict=True)], "byte"
    repeats = 10 if quantity in ("step", "notes") else 1
    calls = {str(place): functools.partial(_repeat, TIMED[quantity](place), repeats) for place in places}
    taken = harness.take_turns(calls, rounds, CPU)
    return [[seconds / repeats for seconds in found] for found in taken.values()], "s"


@torch.no_grad()
def _repeat(run: Callable[[], object], times: int) -> None:
    with torch.enable_grad():
        for _ in range(times):
            run()


# -- which series ------------------------------------------------------------------------------------------------------
def all_series(contexts: Sequence[int], trained: Sequence[int], counts: Sequence[int], context: int) -> Iterator[Series]:
    """Everything along every axis: contexts of decoding, of training, and numbers of heads and of sequences."""
    for cr in (1, 4, 16):
        places = [Place(n, cr) for n in contexts]
        yield Series("step", "context", places, 1.0)
        yield Series("notes", "context", places, 0.0)
        yield Series("piece", "context", places, 1.0)
        yield Series("bytes", "context", places, 1.0)
    for cr in (1, 8):
        yield Series("train", "context", [Place(n, cr) for n in trained], 2.0)
        yield Series("peak", "context", [Place(n, cr) for n in trained], 1.0)
    ratios = [cr for cr in (1, 2, 4, 8, 16) if cr in (1, 4, 16) or len(counts) > 3]
    for quantity in ("step", "piece", "bytes"):
        yield Series(quantity, "cr", [Place(context, cr) for cr in ratios], 0.0)
        for axis in ("heads", "batch"):
            yield Series(quantity, axis, [Place(context, 4)._replace(**{axis: n}) for n in counts], 1.0)


# -- fits --------------------------------------------------------------------------------------------------------------
def exponent(sizes: Sequence[float], found: Sequence[float]) -> float:
    """The slope of log value over log size, by least squares, in the upper half of the sizes (three at least)."""
    last = max(3, -(-len(sizes) // 2))
    return float(np.polyfit(np.log(sizes[-last:]), np.log(found[-last:]), 1)[0])


def quadratic_share(sizes: Sequence[float], found: Sequence[float]) -> float:
    """The share of c n^2 at the largest size in a + b n + c n^2, a, b, c >= 0, fitted with relative errors."""
    n, y = np.asarray(sizes, float) / sizes[-1], np.asarray(found, float)
    parts, _ = nnls(np.stack([n**0, n, n**2], 1) / y[:, None], np.ones(len(y)))
    return float(parts[2] / parts.sum())


def measure(series: Series, rounds: int) -> list[harness.Row]:
    """The values along a series; ratios are to its first place."""
    names = [f"{getattr(place, series.axis):,}" for place in series.places]
    found, unit = values(series.quantity, series.places, rounds)
    gc.collect()
    return [harness.Row(series.name, name, of, names[0], unit) for name, of in zip(names, found, strict=True)]


def cells(series: Series, rows: Sequence[harness.Row]) -> list[str]:
    """A line of the table."""
    sizes = [getattr(place, series.axis) for place in series.places]
    middles = [statistics.median(row.values) for row in rows]
    steep = exponent(sizes, middles)
    scale, unit = (1e3, "ms") if rows[0].unit == "s" else (2**-20, "MiB")
    ends = f"{sizes[0]:,} to {sizes[-1]:,}", f"{scale * middles[0]:.3g} to {scale * middles[-1]:.3g} {unit}"
    verdict = "" if steep <= series.expected + SLACK else "steeper"
    return [series.name, *ends, f"{steep:.2f}", f"{series.expected:g}", f"{quadratic_share(sizes, middles):.0%}", verdict]


def main() -> None:
    """Measures, prints the table, writes the rows; on a CPU, whatever else is there."""
    parser = harness.parser(__doc__, HERE)
    parser.add_argument("--quantities", nargs="+", default=QUANTITIES, choices=QUANTITIES)
    parser.add_argument("--rounds", type=int, default=5, choices=range(1, MOST_TURNS))
    args: argparse.Namespace = parser.parse_args()
    torch.set_num_threads(1)
    sizes = ([2**n for n in range(10, 17)], [2**n for n in range(9, 14)], (1, 2, 4, 8, 16), 8192)
    if args.short:
        sizes = ([1024, 2048, 4096, 8192], [512, 1024, 2048], (1, 2, 4), 2048)
    rows, lines = [], []
    for series in all_series(*sizes):
        if series.quantity in args.quantities:
            found = measure(series, args.rounds)
            lines.append(cells(series, found))
            print(*lines[-1], sep=", ", flush=True)
            rows += found
    head = ("what", "sizes", "values", "exponent", "at most", "quadratic share", "")
    print("\n" + harness.table(head, lines))
    harness.write(harness.out(args), rows, CPU, dtype="float32")


if __name__ == "__main__":
    main()
