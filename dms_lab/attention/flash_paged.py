"""Decoding over slots in pages by the package flash-attn: a KV head of a sequence is a sequence of its own, of one KV head.

    pages [P, page, D] -> [P, page, 1, D]   table [B, K, M] -> [B * K, M]   query [B, H, 1, D] -> [B * K, 1, G, D]

Its paged kernel (2.x) takes pages of a multiple of 256 slots, one width for keys and values, 16-bit types, no sinks. Tested
with a stub of its signature alone. Shapes: B batch, H query heads, K KV heads, G = H / K, M pages of a head, D head width.
"""

import torch
from torch import Tensor

from dms_lab.attention.paged import Slots
from dms_lab.cache.pages import PagePool
from dms_lab.cache.policy import Scores

_PAGE_MULTIPLE = 256  # slots
_OTHERS = "use attention=torch, or attention=triton on CUDA"


def check_pool(pool: PagePool) -> None:
    """Raises `ValueError` for what flash-attn's paged kernel cannot read."""
    key, value = pool.key, pool.value
    if pool.device.type != "cuda":
        raise ValueError(f"attention='flash_attn' works on cuda, not on {pool.device.type}; use attention=torch")
    if pool.page_size % _PAGE_MULTIPLE:
        raise ValueError(
            f"attention='flash_attn' takes pages of a multiple of {_PAGE_MULTIPLE} slots, not of {pool.page_size}: give "
            f"page_size={_PAGE_MULTIPLE}, or {_OTHERS}"
        )
    is_odd = key.width != value.width or key.width > 256 or key.width % 8
    if key.data.dtype not in (torch.bfloat16, torch.float16) or is_odd:
        raise ValueError(
            "attention='flash_attn' takes bfloat16 or float16 as the model has it (storage=model), keys and values of one "
            f"width up to 256 and divisible by 8, not {key.data.dtype} of {key.width} and {value.width}; {_OTHERS}"
        )


def decode(query: Tensor, slots: Slots, scores: Scores) -> Tensor:
    """Attention [B, H, 1, D] of one query a sequence over its live slots, 0 without any; `ValueError` with sinks."""
    from flash_attn import flash_attn_with_kvcache

    if scores.sinks is not None:
        raise ValueError(f"attention='flash_attn' knows no attention sinks, which this model has; {_OTHERS}")
    batch, num_heads, _, width = query.shape
    length = slots.length.flatten()
    output = flash_attn_with_kvcache(
        query.reshape(length.shape[0], 1, -1, width),
        slots.pool.key.data[:, :, None],
        slots.pool.value.data[:, :, None],
        cache_seqlens=length.int(),
        block_table=slots.table.flatten(0, 1).int(),
        softmax_scale=scores.scaling,
        softcap=scores.softcap or 0.0,
    )
    return output.masked_fill((length == 0)[:, None, None, None], 0.0).view(batch, num_heads, 1, width)
