"""Every benchmark in its short form: python -m experiments.benchmarks.run [names] [--folder runs/benchmarks]

Each in a process of its own, one after the other; writes <folder>/<name>/results.json, by default beside the benchmark.
Each has as many threads as the results beside it were made with, where this machine has so many cores: else 1.
A benchmark that fails takes no other with it, and makes the exit status 1.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from experiments.benchmarks import harness

HERE = Path(__file__).parent
COMMANDS = {
    "floors": ["floors.measure"],
    "training_attention": ["training_attention.measure"],
    "decode_cpu": ["decode_cpu.short"],
    "decode_step": ["decode_step.measure"],
    "distillation_loss": ["distillation_loss.measure"],
    "where_time_goes": ["where_time_goes.measure"],
    "growth": ["growth.measure"],
}


def threads(name: str, committed: Path = HERE) -> int:
    """How many threads a benchmark runs with, so that its results can be held against the committed ones."""
    path = committed / name / harness.RESULTS
    recorded = harness.read(path)[0]["threads"] if path.is_file() else 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return recorded if recorded <= cores else 1


def main() -> int:
    """Runs what was asked for; the number of benchmarks that failed, at most 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *COMMANDS], metavar="name", help=", ".join(COMMANDS))
    parser.add_argument("--folder", type=Path, default=HERE)
    args = parser.parse_args()
    failed = []
    for name in args.names or COMMANDS:
        module, *words = COMMANDS[name]
        out = args.folder.absolute() / name / harness.RESULTS
        print(f"\n== {name}", flush=True)
        command = [sys.executable, "-m", f"experiments.benchmarks.{module}", *words, "--short", "--out", str(out)]
        if subprocess.run(command, cwd=harness.ROOT, env=os.environ | {"OMP_NUM_THREADS": str(threads(name))}).returncode:
            failed.append(name)
    for name in failed:
        print(f"error: {name} failed, see above", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
