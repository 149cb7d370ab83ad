"""Bounds of what interpreted kernels read and write: they go through raw pointers, and a GPU would say nothing.

A file that imports the fixture `within_bounds` has it for all of its tests: every access of an interpreted kernel must lie
between the first and the last element of one of the tensors that it was launched with; else the kernel fails, and nothing
was written.
"""

import numpy as np
import pytest
from triton.runtime import interpreter


class _Bounds:
    """Stands for the interpreter's own module: checks, then passes on."""

    def __init__(self, real, ranges):
        self._real, self._ranges = real, ranges

    def __getattr__(self, name):
        return getattr(self._real, name)

    def _check(self, what, pointers, mask, itemsize):
        active = pointers[mask] if mask is not None else pointers.reshape(-1)
        active = active.astype(np.uint64).reshape(-1)
        inside = np.zeros(active.shape, dtype=bool)
        for start, stop in self._ranges:
            inside |= (active >= start) & (active + itemsize <= stop)
        assert inside.all(), f"a kernel {what}s outside its tensors: {active[~inside][:4]} not in {self._ranges}"

    def load(self, pointers, mask, other, dtype):
        self._check("read", pointers, mask.astype(bool), np.dtype(dtype).itemsize)
        return self._real.load(pointers, mask, other, dtype)

    def store(self, pointers, value, mask):
        self._check("write", pointers, mask.astype(bool), value.dtype.itemsize)
        return self._real.store(pointers, value, mask)

    def atomic_rmw(self, operation, pointers, value, mask, order):
        self._check("write", pointers, mask.astype(bool), value.dtype.itemsize)
        return self._real.atomic_rmw(operation, pointers, value, mask, order)

    def atomic_cas(self, pointers, compare, value, order):
        self._check("write", pointers, None, value.dtype.itemsize)
        return self._real.atomic_cas(pointers, compare, value, order)


@pytest.fixture(autouse=True)
def within_bounds(monkeypatch):
    """Checks every access of interpreted kernels; on a GPU there is nothing to check."""
    ranges: list[tuple[int, int]] = []  # of the tensors of the kernel that runs
    begin = interpreter.GridExecutor._init_args_hst

    def noted(self, args, kwargs):
        found = begin(self, args, kwargs)
        ranges.clear()
        for arg in [*found[0], *found[1].values()]:
            if hasattr(arg, "untyped_storage") and arg.numel():
                last = sum((size - 1) * stride for size, stride in zip(arg.shape, arg.stride(), strict=True))
                ranges.append((arg.data_ptr(), arg.data_ptr() + (last + 1) * arg.element_size()))
        return found

    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", noted)
    monkeypatch.setattr(interpreter, "_interpreter", _Bounds(interpreter._interpreter, ranges))
