"""A Hydra multirun (`-m`) as a sweep: all points are checked before the first is run, and none takes the others down.

    Multirun.on_multirun_start   words -> points, resolved -> what their jobs ask for, experiments/<sweep>/sweep.yaml
    run_point, in each job       the point's job (`sweeping.job`), and what became of it: runs/sweeps/<sweep>/outcomes/
    Multirun.on_multirun_end     the points that failed, a line each, and exit status 1

Hydra composes each point anew where it runs: a job that waits in a queue sees conf/ as it is when it starts.
"""

import gc
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from dms_lab.sweeping.points import Point

# ${sweep_or:${sweep},<other>} in conf/: the name of the sweep, or what stands for one
OmegaConf.register_new_resolver("sweep_or", lambda name, other: other if name is None else name, replace=True)

OUTCOMES = "outcomes"
_SHOWN = ("--cfg", "-c", "--info", "-i", "--help", "-h", "--hydra-help", "--version", "--shell-completion")
_NEEDS = {"cluster=slurm": ("hydra_plugins.hydra_submitit_launcher", "slurm")}
_NEEDS |= {"search=optuna": ("hydra_plugins.hydra_optuna_sweeper", "optuna")}


def is_multirun() -> bool:
    """Whether this process runs a point of a multirun."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def check_words(words: Sequence[str]) -> None:
    """Raises `ValueError` for what is said of a sweep where there is none, and for what is not installed."""
    if any(word.startswith(_SHOWN) for word in words):
        return
    is_swept = bool({"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(words))
    for word in words:
        if not is_swept and word in _NEEDS:
            raise ValueError(f"{word} is for sweeps; add -m (one point is a sweep, too)")
        if word in _NEEDS and find_spec(_NEEDS[word][0]) is None:
            raise ValueError(f"{word} needs the extra {_NEEDS[word][1]}: pip install 'dms_lab[{_NEEDS[word][1]}]'")
        if word.lstrip("+~").startswith("cluster.") and "cluster=slurm" not in words:
            raise ValueError(f"{word} says what a job in Slurm gets; add cluster=slurm")


# -- before the first point, and after the last ------------------------------------------------------------------------
class Multirun(Callback):
    """Prepares a multirun and ends it. Hydra swallows what a callback raises: an error here ends the process itself."""

    unfinished: ClassVar["Multirun | None"] = None
    recording: ClassVar[ExitStack] = ExitStack()  # of the class: Hydra pickles a callback with every job

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Checks every point, sets the launcher and the sweeper, leaves the sweep's file."""
        from hydra.errors import HydraException

        from dms_lab.sweeping.asked import read_asked
        from dms_lab.sweeping.launcher import recorded

        try:
            self._asked = read_asked(config)
            self._folder = Path(config.hydra.sweep.dir)
            self._points = self._prepare(config)
        except (ValueError, HydraException) as error:
            sys.exit(f"error: {str(error).removeprefix('parts[0]').lstrip(',: ')}")
        shutil.rmtree(self._folder / OUTCOMES, ignore_errors=True)
        if self._asked.cluster == "slurm" and self._asked.name is not None:
            Multirun.recording.enter_context(recorded(self._asked, self._points))
        Multirun.unfinished = self

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Lists the points that failed; with any, the exit status is 1."""
        Multirun.unfinished = None
        Multirun.recording.close()
        if self.finish():
            sys.exit(1)

    def _prepare(self, config: DictConfig) -> "list[Point]":
        from dms_lab.sweeping.asked import keep_sweep
        from dms_lab.sweeping.launcher import check_free, check_length, check_local, set_launcher
        from dms_lab.sweeping.points import expand

        asked = self._asked
        if asked.search is not None:
            from dms_lab.sweeping.search import prepare

            points = prepare(config, asked, self._folder)
        elif asked.is_other:
            points = []
        else:
            points = expand(asked.sweep)
            tell_family(points)
        if asked.cluster == "slurm":
            if shutil.which("sbatch") is None:
                raise ValueError("cluster=slurm submits by sbatch, which is not installed here")
            set_launcher(config, asked.sweep, points)
            if asked.search is None:
                check_length(points)
            if asked.name is not None and asked.search is None:
                check_free(asked.sweep, points)
        else:
            check_local(points)
        if asked.name is not None and asked.search is None:
            keep_sweep(asked.sweep, points)
        return points

    def finish(self) -> int:
        """Tells what failed so far, and leaves what a search found; the number of failures."""
        if self._asked.search is not None:
            from dms_lab.sweeping.search import finish

            finish(self._asked, self._folder, self._points[0].config.data.kind == "tiny")
        outcomes = [json.loads(path.read_text()) for path in sorted((self._folder / OUTCOMES).glob("*.json"))]
        failed = [outcome for outcome in outcomes if outcome["error"]]
        if failed:
            print(f"\n{len(failed)} of {len(outcomes)} points failed:", file=sys.stderr)
        common = set.intersection(*(set(outcome["overrides"]) for outcome in outcomes)) if len(outcomes) > 1 else set()
        for outcome in failed:
            differing = [word for word in outcome["overrides"] if word not in common]
            print(f"  {' '.join(differing)}: {outcome['error']}", file=sys.stderr)
        return len(failed)

    @classmethod
    def finish_unfinished(cls) -> None:
        """After a multirun that was broken off, by a signal or because Hydra's launcher gave up: what is known by then."""
        multirun, cls.unfinished = cls.unfinished, None
        if multirun is None:
            return
        cls.recording.close()
        multirun.finish()
        if multirun._asked.cluster == "slurm":
            told = "squeue" if multirun._asked.name is None else f"dms_lab.sweep status {multirun._asked.sweep.folder}"
            print(f"jobs that are queued or run go on without this command; {told} shows them", file=sys.stderr)


