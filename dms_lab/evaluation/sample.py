"""One sampled chain, and how it becomes a row of a table: plain columns, and a few that are compressed.

`num_tokens` counts generated tokens; costs are those of the whole chain, as in `accounting`. Compressed (N = num_tokens,
H = num_heads):

| column            | content                                                                                     |
|-------------------|---------------------------------------------------------------------------------------------|
| `ids`             | zlib of N little-endian int32                                                               |
| `live`            | sequence [N], means over H heads                                                            |
| `read_at`, `read` | the steps at which the slots read differ from the live ones (H = 1), and what was read then |
| `held_bytes`      | sequence [N], H = 1                                                                         |

A sequence is a letter and zlib of N 8-byte little-endian words: byte 0 of every word, then byte 1 of every word, and so on.
`i`: the words are differences of int64 totals over heads, the first one from 0; a value is total / H. That is the same
float64 to the bit, as a division is rounded correctly, in about a byte a step. `m`: the same with total * (1 / H), the way
that some devices compute means. `f`: the values themselves, where neither gives them back: several times as large.
"""

import zlib
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np

from dms_lab.accounting import Trace

FINISH_REASONS = ("eos", "stop", "length")


class Key(NamedTuple):
    """What names a chain: two samples with the same key are the same chain, run for a longer or a shorter time."""

    task: str
    problem: str
    chain: int
    run: str
    prompt_hash: str


class _Chain:
    """What samples and their summaries have in common."""

    @property
    def key(self) -> Key:
        """The name of the chain."""
        return Key(*(getattr(self, name) for name in Key._fields))

    def serves(self, max_tokens: int) -> bool:
        """Whether the sample says what the chain does within `max_tokens`: it ended by itself, or ran that long."""
        return self.finish_reason != "length" or self.num_tokens >= max_tokens


@dataclass(frozen=True)
class Sample(_Chain):
    """One chain. `run` is a hash of everything that decides its tokens but `max_tokens`, the limit it was drawn with.

    `created` is an ISO time with its zone. Raises `ValueError` for a trace of another length than `ids`, and for other
    values that no chain has.
    """

    task: str
    problem: str
    chain: int
    seed: int
    run: str
    prompt_hash: str
    max_tokens: int
    num_prompt: int
    text: str
    ids: tuple[int, ...]
    finish_reason: str
    trace: Trace
    num_heads: int
    seconds: float
    created: str

    @property
    def num_tokens(self) -> int:
        """Generated tokens."""
        return len(self.ids)

    def __post_init__(self) -> None:
        where = f"chain {self.chain} of problem {self.problem!r}"
        if self.finish_reason not in FINISH_REASONS:
            raise ValueError(f"{where}: finish_reason={self.finish_reason!r} must be one of {', '.join(FINISH_REASONS)}")
        if self.num_tokens > self.max_tokens or (self.finish_reason == "length" and self.num_tokens < self.max_tokens):
            raise ValueError(
                f"{where} has {self.num_tokens} tokens, finish_reason={self.finish_reason!r} and max_tokens="
                f"{self.max_tokens}: a chain ends at max_tokens by 'length', or before it or there by itself"
            )
        for name in ("live", "read", "held_bytes"):
            values = getattr(self.trace, name)
            is_right = values.shape == (self.num_tokens,) and values.dtype == np.float64
            if not (is_right and np.isfinite(values).all()):
                raise ValueError(
                    f"{where}: trace.{name} is {values.dtype} {list(values.shape)}; it must be finite float64 "
                    f"[{self.num_tokens}], one entry a generated token"
                )
        if self.num_heads < 1:
            raise ValueError(f"{where}: num_heads={self.num_heads} must be at least 1")
        if not -(1 << 63) <= self.seed < 1 << 63:
            raise ValueError(f"{where}: seed={self.seed} must fit into 63 bits and a sign")
        if datetime.fromisoformat(self.created).tzinfo is None:
            raise ValueError(f"{where}: created={self.created!r} must name its time zone, as now() does")

    def summary(self) -> "Summary":
        """What is small about the sample."""
        cost = self.trace.request(self.num_prompt)
        costs = {name: getattr(cost, name) for name in ("kv_reads", "peak_tokens", "kv_bytes_peak")}
        return Summary(**{n: getattr(self, n) for n in SCALARS if n not in costs}, **costs)


