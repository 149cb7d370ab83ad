"""Which pages each KV head of each sequence has, in one layer, and what else is known of a sequence there.

    slots of a head     [ 0 1 2 3 | 4 5 6 7 | 8 . . . ]     slot s is in page table[s // page], place s % page
    ring over the window  slot and decision flag of each of the last `window` tokens, token t in place t % window

A row is a sequence; `rows` restricts everything to some: a tensor of their numbers, or `slice(n)` for the leading ones,
which are looked at in place. Sequences are released, copied and selected here; tokens come and go in `slots`.
Shapes: B sequences, K KV heads, M pages of a head at most, S slots, W window.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from dms_lab.cache.pages import PagePool, PoolExhausted

Rows = Tensor | slice | None
_PER_ROW = ("table", "length", "seen", "ring_slot", "ring_flag", "victim", "freed_at", "tail")


class PageTable:
    """The pages of one layer. `window=None` evicts nothing by age; `shift` is how far the deciding token lies behind.

    `sliding`: the model's own window, beyond which a layer sees nothing. Where it is not longer than `window`, a token is
    gone before a decision about it counts, and the table has none.
    """

    def __init__(
        self, pool: PagePool, batch: int, num_kv_heads: int, window: int | None, shift: int, sliding: int | None = None
    ) -> None:
        device, shape = pool.device, (batch, num_kv_heads)
        if None not in (window, sliding) and sliding <= window:
            window = None
        self.pool, self.window, self.shift, self.sliding = pool, window, shift, sliding
        self.limit = sys.maxsize if sliding is None else sliding  # slots that a head may ever have
        self.rows: Rows = None
        self.table = torch.zeros(*shape, 1, dtype=torch.long, device=device)
        self.length = torch.zeros(shape, dtype=torch.long, device=device)
        self.seen = torch.zeros(batch, dtype=torch.long, device=device)  # tokens so far, padding not counted
        self.tail = torch.zeros(batch, dtype=torch.long, device=device)  # columns since the newest padding
        self.ring_slot = torch.zeros(*shape, window or 0, dtype=torch.int32, device=device)
        self.ring_flag = torch.zeros(*shape, window or 0, dtype=torch.bool, device=device)
        self.victim = torch.full(shape, -1, dtype=torch.long, device=device)  # of a ranked rule: the next token's slot
        self.freed_at = torch.full(shape, -1, dtype=torch.long, device=device)  # newest token that another made room for
        self._longest = 0  # upper bound of `length`, known to the host

    # -- rows ----------------------------------------------------------------------------------------------------------
    def get(self, name: str) -> Tensor:
        """The tensor `name` of the rows in use."""
        whole = getattr(self, name)
        return whole if self.rows is None else whole[self.rows]

    def put(self, name: str, value: Tensor) -> None:
        """Replaces the tensor `name` of the rows in use."""
        if self.rows is None:
            setattr(self, name, value)
        else:
            getattr(self, name)[self.rows] = value

    @property
    def num_rows(self) -> int:
        """How many rows are in use."""
        if isinstance(self.rows, slice):
            return self.rows.stop
        return len(self.length if self.rows is None else self.rows)

    def tensors(self) -> list[Tensor]:
        """All tensors of the table."""
        return [getattr(self, name) for name in _PER_ROW]

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        return sum(getattr(self, name).nbytes for name in _PER_ROW)

    @property
    def row_bytes(self) -> int:
        """Bytes of a sequence's rows in all tables but that of the pages, which is as wide as the longest head asks."""
        return (self.nbytes - self.table.nbytes) // len(self.length)

    def longest(self) -> int:
        """The most slots of a head among the rows in use. Waits for the device."""
        return int(self.get("length").max())

    def past(self) -> tuple[Tensor, Tensor, Tensor]:
        """Addresses, positions [B, K, S] and which are in use; S is the most slots of a head."""
        slot = torch.arange(self.longest(), device=self.pool.device).expand(*self.get("length").shape, -1)
        address = self.address(slot)
        return address, self.pool.position.view(-1)[address].long(), slot < self.get("length")[:, :, None]

    # -- pages ---------------------------------------------------------------------------------------------------------
    def address(self, slot: Tensor) -> Tensor:
        """Addresses in the pool of the slots [B, K, S]; beyond the table, those of its last page."""
        page_size, table = self.pool.page_size, self.get("table")
        page = table.gather(2, (slot // page_size).clamp(max=table.shape[2] - 1))
        return page * page_size + slot % page_size

    def claim_one(self) -> bool:
        """Makes the table wide enough for one more token a row in use, and claims the pages that this could need.

        False, if they are not surely there: `append_one` finds out. True: `kernels.paged.append` may store the token.
        """
        if not self.pool.claim(self.num_rows * self.length.shape[1]):
            return False
        self._make_room()
        return True

    def _make_room(self) -> None:
        """Makes the table wide enough for one more slot of the longest head."""
        page_size = self.pool.page_size
        self._longest = min(self._longest + 1, self.limit)
        if self._longest > self.table.shape[2] * page_size:  # looked at once in a page's length of steps at most
            self._longest = min(int(self.length.max()) + 1, self.limit)
            self._widen(-(-self._longest // page_size) + 1)

    def _add_pages(self, length: Tensor, grown: Tensor) -> None:
        """Gives a page to every head that grows by one slot beyond its last page."""
        page_size = self.pool.page_size
        self._make_room()
        wanted = grown & (length % page_size == 0)
        new, table = self.pool.take(wanted, waits=False), self.get("table")
        where = (length // page_size)[:, :, None].clamp(max=table.shape[2] - 1)
        kept = torch.where(wanted, new, table.gather(2, where)[:, :, 0])
        self.put("table", table.scatter_(2, where, kept[:, :, None]))

    def _fit_pages(self, length: Tensor, size: Tensor) -> None:
        """Takes the pages that heads of `size` slots need and gives back those that they no longer do."""
        page_size = self.pool.page_size
        had, need = -(-length // page_size), -(-size // page_size)
        self._widen(int(need.max()))
        table = self.get("table")
        index = torch.arange(table.shape[2], device=table.device)
        wanted = (index >= had[:, :, None]) & (index < need[:, :, None])
        table = torch.where(wanted, self.pool.take(wanted), table)
        gone = (index >= need[:, :, None]) & (index < had[:, :, None])
        self.pool.give_back(table, gone)
        self.put("table", table.masked_fill(gone, 0))

    def is_narrow(self, longest: int) -> bool:
        """Whether the table has no room for a head that would have `longest` slots, if the sliding window let it."""
        return min(longest, self.limit) > self.table.shape[2] * self.pool.page_size

    def reach(self, longest: int, num_pages: int) -> None:
        """Notes that no head will have more than `longest` slots; makes the table `num_pages` wide, or as a head can be."""
        self._longest = min(longest, self.limit)
        num_pages = min(num_pages, -(-self.limit // self.pool.page_size))
        if num_pages > self.table.shape[2]:
            self.table = F.pad(self.table, (0, num_pages - self.table.shape[2]))

    def _widen(self, pages: int) -> None:
        missing = pages - self.table.shape[2]
        if missing > 0:
            self.table = F.pad(self.table, (0, missing + self.table.shape[2] // 8))

    def _held(self) -> Tensor:
        """Which entries of the table are pages, [B, K, M]."""
        pages = -(-self.length // self.pool.page_size)
        return torch.arange(self.table.shape[2], device=self.table.device) < pages[:, :, None]

    # -- sequences -----------------------------------------------------------------------------------------------------
    def release(self, rows: Tensor) -> None:
        """Gives all pages of the sequences `rows` [n] back at once and makes their places empty."""
        self.pool.give_back(self.table[rows], self._held()[rows])
        for name in ("table", "length", "seen", "tail"):
            getattr(self, name)[rows] = 0
        self.victim[rows] = self.freed_at[rows] = -1

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Makes the empty places `target` [n] hold what the sequences `source` [n] do, in pages of their own."""
        held = self._held()[source]
        pages = self.pool.take(held)
        self.pool.copy_pages(self.table[source][held], pages[held])
        self.table[target] = pages
        for name in _PER_ROW[1:]:
            whole = getattr(self, name)
            whole[target] = whole[source]

    def select(self, indices: Tensor) -> None:
        """Keeps the sequences `indices` [n] in that order; one named twice is copied, one not named is released.

        Raises `PoolExhausted`, and changes nothing then.
        """
        chosen, batch = indices.tolist(), self.length.shape[0]
        again = [i for i, row in enumerate(chosen) if row in chosen[:i]]
        dropped = torch.tensor(sorted(set(range(batch)) - set(chosen)), dtype=torch.long, device=self.table.device)
        held = self._held()
        mine = held[indices][again]
        needed, free = int(mine.sum()), self.pool.count_free() + int(held[dropped].sum())
        if needed > free and not self.pool.grows:
            raise PoolExhausted(needed, free, self.pool.num_pages)
        if dropped.numel():
            self.pool.give_back(self.table[dropped], held[dropped])
        for name in _PER_ROW:
            setattr(self, name, getattr(self, name)[indices])
        if again:
            pages = self.pool.take(mine)
            self.pool.copy_pages(self.table[again][mine], pages[mine])
            self.table[again] = pages