def tell_family(points: "Sequence[Point]") -> None:
    """Prints a note if points differ in `cr` alone: one run leaves a checkpoint at each."""
    groups: dict[tuple[str, ...], set[float]] = {}
    for point in points:
        if point.command == "train" and point.config.method == "dms":
            others = tuple(word for word in point.overrides if not word.startswith("cr="))
            groups.setdefault(others, set()).add(point.config.cr)
    ratios = sorted(max(groups.values(), key=len, default=set()))
    if len(ratios) > 1:
        family = ",".join(f"{cr:g}" for cr in ratios)
        print(
            f"note: cr={family} trains a run for each. One run to the last leaves a checkpoint at all of them on its way: "
            f"cr={ratios[-1]:g} cr_family=[{family}]"
        )


# -- one point ---------------------------------------------------------------------------------------------------------
def run_point(cfg: DictConfig, other: Callable[[DictConfig], None] | None = None) -> tuple[float, ...] | None:
    """Completes this process's point of a multirun, and notes what became of it; in a search, what the trial is judged by.

    A failure is told and noted, and the next point is run. A signal ends the whole multirun; so does, for its own job, the
    failure of one process of several, since the rest would wait for it. `other`: what to do if it is no point of a sweep.
    """
    from dms_lab.sweeping.asked import is_of_all
    from dms_lab.sweeping.objectives import FAILED
    from dms_lab.sweeping.steps import StoppedError

    hydra = HydraConfig.get()
    is_searched = hydra.runtime.choices.get("search") is not None
    words = [word for word in hydra.overrides.task if not is_of_all(word)]
    try:
        found = other(cfg) if other else _complete(hydra.job.config_name, words, cfg.sweep, is_searched)
    except (StoppedError, KeyboardInterrupt) as error:
        print(f"{error or 'stopped'}; the same command goes on", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 130))
    except Exception as error:
        if not isinstance(error, ValueError):
            traceback.print_exc()
        sentence = " ".join(str(error).split()) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        print(f"error: {' '.join(words)}: {sentence}", file=sys.stderr)
        _note(hydra, words, sentence)
        if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
            sys.exit(1)
        found = FAILED if is_searched else None
    else:
        _note(hydra, words, None)
    _let_go()
    return found


def _complete(command: str, words: Sequence[str], name: str | None, is_searched: bool) -> tuple[float, ...] | None:
    from dms_lab.sweep_config import Resources
    from dms_lab.sweeping.asked import sweep_of
    from dms_lab.sweeping.job import job_of
    from dms_lab.sweeping.objectives import objectives
    from dms_lab.sweeping.points import expand
    from dms_lab.training.distributed import is_first_rank

    [point] = expand(sweep_of(command, words, name))
    point = replace(point, composed=point.composed | {"sweep": name})  # which has no name, if it was given none
    launcher = HydraConfig.get().launcher  # of Slurm, or of this process, which nobody tells of its end
    job_of(point, Path(), launcher.get("signal_delay_s", Resources.signal_delay_s))()
    if not is_searched or not is_first_rank():  # of several processes, the first evaluates, after the others have left
        return None
    return objectives(point.config, Path(point.folder))


def _let_go() -> None:
    """Frees what a point held, for the next one in this process."""
    gc.collect()
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _note(hydra: DictConfig, words: Sequence[str], error: str | None) -> None:
    """Writes what became of a point; of several processes, one that fails does, else the first."""
    from dms_lab.training.distributed import is_first_rank

    if error is None and not is_first_rank():
        return
    folder = Path(hydra.sweep.dir) / OUTCOMES
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hydra.job.num:05d}.json"
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps({"overrides": list(words), "error": error}) + "\n")
    temporary.replace(path)
