"""Attention over slots in pages by Triton kernels: the door to `paged_decode` and `paged_chunk`.

Opt-in: right on a CPU by Triton's interpreter (TRITON_INTERPRET=1), not yet measured on a GPU.
Shapes: B batch, H query heads, K KV heads, G = H / K, C new tokens, S slots, M pages of a head, D head width.
"""

import torch
import triton
from torch import Tensor

from dms_lab.attention.kernels.device import where_its_tensors_are
from dms_lab.attention.kernels.far import LOG2E
from dms_lab.attention.kernels.paged_append import append_kernel
from dms_lab.attention.kernels.paged_chunk import chunk_kernel
from dms_lab.attention.kernels.paged_decode import combine_kernel, part_kernel
from dms_lab.attention.kernels.tiles import Tile, choose_chunk_tile, choose_decode_tile
from dms_lab.attention.kernels.until import NO_LIMIT, new_keys, past_keys
from dms_lab.attention.paged import Chunk, Slots
from dms_lab.cache.pages import PagePool
from dms_lab.cache.policy import Scores
from dms_lab.cache.slots import SlotTable

INTERPRETED = type(part_kernel).__name__ == "InterpretedFunction"
WIDEST = 256
MAX_PARTS = 64  # of a row: so many programs a KV head fill a GPU with 2 heads of one sequence
LEAST_PART = 256  # slots
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_pool(pool: PagePool) -> None:
    """Raises `ValueError` for a device, a type, a storage or a width for which there are no kernels."""
    device, store = pool.device, pool.key
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"attention='triton' has kernels for cuda, not for {device.type}; use attention=torch "
            "(TRITON_INTERPRET=1 in the environment interprets the kernels on a CPU, slowly, as the tests do)"
        )
    if store.dtype not in _DTYPES:
        raise ValueError(
            "attention='triton' needs keys and values of bfloat16, float16 or float32, not "
            f"{str(store.dtype).removeprefix('torch.')}; use attention=torch"
        )
    if max(store.width, pool.value.width) > WIDEST:
        raise ValueError(
            f"attention='triton' takes heads of a width up to {WIDEST}, not {store.width} and {pool.value.width}; use "
            "attention=torch"
        )
    is_fp8 = store.data.dtype == torch.float8_e4m3fn
    if is_fp8 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise ValueError(
            f"attention='triton' reads storage=fp8 on GPUs of compute capability 8.9 and later, not on "
            f"{torch.cuda.get_device_name(device)}; use storage=int8 or attention=torch"
        )


@where_its_tensors_are
def decode(query: Tensor, slots: Slots, scores: Scores) -> Tensor:
    """Attention [B, H, 1, D] of one query a sequence over its live slots, 0 without any; see `attention.paged.decode`."""
    batch, num_heads, _, width = query.shape
    num_kv_heads, num_pages = slots.table.shape[1:]
    pool, num_rows, group = slots.pool, batch * num_kv_heads, num_heads // num_kv_heads
    value_width = pool.value.width
    tile = choose_decode_tile(max(width, value_width), query.dtype)
    num_parts = min(MAX_PARTS, triton.cdiv(num_pages * pool.page_size, LEAST_PART))
    query = _rows(query)
    table, length = slots.table.contiguous(), slots.length.contiguous()
    parts = query.new_empty(num_rows, group, num_parts, value_width, dtype=torch.float32)
    lse = query.new_empty(num_rows, group, num_parts, dtype=torch.float32)
    output = query.new_empty(batch, num_heads, 1, value_width)
    cut = {"BLOCK_N": tile.keys, "MAX_PARTS": MAX_PARTS, "LEAST_PART": LEAST_PART}
    part_kernel[(num_rows, num_parts)](
        query, *_stored(pool), table, length, _sinks(scores, query), parts, lse,
        query.stride(0), query.stride(1), num_kv_heads, num_pages, *_factors(scores),
        BLOCK_G=_block(group), **cut, **_flags(query, pool, scores, group, tile),
    )  # fmt: skip
    combine_kernel[(num_rows * group,)](
        parts, lse, length, output, num_parts,
        GROUP=group, VALUE_WIDTH=value_width, BLOCK_V=_block(value_width), BLOCK_P=16, WIDE=_is_wide(query), **cut,
    )  # fmt: skip
    return output


