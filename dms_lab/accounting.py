"""What a cache costs: live slots read, live slots held, bytes. Sums over requests, nothing else.

| name            | definition                                                                                          |
|-----------------|-----------------------------------------------------------------------------------------------------|
| `kv_reads`      | live slots attended to, summed over decode steps, mean over layers and KV heads; mean over requests |
| `peak_tokens`   | maximum of live slots over the steps, mean over layers and KV heads; mean over requests             |
| `kv_bytes_peak` | bytes allocated for a request's keys, values, positions, scales and tables at its peak              |
| `measured_cr`   | logical tokens / live slots at the end of the request, prompt and window included                   |
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np


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


@dataclass(frozen=True)
class Trace:
    """What one chain held and read, step by step: float64 [N] each, N its generated tokens.

    Entry i is the state after the prompt and i generated tokens went through the model: `live` slots and slots `read` by
    that forward (0 for the prompt), means over layers and KV heads, and the bytes held.
    """

    live: np.ndarray
    read: np.ndarray
    held_bytes: np.ndarray

    def request(self, num_prompt: int, max_tokens: int | None = None) -> Request:
        """The cost of the chain, or of the same chain ended after `max_tokens` generated tokens (at least 1)."""
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens} must be at least 1")
        live, read, held_bytes = (x[:max_tokens] for x in (self.live, self.read, self.held_bytes))
        if not len(live):
            return Request(0.0, 0.0, 0.0, num_prompt, 0, 0.0)
        return Request(
            # One after the other, as a generation adds them: a sum in pairs may differ in the last digit.
            float(np.cumsum(read)[-1]),
            float(live.max()),
            float(live[-1]),
            num_prompt + len(live) - 1,  # the last token generated never went through the model
            len(live),
            float(held_bytes.max()),
        )


@dataclass
class Tally:
    """Takes down what one chain holds and reads, step by step; counts are means over layers and KV heads."""

    live: array = field(default_factory=lambda: array("d"))
    read: array = field(default_factory=lambda: array("d"))
    held_bytes: array = field(default_factory=lambda: array("d"))

    def note(self, live: float, held_bytes: float, read: float | None) -> None:
        """Counts one forward that left `live` slots in `held_bytes`, after it `read` slots; None: a prefill."""
        self.live.append(live)
        self.held_bytes.append(held_bytes)
        self.read.append(read or 0.0)

    def trace(self) -> Trace:
        """What was noted so far."""
        return Trace(*(np.array(x) for x in (self.live, self.read, self.held_bytes)))


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
