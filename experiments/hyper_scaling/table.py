"""Accuracy against what it costs, over widths, as Markdown: python experiments/hyper_scaling/table.py

Reads every results_seed*.jsonl beside this file: means over tasks and seeds (the range over seeds behind accuracies), and
the margins of DMS over full attention at equal budgets. Draws `pareto.png`.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import pandas as pd
from matplotlib import pyplot as plt

from dms_lab import pareto, results
from dms_lab.plots import STYLE, TOKEN_BUDGETS, display_name, sorting_key

HERE = Path(__file__).parent
frame = pd.concat([results.load(file) for file in sorted(HERE.glob("results_seed*.jsonl"))])
frame = frame[frame["max_tokens"] == frame["max_tokens"].max()]
by_seed = frame.groupby(["method", "target_cr", "width", "seed"], as_index=False)[["accuracy", *TOKEN_BUDGETS]].mean()
means = by_seed.groupby(["method", "target_cr", "width"], as_index=False)[["accuracy", *TOKEN_BUDGETS]].mean()

print("| method | CR | W | majority vote | KV reads | peak |")
print("|---|---|---|---|---|---|")
for row in sorted(means.to_dict("records"), key=lambda r: (r["target_cr"], sorting_key(r["method"]), r["width"])):
    same = (by_seed[["method", "target_cr", "width"]] == [row["method"], row["target_cr"], row["width"]]).all(axis=1)
    seeds = 100 * by_seed[same]["accuracy"]
    spread = f"{100 * row['accuracy']:.1f} ({seeds.min():.1f}-{seeds.max():.1f})"
    cost = f"{row['kv_reads']:.0f} | {row['peak_tokens']:.0f}"
    print(f"| {display_name(row['method'])} | {row['target_cr']:g} | {row['width']} | {spread} | {cost} |")

print("\nmargin over full attention, points, mean over the common budgets on a log2 axis, each seed:")
for budget in TOKEN_BUDGETS:
    for cr in sorted(set(by_seed["target_cr"]) - {1.0}):
        found = []
        for _, rows in by_seed.groupby("seed"):
            ours, full = rows[rows["target_cr"] == cr], rows[rows["method"] == "full"]
            found.append(100 * pareto.margin(ours[budget], ours["accuracy"], full[budget], full["accuracy"]))
        print(f"  DMS at CR {cr:g} by {budget}: " + ", ".join(f"{value:+.1f}" for value in found))

figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
for panel, (budget, title) in zip(panels, TOKEN_BUDGETS.items(), strict=True):
    for (method, cr), rows in means.groupby(["method", "target_cr"]):
        colour, marker, name = STYLE[method].colour, STYLE[method].marker, STYLE[method].name
        label, style = (name, "-") if method == "full" else (f"{name}, CR {cr:g}", "-" if cr == 8 else "--")
        panel.plot(rows[budget], 100 * rows["accuracy"], style, color=colour, marker=marker, label=label)
        for point in rows.to_dict("records"):
            panel.annotate(
                f"W {point['width']}",
                (point[budget], 100 * point["accuracy"]),
                fontsize=7,
                xytext=(3, -9),
                textcoords="offset points",
            )
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:.0f}")
    panel.set_xlabel(title)
panels[0].set_ylabel("majority vote, mean over tasks (%)")
panels[1].legend(fontsize=8, loc="lower right")
figure.savefig(HERE / "pareto.png", dpi=150)
