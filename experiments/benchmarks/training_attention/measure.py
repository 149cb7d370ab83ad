"""Time of the training attention: python -m experiments.benchmarks.training_attention.measure [time|tiles|floors]

time    on a GPU `triton` against compiled FlexAttention on the same decisions, and against the dense causal attentions of
        torch, which know none: forward, and forward and backward; contestants take turns. What is wrong is not timed:
        outputs and gradients first have to err at most twice as much as plain bfloat16 does
tiles   the candidates of `kernels.tiles` against each other
floors  operations and bytes of the real shapes, by arithmetic

On a CPU, which has the short form alone, `chunked` is held against dense attention in float32, and the kernels' errors are
checked on 40 tokens through the interpreter.
"""

import argparse
import functools
import gc
import itertools
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dms_lab.attention.kernels import tiles as kernel_tiles
from dms_lab.attention.kernels.relaxed import Scoring, relaxed_attention
from dms_lab.attention.soft import soft_attention
from experiments.benchmarks import counts, harness

HERE = Path(__file__).parent
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32  # of what is timed
DENSE = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}
CONTESTANTS = ("triton", "flex", "cudnn", "flash") if CUDA else ("chunked", "flash")
SHAPES = counts.SHAPES | {"tiny": counts.TINY}
Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Case:
    """Inputs of one layer, one sequence: bfloat16 tensors, decisions that leave one of `ratio` keys, a cotangent."""

    def __init__(self, name: str, num_tokens: int, ratio: float, window: int, num_documents: int = 1) -> None:
        g, shape = torch.Generator().manual_seed(0), SHAPES[name]
        self.name = f"{name}, {num_tokens:,} tokens in {num_documents} document(s), 1/{ratio:g} of the far keys"
        self.shape, self.window = shape, window

        def draw(num_heads: int) -> Tensor:
            # As a model gives them: [B, T, heads, D], transposed.
            return torch.randn(1, num_tokens, num_heads, shape.head_dim, generator=g).bfloat16().to(DEVICE).transpose(1, 2)

        self.query, self.cotangent = draw(shape.num_heads), draw(shape.num_heads)
        self.key, self.value = draw(shape.num_kv_heads), draw(shape.num_kv_heads)
        gone = torch.rand(1, shape.num_kv_heads, num_tokens, generator=g) < 1 - 1 / ratio
        # Decided at 50 with tau 0.1, either way: logsigmoid(-500) and logsigmoid(500).
        self.log_keep = torch.where(gone, -500.0, -1e-6).to(DEVICE)
        self.document = None
        if num_documents > 1:
            position = torch.arange(num_tokens, device=DEVICE)[None]
            self.document = position * num_documents // num_tokens

    def tensors(self, dtype: torch.dtype = DTYPE) -> list[Tensor]:
        """Fresh leaves: query, key, value of `dtype`, and log_keep."""
        values = [x.detach().to(dtype) for x in (self.query, self.key, self.value)] + [self.log_keep.clone()]
        return [x.requires_grad_() for x in values]

    def attention(self, name: str, tiles: kernel_tiles.Tiles | None = None) -> Attention:
        """The contestant as a function of the tensors; dense ones ignore the decisions and the documents."""
        scaling = self.shape.head_dim**-0.5
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
def check(name: str, num_tokens: int, window: int) -> dict[str, float]:
    """How much more than plain bfloat16 the kernels err against float32, of output and gradients; raises above 2."""
    case = Case(name, num_tokens, 3.0, window, num_documents=2)
    case.log_keep = -torch.rand_like(case.log_keep) * 8  # soft decisions, so that their gradients are not 0
    exact, plain, found = (
        _results(case, name, dtype)
        for name, dtype in (("reference", torch.float32), ("reference", torch.bfloat16), ("triton", torch.bfloat16))
    )
    worst = {}
    for what, want, naive, got in zip(("output", "dq", "dk", "dv", "dlog_keep"), exact, plain, found, strict=True):
        allowed = 2 * (naive - want).abs().max() + torch.finfo(torch.bfloat16).eps * want.abs().max()
        error = (got - want).abs().max()
        if not error <= allowed:
            raise SystemExit(f"{name}: {what} errs by {error:.2e}, twice plain bfloat16 would be {allowed:.2e}")
        worst[what] = round(float(error / (naive - want).abs().max()), 3)
    return worst


def _results(case: Case, name: str, dtype: torch.dtype) -> list[Tensor]:
    tensors = case.tensors(dtype)
    output = case.attention(name)(*tensors)
    grads = torch.autograd.grad(output, tensors, case.cotangent.to(output.dtype))
    return [x.detach().float() for x in (output, *grads)]


# -- time --------------------------------------------------------------------------------------------------------------
def compete(case: Case, attentions: dict[str, Attention], rounds: int) -> list[harness.Row]:
    """Forward, and forward and backward, in turns; ratios are to the last. Who fails is named and left out."""
    dense = list(attentions)[-1]
    able = {name: attention for name, attention in attentions.items() if _is_able(case, name, attention)}
    rows = []
    for part, run in (("forward", _forward), ("forward and backward", _both)):
        calls = {name: functools.partial(run, case, attention) for name, attention in able.items()}
        times = harness.take_turns(calls, rounds, DEVICE, warm_up=2)
        rows += [harness.Row(f"{part}, {case.name}", name, taken, dense) for name, taken in times.items()]
    return rows


