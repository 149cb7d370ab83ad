"""A training as its W&B run sees it: lines of metrics.jsonl, and a tracker that gets each after it is there."""

import json
from dataclasses import asdict
from pathlib import Path

from dms_lab.tracking import Tracker


def row_of(step):
    return {"step": step, "kl": 1 / step, "cr_hard": 1.5, "retained_per_head": [[1 / step, 0.25], [1.0, 0.5]]}


def write_rows(folder, steps):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row_of(step)) + "\n" for step in steps))


def track(config, steps, tracker=None):
    """Logs as a training does: the line is in the file when the tracker gets it."""
    folder = Path(config.out)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    tracker = tracker or Tracker(config, folder)
    for step in steps:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row_of(step)) + "\n")
        tracker.log(row_of(step))
    return tracker
