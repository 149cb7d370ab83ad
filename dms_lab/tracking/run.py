"""One run of W&B that repeats what files say: opened by its id, fed in rising steps, never the reason that anything ends.

    key?  yes -> online, resumed by id: steps that W&B has are not sent again
          no  -> <folder>/wandb/offline-run-*, for `wandb sync`: the newest repeats and replaces those that were not sent

W&B appends whatever a synced folder holds, the same step twice if two folders have it. So of one id there is one folder to
send, and `<id>.steps.json` beside it says which steps those that were sent have, `<id>.marks.json` which tables.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import wandb

_log = logging.getLogger(__name__)
PROJECT = "dms_lab"  # unless WANDB_PROJECT says otherwise
FINISH_SECONDS = 60.0  # what is not uploaded by then is left on disk; a job does not wait for ever
FLUSH_SECONDS = 1.0  # how much a kill of all processes may take from what is kept offline (W&B: 15)
_TAG_CHARACTERS = 64  # W&B's limit


@dataclass(frozen=True)
class Label:
    """What a run is called in W&B, and the configuration that stands beside it. `group` is the sweep it belongs to."""

    run_id: str
    job_type: str
    name: str
    group: str | None
    tags: tuple[str, ...]
    config: dict[str, Any]


class WandbRun:
    """An open run. What W&B cannot do, for want of a network, a right or a disk, is told once and never raised.

    `next_step` is the first that W&B lacks, `place` W&B's own folder of the run, `failure` what went wrong, if anything.
    """

    def __init__(self, label: Label, folder: Path) -> None:
        self.label, self.folder, self.next_step = label, folder, 0
        self.place: Path | None = None
        self.failure: str | None = None
        self._sent: str | None = None  # the mark of what W&B has last
        self._run: wandb.Run | None = None
        with self.survives():
            folder.mkdir(parents=True, exist_ok=True)
            self._run = _opened(label, folder)
            if not self._run.disabled:
                self.place = Path(self._run.dir).parent
                sent, marks = _replace_unsent(self.place, label.run_id)
                self.next_step = sent + 1 if self.is_offline else self._run.starting_step
                self._sent = max([mark for mark in marks if mark[0] < self.next_step], default=(-1, None))[1]

    @property
    def is_offline(self) -> bool:
        """Whether the run is kept for `wandb sync`."""
        return self.place is not None and self.place.name.startswith("offline-run-")

    @contextmanager
    def survives(self) -> Iterator[None]:
        """Inside, whatever goes wrong with W&B ends the run there, and nothing else. Tables are made inside, too."""
        try:
            yield
        except Exception as error:  # of a library, a service and a network: no list of them is complete
            self._run, self.failure = None, f"{type(error).__name__}: {error}"
            _log.warning(
                "W&B failed (%s). What is computed goes on, and its files have everything: python -m dms_lab.pareto %s "
                "--wandb sends what is missing",
                self.failure,
                self.folder,
            )

    def log(self, values: dict[str, Any], step: int) -> None:
        """`values` stand at `step`, unless W&B has that step already."""
        if self._run is None or step < self.next_step:
            return
        with self.survives():
            self._run.log(values, step=step, commit=True)
            self.next_step = step + 1
            if self.place is not None:
                _note(self.place, self.label.run_id, _STEPS, step)

    def log_new(self, mark: str, made: Callable[[], dict[str, Any]]) -> None:
        """What `made` returns stands at the next step, unless W&B has it already as the last that had this `mark`."""
        if self._run is None or self._sent == mark:
            return
        with self.survives():
            step = self.next_step
            self.log(made(), step)
            if self.next_step > step and self.place is not None:
                _note(self.place, self.label.run_id, _MARKS, [step, mark])

    def summarize(self, values: dict[str, Any]) -> None:
        """`values` stand in the run's summary."""
        if self._run is not None:
            with self.survives():
                self._run.summary.update(values)

    def attach(self, path: Path, kind: str) -> None:
        """The file is an artifact of the run."""
        if self._run is not None:
            with self.survives():
                import wandb

                artifact = wandb.Artifact(f"{self.label.run_id}-{kind}", type=kind)
                artifact.add_file(str(path))
                self._run.log_artifact(artifact)

    def finish(self, failed: bool = False) -> None:
        """The run is closed, within `FINISH_SECONDS` or what WANDB_FINISH_TIMEOUT says; says how to send an offline one."""
        if self._run is None:
            return
        with self.survives():
            self._run.finish(exit_code=1 if failed else 0)
            self._run = None
            if self.is_offline:
                _log.info("W&B: kept offline; to send it: wandb sync %s", self.place)


