"""What memory a run takes beside what its steps compute with, by arithmetic alone.

host   the base and its teacher, as each process loads them (with fsdp one after the other), or all that `last.ckpt`
       holds, which with fsdp the first process gathers; and what Python and CUDA take in each process
GPU    the weights that one GPU alone holds in the evaluation that follows a training, however many trained it
"""

from dms_lab.config import TrainConfig, num_processes
from dms_lab.sweeping.shapes import Shape, num_trained

PROCESS_BYTES = 4e9  # of a process that has imported torch and opened a GPU
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
GIB = 2**30  # what Slurm calls a GB


def saved_bytes(config: TrainConfig, shape: Shape) -> float:
    """Bytes of `last.ckpt` while a run trains: weights and AdamW's two moments, their average where there is one."""
    return 4 * num_trained(config, shape) * (4 if config.average else 3)


def weight_bytes(config: TrainConfig, shape: Shape) -> float:
    """Bytes of the model's weights, as they are loaded, trained and evaluated."""
    return _BYTES[config.model.dtype] * shape.num_parameters


def host_bytes(config: TrainConfig, shape: Shape) -> float:
    """Bytes of a node's memory that a run on GPUs needs at its peak, that of loading or of saving."""
    is_cut = config.strategy == "fsdp" and num_processes(config) > 1
    loaded = weight_bytes(config, shape) * (2 if config.trained == "all" else 1) * (1 if is_cut else config.devices)
    return config.devices * PROCESS_BYTES + max(loaded, saved_bytes(config, shape) if is_cut else 0.0)
