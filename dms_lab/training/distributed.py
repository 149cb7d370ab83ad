"""The processes of one run: which of them this is, whether they agree, and which of them writes.

    torchrun or srun -> environment variables -> find_world -> World -> joined: collectives -> left again

No process starts another. No heavy import up here: a command asks `is_first_rank` before it loads anything.
"""

import functools
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from dms_lab.config import TrainConfig, num_processes

T = TypeVar("T")
_TIMEOUT = timedelta(minutes=60)  # of a collective: the slowest process may read its data or load its weights meanwhile
_RUNS = itertools.count()
_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SRUN = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES")


class AgreedError(ValueError):
    """What is wrong with a run, known to all of its processes."""


@dataclass(frozen=True)
class World:
    """This process among the `size` of its run, `devices` of them on each node; alone unless it was launched otherwise.

    `meeting_point` is what `torch.distributed` calls an init method.
    """

    rank: int = 0
    local_rank: int = 0
    node_rank: int = 0
    size: int = 1
    devices: int = 1
    meeting_point: str = "env://"
    launcher: str = ""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes, logs and evaluates."""
        return self.rank == 0

    @property
    def num_nodes(self) -> int:
        """Nodes of the run."""
        return self.size // self.devices


# -- which process is this -------------------------------------------------------------------------------------------
def is_first_rank() -> bool:
    """Whether this process writes and evaluates: alone, or the first of those that torchrun or srun launched."""
    if _has(_TORCHRUN):
        return os.environ["RANK"] == "0"
    return not _has(_SRUN) or os.environ["SLURM_PROCID"] == "0"


def find_world(config: TrainConfig) -> World:
    """The process that the environment describes; `ValueError` unless that is what `devices` and `num_nodes` ask for."""
    wanted = num_processes(config)
    found = _launched()
    if found.size == 1 and wanted == 1:
        return World()
    if found.size == 1:
        raise ValueError(
            f"devices={config.devices} and num_nodes={config.num_nodes} are {wanted} processes, and this one is alone: "
            f"{_how_to_launch(config)}"
        )
    if found.size != wanted:
        raise ValueError(
            f"{found.launcher} launched {found.size} processes, but devices={config.devices} and "
            f"num_nodes={config.num_nodes} are {wanted}: add devices=<processes on a node> num_nodes=<nodes>, or launch "
            f"as many: {_how_to_launch(config)}"
        )
    if found.devices != config.devices:
        raise ValueError(
            f"{found.launcher} launched {found.devices} processes on this node, but devices={config.devices}: every node "
            f"must have as many: {_how_to_launch(config)}"
        )
    return found


def _has(names: tuple[str, ...]) -> bool:
    return all(name in os.environ for name in names)


def _launched() -> World:
    env = os.environ
    if _has(_TORCHRUN):
        rank, local_rank, size, devices = (int(env[name]) for name in _TORCHRUN[:4])
        return World(rank, local_rank, rank // devices, size, devices, launcher="torchrun")
    if not _has(_SRUN):  # in a batch script, outside srun, the variables of a step are absent
        return World()
    rank, local_rank, node_rank, size, num_nodes = (int(env[name]) for name in _SRUN)
    devices, *others = set(_tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", f"{size // num_nodes}(x{num_nodes})")))
    if others:
        raise ValueError(
            f"srun launched {env['SLURM_STEP_TASKS_PER_NODE']} processes on the nodes of this step; every node must have "
            "as many: use --ntasks-per-node"
        )
    return World(rank, local_rank, node_rank, size, devices, _slurm_meeting_point(), launcher="srun")


def _tasks_per_node(text: str) -> list[int]:
    """Slurm's `2(x3),1` as [2, 2, 2, 1]."""
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in parts for _ in range(int(times or 1))]


def _slurm_meeting_point() -> str:
    """Where the processes of a Slurm step meet: its first node, at a port that its job's and its own number give.

    MASTER_ADDR and MASTER_PORT, if set, come first.
    """
    env = os.environ
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "127.0.0.1")
    first = re.sub(r"\[(\d+)[^]]*\]", r"\1", nodes).split(",")[0]  # n[01-04,7],m1 -> n01
    number = int(env.get("SLURM_JOB_ID", 0)) + 97 * int(env.get("SLURM_STEP_ID", 0))
    return f"tcp://{env.get('MASTER_ADDR', first)}:{env.get('MASTER_PORT', 15000 + number % 10000)}"


