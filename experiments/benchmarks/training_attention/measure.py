"""Time of the training attention on a GPU: python measure.py time|tiles|floors [options]

time    `triton` against compiled FlexAttention on the same decisions, and against the dense causal attentions of torch,
        which know none: forward, and forward and backward; contestants take turns. What is wrong is not timed: outputs and
        gradients first have to err at most twice as much as plain bfloat16 does
tiles   the candidates of `kernels.tiles` against each other
floors  operations and bytes of the real shapes, by arithmetic

--short runs all of it on tiny shapes and, without a GPU, on the backends that a CPU has: it says nothing about speed.
Writes what was measured, with machine, versions and revision, to --out.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch.nn.functional as F
import triton
from shapes import SHAPES, TINY, Shape, causal_pairs, floor_rows, operations
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dms_lab.attention.kernels import tiles as kernel_tiles
from dms_lab.attention.kernels.relaxed import Scoring, relaxed_attention
from dms_lab.attention.soft import soft_attention

HERE = Path(__file__).parent
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DENSE = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
CONTESTANTS = ("triton", "flex", "cudnn", "flash") if CUDA else ("triton", "chunked", "math")
Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Case:
    """Inputs of one layer, one sequence: bfloat16 tensors, decisions that leave one of `ratio` keys, a cotangent."""

    def __init__(self, shape: Shape, num_tokens: int, ratio: float, window: int, num_documents: int = 1) -> None:
        g = torch.Generator().manual_seed(0)
        self.shape, self.num_tokens, self.ratio, self.window = shape, num_tokens, ratio, window

        def draw(num_heads: int) -> Tensor:
            # As a model gives them: [B, T, heads, D], transposed.
            return torch.randn(1, num_tokens, num_heads, shape.width, generator=g).bfloat16().to(DEVICE).transpose(1, 2)

        self.query, self.cotangent = draw(shape.num_heads), draw(shape.num_heads)
        self.key, self.value = draw(shape.num_kv_heads), draw(shape.num_kv_heads)
        gone = torch.rand(1, shape.num_kv_heads, num_tokens, generator=g) < 1 - 1 / ratio
        # Decided at 50 with tau 0.1, either way: logsigmoid(-500) and logsigmoid(500).
        self.log_keep = torch.where(gone, -500.0, -1e-6).to(DEVICE)
        self.document = None
        if num_documents > 1:
            position = torch.arange(num_tokens, device=DEVICE)[None]
            self.document = position * num_documents // num_tokens

    def tensors(self, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        """Fresh leaves: query, key, value of `dtype`, and log_keep."""
        values = [x.detach().to(dtype) for x in (self.query, self.key, self.value)] + [self.log_keep.clone()]
        return [x.requires_grad_() for x in values]

    def attention(self, name: str, tiles: kernel_tiles.Tiles | None = None) -> Attention:
        """The contestant as a function of the tensors; dense ones ignore the decisions and the documents."""
        scaling = self.shape.width**-0.5
        if name == "triton":
            scoring = Scoring(self.window, scaling, tiles=tiles)
            return lambda q, k, v, keep: relaxed_attention(q, k, v, keep, self.document, None, scoring)
        if name in DENSE:
            return lambda q, k, v, keep: _dense(DENSE[name], q, k, v, scaling)
        return lambda q, k, v, keep: soft_attention(q, k, v, keep, self.window, self.document, scaling, backend=name)


def _dense(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)


# -- correctness -------------------------------------------------------------------------------------------------------
def check(shape: Shape, num_tokens: int, window: int) -> dict:
    """How much more than plain bfloat16 the kernels err against float32, of output and gradients; raises above 2."""
    case = Case(shape, num_tokens, 3.0, window, num_documents=2)
    case.log_keep = -torch.rand_like(case.log_keep) * 8  # soft decisions, so that their gradients are not 0
    exact, plain, found = (
        _results(case, name, dtype)
        for name, dtype in (("reference", torch.float32), ("reference", torch.bfloat16), ("triton", torch.bfloat16))
    )
    worst = {}
    for name, want, naive, got in zip(("output", "dq", "dk", "dv", "dlog_keep"), exact, plain, found, strict=True):
        allowed = 2 * (naive - want).abs().max() + torch.finfo(torch.bfloat16).eps * want.abs().max()
        error = (got - want).abs().max()
        if not error <= allowed:
            raise SystemExit(f"{shape.name}: {name} errs by {error:.2e}, twice plain bfloat16 would be {allowed:.2e}")
        worst[name] = round(float(error / (naive - want).abs().max()), 3)
    return {"kind": "check", "shape": shape.name, "tokens": num_tokens, "error_of_plain_bfloat16": worst}


def _results(case: Case, name: str, dtype: torch.dtype) -> list[Tensor]:
    tensors = case.tensors(dtype)
    output = case.attention(name)(*tensors)
    grads = torch.autograd.grad(output, tensors, case.cotangent.to(output.dtype))
    return [x.detach().float() for x in (output, *grads)]


# -- time --------------------------------------------------------------------------------------------------------------
def compete(case: Case, attentions: dict[str, Attention], rounds: int) -> list[dict]:
    """Milliseconds of every contestant's forward, and of its forward and backward, in turns; out of memory is said so."""
    times: dict[str, dict[str, list[float]]] = {name: {"forward_ms": [], "both_ms": []} for name in attentions}
    failed = {}
    for turn in range(-2, rounds):  # two turns to compile and to warm up
        for name, attention in attentions.items():
            if name in failed:
                continue
            try:
                forward, both = _run(case, attention)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                failed[name] = str(error).splitlines()[0]
                gc.collect()
                continue
            if turn >= 0:
                times[name]["forward_ms"].append(round(forward, 4))
                times[name]["both_ms"].append(round(both, 4))
    place = {"shape": case.shape.name, "tokens": case.num_tokens, "ratio": case.ratio, "window": case.window}
    place["documents"] = 1 if case.document is None else int(case.document.max()) + 1
    return [
        {"kind": "time", "name": name} | place | (times[name] if name not in failed else {"failed": failed[name]})
        for name in attentions
    ]


