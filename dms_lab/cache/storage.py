"""How slots hold numbers: in the model's dtype, or quantised with a scale per page.

    write [N, D] -> page's scale grows if it must (what the page holds is rescaled) -> quantise -> data [P, page, D]
    gather pages -> data * scale -> [..., n * page, D] in the model's dtype

A page belongs to one KV head of one sequence and layer, so a scale per page is a scale per page and head. Scales of `fp8`
are powers of two: rescaling a page then only moves exponents. Shapes: P pages, D head width, N slots written.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Format:
    """A storage dtype (None: the model's) and the largest magnitude that it holds."""

    dtype: torch.dtype | None = None
    limit: float = 0.0


FORMATS = {"model": Format(), "fp8": Format(torch.float8_e4m3fn, 448.0), "int8": Format(torch.int8, 127.0)}
_LEAST_SCALE = 2.0**-100  # of a page that holds nothing yet
_LEAST_GROWTH = 1.25  # of a scale, or its growth would be lost in rounding again and again; what is lost sums to 2.5 steps
_E4M3_IN_FLOAT = 0x87F00000 - 2**32  # sign and the 7 other bits of an 8-bit float, where float32 has them


class SlotStore:
    """Keys or values of a page pool, [P, page, D]."""

    def __init__(self, storage: str, num_pages: int, page_size: int, width: int, dtype: torch.dtype, device: torch.device):
        if storage not in FORMATS:
            raise ValueError(f"storage={storage!r} is not known; choose one of {', '.join(FORMATS)}")
        self.storage, self.format = storage, FORMATS[storage]
        self.dtype, self.page_size, self.width = dtype, page_size, width
        self.data = torch.zeros(num_pages, page_size, width, dtype=self.format.dtype or dtype, device=device)
        self.scale = torch.full((num_pages,), _LEAST_SCALE, device=device) if self.format.dtype else None

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def resize(self, num_pages: int) -> None:
        """Gives the store `num_pages` pages; the pages that both have keep their content."""
        both = min(num_pages, self.data.shape[0])
        data = torch.zeros(num_pages, *self.data.shape[1:], dtype=self.data.dtype, device=self.data.device)
        _bits(data)[:both] = _bits(self.data)[:both]
        self.data = data
        if self.scale is not None:
            scale = torch.full((num_pages,), _LEAST_SCALE, device=data.device)
            scale[:both] = self.scale[:both]
            self.scale = scale

    def clear(self, pages: Tensor) -> None:
        """Empties pages [n] that are taken anew: no number of their last holder is left, and they choose their own scale.

        A slot that is not in use is masked, not skipped, and zero times NaN is NaN.
        """
        _bits(self.data)[pages] = 0
        if self.scale is not None:
            self.scale[pages] = _LEAST_SCALE

    def copy_pages(self, source: Tensor, target: Tensor) -> None:
        """Copies whole pages, `source` [N] to `target` [N]."""
        _bits(self.data)[target] = _bits(self.data)[source]
        if self.scale is not None:
            self.scale[target] = self.scale[source]

    def read(self, address: Tensor) -> Tensor:
        """What stands at `address` [...], [..., D] in the model's dtype."""
        found = _bits(self.data).view(-1, self.width)[address].view(self.data.dtype)
        if self.scale is None:
            return found
        return (found.float() * self.scale[address // self.page_size, None]).to(self.dtype)

    def write(self, address: Tensor, x: Tensor, one_a_page: bool) -> None:
        """Puts `x` [N, D] at `address` [N]; `one_a_page`: no two of them share a page (but the one that nobody reads)."""
        if self.scale is not None:
            x = self._quantised(address, x.float(), one_a_page)
        _bits(self.data).view(-1, self.width)[address] = _bits(x)

    def gather(self, pages: Tensor, scratch: Tensor | None = None) -> Tensor:
        """The slots of `pages` [n] in order, [n * page, D] in the model's dtype, in `scratch` [>= n, page, D] if given."""
        if self.scale is None:
            out = None if scratch is None else scratch[: pages.shape[0]]
            return torch.index_select(self.data, 0, pages, out=out).view(-1, self.width)
        found = _wide(_bits(self.data).index_select(0, pages).view(self.data.dtype), self.dtype)
        return found.mul_(self.scale[pages, None, None].to(self.dtype)).view(-1, self.width)

    def _quantised(self, address: Tensor, x: Tensor, one_a_page: bool) -> Tensor:
        pages, highest = address // self.page_size, x.abs().amax(-1)
        places = pages
        if not one_a_page:
            pages, inverse = pages.unique(return_inverse=True)
            highest = highest.new_zeros(pages.shape).scatter_reduce(0, inverse, highest, "amax")
        old, wanted = self.scale[pages], highest / self.format.limit
        if self.format.dtype.is_floating_point:
            wanted = torch.exp2(torch.log2(wanted.clamp(min=_LEAST_SCALE)).ceil())
        else:
            wanted = torch.where(wanted > old, wanted.maximum(_LEAST_GROWTH * old), old)
        new = torch.maximum(old, wanted)
        self._rescale(pages, old, new)
        return self._rounded(x / self.scale[places, None])

    def _rescale(self, pages: Tensor, old: Tensor, new: Tensor) -> None:
        """Gives `pages` the scales `new`, and what they hold the same values under them."""
        if new.device.type == "cpu":  # elsewhere a look at what grew would wait for the device
            grown = (new > old).nonzero()[:, 0]
            pages, old, new = pages[grown], old[grown], new[grown]
        held = _bits(self.data)[pages].view(self.data.dtype).float() * (old / new)[:, None, None]
        _bits(self.data)[pages] = _bits(self._rounded(held))
        self.scale[pages] = new

    def _rounded(self, x: Tensor) -> Tensor:
        limit = self.format.limit
        if not self.format.dtype.is_floating_point:
            x = x.round()
        return x.clamp(-limit, limit).to(self.format.dtype)


def _wide(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`. On a CPU the bits of 8-bit floats are moved by hand, 20 times as fast as the conversion is there."""
    if x.dtype != torch.float8_e4m3fn or x.device.type != "cpu":
        return x.to(dtype)
    bits = x.view(torch.int8).to(torch.int32).bitwise_left_shift_(20).bitwise_and_(_E4M3_IN_FLOAT)
    return bits.view(torch.float32).mul_(2.0**120).to(dtype)  # the exponent's bias is 127, not 7


def _bits(x: Tensor) -> Tensor:
    """`x`, or its bytes where it holds 8-bit floats, which few operations take."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
