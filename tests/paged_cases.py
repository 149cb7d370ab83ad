"""Slots in pages for the tests of the paged kernels, with NaN wherever nobody may look, and what they hold exactly."""

import torch

from dms_lab.attention.kernels.paged import INTERPRETED
from dms_lab.attention.paged import Slots
from dms_lab.cache.pages import PagePool

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


def normal(*shape, seed=0):
    """Numbers that are the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def fill(lengths, widths=(16, 16), page_size=4, storage="model", dtype=torch.float32, spare=1, seed=0):
    """Slots of `lengths` [B][K] in a table that is `spare` pages wider than the longest head asks."""
    length = torch.tensor(lengths, device=DEVICE)
    need = -(-length // page_size)
    pool = PagePool(*widths, dtype, DEVICE, page_size, num_pages=int(need.sum()) + 2, storage=storage)
    table = pool.take(torch.arange(int(need.max()) + spare, device=DEVICE) < need[:, :, None])
    slots = Slots(pool, table, length, backend="triton")
    address = addresses(slots)
    count = address.shape[0]
    key, value = (normal(count, width, seed=seed + i).to(dtype) for i, width in enumerate(widths))
    position = torch.arange(count, device=DEVICE)
    pool.write(address, key, value, position)
    for store in (pool.key, pool.value):
        _spoil(store, address)
    return slots


def addresses(slots):
    """Addresses of all slots in use, head after head."""
    page_size = slots.pool.page_size
    slot = torch.arange(slots.table.shape[2] * page_size, device=DEVICE)
    address = slots.table.repeat_interleave(page_size, 2) * page_size + slot % page_size
    return address[slot < slots.length[:, :, None]]


def _spoil(store, address):
    unused = torch.ones(store.data.shape[0] * store.page_size, dtype=torch.bool, device=DEVICE)
    unused[address] = False
    rows = store.data.view(-1, store.width)
    if store.data.dtype == torch.float8_e4m3fn:
        rows.view(torch.uint8)[unused] = 0x7F
    elif store.scale is None:
        rows[unused] = torch.nan
    if store.scale is not None:
        store.scale[unused.view(-1, store.page_size).all(1)] = torch.nan


def held(slots):
    """Keys and values [B, K, S, D] in float64, exactly as stored, 0 behind a head's length, and which slots are in use."""
    page_size, parts = slots.pool.page_size, []
    slot = torch.arange(slots.table.shape[2] * page_size, device=DEVICE)
    used = slot < slots.length[:, :, None]
    page = slots.table.repeat_interleave(page_size, 2)
    for store in (slots.pool.key, slots.pool.value):
        x = store.data.double()[page, slot % page_size]
        if store.scale is not None:
            x = x * store.scale.double()[page][..., None]
        parts.append(x.masked_fill(~used[..., None], 0.0))
    return *parts, used


def errs_like(found, plain, exact):
    """Whether `found` errs at most twice as much as `plain`, a computation in the same low precision."""
    found, plain = (x.double() - exact for x in (found, plain))
    return found.abs().max() <= 2 * plain.abs().max() and found.norm() <= 1.5 * plain.norm()


def state(table):
    """What a table of slots knows, and what its slots in use hold, whichever pages those are in."""
    names, table.rows = ("length", "seen", "tail", "ring_slot", "ring_flag", "freed_at"), None
    slot = torch.arange(table.table.shape[2] * table.pool.page_size, device=DEVICE).expand(*table.length.shape, -1)
    address = table.address(slot)[slot < table.length[:, :, None]]
    stores = [table.pool.key, table.pool.value]
    numbers = [x.data.view(torch.uint8) if x.data.dtype == torch.float8_e4m3fn else x.data for x in stores]
    held = [x.view(-1, x.shape[2])[address] for x in numbers] + [table.pool.position.view(-1)[address]]
    held += [x.scale[table.table].masked_fill(~table._held(), 0.0) for x in stores if x.scale is not None]
    pages = table.table[table._held()]
    unused = [int((x[pages].view(-1, x.shape[2]) != 0).any(1).sum()) - len(address) for x in numbers]
    return [*(getattr(table, name).clone() for name in names), *held, torch.tensor(unused), pages.sort().values]