def wait() -> None:
    """What was logged is on disk: W&B's service, a process of its own that writes behind `finish`, has ended.

    At the end of a process W&B waits itself, but not in one that `multiprocessing` started. Raises nothing either.
    """
    import wandb

    if wandb.run is None:  # one of somebody else would be closed as well
        with suppress(Exception):
            wandb.teardown()


# -- opening -----------------------------------------------------------------------------------------------------------
def _opened(label: Label, folder: Path) -> "wandb.Run":
    """A run as W&B's own settings (WANDB_MODE, WANDB_PROJECT ...) want it; offline without a key, or without an answer."""
    import wandb

    if wandb.setup().settings.mode != "online":
        return _init(label, folder, None)
    try:
        if wandb.login(prompt=False, verify=False):
            return _init(label, folder, None)
    except Exception as error:  # as in `survives`
        _log.warning("W&B cannot be reached (%s: %s); the run is kept offline", type(error).__name__, error)
        with suppress(Exception):
            wandb.teardown()  # the service that failed keeps the run's id to itself
    return _init(label, folder, "offline")


def _init(label: Label, folder: Path, mode: str | None) -> "wandb.Run":
    import wandb

    given = wandb.setup().settings
    flushing = "x_transaction_log_flush_interval"  # not of W&B's public settings: done without where there is none
    return wandb.init(
        project=given.project or PROJECT,
        id=label.run_id,
        name=label.name,
        group=label.group,
        job_type=label.job_type,
        tags=[tag[:_TAG_CHARACTERS] for tag in (*(given.run_tags or ()), *label.tags)],
        config=label.config,
        allow_val_change=True,
        resume="allow",
        reinit="create_new",
        mode=mode,
        dir=folder,
        settings=wandb.Settings(
            silent=given.silent or "offline" in (mode, given.mode),  # all there is to tell is told here
            quiet=True,
            console="off",
            disable_git=True,  # the revision stands in the configuration; a patch of uncommitted work stays here
            finish_timeout=given.finish_timeout or FINISH_SECONDS,
            finish_timeout_raises=True,
            **({flushing: FLUSH_SECONDS} if flushing in wandb.Settings.model_fields else {}),
        ),
    )


# -- what was sent -----------------------------------------------------------------------------------------------------
_STEPS = "steps"  # of each of W&B's folders of a run: the last step
_MARKS = "marks"  # the step and mark of what was logged new


def _replace_unsent(place: Path, run_id: str) -> tuple[int, list[list]]:
    """Removes what of this run was kept offline and not sent, but for `place`; returns the last step that was, else -1.

    And the steps and marks of what was sent. A folder that is gone was sent: `wandb clean` removes such ones only.
    """
    home = place.parent
    noted = {}
    for kind in (_STEPS, _MARKS):
        known = _noted(home, run_id, kind)
        if place.name in known:  # a folder of the same second that was sent and removed: it keeps its note, not its name
            known[f"{place.name}~"] = known.pop(place.name)
        noted[kind] = {name: of for name, of in known.items() if not _is_unsent(home / name)}
    for file in home.glob(f"offline-run-*/run-{run_id}.wandb"):
        if file.parent != place and _is_unsent(file.parent):
            shutil.rmtree(file.parent)
    for kind, found in noted.items():
        _write(home, run_id, kind, found)
    return max(noted[_STEPS].values(), default=-1), list(noted[_MARKS].values())


def _is_unsent(place: Path) -> bool:
    return place.name.startswith("offline-run-") and place.is_dir() and not any(place.glob("*.wandb.synced"))


def _note(place: Path, run_id: str, kind: str, value: Any) -> None:
    _write(place.parent, run_id, kind, _noted(place.parent, run_id, kind) | {place.name: value})


def _noted(home: Path, run_id: str, kind: str) -> dict[str, Any]:
    """What was noted of each of W&B's folders of a run, by its name."""
    try:
        return json.loads((home / f"{run_id}.{kind}.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _write(home: Path, run_id: str, kind: str, noted: dict[str, Any]) -> None:
    temporary = home / f"{run_id}.{kind}.tmp"
    temporary.write_text(json.dumps(noted))
    temporary.replace(home / f"{run_id}.{kind}.json")
