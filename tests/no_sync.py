"""A guard that raises where a program on a GPU would wait for it, or could not be captured as a graph; it works on a CPU.

What looks at numbers on the host: `item`, `tolist`, truth, `cpu`, `numpy`; what has a shape that depends on them:
`nonzero`, selection by a mask, `unique`; what brings numbers from the host: `torch.tensor`. Kernels in Triton's
interpreter, which does all of that, are let through.
"""

from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

METHODS = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__", "__contains__"}
FUNCTIONS = {"tensor", "as_tensor", "from_numpy", "asarray"}
OPERATORS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "_unique", "allclose")
MASKED = ("index", "index_put", "index_put_", "_index_put_impl_")


class SynchronisedError(AssertionError):
    """Something waits for the device."""


class _Calls(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in METHODS or (name in FUNCTIONS and function is getattr(torch, name, None)):
            raise SynchronisedError(f"{name} waits for the device, or brings numbers from the host")
        return function(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in MASKED and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        repeats = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name.startswith(OPERATORS) or by_mask or repeats:
            raise SynchronisedError(f"{function} waits for the device")
        moved = (kwargs or {}).get("device")
        if name == "_to_copy" and moved is not None and moved.type != args[0].device.type:
            raise SynchronisedError(f"{function} moves to {moved}")
        return function(*args, **(kwargs or {}))


@contextmanager
def no_sync(monkeypatch):
    """Inside, what would wait for a GPU raises `SynchronisedError`."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def let_through(self, *args, **kwargs):
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return launch(self, *args, **kwargs)

    with monkeypatch.context() as patched, _Calls(), _Operators():
        patched.setattr(GridExecutor, "__call__", let_through)
        yield
