"""What a person with a GPU runs: python -m experiments.benchmarks.gpu_check [--short]. Correctness first, then the tables.

    1 the tests of kernels and caches, on the GPU         -> ends here if one fails
    2 each benchmark, its tables and <name>/gpu.json beside it, with the GPU's name, versions and revision

--short: small sizes, to see that all of it runs.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from experiments.benchmarks import harness

HERE = Path(__file__).parent
TESTS = ("tests/test_triton_attention.py", "tests/test_triton_decode.py", "tests/test_triton_prefill.py")
TESTS += ("tests/test_decode_step.py",)
BENCHMARKS = {
    "floors": ["floors.measure", "--backend", "triton"],
    "training_attention": ["training_attention.measure", "time"],
    "paged_attention": ["paged_attention.measure"],
    "decode_step": ["decode_step.measure"],
    "distillation_loss": ["distillation_loss.measure"],
}


def run(*words: object) -> int:
    """One command in the root of the project; its exit status."""
    print("\n$", *words, flush=True)
    return subprocess.run([str(word) for word in words], cwd=harness.ROOT).returncode


def main() -> int:
    """Tests, then benchmarks; 1 if a test or a benchmark failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: torch sees no CUDA device here; the same kernels are tested on a CPU by make test", file=sys.stderr)
        return 1
    print(torch.cuda.get_device_name(), torch.__version__, torch.version.cuda)
    if run(sys.executable, "-m", "pytest", "-q", *TESTS):
        print("error: a test failed on this GPU; nothing is timed before it passes", file=sys.stderr)
        return 1
    short = ["--short"] if args.short else []
    failed = []
    for name, (module, *words) in BENCHMARKS.items():
        out = HERE / name / "gpu.json"
        if run(sys.executable, "-m", f"experiments.benchmarks.{module}", *words, *short, "--out", out):
            failed.append(name)
    for name in failed:
        print(f"error: the benchmark {name} failed, see above", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
