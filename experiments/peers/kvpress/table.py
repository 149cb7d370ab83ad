"""Results of run.py as Markdown: python experiments/peers/kvpress/table.py results.jsonl

Runs in the project's environment. One row a method and target: exact match a task in percent, costs as means over tasks.
"""

import sys
from pathlib import Path

from dms_lab import results

COSTS = {"measured_cr": 2, "live_measured_cr": 2, "kv_reads": 0, "live_kv_reads": 0, "peak_tokens": 0, "kv_bytes_peak": 0}

frame = results.load(Path(sys.argv[1]))
families = list(dict.fromkeys(frame["task"]))
print("| method | " + " | ".join(families) + " | CR held | CR live | KV reads | live | peak tokens | peak bytes |")
print("|---" * (1 + len(families) + len(COSTS)) + "|")
for (method, _), rows in frame.groupby(["method", "config_hash"], sort=False):
    shares = [f"{100 * rows[rows['task'] == family]['accuracy'].mean():.0f}" for family in families]
    costs = [f"{rows[name].mean():.{digits}f}" for name, digits in COSTS.items()]
    print(f"| {method.removeprefix('kvpress/')} | " + " | ".join(shares + costs) + " |")
