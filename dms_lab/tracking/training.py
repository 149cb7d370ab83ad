"""A training in W&B: the lines of `metrics.jsonl`, and what each layer and head keeps as a picture of the run so far."""

import io
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dms_lab import results
from dms_lab.config import TrainConfig, config_hash
from dms_lab.tracking.run import Label, WandbRun, wait

if TYPE_CHECKING:
    import wandb

_log = logging.getLogger(__name__)
METRICS = "metrics.jsonl"
DONE = "done.json"  # as `training.run` writes it
_PICTURES = 10  # of the retention a run, evenly spaced


def label_of(config: dict[str, Any], name: str, made_by: dict[str, Any]) -> Label:
    """What W&B is told of a training; `config` is a `TrainConfig` in its plain form, as `config.json` has it.

    `made_by`: the versions and the revision that trained, as far as they are known.
    """
    tags = (config["model"]["name"], config["method"], f"cr{config['cr']:g}", f"w{config['window']}")
    whole = config | {"config_hash": config_hash(config)} | made_by
    return Label(config_hash(config), "train", name, config.get("sweep"), tags, whole)


class Tracker:
    """The W&B run of a training. What a run that goes on wrote to `metrics.jsonl` before is sent first, if W&B lacks it."""

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self._folder = folder
        made_by = {"versions": results.versions(), "git_revision": results.git_revision()}
        self._run = WandbRun(label_of(asdict(config), folder.name, made_by), folder)
        self._pictures, self._is_caught_up = _Pictures(config.steps), False

    def log(self, row: dict[str, Any]) -> None:
        """W&B has `row`, which stands in `metrics.jsonl` already, and the rows before it."""
        if not self._is_caught_up:
            earlier = [known for known in read_rows(self._folder) if known["step"] < row["step"]]
            log_rows(self._run, earlier, self._folder, self._pictures)
            self._is_caught_up = True
        log_rows(self._run, [row], self._folder, self._pictures)

    def finish(self, failed: bool = False) -> None:
        """Closes the run."""
        self._run.finish(failed)
        wait()


@contextmanager
def closing(tracker: Tracker | None) -> Iterator[None]:
    """Closes the W&B run, if there is one, when the block ends: as failed if that is by an error."""
    try:
        yield
    except Exception:
        if tracker is not None:
            tracker.finish(failed=True)
        raise
    if tracker is not None:
        tracker.finish()


def log_training(folder: Path, group: str | None = None) -> WandbRun:
    """The training in `folder` has its W&B run, which is returned, closed: made from `config.json` and `metrics.jsonl`."""
    config = json.loads((folder / "config.json").read_text())
    config["sweep"] = config.get("sweep") or group
    done = json.loads((folder / DONE).read_text()) if (folder / DONE).is_file() else {}
    made_by = {name: done[name] for name in ("versions", "git_revision") if name in done}
    run = WandbRun(label_of(config, folder.name, made_by), folder)
    log_rows(run, read_rows(folder), folder, _Pictures(config["steps"]))
    run.finish()
    return run


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, without one that was cut off by a kill; none if there is no such file."""
    path, rows = folder / METRICS, []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


class _Pictures:
    """Which steps of a training have a picture of what was kept up to them: ten, evenly spaced, and the last."""

    def __init__(self, steps: int) -> None:
        self._last, self._every, self._before = steps, max(1, steps // _PICTURES), 0

    def is_due(self, step: int) -> bool:
        """Whether `step`, which comes after those that were asked about before, has one."""
        found = step >= self._last or step - self._before >= self._every
        self._before = step if found else self._before
        return found


def log_rows(run: WandbRun, rows: Sequence[dict[str, Any]], folder: Path, pictures: _Pictures) -> None:
    """The rows stand in W&B, with the pictures that are due: the same whether they come one by one or all at once."""
    for row in rows:
        log_row(run, row, folder if pictures.is_due(row["step"]) else None)


def log_row(run: WandbRun, row: dict[str, Any], folder: Path | None = None) -> None:
    """One row stands in W&B, a series for each layer and head; with `folder`, its picture of the retention as well."""
    values = {key: value for key, value in row.items() if key not in ("step", "retained_per_head")}
    for layer, heads in enumerate(row["retained_per_head"]):
        values |= {f"retained/layer{layer}/head{head}": value for head, value in enumerate(heads)}
    with run.survives():
        if folder is not None and row["step"] >= run.next_step:
            values |= _picture(folder, row["step"])
    run.log(values, row["step"])


def _picture(folder: Path, step: int) -> "dict[str, wandb.Image]":
    import wandb
    from PIL import Image

    from dms_lab.plots import retention_figure

    try:
        figure = retention_figure(folder, until=step)
    except ValueError as error:
        _log.warning("W&B gets no picture of what heads keep: %s", error)
        return {}
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return {"retention": wandb.Image(Image.open(buffer), caption=f"share of tokens kept, to step {step}")}