def _is_able(case: Case, name: str, attention: Attention) -> bool:
    """Whether a contestant gets through one step: the memory may be too small for it, or the GPU of another kind."""
    try:
        _both(case, attention)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        print(f"{name} is left out of {case.name}: {str(error).splitlines()[0]}", file=sys.stderr)
        return False
    finally:
        gc.collect()
    return True


def _forward(case: Case, attention: Attention) -> None:
    attention(*case.tensors())


def _both(case: Case, attention: Attention) -> None:
    output = attention(*case.tensors())
    output.backward(case.cotangent.to(output.dtype))


def measure(args: argparse.Namespace) -> list[harness.Row]:
    """Checks every shape, then times every contest."""
    for name in args.shapes if CUDA else ("tiny",):
        print(name, check(name, 2048 if CUDA else 40, args.window if CUDA else 8))
    rows = []
    for name, num_tokens, ratio, num_documents in itertools.product(args.shapes, args.tokens, args.ratios, args.documents):
        case = Case(name, num_tokens, ratio, args.window, num_documents)
        rows += compete(case, {rival: case.attention(rival) for rival in args.contestants}, args.rounds)
        del case
        gc.collect()
    return rows


def measure_tiles(args: argparse.Namespace) -> list[harness.Row]:
    """Times the candidate tiles of every shape against the default."""
    rows = []
    for name, num_tokens, ratio in itertools.product(args.shapes, args.tokens, args.ratios):
        case = Case(name, num_tokens, ratio, args.window)
        choices = kernel_tiles.candidates(case.shape.head_dim, torch.bfloat16)
        rows += compete(
            case, {f"tiles {n}": case.attention("triton", c) for n, c in reversed([*enumerate(choices)])}, args.rounds
        )
    return rows


# -- tables ------------------------------------------------------------------------------------------------------------
def print_times(rows: list[harness.Row]) -> None:
    """Medians, and what they are of the dense contestant's."""
    ratios = harness.ratios(rows)
    head = ("what", "contestant", "ms", "of dense")
    cells = [
        (row.case, row.name, f"{1e3 * statistics.median(row.values):.3f}", f"{ratios.get((row.case, row.name), 1.0):.2f}")
        for row in rows
    ]
    print(harness.table(head, cells))


def print_floors(args: argparse.Namespace) -> list[harness.Row]:
    """Operations and bytes of a forward and a backward of the real shapes, whatever is measured."""
    head = ("shape", "tokens", "attention", "TFLOP", "ms at peak", "MB", "ms at peak", "of dense operations")
    cells = []
    for name, shape in counts.SHAPES.items():
        for num_tokens in (8192, 32768):
            dense = _least(shape, num_tokens, None, 5)
            cases = [("dense, one backward pass", dense)]
            for ratio in (1, 2, 4, 8):
                pairs = counts.visible_pairs(num_tokens, args.window, 1 / ratio)
                cases.append((f"two passes, 1/{ratio} of the far keys", _least(shape, num_tokens, pairs, 7)))
            for what, work in cases:
                arithmetic, memory = (1e3 * seconds for seconds in work.floors(counts.H100))
                sizes = (f"{work.flops / 1e12:.2f}", f"{arithmetic:.2f}", f"{work.bytes / 1e6:.0f}", f"{memory:.3f}")
                cells.append((name, num_tokens, what, *sizes, f"{work.flops / dense.flops:.2f}"))
    print(harness.table(head, cells))
    return []


def _least(shape: counts.Shape, num_tokens: int, pairs: float | None, products: int) -> counts.Work:
    forward = counts.attention_forward(shape, 1, num_tokens, 2, pairs=pairs)
    return forward + counts.attention_backward(shape, 1, num_tokens, 2, pairs=pairs, products=products)


def main() -> None:
    """Runs one command and writes what it measured."""
    parser = harness.parser(__doc__, HERE)
    commands = {"time": measure, "tiles": measure_tiles, "floors": print_floors}
    parser.add_argument("command", choices=commands, nargs="?", default="time")
    parser.add_argument("--shapes", nargs="+", default=[*counts.SHAPES], choices=SHAPES)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768])
    parser.add_argument("--ratios", type=float, nargs="+", default=[1, 8], help="of so many far keys one is left")
    parser.add_argument("--documents", type=int, nargs="+", default=[1, 8], help="packed into a sequence")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--contestants", nargs="+", default=CONTESTANTS, help="of time; ratios are to the last of them")
    if "--short" in sys.argv:
        short = {"shapes": ["Llama-3.2-1B"], "tokens": [512], "documents": [1], "window": 64, "rounds": 5}
        parser.set_defaults(**short)
    args = parser.parse_args()
    if not CUDA and not args.short and args.command != "floors":
        parser.error("no CUDA device is here: 32k tokens would take days; use --short, or the command floors")
    rows = commands[args.command](args)
    if rows:
        print_times(rows)
        harness.write(harness.out(args), rows, DEVICE, dtype=str(DTYPE).removeprefix("torch."))


if __name__ == "__main__":
    main()
