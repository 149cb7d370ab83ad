"""What a cache costs: live slots read, live slots held, bytes. Sums over requests, nothing else.

| name            | definition                                                                                          |
|-----------------|-----------------------------------------------------------------------------------------------------|
| `kv_reads`      | live slots attended to, summed over decode steps, mean over layers and KV heads; mean over requests |
| `peak_tokens`   | maximum of live slots over the steps, mean over layers and KV heads; mean over requests             |
| `kv_bytes_peak` | bytes that those slots' keys and values take: what a cache that frees them would hold               |
| `measured_cr`   | logical tokens / live slots at the end of the request, prompt and window included                   |
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor


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
    """The mean cost of `num_requests` requests; `tokens_generated` is their sum."""

    kv_reads: float
    peak_tokens: float
    kv_bytes_peak: float
    measured_cr: float
    live_tokens: float
    tokens_generated: int
    num_requests: int


class Meter:
    """Adds up the live slots of requests that decode together, step by step.

    `peak_concurrent_tokens` is the maximum over the steps of what all requests of a step hold together: the memory that a
    server needs, where the mean of the requests' own peaks says what one of them costs.
    """

    def __init__(self, num_requests: int):
        self.peak_concurrent_tokens = 0.0
        self._reads = [0.0] * num_requests
        self._peaks = [0.0] * num_requests
        self._live = [0.0] * num_requests

    def step(self, live: Tensor, active: Sequence[int] | None = None, prefill: bool = False) -> None:
        """Counts one forward of the requests `active` (default: all), with `live` slots [B, L, K] after it.

        A prefill holds memory but is no decode step, so it adds no reads. Raises `ValueError` if B is not the number of
        active requests.
        """
        rows = range(len(self._reads)) if active is None else active
        tokens = live.double().mean((1, 2)).tolist()
        if len(tokens) != len(rows):
            raise ValueError(f"live slots of {len(tokens)} requests were given, but {len(rows)} are active; name them")
        for row, held in zip(rows, tokens, strict=True):
            self._reads[row] += 0.0 if prefill else held
            self._peaks[row] = max(self._peaks[row], held)
            self._live[row] = held
        self.peak_concurrent_tokens = max(self.peak_concurrent_tokens, sum(tokens))

    def requests(self, num_tokens: Sequence[int], num_generated: Sequence[int]) -> list[Request]:
        """What each request cost, given its logical tokens (prompt included) and those that it generated."""
        rows = zip(self._reads, self._peaks, self._live, num_tokens, num_generated, strict=True)
        return [Request(*row) for row in rows]


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
        num_requests=count,
    )


def merge(usages: Iterable[Usage]) -> Usage:
    """The usage of all requests behind `usages`, as if counted at once. Raises `ValueError` if there is none."""
    found = list(usages)
    if not found:
        raise ValueError("accounting needs at least one usage to merge")
    count = sum(u.num_requests for u in found)

    def mean(name: str) -> float:
        return sum(getattr(u, name) * u.num_requests for u in found) / count

    logical = sum(u.measured_cr * u.live_tokens * u.num_requests for u in found) / count
    return Usage(
        kv_reads=mean("kv_reads"),
        peak_tokens=mean("peak_tokens"),
        kv_bytes_peak=mean("kv_bytes_peak"),
        measured_cr=logical / max(mean("live_tokens"), 1e-9),
        live_tokens=mean("live_tokens"),
        tokens_generated=sum(u.tokens_generated for u in found),
        num_requests=count,
    )
