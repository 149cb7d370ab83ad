"""Attention under hard decisions over slots in pages: one query a sequence, or a chunk of new tokens as well.

    decode  [B, H, 1, D] over the live slots, all of which are visible
    chunk   [B, H, C, D] over the live slots and the C new tokens, by the visibility rule

A row is one KV head of one sequence, with G query heads. On a CPU, rows are gathered a few at a time into memory that stays
in the processor's cache, so that each slot comes from main memory once. Elsewhere all rows go at once, padded to the width
of the table: nothing waits for the device. Where a layer bounds its scores, has sinks, or its weights are asked for, the
dense reference does the work in float32.

    torch    the above, on any device
    triton   kernels of our own (`kernels/`) that read the pages as they lie, CUDA only; all but weights
    flash_attn   that package's paged kernel for single queries (`flash_paged`), else torch
    flashinfer   likewise (`flashinfer_paged`)
    auto     torch: of the others none was measured on a GPU yet

Shapes: B batch, K KV heads, G = H / K, C queries, S slots, M pages of a head, D head width.
"""

import importlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dms_lab import eviction
from dms_lab.attention import reference
from dms_lab.cache.pages import PagePool
from dms_lab.cache.policy import Scores

BACKENDS = ("auto", "torch", "triton", "flash_attn", "flashinfer")
_DOORS = {  # imported late
    "triton": "dms_lab.attention.kernels.paged",
    "flash_attn": "dms_lab.attention.flash_paged",
    "flashinfer": "dms_lab.attention.flashinfer_paged",
}
_PACKAGES = {"triton": "dms_lab[gpu]", "flash_attn": "dms_lab[gpu]", "flashinfer": "flashinfer-python"}
_GROUP_BYTES = 2**21  # keys gathered at a time, about what a core's own cache holds
_LONG_BYTES, _PART_BYTES = 2**22, 2**21  # keys of a head that are gathered in parts: more would not stay in that cache
_GROUP_MASK = 2**20  # entries of a chunk's mask at a time
_DEVICE_MASK = 2**26  # the same on a GPU


