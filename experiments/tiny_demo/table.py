"""The demo's results over seeds as Markdown: python experiments/tiny_demo/table.py [results.jsonl ...]

Without arguments: every results_seed*.jsonl beside this file, and `pareto.png` is drawn from them. Where seeds differ, the
range stands behind the mean.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import pandas as pd

from dms_lab import results
from dms_lab.plots import display_name, pareto_figures, sorting_key
from dms_lab.tiny.tasks import FAMILIES

files = [Path(name) for name in sys.argv[1:]] or sorted(Path(__file__).parent.glob("results_seed*.jsonl"))
frame = pd.concat([results.load(file) for file in files])
seeds = sorted(frame["seed"].unique())


def spread(values: pd.Series, digits: int = 1, factor: float = 1.0) -> str:
    """The mean over seeds, and the range where there is one."""
    low, high, mean = (f"{factor * v:.{digits}f}" for v in (values.min(), values.max(), values.mean()))
    return mean if low == high else f"{mean} ({low}-{high})"


print(f"{len(seeds)} seeds ({', '.join(map(str, seeds))}), {frame['num_problems'].max()} problems a family and seed\n")
print("| CR | method | measured | " + " | ".join(FAMILIES) + " | mean | text ppl | at text CR | KV reads | peak |")
print("|---" * (9 + len(FAMILIES)) + "|")
for (cr, method), rows in sorted(frame.groupby(["target_cr", "method"]), key=lambda g: (g[0][0], sorting_key(g[0][1]))):
    tasks, text = rows[rows["accuracy"].notna()], rows[rows["perplexity"].notna()]
    by_seed = tasks.groupby("seed")
    cells = [spread(tasks[tasks["task"] == family]["accuracy"], factor=100) for family in FAMILIES]
    mean = spread(by_seed["accuracy"].mean(), factor=100)
    measured = spread(by_seed["measured_cr"].mean(), 2)
    cost = [f"{by_seed[name].mean().mean():.0f}" for name in ("kv_reads", "peak_tokens")]
    of_text = [spread(text[name], 2) for name in ("perplexity", "measured_cr")]
    print(f"| {cr:g} | {display_name(method)} | {measured} | " + " | ".join([*cells, mean, *of_text, *cost]) + " |")

if len(sys.argv) == 1:
    with tempfile.TemporaryDirectory() as folder:
        png, _ = pareto_figures(frame, Path(folder))
        shutil.copy(png, Path(__file__).parent / "pareto.png")
