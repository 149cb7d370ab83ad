"""Whose attention is measured, and what it cannot do without: operations, and bytes to and from memory.

pairs       (query, key) that a head has to score: all causal ones, or those of the window and of the keys that are left
operations  2 a multiplication with addition: 2 products a pair forward; backward 5 in one pass that adds up dQ with
            atomics, 7 in two passes without (S and dP are computed twice)
bytes       every input read and every output written once, in 2 bytes an element
"""

from typing import NamedTuple

PEAK_OPERATIONS = 989e12  # a second, dense bfloat16, and
PEAK_BYTES = 3.35e12  # a second: an H100 SXM5 by its data sheet, which no kernel reaches


class Shape(NamedTuple):
    """The attention of a layer."""

    name: str
    num_heads: int
    num_kv_heads: int
    width: int


SHAPES = (
    Shape("Llama-3.2-1B", 32, 8, 64),
    Shape("Qwen-R1-7B", 28, 4, 128),
    Shape("Qwen3-8B", 32, 8, 128),
)
TINY = Shape("tiny", 2, 1, 16)


def causal_pairs(num_tokens: int, window: int | None = None, ratio: float = 1.0) -> float:
    """Pairs of one head over one document; beyond `window`, one of `ratio` keys is left."""
    everything = num_tokens * (num_tokens + 1) / 2
    if window is None or window >= num_tokens:
        return everything
    rest = num_tokens - window
    far = rest * (rest + 1) / 2
    return everything - far + far / ratio


def operations(shape: Shape, pairs: float, backward_products: int) -> float:
    """Operations of a forward and a backward of one sequence."""
    return (2 + backward_products) * 2 * shape.width * shape.num_heads * pairs


def moved_bytes(shape: Shape, num_tokens: int) -> float:
    """Bytes of a forward (q, k, v, o) and a backward (those, dO, dQ, dK, dV) of one sequence."""
    wide = shape.num_heads * num_tokens * shape.width * 2
    narrow = shape.num_kv_heads * num_tokens * shape.width * 2
    return (2 * wide + 2 * narrow) + (4 * wide + 4 * narrow)


def floor_rows(window: int, ratios: tuple[float, ...], lengths: tuple[int, ...]):
    """Cells of the table of floors: operations and their least time, bytes and theirs, and operations against dense."""
    for shape in SHAPES:
        for num_tokens in lengths:
            dense = operations(shape, causal_pairs(num_tokens), 5)
            moved = moved_bytes(shape, num_tokens)
            cases = [("dense, one backward pass", dense)]
            for ratio in ratios:
                pairs = causal_pairs(num_tokens, window, ratio)
                cases.append((f"two passes, 1/{ratio:g} of the far keys", operations(shape, pairs, 7)))
            for name, count in cases:
                least = 1e3 * count / PEAK_OPERATIONS
                yield [
                    shape.name, num_tokens, name, f"{count / 1e12:.2f}", f"{least:.2f}",
                    f"{moved / 1e6:.0f}", f"{1e3 * moved / PEAK_BYTES:.3f}", f"{count / dense:.2f}",
                ]  # fmt: skip
