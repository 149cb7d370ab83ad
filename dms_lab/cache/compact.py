"""The compact cache: what is evicted is freed, and its memory serves the next token.

    model.generate(...)  ->  update(new keys, new values): handed on  ->  attend, layer by layer (see `cache.layer`)

Every (sequence, layer, KV head) has a length of its own, in pages of one pool. A prompt, a later turn and a single token
are the same path; held are the live slots and at most one piece. Equal to `cache.masked`, which frees nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dms_lab.attention.paged import check_backend, choose_backend
from dms_lab.cache.layer import CompactLayer, in_any_mode
from dms_lab.cache.pages import PagePool, PoolExhausted
from dms_lab.cache.policy import OffloadingRule, Policy, PolicyCache, RankedRule, ReadingRule, Scores, WindowedRule
from dms_lab.cache.slots import SlotTable
from dms_lab.cache.storage import FORMATS
from dms_lab.cache.table import Rows

_PAGE_SIZE = 32  # slots: little is left empty in a head's last page, and a page is long enough to be read at full speed


@dataclass(frozen=True)
class Compression:
    """What a cache saves: by eviction (tokens / slots), by storage (bytes of a slot), and in bytes really allocated."""

    eviction: float
    storage: float
    together: float


class CompactCache(PolicyCache):
    """A Hugging Face cache with one `policy` (of `dms_lab.policies`) for all layers, which really frees memory.

    `storage`: "model" (the model's dtype), "fp8" or "int8". `num_pages` of `page_size` slots (None: 32, or the policy's
    block): a pool of that size, which raises `PoolExhausted`; None: one that grows. `num_places`: a table of that many
    sequences, of which `rows` are in use at a time; None: as many as the first batch has. `chunk`: how many tokens of a
    prompt are attended at once. `apart`: no operation of the attention mixes sequences. `attention`: "auto", "torch",
    "triton", "flash_attn" or "flashinfer" (see `attention.paged`); rules that look at weights get those by the reference.

    Gradients do not pass through it: a backward through its output raises. Crop works while nothing was freed.
    """

    is_compileable = False

    def __init__(
        self,
        policy: Policy,
        storage: str = "model",
        page_size: int | None = None,
        num_pages: int | None = None,
        num_places: int | None = None,
        chunk: int = 256,
        apart: bool = False,
        attention: str = "auto",
    ) -> None:
        if storage not in FORMATS:
            raise ValueError(f"storage={storage!r} is not known; choose one of {', '.join(FORMATS)}")
        check_backend(attention)
        if chunk < 1:
            raise ValueError(f"chunk={chunk} must be at least 1 token; 256 is usual")
        block = policy.block if isinstance(policy, ReadingRule) else None
        if block is not None and page_size not in (None, block):
            raise ValueError(
                f"page_size={page_size} is not the block of policy {policy.name}; leave it out, or give {block}"
            )
        super().__init__(layers=[])
        self.policy, self.storage, self.num_pages = policy, storage, num_pages
        self.page_size = page_size if page_size is not None else block or _PAGE_SIZE
        self.num_places, self.chunk, self.apart = num_places, chunk, apart
        self.attention, self.backend = attention, "torch"  # as asked for, and as chosen for the pool
        self.pool: PagePool | None = None
        self.reads_prompt = False  # whether a single new token is the end of a prompt, which a reading rule reads whole
        self._torn: set[int] | None = None  # rows of which the layers hold different tokens
        self.rows: Rows = None
        self.is_fixed = False  # whether a forward is a fixed step, see `cache.fixed`
        self.secured = 0  # further tokens of each sequence for which there surely is room, see there
        self._element_bytes = 0

    # -- Hugging Face's side -----------------------------------------------------------------------------------------
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        while len(self.layers) <= layer_idx:
            self.layers.append(self._new_layer(len(self.layers)))
        return super().update(key_states, value_states, layer_idx)

    def reset(self) -> None:
        """Empties the cache; it then serves any model, as a new one would."""
        super().reset()
        self.pool, self._torn, self.secured = None, None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._in_all_layers(super().reorder_cache, beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._in_all_layers(super().batch_select_indices, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._in_all_layers(super().batch_repeat_interleave, repeats)

    def _in_all_layers(self, function: Callable, *args):
        """`function`, which goes from layer to layer; if pages run out on the way, the cache is of no use until `reset`."""
        self._check_whole()
        self._unsettle()
        try:
            return function(*args)
        except PoolExhausted:
            self._torn = set(range(self._num_rows())) if self.rows is None else set(self.rows.tolist())
            raise

    def _unsettle(self) -> None:
        """Ends what was secured, as slots or pages are about to change otherwise than by a fixed step."""
        if self.secured and not self.is_fixed:
            self.secured = 0
            self.pool.settle()

    def _check_whole(self) -> None:
        if self._torn is not None:
            raise ValueError(
                "this cache ran out of pages in the middle of a forward or a selection, so its layers hold different "
                "tokens: call reset() on it, or make a new one with more pages (num_pages)"
            )

    def _num_rows(self) -> int:
        return max((layer.slots.length.shape[0] for layer in self.layers if layer.slots is not None), default=0)

    @in_any_mode
    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last tokens (a negative count), in all layers or in none; `ValueError` if slots were freed since."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give a negative count of tokens to remove, as Hugging Face does")
        if tokens_to_remove and isinstance(self.policy, ReadingRule):
            raise ValueError(f"a cache of policy {self.policy.name} cannot be cropped: its blocks' bounds would stay wide")
        if tokens_to_remove and isinstance(self.policy, RankedRule) and self.policy.needs_total:
            raise ValueError(f"a cache of policy {self.policy.name} cannot be cropped: attention summed up stays summed up")
        self._check_whole()
        self._unsettle()
        for layer in self.layers:
            if tokens_to_remove and layer.slots is not None:
                layer.slots.check_crop(-tokens_to_remove)
        for layer in self.layers:
            layer.crop(tokens_to_remove)

    def _new_layer(self, index: int) -> CompactLayer:
        if isinstance(self.policy, OffloadingRule):
            from dms_lab.cache.offload import OffloadingLayer

            return OffloadingLayer(self, index)
        return CompactLayer(self, index)

    # -- attention ---------------------------------------------------------------------------------------------------
    def new_table(self, layer_idx: int, batch: int, key: Tensor, value: Tensor, scores: Scores) -> SlotTable:
        """The empty table of a layer; the first one opens the pool."""
        if self.pool is None:
            self.pool = PagePool(
                key.shape[-1],
                value.shape[-1],
                key.dtype,
                key.device,
                self.page_size,
                self.num_pages,
                self.storage,
                isinstance(self.policy, RankedRule) and self.policy.needs_total,
                isinstance(self.policy, ReadingRule),
            )
            self.backend = choose_backend(self.attention, self.pool)
            self._element_bytes = key.element_size()
        window, shift = None, 0
        if isinstance(self.policy, WindowedRule):
            window = self.policy.window
            if isinstance(self.policy, OffloadingRule) and scores.sliding_window is not None:
                window = None  # such a layer needs no old tokens
            shift = {"self": 0, "next": 1, "delayed": window}[self.policy.decided_by]
        places = self.num_places or batch
        return SlotTable(self.pool, places, key.shape[1], window, shift, scores.sliding_window)

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scores: Scores,
        evict_logit: Tensor | None,
        document: Tensor | None,
    ) -> Tensor:
        self._check(layer_idx, query, key, value)
        real = None if document is None else document[:, -query.shape[2] :] >= 0
        attend = self.layers[layer_idx].attend
        output = self._in_all_layers(attend, query, key, value, scores, evict_logit, real)
        return _NoBackward.apply(query, output) if torch.is_grad_enabled() and query.requires_grad else output

    def _check(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        pool, layer = self.pool, self.layers[layer_idx]
        if pool is not None:
            mine = (pool.key.width, pool.value.width, pool.key.dtype, pool.device)
            theirs = (key.shape[-1], value.shape[-1], key.dtype, key.device)
            if mine != theirs:
                raise ValueError(
                    f"this cache holds another model's tokens: (key width, value width, dtype, device) is {mine}, but "
                    f"layer {layer_idx} has {theirs}; make a new CompactCache for each model"
                )
        if layer.slots is not None:
            layer.slots.rows = self.rows
            num_rows = layer.slots.num_rows
            if (num_rows, layer.slots.length.shape[1]) != tuple(key.shape[:2]):
                raise ValueError(
                    f"this cache serves {num_rows} sequences with {layer.slots.length.shape[1]} KV heads, but was given "
                    f"{key.shape[0]} with {key.shape[1]}; continue the same sequences, or make a new CompactCache"
                )

    @in_any_mode
    def release(self, rows: Tensor) -> None:
        """Makes the places `rows` [n] empty and gives their pages back at once."""
        if self._torn is not None and self._torn <= set(rows.tolist()):
            self._torn = None
        self._unsettle()
        for layer in self.layers:
            if layer.slots is not None:
                layer.release(rows)

    @in_any_mode
    def copy(self, source: Tensor, target: Tensor) -> None:
        """Makes the empty places `target` [n] hold what `source` [n] do. Raises `PoolExhausted`, then nothing is held."""
        self._unsettle()
        for done, layer in enumerate(self.layers):
            try:
                layer.copy(source, target)
            except PoolExhausted:
                for other in self.layers[:done]:
                    other.release(target)
                raise

    @property
    def appends_at_once(self) -> bool:
        """Whether a kernel finds the slot of a new token and writes it there: see `kernels.paged_append`."""
        by_decision = isinstance(self.policy, WindowedRule) and not isinstance(self.policy, ReadingRule)
        return self.attention == "triton" and by_decision

    # -- accounting --------------------------------------------------------------------------------------------------
    def live_slots(self) -> Tensor:
        return self._stacked(lambda layer: layer.live())

    def held_slots(self) -> Tensor:
        """Slots on the device, [B, L, K]: the live ones, but for a rule that keeps some in host memory."""
        return self._stacked(lambda layer: layer.slots.get("length"))

    def _stacked(self, of: Callable[[CompactLayer], Tensor]) -> Tensor:
        """Something of each layer [B, K], for the rows in use, [B, L, K]."""
        self._check_used()
        for layer in self.layers:
            layer.slots.rows = self.rows
        return torch.stack([of(layer) for layer in self.layers], dim=1)

    def read_slots(self) -> Tensor:
        """Slots that the newest query attended to, [B, L, K]."""
        return self._stacked(lambda layer: layer.reads())

    def _check_used(self) -> None:
        if self.pool is None:
            raise ValueError("this cache is empty, so there is nothing to count: run a forward with it first")

    @property
    def table_bytes(self) -> int:
        """Bytes of the tables: who sits where; and of what two layers fetched from host memory, where one pages."""
        fetched = sorted(getattr(layer, "fetched_bytes", 0) for layer in self.layers)[-2:]
        return sum(layer.slots.nbytes for layer in self.layers if layer.slots is not None) + sum(fetched)

    @property
    def row_bytes(self) -> int:
        """Bytes of one sequence's rows in the tables, beside 8 for each page it holds: no matter who else is there."""
        fetched = sorted(getattr(layer, "fetched_bytes", 0) for layer in self.layers)[-2:]
        rows = next((len(layer.slots.length) for layer in self.layers if layer.slots is not None), 1)
        return sum(layer.slots.row_bytes for layer in self.layers if layer.slots is not None) + sum(fetched) // rows

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all pages and tables, as the allocator sees them."""
        return self.table_bytes + (0 if self.pool is None else self.pool.allocated_bytes)

    @property
    def storage_factor(self) -> float:
        """Bytes of a slot's keys and values in the model's dtype, by the bytes stored of them, scales included."""
        self._check_used()
        pool = self.pool
        stored = sum(s.data.element_size() * s.width for s in (pool.key, pool.value))
        stored += 0 if pool.key.scale is None else 8 / pool.page_size
        return (pool.key.width + pool.value.width) * self._element_bytes / stored

    @property
    def plain_bytes_per_token(self) -> int:
        """Bytes of a token's keys and values over all layers and heads, uncompressed, in the model's dtype."""
        self._check_used()
        heads = sum(layer.slots.length.shape[1] for layer in self.layers)
        return heads * (self.pool.key.width + self.pool.value.width) * self._element_bytes

    def compression(self) -> Compression:
        """What this cache saves now, over all its sequences: by eviction, by storage, and both in allocated bytes.

        Of the device's memory: what a rule keeps in host memory is not in the bytes.
        """
        self._check_used()
        seen = torch.stack([layer.slots.seen for layer in self.layers], 1).double()
        self.rows = None
        live = self.live_slots().double()
        tokens = float(seen.sum()) / len(self.layers)
        return Compression(
            tokens * live[0].numel() / max(1.0, float(live.sum())),
            self.storage_factor,
            tokens * self.plain_bytes_per_token / max(1, self.allocated_bytes),
        )


class _NoBackward(torch.autograd.Function):
    """Passes an output on; a backward through it says where gradients are to be had instead."""

    @staticmethod
    def forward(ctx, query: Tensor, output: Tensor) -> Tensor:
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad: Tensor):
        raise RuntimeError(
            "the compact cache carries no gradients: train with `handle.soft(...)`, or evaluate inside torch.no_grad()"
        )
