"""Decoding over slots in pages by the package flashinfer: a KV head of a sequence is a sequence of its own, of one KV head.

    pages [P, page, D] -> [P, page, 1, D]  table [B, K, M] -> pages in use, row by row  query [B, H, 1, D] -> [B * K, G, D]

Its plan is made on the host from all lengths, for every token and layer: each waits for the device, as none does under
`attention=triton`. Pages of any size, 16-bit types, no sinks. Tested with a stub of its signature alone. Shapes: B batch, H
query heads, K KV heads, G = H / K, M pages of a head, P pages of the pool, D head width.
"""

import functools
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dms_lab.attention.paged import Slots
from dms_lab.cache.pages import PagePool
from dms_lab.cache.policy import Scores

if TYPE_CHECKING:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

_WIDTHS = (64, 128, 256)
_WORKSPACE = 128 * 2**20  # bytes, as its documentation recommends
_OTHERS = "use attention=torch, or attention=triton on CUDA"


def check_pool(pool: PagePool) -> None:
    """Raises `ValueError` for what flashinfer's paged kernels cannot read."""
    key, value = pool.key, pool.value
    if pool.device.type != "cuda":
        raise ValueError(f"attention='flashinfer' works on cuda, not on {pool.device.type}; use attention=torch")
    if key.data.dtype not in (torch.bfloat16, torch.float16) or key.width != value.width or key.width not in _WIDTHS:
        raise ValueError(
            "attention='flashinfer' takes bfloat16 or float16 as the model has it (storage=model), keys and values of one "
            f"width of {', '.join(map(str, _WIDTHS))}, not {key.data.dtype} of {key.width} and {value.width}; {_OTHERS}"
        )


def decode(query: Tensor, slots: Slots, scores: Scores) -> Tensor:
    """Attention [B, H, 1, D] of one query a sequence over its live slots, 0 without any; `ValueError` with sinks."""
    if scores.sinks is not None:
        raise ValueError(f"attention='flashinfer' is given no attention sinks, which this model has; {_OTHERS}")
    batch, num_heads, _, width = query.shape
    pool, length, table = slots.pool, slots.length.flatten(), slots.table.flatten(0, 1)
    num_pages = -(-length // pool.page_size)
    in_use = torch.arange(table.shape[1], device=table.device) < num_pages[:, None]
    in_last = length - (num_pages - 1).clamp(min=0) * pool.page_size
    group = num_heads // slots.length.shape[1]
    wrapper = _wrapper(query.device)
    wrapper.plan(
        F.pad(num_pages.cumsum(0), (1, 0)).int(),
        table[in_use].int(),
        in_last.int(),
        group,
        1,
        width,
        pool.page_size,
        q_data_type=query.dtype,
        kv_data_type=pool.key.data.dtype,
        sm_scale=scores.scaling,
        logits_soft_cap=scores.softcap,
    )
    output = wrapper.run(query.reshape(-1, group, width), (pool.key.data[:, :, None], pool.value.data[:, :, None]))
    return output.masked_fill((length == 0)[:, None, None], 0.0).view(batch, num_heads, 1, width)


@functools.cache
def _wrapper(device: torch.device) -> "BatchDecodeWithPagedKVCacheWrapper":
    """One a device: layers take turns, and each plans anew. Tensor cores take query heads of a group together."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    workspace = torch.zeros(_WORKSPACE, dtype=torch.uint8, device=device)
    return BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
