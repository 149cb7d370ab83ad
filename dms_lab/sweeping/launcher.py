"""What Hydra's Slurm launcher asks for: the same as `dms_lab.sweep submit`, as far as it can ask once for all points.

Hydra composes the launcher's configuration before it knows the points: of `model=a,b` and other swept keys it has the
defaults, and only what is not swept can be interpolated. So it is filled in here, from the points themselves.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dms_lab.sweep_config import SweepConfig
from dms_lab.sweeping.asked import Asked, is_of_all, sweep_of
from dms_lab.sweeping.points import Point, expand
from dms_lab.sweeping.records import append_jobs, submitting
from dms_lab.sweeping.resources import load_cluster, resources_of, slurm_parameters
from dms_lab.sweeping.slurm import job_name, max_array_size, submitted
from dms_lab.sweeping.state import point_states


def set_launcher(config: DictConfig, sweep: SweepConfig, points: Sequence[Point]) -> None:
    """Has `config.hydra.launcher` ask for what the points need; `ValueError` if they need different things.

    What the command line says of `hydra.launcher` itself is left as it is.
    """
    if not points:
        raise ValueError("cluster=slurm runs trainings and eval=reasoning; a run's own evaluation is part of its training")
    kinds: dict[str, tuple[Point, dict[str, Any]]] = {}
    for point in points:
        asked = _parameters(point, sweep)
        kinds.setdefault(json.dumps(asked, sort_keys=True), (point, asked))
    (first, asked), *others = kinds.values()
    if others:
        other, its = others[0]
        keys = sorted(key for key in asked | its if asked.get(key) != its.get(key) and key != "srun_args")
        raise ValueError(
            f"Hydra asks Slurm once, for equal jobs, but {' '.join(first.overrides)} needs {_named(keys, asked)}, "
            f"{' '.join(other.overrides)} {_named(keys, its)}. Call once for each, say what all get (cluster.{keys[0]}=);"
            " or a sweep file and python -m dms_lab.sweep submit give each its own"
        )
    given = {word.partition("=")[0].lstrip("+~") for word in config.hydra.overrides.hydra}
    ours = {key: value for key, value in asked.items() if f"hydra.launcher.{key}" not in given}
    config.hydra.launcher = OmegaConf.to_container(config.hydra.launcher, resolve=False) | ours


@contextmanager
def recorded(asked: Asked, points: Sequence[Point]) -> Iterator[None]:
    """Inside, jobs that Hydra's launcher submits are noted in the sweep's record, as those of `dms_lab.sweep submit` are.

    Not noted is a trial of a search that cannot be run: it is no point. Hydra's launcher submits and waits in one call, so
    that it is submitit's own submission that is wrapped, and restored.
    """
    import submitit

    sweep, plain = asked.sweep, submitit.AutoExecutor.map_array
    by_words = {point.overrides: point for point in points}

    def point_of(words: Sequence[str]) -> Point | None:
        mine = tuple(word for word in words if not is_of_all(word))
        if mine not in by_words:  # a trial, or a point that is given twice
            try:
                [by_words[mine]] = expand(sweep_of(asked.command, mine, asked.name))
            except Exception:  # its job fails by the same, and tells it
                return None
        return by_words[mine]

    def noting(executor: submitit.AutoExecutor, function: Any, overrides: Sequence[Any], *others: Any) -> list[Any]:
        overrides = list(overrides)
        its_points = [point_of(words) for words in overrides]
        with submitting(sweep):
            jobs = plain(executor, function, overrides, *others)
            noted = [submitted(job, point) for job, point in zip(jobs, its_points, strict=True) if point is not None]
            try:
                append_jobs(sweep, noted)
            except OSError as error:  # the jobs are queued, and waited for all the same
                ids = " ".join(job.job_id for job in noted)
                print(f"the record of {sweep.name} cannot be written, and lacks jobs {ids}: {error}", file=sys.stderr)
        return jobs

    submitit.AutoExecutor.map_array = noting
    try:
        yield
    finally:
        submitit.AutoExecutor.map_array = plain


def check_length(points: Sequence[Point]) -> None:
    """Raises `ValueError` if there are more points than an array of this Slurm may have jobs."""
    if len(points) > 1 and len(points) > (longest := max_array_size()):
        raise ValueError(
            f"Hydra submits {len(points)} points as one array, of which this Slurm takes {longest} (MaxArraySize); a sweep "
            "file and python -m dms_lab.sweep submit make several"
        )


def check_free(sweep: SweepConfig, points: Sequence[Point]) -> None:
    """Raises `ValueError` if jobs of an earlier submission are at points: Hydra would submit them once more."""
    busy = [state for state in point_states(sweep, points) if state.is_active]
    if busy:
        job = f" (job {busy[0].job.job_id})" if busy[0].job else ""
        raise ValueError(
            f"{len(busy)} of {len(points)} points are queued or running already, as {busy[0].point.name}{job}: wait for "
            f"them, or python -m dms_lab.sweep cancel {sweep.folder}; submit {sweep.folder} there adds what is missing"
        )


def _parameters(point: Point, sweep: SweepConfig) -> dict[str, Any]:
    """The launcher's parameters for one point, by the names that the launcher has for them."""
    resources = resources_of(point, sweep, load_cluster("slurm"))
    found = {"gpus_per_node": None} | slurm_parameters(point, resources, job_name(sweep))
    named = {key.removeprefix("slurm_"): value for key, value in found.items()}
    return named | {"max_num_timeout": resources.max_num_timeout}


def _named(keys: Sequence[str], values: dict[str, Any]) -> str:
    return " ".join(f"{key}={values.get(key)}" for key in keys)


def check_local(points: Sequence[Point]) -> None:
    """Raises `ValueError` if a point needs more than the one process that Hydra's own launcher has for all."""
    for point in points:
        if getattr(point.config, "devices", 1) * getattr(point.config, "num_nodes", 1) > 1:
            raise ValueError(
                f"{' '.join(point.overrides)}: a run of several processes cannot be a point of a sweep in this one; add "
                "cluster=slurm, or use python -m dms_lab.sweep submit, which starts them"
            )
