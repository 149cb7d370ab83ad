"""Who sits in which slot: one layer's table of pages, lengths and window, per sequence and KV head.

    append_one    O(1): the token that leaves the window marked for eviction gives its slot to the new one, or one is added;
                  where the model has a sliding window, so does the one that leaves that: it is looked up by its position
    append_chunk  many tokens at once: what is no longer visible is left out, holes are filled from the end

    slots of a head     [ 0 1 2 3 | 4 5 6 7 | 8 . . . ]     slot s is in page table[s // page], place s % page
    ring over the window  slot and decision flag of each of the last `window` tokens, token t in place t % window

Slots stand in any order: positions are in the keys already. A row is a sequence; `rows` restricts everything to some: a
tensor of their numbers, or `slice(n)` for the leading ones, which are looked at in place.
Shapes: B sequences, K KV heads, M pages of a head at most, S slots, C new tokens, W window.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from dms_lab.cache.pages import PagePool, PoolExhausted

Rows = Tensor | slice | None
_PER_ROW = ("table", "length", "seen", "ring_slot", "ring_flag", "victim", "freed_at", "tail")


class SlotTable:
    """The slots of one layer. `window=None` evicts nothing by age; `shift` is how far the deciding token lies behind.

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

    # -- rows --------------------------------------------------------------------------------------------------------
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

    # -- one token ---------------------------------------------------------------------------------------------------
    def append_one(self, flag: Tensor | None, real: Tensor | None) -> Tensor:
        """A slot for one more token a sequence; returns addresses [B, K] in the pool, 0 where `real` [B] is False.

        `flag` [B, K] is what the new token computed.
        """
        length, now = self.get("length"), self.get("seen")[:, None]
        freed, further = self.freed(flag)
        reuse = freed >= 0
        slot = torch.where(reuse, freed, length)
        if real is not None:
            reuse = reuse & real[:, None]
        grown = ~reuse if real is None else ~reuse & real[:, None]
        self._add_pages(length, grown)
        if further is not None:
            self.fill(further, real)
        address = self.address(slot[:, :, None])[:, :, 0]
        if real is not None:
            address = torch.where(real[:, None], address, 0)
        if flag is not None:
            place = self._place(now)
            ring_slot, ring_flag = self.get("ring_slot"), self.get("ring_flag")
            fresh = torch.ones_like(reuse) if real is None else real[:, None].expand(reuse.shape)
            slot = torch.where(fresh, slot, ring_slot.gather(2, place)[:, :, 0].long())
            flag = torch.where(fresh, flag, ring_flag.gather(2, place)[:, :, 0])
            self.put("ring_slot", ring_slot.scatter_(2, place, slot[:, :, None].int()))
            self.put("ring_flag", ring_flag.scatter_(2, place, flag[:, :, None]))
        self.put("freed_at", torch.where(reuse, now, self.get("freed_at")))
        self.put("length", self.get("length") + grown)
        step = torch.ones_like(now[:, 0]) if real is None else real.long()
        self.put("tail", (self.get("tail") + 1) * step)
        self.put("seen", now[:, 0] + step)
        return address

    def freed(self, flag: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The slots that one more token frees, [B, K], -1 for none: the one that it takes, and a further one behind that.

        Only where decisions count in a layer with a sliding window, two tokens may leave at once; else the second is None.
        `flag` [B, K] is what the new token computed. Waits for nothing.
        """
        chosen = self.get("victim") if flag is None else self._decided(flag)
        if self.sliding is None:
            return chosen, None
        leaving = self._leaving()
        if self.window is None:
            return chosen.maximum(leaving), None  # a ranked rule chose that token, or none
        low, high = chosen.minimum(leaving), chosen.maximum(leaving)
        return torch.where(low >= 0, low, high), torch.where(low >= 0, high, -1)

    def _place(self, token: Tensor) -> Tensor:
        """The place of `token` [B, K or 1] in the ring, [B, K, 1]."""
        return (token % self.window)[:, :, None].expand(-1, self.length.shape[1], -1)

    def _decided(self, flag: Tensor) -> Tensor:
        """The slot of the token that leaves the window marked for eviction, [B, K], -1 where none does."""
        now = self.get("seen")[:, None]
        place = self._place(now)
        decider = flag
        if self.shift % self.window or not self.shift:
            decider = self.get("ring_flag").gather(2, (place + self.shift) % self.window)[:, :, 0]
        return torch.where(decider & (now >= self.window), self.get("ring_slot").gather(2, place)[:, :, 0].long(), -1)

    def _leaving(self) -> Tensor:
        """The slot of the token that the next one will not see, in a sliding window, [B, K], -1 without one."""
        position = self.pool.position[self.get("table")].flatten(2)
        slot = torch.arange(position.shape[2], device=position.device)
        leaves = position == (self.get("seen") - self.sliding)[:, None, None]
        return torch.where(leaves & (slot < self.get("length")[:, :, None]), slot, -1).amax(2)

    def fill(self, hole: Tensor, real: Tensor | None) -> None:
        """Moves the last slot of each head into `hole` [B, K] (-1: none, as where `real` [B] is False), which is one less.

        Waits for nothing: pages of the pool that become empty are given back.
        """
        table, length, page_size = self.get("table"), self.get("length"), self.pool.page_size
        moves = hole >= 0 if real is None else (hole >= 0) & real[:, None]
        last = (length - 1).clamp(min=0)
        source, target = (torch.where(moves, self.address(x[:, :, None])[:, :, 0], 0) for x in (last, hole.clamp(min=0)))
        if self.window is not None:
            ring = self.get("ring_slot")
            position = self.pool.position.view(-1)[source].long()
            place = self._place(position)
            is_known = moves & (position >= self.get("seen")[:, None] - self.window)
            slot = torch.where(is_known, hole.int(), ring.gather(2, place)[:, :, 0])
            self.put("ring_slot", ring.scatter_(2, place, slot[:, :, None]))
        self.pool.move(source.flatten(), target.flatten(), one_a_page=True)
        where, empty = (last // page_size)[:, :, None], moves & (last % page_size == 0)
        page = table.gather(2, where)[:, :, 0]
        self.pool.give_back(page, empty)
        self.put("table", table.scatter_(2, where, page.masked_fill(empty, 0)[:, :, None]))
        self.put("length", length - moves.long())

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

    def address(self, slot: Tensor) -> Tensor:
        """Addresses in the pool of the slots [B, K, S]; beyond the table, those of its last page."""
        page_size, table = self.pool.page_size, self.get("table")
        page = table.gather(2, (slot // page_size).clamp(max=table.shape[2] - 1))
        return page * page_size + slot % page_size

    # -- many tokens -------------------------------------------------------------------------------------------------
    def past(self) -> tuple[Tensor, Tensor, Tensor]:
        """Addresses, positions [B, K, S] and which are in use; S is the most slots of a head."""
        slot = torch.arange(self.longest(), device=self.pool.device).expand(*self.get("length").shape, -1)
        address = self.address(slot)
        return address, self.pool.position.view(-1)[address].long(), slot < self.get("length")[:, :, None]

    def governed(self, flags: Tensor | None, count: Tensor) -> Tensor | None:
        """Which of the window's and the new tokens are decided for eviction, [B, K, W + C]: token `seen - W + i` at i.

        `flags` [B, K, C] of the new tokens, of which the first `count` [B] are real.
        """
        if flags is None:
            return None
        known = torch.cat([self._unrolled(), flags & self._among(count, flags)], 2)
        return F.pad(known[:, :, self.shift :], (0, min(self.shift, known.shape[2])))

    def _unrolled(self) -> Tensor:
        """The flags of the last `window` tokens in their order, [B, K, W]."""
        place = (self.get("seen")[:, None] + torch.arange(self.window, device=self.pool.device)) % self.window
        ring = self.get("ring_flag")
        return ring.gather(2, place[:, None].expand(ring.shape))

    @staticmethod
    def _among(count: Tensor, new: Tensor) -> Tensor:
        return (torch.arange(new.shape[2], device=count.device) < count[:, None])[:, None]

    def is_evicted(self, governed: Tensor | None, position: Tensor) -> Tensor:
        """Whether the tokens at `position` [B, K, S] are decided for eviction, by what `governed` returned."""
        if governed is None:
            return torch.zeros_like(position, dtype=torch.bool)
        index = position - (self.get("seen")[:, None, None] - self.window)
        found = governed.gather(2, index.clamp(0, governed.shape[2] - 1))
        return found & (index >= 0)

    def stays(self, evicted: Tensor, position: Tensor, newest: Tensor) -> Tensor:
        """The visibility rule for the query at `newest` [B]: which tokens it sees."""
        age = newest[:, None, None] - position
        seen = (age >= 0) & ~evicted if self.window is None else (age >= 0) & (~evicted | (age < self.window))
        return seen if self.sliding is None else seen & (age < self.sliding)

    def append_chunk(self, key: Tensor, value: Tensor, flags: Tensor | None, count: Tensor) -> None:
        """Stores what the last of the new tokens still sees: keys, values [B, K, C, D], the first `count` [B] real."""
        seen, length = self.get("seen"), self.get("length")
        num_new = key.shape[2]
        governed = self.governed(flags, count)
        address, position, in_use = self.past()
        newest = seen + count - 1
        old = in_use & self.stays(self.is_evicted(governed, position), position, newest)
        fresh_at = (seen[:, None] + torch.arange(num_new, device=seen.device))[:, None].expand(-1, length.shape[1], -1)
        fresh = self._among(count, fresh_at) & self.stays(self.is_evicted(governed, fresh_at), fresh_at, newest)
        size = old.sum(2) + fresh.sum(2)

        slots = torch.arange(old.shape[2] + num_new, device=seen.device).expand(*length.shape, -1)
        hole = ~F.pad(old, (0, num_new)) & (slots < size[:, :, None])
        holes = _listed(hole, slots)
        mover = old & (slots[:, :, : old.shape[2]] >= size[:, :, None])
        to_fresh = holes.gather(2, (fresh.cumsum(2) - 1).clamp(min=0))
        to_mover = holes.gather(2, (fresh.sum(2, keepdim=True) + mover.cumsum(2) - 1).clamp(min=0))

        self._fit_pages(length, size)
        target = self.address(to_mover)
        self.pool.move(address[mover], target[mover])
        self.pool.write(self.address(to_fresh)[fresh], key[fresh], value[fresh], fresh_at[fresh])
        if self.window is not None:
            slot_of = torch.where(mover, to_mover, slots[:, :, : old.shape[2]])
            self._turn_ring(flags, count, (position, slot_of, old), (fresh_at, to_fresh, fresh))
        lost = (in_use & ~old).any(2) | (self._among(count, fresh_at) & ~fresh).any(2)
        self.put("freed_at", torch.where(lost, newest[:, None], self.get("freed_at")))
        self.put("length", size)
        self.put("seen", seen + count)
        self._longest = max(self._longest, int(size.max()))

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

    def _turn_ring(self, flags: Tensor | None, count: Tensor, *groups: tuple[Tensor, Tensor, Tensor]) -> None:
        """Rebuilds the ring after `count` [B] new tokens from (position, slot, in use) of old and new tokens."""
        seen, ring = self.get("seen"), self.get("ring_slot")
        end = (seen + count)[:, None, None]
        ring = F.pad(ring, (0, 1))
        for position, slot, used in groups:
            place = torch.where(used & (position >= end - self.window), position % self.window, self.window)
            ring.scatter_(2, place, slot.int())
        self.put("ring_slot", ring[:, :, : self.window].contiguous())
        if flags is not None:
            index = count[:, None] + torch.arange(self.window, device=seen.device)
            known = torch.cat([self._unrolled(), flags], 2)
            newest = known.gather(2, index[:, None].expand(*known.shape[:2], -1))
            place = ((seen[:, None] + index - self.window) % self.window)[:, None].expand(newest.shape)
            self.put("ring_flag", torch.empty_like(newest).scatter_(2, place, newest))

    def note_columns(self, real: Tensor | None, num_columns: int) -> None:
        """Counts the columns of a chunk since its last padding; `real` [B, C], None: no padding."""
        tail = self.get("tail")
        if real is None:
            self.put("tail", tail + num_columns)
            return
        trailing = real.flip(1).long().cummin(1).values.sum(1)
        self.put("tail", torch.where(trailing == num_columns, tail + num_columns, trailing))

    # -- sequences ---------------------------------------------------------------------------------------------------
    def _held(self) -> Tensor:
        """Which entries of the table are pages, [B, K, M]."""
        pages = -(-self.length // self.pool.page_size)
        return torch.arange(self.table.shape[2], device=self.table.device) < pages[:, :, None]

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

    def check_crop(self, count: int) -> None:
        """Raises `ValueError` unless the last `count` columns can be forgotten: tokens for which nothing was freed."""
        begin = self.seen - count
        if bool((self.tail < count).any()):
            raise ValueError(f"a cache cannot be cropped by {count} columns: some of them are padding, or before its start")
        if bool((self.freed_at >= begin[:, None]).any()) or bool((self.victim >= 0).any()):
            raise ValueError(
                f"this cache cannot be cropped by {count} tokens: it freed slots since, which are gone; crop works as long "
                "as nothing was evicted (policy full, or a window longer than the sequence)"
            )

    def crop(self, count: int) -> None:
        """Forgets the last `count` columns. Raises `ValueError` where that cannot be undone, and changes nothing then."""
        self.check_crop(count)
        self.rows = None
        unrolled = None if self.window is None else self._unrolled()
        self._fit_pages(self.length, self.length - count)
        self.length, self.seen, self.tail = self.length - count, self.seen - count, self.tail - count
        if self.window is None:
            return
        # What left the window in the meantime was kept, or it would have been freed: its flag is False.
        unrolled = F.pad(unrolled, (min(count, self.window), 0))[:, :, : self.window]
        begin = self.seen
        place = (begin[:, None] + torch.arange(self.window, device=begin.device)) % self.window
        place = place[:, None].expand(unrolled.shape)
        self.ring_flag = torch.empty_like(unrolled).scatter_(2, place, unrolled)
        _, position, in_use = self.past()
        slot = torch.arange(position.shape[2], device=begin.device).expand(position.shape)
        self._turn_ring(None, torch.zeros_like(begin), (position, slot, in_use))


def _listed(marked: Tensor, slots: Tensor) -> Tensor:
    """The indices of the True entries first and in order, along the last axis; garbage behind them."""
    place = torch.where(marked, marked.cumsum(2) - 1, marked.shape[2])
    return F.pad(torch.zeros_like(slots), (0, 1)).scatter_(2, place, slots)[:, :, : marked.shape[2]]
