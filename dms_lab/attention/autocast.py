"""Autocast, where it is on: what is to be computed in its precision, and what in spite of it."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def is_on(device: torch.device) -> bool:
    """Whether operations on that device are cast; False on devices that know no autocast, as tensors without data."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def off(device: torch.device) -> AbstractContextManager:
    """Inside, operations on that device are computed in the precision that they are given."""
    return torch.autocast(device.type, enabled=False) if is_on(device) else nullcontext()


def cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one device in the precision of autocast; as they are where it is off."""
    device = tensors[0].device
    if not is_on(device):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device.type)) for x in tensors)
