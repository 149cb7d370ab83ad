"""Who sits in which slot: how the tokens of one layer come and go, per sequence and KV head.

    append_one    O(1): the token that leaves the window marked for eviction gives its slot to the new one, or one is added;
                  where the model has a sliding window, so does the one that leaves that: it is looked up by its position
    append_chunk  many tokens at once: what is no longer visible is left out, holes are filled from the end
    crop          the last tokens are forgotten, if nothing was freed for them

Slots stand in any order: positions are in the keys already.
Shapes: B sequences, K KV heads, M pages of a head at most, S slots, C new tokens, W window.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dms_lab.cache.table import PageTable


class SlotTable(PageTable):
    """The slots of one layer."""

    # -- one token -----------------------------------------------------------------------------------------------------
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

    # -- many tokens ---------------------------------------------------------------------------------------------------
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

    # -- back ----------------------------------------------------------------------------------------------------------
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
