"""Tensors that may be cut over the processes of a run (FSDP2's DTensors), and the same calls for those that are not.

whole(piece of each process)  -> the tensor, on every process: all must call it
cut_like(tensor, parameter)   -> this process's part of it, cut as the parameter is
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def is_first_process() -> bool:
    """Whether this process is alone, or the first of those that train together."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def is_cut(tensor: Tensor) -> bool:
    """Whether a process holds a part of it alone."""
    return hasattr(tensor, "device_mesh")


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor. Of one that is cut every process must ask, at the same time."""
    return tensor.full_tensor() if is_cut(tensor) else tensor


def piece(tensor: Tensor) -> Tensor:
    """What this process holds of it, as a view: what is written to it is written to the tensor."""
    return tensor.to_local() if is_cut(tensor) else tensor


def cut_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """`tensor`, which every process holds whole, on the device of `parameter`, and cut along its first axis as that is.

    Of one that is cut, the part of this process is copied, and nothing else is read of `tensor` or kept.
    """
    if not is_cut(parameter):
        return tensor.to(parameter.device)
    from torch.distributed.tensor import DTensor

    mesh = parameter.device_mesh
    parts, number = tensor.chunk(mesh.size()), mesh.get_local_rank()
    part = parts[number] if number < len(parts) else tensor[:0]  # of few rows, the last processes have none
    part = part.to(parameter.device, copy=True)
    placed = {"shape": tensor.shape, "stride": tensor.stride()}
    return DTensor.from_local(part, mesh, parameter.placements, run_check=False, **placed)


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors on the CPU, by name, on the first process; an empty dictionary on the others.

    Where tensors are cut, every process must call it. One whole tensor at a time lies on a device.
    """
    is_first, found = is_first_process(), {}
    for name, tensor in tensors.items():
        tensor = whole(tensor.detach())
        if is_first:
            found[name] = tensor.cpu()
    return found
