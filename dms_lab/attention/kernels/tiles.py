"""How large the kernels' blocks are: by head width, chosen by what fits Hopper's registers and shared memory.

Fixed, not tuned while training runs: other blocks round otherwise, and a run that is resumed must give the same bits.
`candidates` is what a benchmark tries. None of these was timed on a GPU yet.
"""

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Queries and keys of a block (powers of 2, at least 16), warps of a program, stages of its loads."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2


class Tiles(NamedTuple):
    """One tile for each kernel."""

    forward: Tile
    query_grad: Tile
    key_grad: Tile


def choose_tiles(width: int, dtype: torch.dtype) -> Tiles:
    """The tiles for heads of `width`; float32 takes small ones, as its operands are twice as wide."""
    return candidates(width, dtype)[0]


def candidates(width: int, dtype: torch.dtype) -> list[Tiles]:
    """Tiles worth timing for heads of `width`, the default first."""
    if dtype == torch.float32:
        return [Tiles(Tile(32, 32), Tile(32, 32), Tile(32, 32))] if width <= 128 else [Tiles(*[Tile(16, 32)] * 3)]
    if width <= 64:
        return [
            Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
            Tiles(Tile(128, 64, 4, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
            Tiles(Tile(128, 128, 8, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
        ]
    if width <= 128:
        return [
            Tiles(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
            Tiles(Tile(128, 128, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
            Tiles(Tile(64, 64, 4, 3), Tile(128, 32, 8, 3), Tile(32, 128, 8, 3)),
        ]
    return [
        Tiles(Tile(128, 32, 8, 2), Tile(64, 32, 8, 2), Tile(32, 64, 8, 2)),
        Tiles(Tile(64, 64, 8, 2), Tile(64, 32, 4, 1), Tile(32, 64, 8, 1)),
    ]


def choose_decode_tile(width: int, dtype: torch.dtype) -> Tile:
    """The tile of decoding for heads of `width`; its queries are those of a group, at least 16."""
    return decode_candidates(width, dtype)[0]


def decode_candidates(width: int, dtype: torch.dtype) -> list[Tile]:
    """Tiles worth timing for decoding with heads of `width`, the default first."""
    if dtype == torch.float32 or width > 128:
        return [Tile(16, 32, 4, 3), Tile(16, 64, 4, 2)]
    return [Tile(16, 64, 4, 3), Tile(16, 128, 4, 2), Tile(16, 32, 2, 4)]


def choose_chunk_tile(width: int, dtype: torch.dtype, num_rows: int) -> Tile:
    """The tile of a chunk for heads of `width`, `num_rows` a KV head: a row is a token and one of its heads."""
    tile = chunk_candidates(width, dtype)[0]
    fitting = 16
    while fitting < min(num_rows, tile.queries):
        fitting *= 2
    return tile if fitting == tile.queries else Tile(fitting, tile.keys, 4, tile.stages)


def chunk_candidates(width: int, dtype: torch.dtype) -> list[Tile]:
    """Tiles worth timing for a chunk with heads of `width`, the default first."""
    if dtype == torch.float32:
        return [Tile(32, 32)] if width <= 128 else [Tile(16, 32)]
    if width <= 128:
        return [Tile(128, 64, 8, 3), Tile(128, 64, 4, 3), Tile(64, 64, 4, 3)]
    return [Tile(128, 32, 8, 2), Tile(64, 32, 4, 2)]
