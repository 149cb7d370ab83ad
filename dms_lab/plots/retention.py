"""What each layer and head keeps over a training run."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dms_lab.plots.axes import paper
from dms_lab.plots.style import COLUMN

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRICS = "metrics.jsonl"


def retained(folder: Path, until: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Steps [N] and the retained share of each layer and head [N, layers, heads] of a run, from its `metrics.jsonl`.

    To step `until`, or all. Raises `ValueError` with file and line for a bad one, or if there is none.
    """
    path = Path(folder) / METRICS
    if not path.is_file():
        raise ValueError(f"no {METRICS} in {folder}: give the folder of a run of dms_lab.train")
    steps, shares = [], []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            steps.append(row["step"])
            shares.append(row["retained_per_head"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number} has no step with retained_per_head ({error}); remove the line to go on without it"
            ) from error
    if not steps:
        raise ValueError(f"{path} is empty: the run logged nothing")
    kept = [place for place, step in enumerate(steps) if until is None or step <= until]
    if not kept:
        raise ValueError(f"{path} has no step to {until}: its first is {steps[0]}")
    return np.asarray(steps)[kept], np.asarray(shares, float)[kept]


def retention_figure(folder: Path, until: int | None = None) -> "Figure":
    """The share of tokens that each layer and head of a run kept, over its steps (to `until`); darker is less."""
    from matplotlib.figure import Figure

    steps, shares = retained(folder, until)
    _, num_layers, num_heads = shares.shape
    with paper():
        height = min(6.0, 1.1 + 0.11 * num_layers * num_heads)
        figure = Figure(figsize=(COLUMN, height), layout="constrained")
        panel = figure.subplots()
        edges = np.concatenate([[0], steps])  # a value is of the steps since the one before
        image = panel.pcolormesh(
            edges, np.arange(num_layers * num_heads + 1), shares.reshape(len(steps), -1).T, cmap="cividis", vmin=0, vmax=1
        )
        for layer in range(1, num_layers):
            panel.axhline(layer * num_heads, color="white", linewidth=0.8)
        stride = max(1, num_layers // 12)
        shown = range(0, num_layers, stride)
        panel.set_yticks([(layer + 0.5) * num_heads for layer in shown], [str(layer) for layer in shown])
        panel.invert_yaxis()
        panel.set_ylabel(f"layer ({num_heads} KV heads each)" if num_heads > 1 else "layer")
        panel.set_xlabel("step")
        figure.colorbar(image, ax=panel, label="share of tokens kept", fraction=0.06, pad=0.02)
    return figure
