"""What a point's job asks Slurm for: conf/cluster/slurm.yaml, the size of its model, the sweep's own resources."""

import json
import math
from pathlib import Path
from typing import Any

from dms_lab.config import TrainConfig
from dms_lab.sweep_config import Resources, SweepConfig, build_resources, check_resources
from dms_lab.sweeping.composition import config_folder
from dms_lab.sweeping.memory import GIB, host_bytes
from dms_lab.sweeping.points import Point
from dms_lab.sweeping.shapes import shape_of


def load_cluster(name: str) -> dict[str, Any]:
    """The plain members of conf/cluster/<name>.yaml, without what is Hydra's."""
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(OmegaConf.load(config_folder() / "cluster" / f"{name}.yaml"), resolve=False)
    return {key: value for key, value in values.items() if key not in ("defaults", "hydra", "name")}


def resources_of(point: Point, sweep: SweepConfig, cluster: dict[str, Any]) -> Resources:
    """The resources of one point's job: each of these over the one before.

    the cluster's, those of the model's size there, the sweep's, those of the model's size in the sweep

    `mem_gb` of the cluster is raised to what the run needs by `memory.host_bytes`; that of the sweep has the last word.
    """
    check_resources(cluster, "conf/cluster: ")
    size_of = (cluster.get("size_of") or {}) | (sweep.resources.get("size_of") or {})
    size = size_of.get(_model_name(point))
    values: dict[str, Any] = {}
    for level in (cluster, sweep.resources):
        values |= {key: value for key, value in level.items() if key not in ("sizes", "size_of")}
        values |= (level.get("sizes") or {}).get(size) or {}
        if level is cluster and values.get("mem_gb") and values.get("gpus_per_node"):
            values["mem_gb"] = max(values["mem_gb"], _needed_gb(point))
    return build_resources(values)


def _model_name(point: Point) -> str | None:
    """The name of the point's model, of an evaluation's checkpoint that of the run it lies in; None where there is none."""
    if point.config.model is not None:
        return point.config.model.name
    place = Path(point.config.checkpoint)
    for folder in (place, place.parent.parent):
        if (folder / "config.json").is_file():
            return (json.loads((folder / "config.json").read_text()).get("model") or {}).get("name")
    return None


def _needed_gb(point: Point) -> int:
    """GB of a node's memory that a training needs at least, where the size of its model is known; else 0."""
    shape = shape_of(point.config.model) if isinstance(point.config, TrainConfig) else None
    return 0 if shape is None else math.ceil(host_bytes(point.config, shape) / GIB)


def slurm_parameters(point: Point, resources: Resources, name: str) -> dict[str, Any]:
    """The resources as `submitit.AutoExecutor.update_parameters` takes them, for a job called `name`."""
    devices, nodes = _processes(point)
    if resources.nodes not in (None, nodes):
        raise ValueError(
            f"{' '.join(point.overrides)}: nodes={resources.nodes} of the job are not the {nodes} of the run, which would "
            "find other processes than it was told of; leave nodes out, and say num_nodes=<nodes> of the run"
        )
    gpus = resources.gpus_per_node
    more = {"requeue": True} | (resources.additional_parameters or {})
    found = {
        "name": name,
        "timeout_min": resources.timeout_min,
        "nodes": nodes,
        "tasks_per_node": devices,
        "cpus_per_task": resources.cpus_per_task,
        "mem_gb": resources.mem_gb,
        "gpus_per_node": max(gpus, devices) if gpus else None,
        "slurm_partition": resources.partition,
        "slurm_account": resources.account,
        "slurm_qos": resources.qos,
        "slurm_array_parallelism": resources.array_parallelism,
        "slurm_signal_delay_s": resources.signal_delay_s,
        "slurm_setup": list(resources.setup) or None,
        "slurm_srun_args": _srun_args(resources, nodes * devices),
        "slurm_additional_parameters": more,
    }
    return {key: value for key, value in found.items() if value is not None}


def _srun_args(resources: Resources, num_processes: int) -> list[str] | None:
    """What submitit leaves to srun, whose defaults do not suit.

    It does not inherit the processors of a task since 22.05; it leaves processes waiting for one that died; and where
    slurm.conf has a WaitTime it ends the first, which evaluates, so many seconds after the others have left.
    """
    words = [f"--cpus-per-task={resources.cpus_per_task}"] if resources.cpus_per_task else []
    return [*words, *(["--kill-on-bad-exit=1", "--wait=0"] if num_processes > 1 else [])] or None


def _processes(point: Point) -> tuple[int, int]:
    """Processes a node, and nodes, of a point."""
    return (point.config.devices, point.config.num_nodes) if isinstance(point.config, TrainConfig) else (1, 1)
