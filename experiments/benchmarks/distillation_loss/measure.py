"""The distillation loss: python -m experiments.benchmarks.distillation_loss.measure [--short] [--device cuda]

random hidden states of student and teacher, two heads -> kl_loss and its backward, against the same with its logits
computed again in the backward; contestants take turns
"""

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dms_lab import distillation
from experiments.benchmarks import harness

FOLDER = Path(__file__).parent


class Case(NamedTuple):
    """Sizes: tokens, hidden width, vocabulary, tokens of a chunk."""

    tokens: int
    hidden: int
    vocabulary: int
    chunk: int


CASES = {
    "embedded model": Case(2048, 128, 1024, 1024),
    "32k vocabulary": Case(512, 512, 32768, 128),
    "32k vocabulary, wide": Case(256, 2048, 32768, 128),
}
SHORT = {"embedded model": CASES["embedded model"], "8k vocabulary": Case(256, 256, 8192, 128)}


def recomputed(hidden: Tensor, teacher: Tensor, head: Tensor, teacher_head: Tensor, chunk: int) -> Tensor:
    """KL(teacher || student) whose chunks are computed again in the backward: five products with a head."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        log_q = F.linear(x, head).float().log_softmax(-1)
        with torch.no_grad():
            log_p = F.linear(y, teacher_head).float().log_softmax(-1)
        return F.kl_div(log_q, log_p, reduction="sum", log_target=True)

    parts = zip(hidden.split(chunk), teacher.split(chunk), strict=True)
    return sum(checkpoint(loss, *part, use_reentrant=False) for part in parts) / len(hidden)


def kept(hidden: Tensor, teacher: Tensor, head: Tensor, teacher_head: Tensor, chunk: int) -> Tensor:
    """The same, by the package: three products."""
    return distillation.kl_loss(
        hidden, teacher, lambda x: F.linear(x, head), lambda x: F.linear(x, teacher_head), chunk_tokens=chunk
    )


def measure(name: str, case: Case, is_trained: bool, args: argparse.Namespace) -> list[harness.Row]:
    """Seconds of both; with `is_trained` the head gets a gradient too."""
    make = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    hidden, teacher = (torch.randn(case.tokens, case.hidden, **make) for _ in range(2))
    head, teacher_head = (torch.randn(case.vocabulary, case.hidden, **make) * case.hidden**-0.5 for _ in range(2))
    hidden.requires_grad_()
    head.requires_grad_(is_trained)

    def run(function: Callable[..., Tensor]) -> None:
        hidden.grad = head.grad = None
        function(hidden, teacher, head, teacher_head, case.chunk).backward()

    calls = {function.__name__: functools.partial(run, function) for function in (kept, recomputed)}
    taken = harness.take_turns(calls, args.rounds, args.device)
    place = f"{name}, {'trained' if is_trained else 'frozen'} head"
    return [harness.Row(place, who, taken[who], "recomputed", notes=case._asdict()) for who in calls]


def print_table(rows: Sequence[harness.Row]) -> None:
    """Medians of both, and how many times faster the package is, as Markdown."""
    middle = {(row.case, row.name): 1e3 * statistics.median(row.values) for row in rows}
    cells = []
    for row in rows:
        if row.name == "kept":
            both = middle[row.case, "recomputed"], middle[row.case, "kept"]
            ratio = 1 / harness.ratios(rows)[row.case, "kept"]
            cells.append([row.case, *row.notes.values(), *(f"{ms:,.1f}" for ms in both), f"{ratio:.2f}"])
    head = ("case", *Case._fields, "recomputed ms", "kept ms", "ratio")
    print(harness.table(head, cells))


def main() -> None:
    """The command."""
    parser = harness.parser(__doc__, FOLDER)
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    rows = []
    for name, case in (SHORT if args.short else CASES).items():
        for is_trained in (False, True):
            rows += measure(name, case, is_trained, args)
    print_table(rows)
    harness.write(harness.out(args), rows, args.device, dtype=args.dtype)


if __name__ == "__main__":
    main()