@where_its_tensors_are
def attend_chunk(query: Tensor, chunk: Chunk, slots: Slots, scores: Scores) -> Tensor:
    """Attention [B, H, C, D] of the new tokens by the visibility rule; see `attention.paged.attend_chunk`.

    Beside the output, memory for a few integers a slot and a new token.
    """
    batch, num_heads, num_new, width = query.shape
    num_kv_heads, num_pages = slots.table.shape[1:]
    pool, num_rows, group = slots.pool, batch * num_kv_heads, num_heads // num_kv_heads
    value_width, sliding = pool.value.width, scores.sliding_window
    tile = choose_chunk_tile(max(width, value_width), query.dtype, num_new * group)
    past, new = past_keys(chunk, slots, sliding, tile.keys), new_keys(chunk, sliding)
    query, key, value = (_rows(x) for x in (query, chunk.key, chunk.value))
    output = query.new_empty(batch, num_heads, num_new, value_width)
    strides = [stride for x in (query, key, value, output) for stride in x.stride()[:3]]
    chunk_kernel[(num_rows, triton.cdiv(num_new * group, tile.queries))](
        query, key, value, *_stored(pool), slots.table.contiguous(), *past, *new[:3], _sinks(scores, query), output,
        *strides, num_kv_heads, num_new, num_pages, past.until.shape[2], past.order.shape[2], new.window,
        sliding or NO_LIMIT, *_factors(scores),
        HAS_FAR=new.window < num_new, BLOCK_M=tile.queries, BLOCK_N=tile.keys, **_flags(query, pool, scores, group, tile),
    )  # fmt: skip
    return output


@where_its_tensors_are
def append(table: SlotTable, flag: Tensor | None, real: Tensor | None, key: Tensor, value: Tensor) -> None:
    """Stores a token's key, value [B, K, 1, D] as `SlotTable.append_one` and `PagePool.write` do, in one launch.

    The pages that this may take must have been claimed (`SlotTable.claim_one`). For rules with a decision per token, `flag`
    [B, K], or none; where `real` [B] is False nothing is stored. In a layer with a sliding window, operations of torch's
    look up before which slots become free.
    """
    pool, num_kv_heads = table.pool, table.length.shape[1]
    freed, further = (None, None) if table.sliding is None else table.freed(flag)
    if further is not None:
        table.fill(further, real)
    key, value = _rows(key), _rows(value)
    flag, real = (None if x is None else x.contiguous().view(torch.uint8) for x in (flag, real))
    append_kernel[(key.shape[0],)](
        table.rows if isinstance(table.rows, Tensor) else table.seen, table.table, table.length, table.seen, table.tail,
        table.ring_slot, table.ring_flag.view(torch.uint8), table.freed_at, *pool.stack, *map(_bytes, _stored(pool)),
        pool.position, *(table.seen if x is None else x for x in (flag, freed, real)), key, value,
        *key.stride()[:2], *value.stride()[:2], num_kv_heads, table.table.shape[2], table.window or 0, table.shift or 0,
        HAS_ROWS=isinstance(table.rows, Tensor), HAS_FLAG=flag is not None, HAS_FREED=freed is not None,
        HAS_REAL=real is not None, IS_OWN=flag is not None and table.shift > 0 and table.shift % table.window == 0,
        STORAGE=pool.key.storage, WIDTH=pool.key.width, VALUE_WIDTH=pool.value.width,
        BLOCK_K=triton.next_power_of_2(num_kv_heads), BLOCK_D=_block(pool.key.width), BLOCK_V=_block(pool.value.width),
        BLOCK_P=triton.next_power_of_2(pool.page_size), PAGE=pool.page_size, **({} if INTERPRETED else {"num_warps": 1}),
    )  # fmt: skip


# -- arguments ---------------------------------------------------------------------------------------------------------
def _stored(pool: PagePool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values and the scales of their pages, at which kernels without quantised storage do not look."""
    key, value = pool.key, pool.value
    return key.data, value.data, *((key.data, value.data) if key.scale is None else (key.scale, value.scale))


def _bytes(x: Tensor) -> Tensor:
    """Numbers, or the bytes of 8-bit floats, which a kernel rounds by itself: the same on every GPU."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def _rows(x: Tensor) -> Tensor:
    """`x` with rows of consecutive elements, within reach of 32 bits from a head's first one."""
    return x if x.stride(3) == 1 and x.stride(2) * x.shape[2] < 2**31 else x.contiguous()


def _sinks(scores: Scores, unused: Tensor) -> Tensor:
    return unused if scores.sinks is None else scores.sinks


def _factors(scores: Scores) -> tuple[float, float]:
    """(inner, outer): scores in powers of 2 are outer * product, or outer * tanh(inner * product) if they are bounded."""
    if scores.softcap is None:
        return 0.0, scores.scaling * LOG2E
    return scores.scaling / scores.softcap, scores.softcap * LOG2E


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _is_wide(query: Tensor) -> bool:
    return INTERPRETED or query.dtype == torch.float32


def _flags(query: Tensor, pool: PagePool, scores: Scores, group: int, tile: Tile) -> dict:
    """What the kernels are compiled for."""
    flags = {
        "GROUP": group,
        "HAS_SINKS": scores.sinks is not None,
        "HAS_SOFTCAP": scores.softcap is not None,
        "QUANTISED": pool.key.scale is not None,
        "WIDTH": pool.key.width,
        "VALUE_WIDTH": pool.value.width,
        "BLOCK_D": _block(pool.key.width),
        "BLOCK_V": _block(pool.value.width),
        "PAGE": pool.page_size,
        "WIDE": _is_wide(query),
    }
    return flags if INTERPRETED else flags | {"num_warps": tile.warps, "num_stages": tile.stages}
