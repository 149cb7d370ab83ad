"""Paging, the rival that evicts nothing: what leaves the window goes to host memory, and comes back for every query.

    device: pages of the newest `window` tokens      host: [K, T, D] of all older ones, a store a sequence
    layer i attends: its host tokens are there (fetched while layer i - 1 worked) | the copy for layer i + 1 begins

Equal to full attention. On a GPU host memory is pinned and the next layer's copy runs on a stream of its own; on a CPU both
memories are the same one, and nothing is gained. Device memory: the window's pages, and the fetched tokens of two layers.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dms_lab.attention.paged import dense
from dms_lab.cache.layer import CompactLayer

if TYPE_CHECKING:
    from dms_lab.cache.compact import CompactCache


class HostStore:
    """Keys and values of one sequence and layer in host memory, [K, size, D]."""

    def __init__(self) -> None:
        self.size = 0
        self._parts: tuple[Tensor, Tensor] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        return 0 if self._parts is None else sum(part.nbytes for part in self._parts)

    def append(self, key: Tensor, value: Tensor) -> None:
        """Adds tokens [K, n, D]."""
        size = self.size + key.shape[1]
        self._reserve(size, key, value)
        for part, new in zip(self._parts, (key, value), strict=True):
            part[:, self.size : size].copy_(new, non_blocking=True)
        self.size = size

    def _reserve(self, size: int, key: Tensor, value: Tensor) -> None:
        if self._parts is not None and size <= self._parts[0].shape[1]:
            return
        room, pin = size + size // 8, key.device.type == "cuda"
        grown = tuple(x.new_empty(x.shape[0], room, x.shape[2], device="cpu") for x in (key, value))
        grown = tuple(x.pin_memory() for x in grown) if pin else grown
        if self._parts is not None:
            for old, new in zip(self._parts, grown, strict=True):
                new[:, : self.size] = old[:, : self.size]
        self._parts = grown

    def read(self, into: tuple[Tensor, Tensor]) -> None:
        """Copies all tokens to the front of `into`, keys and values [K, >= size, D] on the device."""
        if self._parts is not None:
            for part, target in zip(self._parts, into, strict=True):
                target[:, : self.size].copy_(part[:, : self.size], non_blocking=True)

    def copy(self) -> "HostStore":
        """A store of its own with the same tokens."""
        other = HostStore()
        if self._parts is not None:
            other.append(*(part[:, : self.size] for part in self._parts))
        return other


class OffloadingLayer(CompactLayer):
    """A layer whose slots hold the window, and whose older tokens are in host memory."""

    def __init__(self, cache: "CompactCache", index: int) -> None:
        super().__init__(cache, index)
        self.stores: list[HostStore] = []
        self.fetched_bytes = 0  # of device memory for the newest query's host tokens
        self._fetched: tuple[Tensor, Tensor, Tensor] | None = None
        self._stream: torch.cuda.Stream | None = None
        self._arrived: torch.cuda.Event | None = None

    def live(self) -> Tensor:
        return self.reads()  # nothing is evicted: host tokens are live too

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory."""
        return sum(store.nbytes for store in self.stores)

    def _mine(self) -> list[HostStore]:
        while len(self.stores) < self.slots.length.shape[0]:
            self.stores.append(HostStore())
        return self.stores if self.cache.rows is None else [self.stores[row] for row in self.cache.rows.tolist()]

    def prefetch(self, key: Tensor, value: Tensor) -> None:
        """Begins to bring this layer's tokens to the device; `key`, `value` give shape, dtype and device."""
        if self.slots is None or self._fetched is not None:
            return
        stores = self._mine()
        size = max(store.size for store in stores)
        parts = tuple(x.new_zeros(len(stores), x.shape[1], size, x.shape[3]) for x in (key, value))
        used = torch.arange(size) < torch.tensor([store.size for store in stores])[:, None]
        if key.device.type == "cuda":
            self._stream = self._stream or torch.cuda.Stream(key.device)
            self._stream.wait_stream(torch.cuda.current_stream(key.device))
            with torch.cuda.stream(self._stream):
                self._read(stores, parts)
                self._arrived = self._stream.record_event()
            for part in parts:  # whoever drops them before they arrived leaves their memory to this stream until then
                part.record_stream(self._stream)
        else:
            self._read(stores, parts)
        self._fetched = (*parts, used.to(key.device, non_blocking=True))
        self.fetched_bytes = sum(part.nbytes for part in parts)

    @staticmethod
    def _read(stores: list[HostStore], parts: tuple[Tensor, Tensor]) -> None:
        for row, store in enumerate(stores):
            store.read((parts[0][row], parts[1][row]))

    def _take_fetched(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.prefetch(key, value)
        if self._arrived is not None:
            torch.cuda.current_stream(key.device).wait_event(self._arrived)
        found, self._fetched, self._arrived = self._fetched, None, None
        return found

    def _one(self, query, key, value, scores, logit, real, note=True):
        if self.slots.sliding is not None:  # such a layer needs no old tokens: it pages nothing
            return super()._one(query, key, value, scores, logit, real, note)
        one = torch.ones(key.shape[0], dtype=torch.long, device=key.device)
        if note:
            self.slots.note_columns(None if real is None else real[:, None], 1)
        return self._piece(query, key, value, scores, logit, one if real is None else real.long())

    def _piece(self, query, key, value, scores, logit, count):
        """Everything is visible: host tokens, slots and, causally, the new ones [B, *, C, D], `count` [B] of them real."""
        slots = self.slots
        if slots.sliding is not None:
            return super()._piece(query, key, value, scores, logit, count)
        host_key, host_value, host_used = self._take_fetched(key, value)
        if self.index + 1 < len(self.cache.layers):
            self.cache.layers[self.index + 1].prefetch(key, value)
        address, position, in_use = slots.past()
        past_key, past_value = (
            store.read(address.flatten()).view(*address.shape, store.width) for store in (slots.pool.key, slots.pool.value)
        )
        newest = torch.arange(key.shape[2], device=key.device)
        causal = (newest <= newest[:, None]).expand(key.shape[0], -1, -1)
        past = torch.cat([host_used, in_use[:, 0]], 1)[:, None].expand(-1, key.shape[2], -1)
        visible = torch.cat([past, causal], 2)
        keys, values = torch.cat([host_key, past_key, key], 2), torch.cat([host_value, past_value, value], 2)
        output = dense(query, keys, values, visible[:, None].expand(-1, key.shape[1], -1, -1), scores)
        self._send_old(position[:, 0], in_use[:, 0], (past_key, past_value), (key, value), count)
        positions = slots.get("seen")[:, None] + newest
        slots.append_chunk(key, value, self._flags(logit, positions, key.shape[1]), count)
        self.note_reads(past[:, 0].sum(1)[:, None] + count[:, None])
        if key.shape[2] == 1:
            output = output.masked_fill((count == 0)[:, None, None, None], 0.0)
        return output

    def _send_old(self, position, in_use, past, new, count) -> None:
        """Copies to host memory what the newest token no longer has in its window, of slots [B, S] and new tokens."""
        seen = self.slots.get("seen")
        first = (seen + count - self.slots.window)[:, None]
        place = seen[:, None] + torch.arange(new[0].shape[2], device=seen.device)
        is_new = torch.arange(new[0].shape[2], device=seen.device) < count[:, None]
        leaves = torch.cat([in_use & (position < first), is_new & (place < first)], 1)
        if not bool(leaves.any()):
            return
        both = [torch.cat([old, fresh], 2) for old, fresh in zip(past, new, strict=True)]
        for row, store in enumerate(self._mine()):
            store.append(*(part[row][:, leaves[row]] for part in both))

    def reset(self) -> None:
        super().reset()
        self.stores, self._fetched, self._arrived, self.fetched_bytes = [], None, None, 0

    def select(self, indices: Tensor) -> None:
        super().select(indices)
        chosen = indices.tolist()
        self.stores = [self.stores[i] if i not in chosen[:n] else self.stores[i].copy() for n, i in enumerate(chosen)]
        self._fetched = None

    def release(self, rows: Tensor) -> None:
        super().release(rows)
        for row in rows.tolist():
            if row < len(self.stores):
                self.stores[row] = HostStore()
        self._fetched = None

    def copy(self, source: Tensor, target: Tensor) -> None:
        super().copy(source, target)
        for here, there in zip(source.tolist(), target.tolist(), strict=True):
            self.stores[there] = self.stores[here].copy()
        self._fetched = None