def _how_to_launch(config: TrainConfig) -> str:
    devices, nodes = config.devices, config.num_nodes
    words = f"-m dms_lab.train devices={devices} num_nodes={nodes} ..."
    meeting = "--standalone" if nodes == 1 else f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint <first node>:29500"
    where = " on every node" if nodes > 1 else ""
    return (
        f"`torchrun {meeting} --nproc-per-node {devices} {words}`{where}, or in a job of Slurm "
        f"`srun --nodes {nodes} --ntasks-per-node {devices} --kill-on-bad-exit=1 --wait=0 python {words}`"
    )


# -- together --------------------------------------------------------------------------------------------------------
@contextmanager
def joined(world: World) -> Iterator[None]:
    """Inside, the processes can talk to each other, and all but the first log nothing below an error.

    They leave together, with an `AgreedError` too. After another error a process leaves alone: the rest may never come.
    """
    if world.size == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    backend, device = "gloo", None
    if torch.cuda.is_available():
        backend, device = "nccl", torch.device("cuda", gpu_index(world))
        torch.cuda.set_device(device)
    store = dist.PrefixStore(f"run{next(_RUNS)}", _store(world))  # what an earlier run of this process left there is stale
    dist.init_process_group(
        backend, store=store, rank=world.rank, world_size=world.size, timeout=_TIMEOUT, device_id=device
    )
    logger = logging.getLogger("dms_lab")
    level = logger.level
    if not world.is_first:
        logger.setLevel(logging.ERROR)
    agreed = None
    try:
        yield
    except AgreedError as error:
        agreed = error
    finally:
        logger.setLevel(level)
    dist.barrier()
    dist.destroy_process_group()
    if agreed is not None:
        raise agreed


@functools.cache  # its first process serves it as long as it lives
def _store(world: World) -> Any:
    import torch.distributed as dist

    return next(iter(dist.rendezvous(world.meeting_point, world.rank, world.size, timeout=_TIMEOUT)))[0]


def gpu_index(world: World) -> int:
    """The GPU of this process: its place on the node, or the one that Slurm lets it see (`--gpus-per-task=1`)."""
    import torch

    num_visible = torch.cuda.device_count()
    if num_visible == 1 and world.launcher == "srun":
        return 0
    if num_visible < world.devices:
        raise ValueError(f"devices={world.devices}, but this node shows {num_visible} GPUs; lower devices, or ask for more")
    return world.local_rank


def gather(world: World, value: T) -> list[T]:
    """What each process gave, in the order of their ranks."""
    if world.size == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * world.size
    dist.all_gather_object(found, value)
    return found


def agree(world: World, action: Callable[[], T]) -> T:
    """`action()`, on every process; where one raises `ValueError`, all do: no process waits for one that has left."""
    if world.size == 1:
        return action()
    result = error = None
    try:
        result = action()
    except ValueError as caught:
        error = caught
    found = gather(world, None if error is None else str(error))
    if error is not None:
        raise AgreedError(str(error)) from error
    for rank, text in enumerate(found):
        if text is not None:
            raise AgreedError(f"{text} (process {rank} of {world.size})")
    return result


def in_turn(world: World, action: Callable[[], T]) -> T:
    """`action()`, by one process of a node after another: what one holds whole for a while is in memory once."""
    mine = None
    for turn in range(world.devices):
        if turn == world.local_rank:
            mine = agree(world, action)
        else:
            agree(world, lambda: None)
    return mine


def check_same(world: World, what: str, value: Any) -> None:
    """Raises `AgreedError`, on every process, unless all give the same value for `what`."""
    found = gather(world, value)
    if len(set(found)) > 1:
        raise AgreedError(
            f"the processes of this run do not have the same {what} ({', '.join(map(str, found))}, by rank): give every "
            "node the same files and the same versions of everything"
        )
