"""What a cache costs: live slots read, live slots held, bytes. Sums over requests, nothing else.

| name            | definition                                                                                          |
|-----------------|-----------------------------------------------------------------------------------------------------|
| `kv_reads`      | live slots attended to, summed over decode steps, mean over layers and KV heads; mean over requests |
| `peak_tokens`   | maximum of live slots over the steps, mean over layers and KV heads; mean over requests             |
| `kv_bytes_peak` | bytes that those slots' keys and values take: what a cache that frees them would hold               |
| `measured_cr`   | logical tokens / live slots at the end of the request, prompt and window included                   |
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """One request: counts in tokens, averaged over layers and KV heads."""

    kv_reads: float
    peak_tokens: float
    live_tokens: float
    num_tokens: int
    num_generated: int


@dataclass(frozen=True)
class Usage:
    """The mean cost of requests; `tokens_generated` is their sum."""

    kv_reads: float
    peak_tokens: float
    kv_bytes_peak: float
    measured_cr: float
    live_tokens: float
    tokens_generated: int


def slot_bytes(num_layers: int, num_kv_heads: int, head_dim: int, element_bytes: int) -> int:
    """Bytes of one token's keys and values over all layers and KV heads."""
    return 2 * num_layers * num_kv_heads * head_dim * element_bytes


def usage(requests: Iterable[Request], bytes_per_token: int) -> Usage:
    """The mean over `requests`; measured CR is the ratio of the sums. Raises `ValueError` if there is none."""
    found = list(requests)
    if not found:
        raise ValueError("accounting needs at least one request")
    count = len(found)
    peak = sum(r.peak_tokens for r in found) / count
    live = sum(r.live_tokens for r in found)
    return Usage(
        kv_reads=sum(r.kv_reads for r in found) / count,
        peak_tokens=peak,
        kv_bytes_peak=peak * bytes_per_token,
        measured_cr=sum(r.num_tokens for r in found) / max(live, 1e-9),
        live_tokens=live / count,
        tokens_generated=sum(r.num_generated for r in found),
    )
