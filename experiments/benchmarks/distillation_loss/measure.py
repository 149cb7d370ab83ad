"""The distillation loss against the same with its logits recomputed in the backward: python measure.py [--short] [--device]

    random hidden states of student and teacher, two heads -> kl_loss and its backward, contestants take turns -> medians

Writes results.json beside this file (hardware, threads, versions, revision), --short into runs/, and prints a table.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dms_lab import distillation
from dms_lab.results import git_revision, versions

FOLDER = Path(__file__).parent
# name: tokens, hidden width, vocabulary, tokens of a chunk
CASES = {
    "embedded model": (2048, 128, 1024, 1024),
    "32k vocabulary": (512, 512, 32768, 128),
    "32k vocabulary, wide": (256, 2048, 32768, 128),
}
SHORT = {"short": (64, 16, 100, 16)}


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


def measure(case: tuple[int, int, int, int], is_trained: bool, args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of both, and the ratio; with `is_trained` the head gets a gradient too."""
    num_tokens, width, vocabulary, chunk = case
    make = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    hidden, teacher = torch.randn(num_tokens, width, **make).requires_grad_(), torch.randn(num_tokens, width, **make)
    head, teacher_head = (torch.randn(vocabulary, width, **make) * width**-0.5 for _ in range(2))
    head.requires_grad_(is_trained)
    taken: dict[str, list[float]] = {"recomputed": [], "kept": []}
    for turn in range(args.turns + 1):
        for function in (recomputed, kept):
            hidden.grad = head.grad = None
            started = time.perf_counter()
            function(hidden, teacher, head, teacher_head, chunk).backward()
            if hidden.is_cuda:
                torch.cuda.synchronize()
            if turn:  # the first warms up
                taken[function.__name__].append(time.perf_counter() - started)
    found = {name: statistics.median(values) for name, values in taken.items()}
    return found | {"ratio": found["recomputed"] / found["kept"]}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="that it runs, not what it measures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--turns", type=int, default=9)
    args = parser.parse_args()
    rows = []
    for name, case in (SHORT if args.short else CASES).items():
        for is_trained in (False, True):
            sizes = dict(zip(("tokens", "hidden", "vocabulary", "chunk"), case, strict=True))
            rows.append({"case": name, "trained head": is_trained, **sizes, **measure(case, is_trained, args)})
    found = {"machine": platform.processor() or platform.machine(), "device": args.device, "dtype": args.dtype}
    found |= {"threads": torch.get_num_threads(), "versions": versions(), "git_revision": git_revision(), "rows": rows}
    path = Path("runs/benchmarks/distillation_loss.json") if args.short else FOLDER / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print("| case | tokens | hidden | vocabulary | chunk | head | recomputed ms | kept ms | ratio |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        sizes = " | ".join(f"{row[name]:,}" for name in ("tokens", "hidden", "vocabulary", "chunk"))
        print(
            f"| {row['case']} | {sizes} | {'trained' if row['trained head'] else 'frozen'} | "
            f"{1e3 * row['recomputed']:,.1f} | {1e3 * row['kept']:,.1f} | {row['ratio']:.2f} |"
        )
    print(f"\nresults: {path}")


if __name__ == "__main__":
    main()
