"""What the demo's checkpoints keep, for notebooks/what_is_kept: python experiments/tiny_demo/decisions.py runs/demo/*/dms

Each run folder is asked one problem a family of 512 tokens at each of its ratios, and one of 1,024 at the highest; the
decisions are written to `decisions.jsonl` beside this file.
"""

import sys
from pathlib import Path

from dms_lab.inspection import inspect_checkpoint, save

chains = []
for run in sorted(Path(name) for name in sys.argv[1:]):
    checkpoints = sorted((run / "checkpoints").iterdir(), key=lambda folder: float(folder.name.removeprefix("cr")))
    for checkpoint in checkpoints:
        chains += inspect_checkpoint(checkpoint)
    chains += inspect_checkpoint(checkpoints[-1], lengths=(1024,), families=("ledger",))
if not chains:
    sys.exit("name the run folders of the demo, as runs/demo/<hash>/dms")
chains.sort(key=lambda chain: (chain.about["seed"], chain.about["cr"]))
save(chains, Path(__file__).with_name("decisions.jsonl"))
for chain in chains:
    print(chain.about, f"{len(chain.texts)} tokens, measured CR {chain.measured_cr[-1]:.2f}")
