"""How many bytes of tensors are alive while something runs, by every operation that torch dispatches."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside, `peak` is the most that storages made inside held at once, of `device` alone if that is given."""

    def __init__(self, device=None):
        super().__init__()
        self.device, self.now, self.peak = device, 0, 0
        self.known = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and (self.device is None or x.device.type == self.device):
                storage = x.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self.known:
                    self._add(storage)
        return result

    def _add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        self.known[key] = weakref.finalize(storage, self._drop, key, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _drop(self, key, size):
        del self.known[key]
        self.now -= size