@dataclass(frozen=True)
class Slots:
    """Live slots of a layer: pages [B, K, M], of which each head uses the first `length` [B, K] slots.

    `apart` groups no two sequences in one operation: a result then depends on nothing but its own sequence. `backend` is
    what `choose_backend` returned.
    """

    pool: PagePool
    table: Tensor
    length: Tensor
    apart: bool = False
    backend: str = "torch"

    def gather(self, first: int, last: int, size: int, scratch: tuple[Tensor, Tensor] | None = None) -> list[Tensor]:
        """Keys and values [rows, size, D] of the rows `first..last`, in the model's dtype."""
        pages = -(-size // self.pool.page_size)
        wanted = self.table.flatten(0, 1)[first:last, :pages].flatten()
        parts = zip((self.pool.key, self.pool.value), scratch or (None, None), strict=True)
        return [store.gather(wanted, out).view(last - first, -1, store.width)[:, :size] for store, out in parts]


def check_backend(name: str) -> None:
    """Raises `ValueError` for an unknown name, and for one whose package is not installed."""
    if name not in BACKENDS:
        raise ValueError(f"attention={name!r} is not known; choose one of {', '.join(BACKENDS)}")
    try:
        if name in _PACKAGES:
            importlib.import_module(name)
    except ImportError as error:
        package = name.replace("_", "-")
        raise ValueError(
            f"attention={name!r} needs the package {package} ({error}): pip install '{_PACKAGES[name]}', or use "
            "attention=torch"
        ) from error


def choose_backend(name: str, pool: PagePool) -> str:
    """The backend that `name` means for the slots of `pool`; `ValueError` also where its kernels cannot work."""
    check_backend(name)
    if name in _DOORS:
        importlib.import_module(_DOORS[name]).check_pool(pool)
    return "torch" if name == "auto" else name


def decode(query: Tensor, slots: Slots, scores: Scores, want_weights: bool = False) -> tuple[Tensor, Tensor | None]:
    """Attention [B, H, 1, D] of one query a sequence over its live slots, 0 without any; weights [B, H, S] if wanted."""
    if slots.backend in _DOORS and not want_weights:
        return importlib.import_module(_DOORS[slots.backend]).decode(query, slots, scores), None
    batch, num_heads, _, width = query.shape
    num_kv_heads = slots.length.shape[1]
    if want_weights or scores.softcap is not None or scores.sinks is not None:
        parts = []
        for mine, rows, size in _sequences(slots, 1):
            size = max(1, size)
            key, value = (x.view(-1, num_kv_heads, *x.shape[1:]) for x in slots.gather(*rows, size))
            used = (torch.arange(size, device=key.device) < slots.length[mine, :, None])[:, :, None]
            parts.append(_dense(query[mine], key, value, used, scores))
        output, weights = _joined(parts, 0)
        return output, weights[:, :, 0]
    rows = query.reshape(batch * num_kv_heads, 1, -1, width)
    output = query.new_zeros(rows.shape[0], 1, rows.shape[2], slots.pool.value.width)
    lengths = slots.length.flatten()
    for first, last, size, is_even, scratch in _groups(slots, 1):
        if is_even and last - first == 1 and _key_bytes(slots, size) > _LONG_BYTES:
            output[first, 0] = _decode_in_parts(rows[first, 0], slots, first, size, scores.scaling)
        elif size:
            key, value = slots.gather(first, last, size, scratch)
            mask = None
            if not is_even:
                mask = (torch.arange(size, device=key.device) < lengths[first:last, None])[:, None, None]
            found = F.scaled_dot_product_attention(
                rows[first:last], key[:, None], value[:, None], attn_mask=mask, scale=scores.scaling
            )
            empty = (lengths[first:last] == 0)[:, None, None, None]
            output[first:last] = found if is_even else found.masked_fill(empty, 0.0)
    return output.view(batch, num_heads, 1, -1), None


def _key_bytes(slots: Slots, size: int) -> int:
    """Bytes of a head's gathered keys."""
    return size * slots.pool.key.width * slots.pool.key.dtype.itemsize


def _decode_in_parts(query: Tensor, slots: Slots, row: int, size: int, scaling: float) -> Tensor:
    """Attention [G, D] of a row's queries [G, D] over its `size` slots, gathered a part at a time, in float32."""
    step = max(1, _PART_BYTES // max(1, _key_bytes(slots, slots.pool.page_size)))
    parts = slots.table.flatten(0, 1)[row, : -(-size // slots.pool.page_size)].split(step)
    query = query.float() * scaling
    scores = torch.cat([query @ slots.pool.key.gather(pages).float().T for pages in parts], 1)
    weights = scores[:, :size].softmax(1).split(step * slots.pool.page_size, 1)
    mine = zip(weights, parts, strict=True)
    return sum(part @ slots.pool.value.gather(pages)[: part.shape[1]].float() for part, pages in mine).to(
        slots.pool.value.dtype
    )


@dataclass(frozen=True)
class Chunk:
    """New tokens and what is known of those before them.

    key, value [B, K, C, D]; `position` [B, C], consecutive, and, of the live slots, `past_position` [B, K, S], in tokens;
    `evicted` [B, K, C] and `past_evicted` [B, K, S]: decided for eviction; `window` None: age alone hides nothing.
    """

    key: Tensor
    value: Tensor
    position: Tensor
    evicted: Tensor
    past_position: Tensor
    past_evicted: Tensor
    window: int | None


def attend_chunk(
    query: Tensor, chunk: Chunk, slots: Slots, scores: Scores, want_weights: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Attention [B, H, C, D] of the new tokens by the visibility rule; weights [B, H, C, S + C] if wanted."""
    if slots.backend == "triton" and not want_weights:
        return importlib.import_module(_DOORS["triton"]).attend_chunk(query, chunk, slots, scores), None
    batch, num_heads, num_queries, width = query.shape
    num_kv_heads = chunk.key.shape[1]
    num_rows = batch * num_kv_heads
    if want_weights or scores.softcap is not None or scores.sinks is not None:
        parts = []
        for mine, rows, size in _sequences(slots, num_queries):
            visible = _visible(chunk, slots, *rows, size, scores).view(-1, num_kv_heads, num_queries, size + num_queries)
            key, value = chunk.key[mine], chunk.value[mine]
            if size:
                past = (x.view(-1, num_kv_heads, *x.shape[1:]) for x in slots.gather(*rows, size))
                key, value = (torch.cat([p, x], 2) for p, x in zip(past, (key, value), strict=True))
            parts.append(_dense(query[mine], key, value, visible, scores))
        return _joined(parts, num_queries)
    group = num_heads // num_kv_heads
    rows = query.reshape(num_rows, group, num_queries, width)
    output = query.new_empty(num_rows, group, num_queries, chunk.value.shape[-1])
    new_key, new_value = (x.flatten(0, 1) for x in (chunk.key, chunk.value))
    for first, last, size, _, scratch in _groups(slots, num_queries):
        key, value = new_key[first:last], new_value[first:last]
        size = min(size, chunk.past_position.shape[2])  # a table may be wider than what its heads hold
        if size:
            past = slots.gather(first, last, size, scratch)
            key, value = (torch.cat([p, x], 1) for p, x in zip(past, (key, value), strict=True))
        visible = _visible(chunk, slots, first, last, size, scores)
        output[first:last] = F.scaled_dot_product_attention(
            rows[first:last],
            key[:, None].expand(-1, group, -1, -1),
            value[:, None].expand(-1, group, -1, -1),
            attn_mask=visible[:, None],
            scale=scores.scaling,
        )
    return output.view(batch, num_heads, num_queries, -1), None


def _visible(chunk: Chunk, slots: Slots, first: int, last: int, size: int, scores: Scores) -> Tensor:
    """Which of `size` slots and the C new tokens each new token sees, in the rows `first..last`, [rows, C, size + C]."""
    num_kv_heads = chunk.key.shape[1]
    queries = chunk.position.int().repeat_interleave(num_kv_heads, 0)[first:last]
    keys = torch.cat([chunk.past_position.flatten(0, 1)[first:last, :size].int(), queries], 1)
    used = torch.arange(size, device=keys.device) < slots.length.flatten()[first:last, None]
    evicted = torch.cat([chunk.past_evicted.flatten(0, 1)[first:last, :size], chunk.evicted.flatten(0, 1)[first:last]], 1)
    window = chunk.window or torch.iinfo(torch.int32).max
    visible = eviction.visible(evicted[:, None], window, queries, keys)[:, 0]
    visible[:, :, :size] &= used[:, None]
    if scores.sliding_window is not None:
        visible &= queries[:, :, None] - keys[:, None] < scores.sliding_window
    return visible


def _groups(slots: Slots, num_queries: int):
    """(first row, last row, slots of the longest, whether all have as many, scratch) of the rows to attend at once."""
    if slots.length.device.type != "cpu":
        yield from _unseen_groups(slots, num_queries)
        return
    num_rows, num_kv_heads = slots.length.numel(), slots.length.shape[1]
    page_size, key, value = slots.pool.page_size, slots.pool.key, slots.pool.value
    span = num_kv_heads if slots.apart else num_rows
    for start in range(0, num_rows, span):
        lengths = slots.length.flatten()[start : start + span].tolist()
        longest = max(lengths)
        pages = -(-longest // page_size)
        fit = _GROUP_BYTES // max(1, pages * page_size * key.width * key.data.element_size())
        fit = max(1, min(fit, _GROUP_MASK // (num_queries * (longest + num_queries)), span))
        scratch = None
        if key.scale is None:
            scratch = tuple(x.data.new_empty(fit * pages, page_size, x.width) for x in (key, value))
        for first in range(0, span, fit):
            mine = lengths[first : first + fit]
            yield start + first, start + first + len(mine), max(mine), min(mine) == max(mine), scratch


def _unseen_groups(slots: Slots, num_queries: int):
    """The same without a look at the lengths: all rows are as wide as the table."""
    num_rows, size = slots.length.numel(), slots.table.shape[2] * slots.pool.page_size
    fit = num_rows if num_queries == 1 else max(1, _DEVICE_MASK // (num_queries * (size + num_queries)))
    for first in range(0, num_rows, fit):
        yield first, min(first + fit, num_rows), size, False, None


def _sequences(slots: Slots, num_queries: int):
    """(sequences, (first row, last row), slots of the longest) that the dense reference attends at once."""
    batch, num_kv_heads = slots.length.shape
    longest = int(slots.length.max())
    fit = _GROUP_MASK // (num_kv_heads * num_queries * (longest + num_queries))
    step = 1 if slots.apart else max(1, min(fit, batch))
    for first in range(0, batch, step):
        last = min(first + step, batch)
        mine = slice(first, last)
        yield mine, (first * num_kv_heads, last * num_kv_heads), int(slots.length[mine].max())


def _joined(parts: list[tuple[Tensor, Tensor]], num_new: int) -> tuple[Tensor, Tensor]:
    """Outputs and weights [..., slots + new] of some sequences each as those of all: the slots are padded in number."""
    longest = max(weights.shape[3] for _, weights in parts)
    wide = []
    for _, weights in parts:
        past, new = weights.split([weights.shape[3] - num_new, num_new], 3)
        wide.append(torch.cat([F.pad(past, (0, longest - weights.shape[3])), new], 3))
    return torch.cat([output for output, _ in parts]), torch.cat(wide)


def dense(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scores: Scores) -> Tensor:
    """Attention [B, H, Q, D] over keys [B, K, S, D] that need no gathering; `visible` [B, K, Q, S]."""
    if scores.softcap is not None or scores.sinks is not None:
        return _dense(query, key, value, visible, scores)[0]
    batch, num_heads, num_queries, width = query.shape
    rows = query.reshape(batch * key.shape[1], -1, num_queries, width)
    key, value = (x.flatten(0, 1)[:, None].expand(-1, rows.shape[1], -1, -1) for x in (key, value))
    mask = visible.flatten(0, 1)[:, None]
    output = F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, scale=scores.scaling)
    return output.view(batch, num_heads, num_queries, -1)


def _dense(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    wide = (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in (query, key, value))
    output, weights = reference.attend(*wide, visible, scores.scaling, scores.softcap, scores.sinks)
    return output.to(query.dtype), weights