@dataclass(frozen=True)
class Summary(_Chain):
    """A sample without text, ids and trace; costs are those of the whole chain, see `accounting`."""

    task: str
    problem: str
    chain: int
    seed: int
    run: str
    prompt_hash: str
    max_tokens: int
    num_prompt: int
    finish_reason: str
    num_heads: int
    seconds: float
    created: str
    num_tokens: int
    kv_reads: float
    peak_tokens: float
    kv_bytes_peak: float


SCALARS = tuple(f.name for f in fields(Summary))
BULK = ("text", "ids", "live", "read_at", "read", "held_bytes")


def now() -> str:
    """The time as `Sample.created` wants it: ISO, UTC, microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def to_row(sample: Sample) -> list:
    """The columns of a sample: `SCALARS`, then `BULK`."""
    trace, heads = sample.trace, sample.num_heads
    read_at = np.flatnonzero(trace.read.view(np.int64) != trace.live.view(np.int64))
    sequences = ((trace.live, heads), (read_at.astype(float), 1), (trace.read[read_at], heads), (trace.held_bytes, 1))
    ids = zlib.compress(np.asarray(sample.ids, "<i4").tobytes())
    small = sample.summary()
    return [getattr(small, n) for n in SCALARS] + [sample.text, ids, *(encode(values, h) for values, h in sequences)]


def from_row(summary: Summary, bulk: tuple) -> Sample:
    """The sample of these columns, `bulk` as in `BULK`; its trace has the same bits. Raises `zlib.error` if damaged."""
    text, ids, *blobs = bulk
    heads = (summary.num_heads, 1, summary.num_heads, 1)
    live, read_at, there, held_bytes = (decode(blob, h) for blob, h in zip(blobs, heads, strict=True))
    read = live.copy()
    read[read_at.astype(np.int64)] = there
    tokens = np.frombuffer(zlib.decompress(ids), "<i4")
    small = {f.name: getattr(summary, f.name) for f in fields(Sample) if f.name in SCALARS}
    return Sample(**small, text=text, ids=tuple(tokens.tolist()), trace=Trace(live, read, held_bytes))


def encode(values: np.ndarray, num_heads: int) -> bytes:
    """A sequence of float64 [N] as the module's docstring has it; `decode` gives back the same bits."""
    with np.errstate(all="ignore"):
        totals = np.rint(values * num_heads)
    if bool((np.abs(totals) < 2**53).all()):
        whole = totals.astype("<i8")
        for letter, back in ((b"i", whole / num_heads), (b"m", whole * (1 / num_heads))):
            if np.array_equal(back.view(np.int64), values.view(np.int64)):
                return letter + _packed(np.diff(whole, prepend=np.int64(0)))
    return b"f" + _packed(values.astype("<f8"))


def decode(blob: bytes, num_heads: int) -> np.ndarray:
    """The float64 [N] of a sequence. Raises `zlib.error` for a damaged one."""
    planes = np.frombuffer(zlib.decompress(blob[1:]), np.uint8).reshape(8, -1)
    words = np.ascontiguousarray(planes.T).reshape(-1)
    if blob[:1] == b"f":
        return words.view("<f8").astype(float)
    totals = words.view("<i8").cumsum()
    return totals / num_heads if blob[:1] == b"i" else totals * (1 / num_heads)


def _packed(words: np.ndarray) -> bytes:
    """The bytes of 8-byte words, byte 0 of all first: those that never change compress to nothing."""
    return zlib.compress(np.ascontiguousarray(words.view(np.uint8).reshape(-1, 8).T).tobytes())