def _run(case: Case, attention: Attention) -> tuple[float, float]:
    """Milliseconds of a forward, and of it with its backward."""
    tensors = case.tensors()
    marks = [_now()]
    output = attention(*tensors)
    marks.append(_now())
    output.backward(case.cotangent.to(output.dtype))
    marks.append(_now())
    if CUDA:
        torch.cuda.synchronize()
        return marks[0].elapsed_time(marks[1]), marks[0].elapsed_time(marks[2])
    return 1e3 * (marks[1] - marks[0]), 1e3 * (marks[2] - marks[0])


def _now():
    if not CUDA:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def measure(args: argparse.Namespace) -> list[dict]:
    """Checks every shape, then times every contest."""
    rows = [check(shape, args.check_tokens, args.window) for shape in args.shapes]
    for shape in args.shapes:
        for num_tokens in args.tokens:
            for ratio in args.ratios:
                for num_documents in args.documents:
                    case = Case(shape, num_tokens, ratio, args.window, num_documents)
                    rows += compete(case, {name: case.attention(name) for name in CONTESTANTS}, args.rounds)
                    del case
                    gc.collect()
    print_times(rows)
    return rows


def measure_tiles(args: argparse.Namespace) -> list[dict]:
    """Times the candidate tiles of every shape."""
    rows = []
    for shape in args.shapes:
        choices = kernel_tiles.candidates(shape.width, torch.bfloat16)
        if args.short:
            small = kernel_tiles.Tile(16, 16)
            choices = [kernel_tiles.Tiles(small, small, small)]
        for num_tokens in args.tokens:
            for ratio in args.ratios:
                case = Case(shape, num_tokens, ratio, args.window)
                rows += compete(case, {str(n): case.attention("triton", c) for n, c in enumerate(choices)}, args.rounds)
    print_times(rows)
    return rows


# -- tables and notes --------------------------------------------------------------------------------------------------
def print_table(head: tuple[str, ...], rows) -> None:
    """A Markdown table."""
    print("\n| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")


def print_times(rows: list[dict]) -> None:
    """Medians, and forward and backward against the best dense attention of the same case."""
    head = ("shape", "tokens", "keys left", "documents", "name", "forward ms", "both ms", "of best dense", "TFLOP/s")
    timed = [row for row in rows if row["kind"] == "time"]
    keys = ("shape", "tokens", "ratio", "documents")
    cells = []
    for row in timed:
        place = [row["shape"], row["tokens"], f"1/{row['ratio']:g}", row["documents"], row["name"]]
        if "failed" in row:
            cells.append([*place, row["failed"], "", "", ""])
            continue
        rivals = [r for r in timed if r["name"] in DENSE and "both_ms" in r and all(r[k] == row[k] for k in keys)]
        both = statistics.median(row["both_ms"])
        best = min((statistics.median(r["both_ms"]) for r in rivals), default=None)
        shape = next(s for s in (*SHAPES, TINY) if s.name == row["shape"])
        dense = operations(shape, causal_pairs(row["tokens"]), 5)  # what a dense attention without documents has to do
        rate = f"{dense / both / 1e9:.0f}" if row["name"] in DENSE else ""
        ratio = "" if best is None else f"{both / best:.2f}"
        cells.append([*place, f"{statistics.median(row['forward_ms']):.3f}", f"{both:.3f}", ratio, rate])
    print_table(head, cells)


def print_floors(args: argparse.Namespace) -> list[dict]:
    """The floors of the real shapes, whatever is measured."""
    head = ("shape", "tokens", "attention", "TFLOP", "ms at peak", "MB", "ms at peak", "of dense operations")
    print_table(head, floor_rows(args.window, (1, 2, 4, 8), (8192, 32768)))
    return []


def describe() -> dict:
    """Machine, versions, revision."""
    words = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    revision = subprocess.run(words, cwd=HERE, capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name() if CUDA else f"{platform.machine()}, {os.cpu_count()} cores, interpreter"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    return {"device": device, "cuda": torch.version.cuda, **versions, "revision": revision}


def main() -> None:
    """Runs one command and writes what it measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {"time": measure, "tiles": measure_tiles, "floors": print_floors}
    parser.add_argument("command", choices=commands)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument(
        "--ratios", type=float, nargs="+", default=[1, 8], help="one of so many keys beyond the window is left"
    )
    parser.add_argument("--documents", type=int, nargs="+", default=[1, 8], help="packed into a sequence")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--short", action="store_true", help="tiny shapes, one round")
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    args = parser.parse_args()
    args.shapes, args.check_tokens = SHAPES, 2048
    if args.short:
        args.shapes, args.check_tokens, args.tokens, args.window, args.rounds = (TINY,), 40, [48], 8, 1
    elif not CUDA and args.command != "floors":
        sys.exit("no CUDA device is here: the interpreter would take days; use --short, or the command floors")
    rows = commands[args.command](args)
    if rows:
        args.out.write_text(json.dumps(describe() | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
