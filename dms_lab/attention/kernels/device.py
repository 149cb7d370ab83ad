"""Triton launches on the current device, whatever device its arguments are on."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


def current(device: torch.device) -> AbstractContextManager:
    """Inside, a CUDA device is the current one; of other devices there is nothing to say."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def where_its_tensors_are(function: Callable[..., Result]) -> Callable[..., Result]:
    """`function`, which launches kernels, with the device of its first tensor as the current one."""

    @functools.wraps(function)
    def run(*args, **kwargs) -> Result:
        tensor = next(x for x in args if isinstance(x, Tensor))
        with current(tensor.device):
            return function(*args, **kwargs)

    return run
