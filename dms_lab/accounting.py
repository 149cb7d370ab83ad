"""What a cache costs: live slots read, live slots held, bytes. Sums over requests, nothing else.

| name            | definition                                                                                          |
|-----------------|-----------------------------------------------------------------------------------------------------|
| `kv_reads`      | live slots attended to, summed over decode steps, mean over layers and KV heads; mean over requests |
| `peak_tokens`   | maximum of live slots over the steps, mean over layers and KV heads; mean over requests             |
| `kv_bytes_peak` | bytes allocated for a request's keys, values, positions, scales and tables at its peak              |
| `measured_cr`   | logical tokens / live slots at the end of the request, prompt and window included                   |
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """One request: counts in tokens, averaged over layers and KV heads, and its bytes."""

    kv_reads: float
    peak_tokens: float
    live_tokens: float
    num_tokens: int
    num_generated: int
    kv_bytes_peak: float


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


@dataclass
class Tally:
    """Adds up what one request holds and reads, step by step; counts are means over layers and KV heads."""

    kv_reads: float = 0.0
    peak_tokens: float = 0.0
    live_tokens: float = 0.0
    kv_bytes_peak: float = 0.0

    def note(self, live: float, held_bytes: float, read: float | None) -> None:
        """Counts one forward that left `live` slots in `held_bytes`, after it `read` slots; None: a prefill."""
        self.live_tokens = live
        self.peak_tokens = max(self.peak_tokens, live)
        self.kv_bytes_peak = max(self.kv_bytes_peak, held_bytes)
        self.kv_reads += read or 0.0

    def request(self, num_tokens: int, num_generated: int) -> Request:
        """The cost of the request, given its logical tokens (prompt included) and those that it generated."""
        return Request(self.kv_reads, self.peak_tokens, self.live_tokens, num_tokens, num_generated, self.kv_bytes_peak)


def usage(requests: Iterable[Request]) -> Usage:
    """The mean over `requests`; measured CR is the ratio of the sums. Raises `ValueError` if there is none."""
    found = list(requests)
    if not found:
        raise ValueError("accounting needs at least one request")
    count = len(found)
    live = sum(r.live_tokens for r in found)
    return Usage(
        kv_reads=sum(r.kv_reads for r in found) / count,
        peak_tokens=sum(r.peak_tokens for r in found) / count,
        kv_bytes_peak=sum(r.kv_bytes_peak for r in found) / count,
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
