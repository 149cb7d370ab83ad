"""Weights & Biases, beside the files: everything logged there also stands in `metrics.jsonl`.

Without an API key the run is kept offline in the run's folder, and ``wandb sync`` sends it later. A run's id is the hash
of its configuration, so a resumed run goes on in the same one.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from dms_lab.config import TrainConfig, config_hash


class Tracker:
    """One W&B run."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        import wandb

        has_key = bool(wandb.setup().settings.api_key)
        self._run = wandb.init(
            project="dms_lab",
            id=config_hash(config),
            name=folder.name,
            resume="allow" if has_key else None,
            mode="online" if has_key else "offline",
            dir=folder,
            job_type="train",
            config=asdict(config),
        )

    def log(self, row: dict[str, Any]) -> None:
        """Logs one line of metrics; retained shares become one series a layer and head."""
        flat = {key: value for key, value in row.items() if key not in ("step", "retained_per_head")}
        for layer, heads in enumerate(row["retained_per_head"]):
            flat |= {f"retained/layer{layer}/head{head}": value for head, value in enumerate(heads)}
        self._run.log(flat, step=row["step"])

    def finish(self) -> None:
        """Closes the run."""
        self._run.finish()
