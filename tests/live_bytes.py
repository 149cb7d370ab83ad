"""How many bytes of tensors are alive while something runs, by every operation that torch dispatches."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Inside, `peak` is the most that storages made inside held at once, of `device` alone if that is given."""

    def __init__(self, device=None):
        super().__init__()
        self.device, self.peak = device, 0
        self._known = {}  # weak reference and bytes by address, which is nobody else's while the reference is there

    @property
    def now(self):
        """Bytes that are alive."""
        for key in [key for key, (storage, _) in self._known.items() if storage.expired()]:
            del self._known[key]
        return sum(size for _, size in self._known.values())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        is_new = False
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and (self.device is None or x.device.type == self.device):
                storage = x.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self._known:
                    self._known[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    is_new = True
        if is_new:
            self.peak = max(self.peak, self.now)
        return result
