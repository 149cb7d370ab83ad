"""Pages of slots: one pool a device for all sequences, layers and KV heads.

    keys, values [P, page, D]   position [P, page]   page 0 takes what nobody will read
    free pages: a stack on the device; `take` and `give_back` are a few vector operations and wait for nothing

The host knows a lower bound of what is free. Only when that no longer covers what a call could need, it looks (one scalar
is read back), and the pool grows by a sixteenth or by what is missing. A pool of fixed size raises `PoolExhausted` instead,
before anything is changed. Pages may be promised to steps that the host does not see (see `cache.fixed`).
"""

import torch
from torch import Tensor

from dms_lab.cache.storage import SlotStore

_SLACK = 16  # a growing pool has at most one page in 16 to spare


class PoolExhausted(RuntimeError):
    """A pool of fixed size has fewer free pages than a step needs; nothing was changed."""

    def __init__(self, needed: int, free: int, total: int) -> None:
        super().__init__(f"the page pool is exhausted: {needed} pages are needed, {free} of {total} are free")
        self.needed, self.free, self.total = needed, free, total


class PagePool:
    """Pages for slots of one head width and dtype. `num_pages=None`: grows as needed.

    `track_weight` adds a float32 per slot, for rules that sum up attention; `track_bounds` the lowest and highest key of
    each page [P, D], for rules that read a part of the pages.
    """

    def __init__(
        self,
        width: int,
        value_width: int,
        dtype: torch.dtype,
        device: torch.device,
        page_size: int = 32,
        num_pages: int | None = None,
        storage: str = "model",
        track_weight: bool = False,
        track_bounds: bool = False,
    ) -> None:
        if page_size < 1:
            raise ValueError(f"page_size={page_size} must be at least 1 slot; 32 suits heads of 64 to 128")
        if num_pages is not None and num_pages < 1:
            raise ValueError(f"num_pages={num_pages} must be at least 1, or None for a pool that grows")
        self.page_size, self.device, self.grows = page_size, device, num_pages is None
        pages = 1 + (num_pages or 0)
        self.key = SlotStore(storage, pages, page_size, width, dtype, device)
        self.value = SlotStore(storage, pages, page_size, value_width, dtype, device)
        self.position = torch.zeros(pages, page_size, dtype=torch.int32, device=device)
        self.weight = torch.zeros(pages, page_size, device=device) if track_weight else None
        self.low = torch.full((pages, width), torch.inf, dtype=dtype, device=device) if track_bounds else None
        self.high = None if self.low is None else -self.low
        self._free = torch.arange(pages, -1, -1, device=device)  # the last entry is for what is not given back
        self._num_free = torch.tensor(pages - 1, device=device)
        self._free[: pages - 1] = torch.arange(pages - 1, 0, -1, device=device)
        self._surely_free = pages - 1
        self._promised = 0

    # -- what there is -----------------------------------------------------------------------------------------------
    @property
    def num_pages(self) -> int:
        """Pages that can be held."""
        return self.position.shape[0] - 1

    def count_free(self) -> int:
        """Pages that nobody holds, those promised included. Waits for the device."""
        free = int(self._num_free)
        self._surely_free = free - self._promised
        return free

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: keys, values, scales, positions."""
        return self.allocated_bytes // (self.num_pages + 1)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all pages, held or not, as the allocator sees them."""
        return self.key.nbytes + self.value.nbytes + sum(x.nbytes for x in self._notes().values())

    def tensors(self) -> list[Tensor]:
        """All tensors of the pool."""
        stores = [x for store in (self.key, self.value) for x in (store.data, store.scale) if x is not None]
        return [*stores, *self._notes().values(), *self.stack]

    def _notes(self) -> dict[str, Tensor]:
        """What is kept of each page beside keys and values, by name."""
        found = {name: getattr(self, name) for name in ("position", "weight", "low", "high")}
        return {name: note for name, note in found.items() if note is not None}

    # -- taking and giving back --------------------------------------------------------------------------------------
    def take(self, wanted: Tensor, waits: bool = True) -> Tensor:
        """A page for each True of `wanted`, of the same shape; 0 elsewhere. Raises `PoolExhausted`.

        Unless it `waits` for a GPU to know which they are, page 0 is cleared once for each False.
        """
        self._reserve(wanted)
        rank = wanted.flatten().cumsum(0)
        pages = self._free[(self._num_free - rank).clamp(min=0)].view(wanted.shape)
        self._num_free -= rank[-1]  # in place, as everywhere: kernels and graphs know the counter by its address
        pages = torch.where(wanted, pages, 0)
        taken = pages.flatten()
        if waits or self.device.type == "cpu":
            taken = taken[taken > 0]
        self.key.clear(taken)
        self.value.clear(taken)
        if self.low is not None:
            self.low[taken], self.high[taken] = torch.inf, -torch.inf
        return pages

    def give_back(self, pages: Tensor, held: Tensor) -> None:
        """Returns each page of `pages` where `held`, at once."""
        flat = held.flatten()
        rank = flat.cumsum(0)
        place = torch.where(flat, self._num_free + rank - 1, self._free.shape[0] - 1)
        self._free.scatter_(0, place, pages.flatten())
        self._num_free += rank[-1]

    def claim(self, count: int) -> bool:
        """Whether `count` pages are free, of which the caller may take any number from `stack` without another word."""
        if self._surely_free < count and self.count_free() < count:
            return False
        self._surely_free -= count
        return True

    def promise(self, count: int) -> None:
        """Keeps `count` of the free pages for whoever takes them from `stack` before `settle` is called."""
        self._surely_free -= count
        self._promised = count

    def settle(self) -> None:
        """Ends a promise: what of it was not taken is anybody's again, once the host has looked."""
        self._promised = 0

    @property
    def stack(self) -> tuple[Tensor, Tensor]:
        """The free pages, and how many of them, from the bottom on, are: for kernels, which take them in place."""
        return self._free, self._num_free

    def _reserve(self, wanted: Tensor) -> None:
        if self._surely_free < wanted.numel() and self.count_free() < wanted.numel():
            needed, free = int(wanted.sum()), self._surely_free
            if needed > free:
                if not self.grows:
                    raise PoolExhausted(needed, free, self.num_pages)
                self.grow(max(needed - free, self.num_pages // _SLACK))
            self._surely_free -= needed
            return
        self._surely_free -= wanted.numel()

    def grow(self, extra: int) -> None:
        """Adds `extra` free pages; every tensor of the pool but the counter of `stack` is another one then."""
        old = self.num_pages + 1
        self._resize(old + extra)
        free = torch.zeros(old + extra + 1, dtype=torch.long, device=self.device)
        free[: old - 1] = self._free[: old - 1]
        new = torch.arange(old + extra - 1, old - 1, -1, device=self.device)
        free[self._num_free + torch.arange(extra, device=self.device)] = new
        self._free = free
        self._num_free += extra
        self._surely_free += extra

    def _resize(self, pages: int) -> None:
        both = min(pages, self.position.shape[0])
        self.key.resize(pages)
        self.value.resize(pages)
        for name, old in self._notes().items():
            new = torch.zeros(pages, *old.shape[1:], dtype=old.dtype, device=self.device)
            new[:both] = old[:both]
            setattr(self, name, new)

    def shrink(self) -> None:
        """Returns the memory of a growing pool to the allocator if nobody holds a page. Waits for the device."""
        if self.grows and self.count_free() == self.num_pages:
            self._resize(1)
            self._free = torch.zeros(2, dtype=torch.long, device=self.device)
            self._num_free.zero_()
            self._surely_free = 0

    # -- content -----------------------------------------------------------------------------------------------------
    def write(self, address: Tensor, key: Tensor, value: Tensor, position: Tensor, one_a_page: bool = False) -> None:
        """Puts keys, values [N, D] and positions [N] at `address` [N] (page * page_size + place)."""
        self.key.write(address, key, one_a_page)
        self.value.write(address, value, one_a_page)
        self.position.view(-1)[address] = position.to(torch.int32)
        if self.weight is not None:
            self.weight.view(-1)[address] = 0.0
        if self.low is not None:
            page = (address // self.page_size)[:, None].expand(key.shape)
            self.low.scatter_reduce_(0, page, key, "amin")
            self.high.scatter_reduce_(0, page, key, "amax")

    def move(self, source: Tensor, target: Tensor, one_a_page: bool = False) -> None:
        """Copies the slots at `source` [N] to `target` [N], no two of them the same; `one_a_page`: nor their pages."""
        weight = None if self.weight is None else self.weight.view(-1)[source]
        self.write(target, self.key.read(source), self.value.read(source), self.position.view(-1)[source], one_a_page)
        if weight is not None:
            self.weight.view(-1)[target] = weight

    def copy_pages(self, source: Tensor, target: Tensor) -> None:
        """Copies whole pages, `source` [N] to `target` [N]."""
        self.key.copy_pages(source, target)
        self.value.copy_pages(source, target)
        for note in self._notes().values():
            note[target] = note[source]
