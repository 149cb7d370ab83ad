"""Chunks over slots in pages by the Triton kernel equal the dense reference, through the interpreter or on a GPU."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dms_lab.attention import paged, reference
from dms_lab.cache.policy import Scores
from experiments.benchmarks import harness

pytest.importorskip("triton", reason="the package triton is not installed: pip install dms_lab[gpu]")

from kernel_bounds import within_bounds  # noqa: F401  every test of this file has it
from paged_cases import DEVICE, errs_like, fill, held, normal

from dms_lab.attention.kernels import paged as kernels
from dms_lab.attention.kernels import paged_chunk, until
from dms_lab.attention.kernels.tiles import Tile
from experiments.benchmarks.paged_attention import measure

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 16, so that few tokens have blocks of every kind."""
    monkeypatch.setattr(kernels, "choose_chunk_tile", lambda width, dtype, num_rows: Tile(16, 16))


def draw(lengths, num_new, window, *, share=0.6, behind=0, seed=0, dtype=torch.float32, **layout):
    """Slots and a chunk after them; `share` of all tokens evicted, of the old ones those of the window alone.

    Old tokens stand in any order, some of them `behind` tokens before what fits without gaps.
    """
    slots = fill(lengths, dtype=dtype, seed=seed, **layout)
    batch, num_kv_heads = slots.length.shape
    g = torch.Generator().manual_seed(seed + 7)
    longest = int(slots.length.max())
    seen = longest + behind + torch.randint(0, 5, (batch,), generator=g)
    past = torch.stack(
        [
            torch.stack([torch.randperm(int(n), generator=g)[:longest] for _ in range(num_kv_heads)])
            for n in seen.clamp(min=1)
        ]
    )[:, :, :longest]
    age = seen[:, None, None] - past
    past_evicted = (torch.rand(past.shape, generator=g) < share) & (age < (window or 0))
    evicted = torch.rand(batch, num_kv_heads, num_new, generator=g) < share
    if window is None:
        evicted = torch.zeros_like(evicted)
    width, value_width = slots.pool.key.width, slots.pool.value.width
    chunk = paged.Chunk(
        normal(batch, num_kv_heads, num_new, width, seed=seed + 1).to(dtype),
        normal(batch, num_kv_heads, num_new, value_width, seed=seed + 2).to(dtype),
        (seen[:, None] + torch.arange(num_new)).to(DEVICE),
        evicted.to(DEVICE),
        past.to(DEVICE),
        past_evicted.to(DEVICE),
        window,
    )
    return slots, chunk


def rule(chunk, slots, sliding):
    """What each new token sees, [B, K, C, S + C]: the definition, written down once more."""
    size, far_away = chunk.past_position.shape[2], 1 << 40
    queries = chunk.position[:, None, :, None]
    keys = torch.cat([chunk.past_position, chunk.position[:, None].expand(chunk.evicted.shape)], 2)
    evicted = torch.cat([chunk.past_evicted, chunk.evicted], 2)
    distance = queries - keys[:, :, None]
    seen = (distance >= 0) & (~evicted[:, :, None] | (distance < (chunk.window or far_away)))
    seen[..., :size] &= (torch.arange(size, device=DEVICE) < slots.length[:, :, None])[:, :, None]
    return seen & (distance < (sliding or far_away))


def exact(query, chunk, slots, scores, dtype=torch.float64):
    """The dense reference in `dtype` on what the slots and the chunk hold."""
    size = chunk.past_position.shape[2]
    key, value, _ = held(slots)
    key, value = (
        torch.cat([x[:, :, :size].to(dtype), new.to(dtype)], 2) for x, new in ((key, chunk.key), (value, chunk.value))
    )
    sinks = None if scores.sinks is None else scores.sinks.to(dtype)
    visible = rule(chunk, slots, scores.sliding_window)
    return reference.attend(query.to(dtype), key, value, visible, scores.scaling, scores.softcap, sinks)[0]


def check(slots, chunk, group, scores, atol=3e-6):
    batch, num_kv_heads, num_new, width = chunk.key.shape
    query = normal(batch, group * num_kv_heads, num_new, width, seed=11).to(chunk.key.dtype)
    found, weights = paged.attend_chunk(query, chunk, slots, scores)
    assert weights is None
    assert found.dtype == query.dtype
    torch.testing.assert_close(found.double(), exact(query, chunk, slots, scores), rtol=3e-6, atol=atol)


@pytest.mark.parametrize(
    ("lengths", "num_new", "window", "group", "scores", "layout"),
    [
        ([[0]], 1, 1, 1, Scores(0.3), {}),
        ([[0]], 45, 6, 2, Scores(0.3), {}),
        ([[0, 0]], 33, None, 1, Scores(0.3), {}),
        ([[16, 5], [0, 31]], 20, 4, 3, Scores(0.3), {}),
        ([[50]], 60, 17, 1, Scores(0.3), {"page_size": 32}),
        ([[50]], 40, 100, 2, Scores(0.3), {"page_size": 5}),
        ([[40, 33]], 40, 9, 1, Scores(0.3, sliding_window=21), {}),
        ([[40]], 50, 9, 2, Scores(0.3, sliding_window=4), {"behind": 30}),
        ([[40]], 50, None, 2, Scores(0.3, sliding_window=30), {}),
        ([[20]], 30, 5, 2, Scores(0.3, 2.0, normal(2, seed=3)), {"widths": (24, 80)}),
        ([[3, 20]], 17, 5, 1, Scores(0.3, sinks=normal(2, seed=3), sliding_window=7), {"widths": (80, 16)}),
        ([[20]], 17, 5, 1, Scores(0.1), {"widths": (96, 96)}),
        ([[0]], 48, 31, 1, Scores(0.3), {"share": 1.0}),  # one more token in a window would be a block without masks
    ],
)
def test_chunks_equal_the_reference(lengths, num_new, window, group, scores, layout):
    check(*draw(lengths, num_new, window, **layout), group, scores)


@pytest.mark.parametrize("storage", ["fp8", "int8"])
def test_quantised_slots_and_new_tokens_as_they_are(storage):
    slots, chunk = draw([[40, 9]], 35, 6, storage=storage, page_size=8)
    check(slots, chunk, 2, Scores(0.3, sliding_window=33))


@settings(deadline=None, max_examples=10, derandomize=True)
@given(st.data())
def test_any_chunk_equals_the_reference(data):
    def pick(*choices):
        return data.draw(st.sampled_from(choices))

    num_kv_heads, group, num_new = pick(1, 2), pick(1, 2, 3), data.draw(st.integers(1, 40))
    lengths = [[data.draw(st.integers(0, 50)) for _ in range(num_kv_heads)] for _ in range(pick(1, 2))]
    window = data.draw(st.one_of(st.none(), st.integers(1, 45)))
    scores = Scores(
        0.5,
        pick(None, 2.0),
        pick(None, normal(group * num_kv_heads, seed=2)),
        data.draw(st.one_of(st.none(), st.integers(1, 60))),
    )
    layout = {"page_size": pick(1, 4, 32), "storage": pick("model", "fp8", "int8"), "widths": (8, 8)}
    drawn = {"share": pick(0.0, 0.7, 1.0), "behind": pick(0, 40), "seed": data.draw(st.integers(0, 99))}
    slots, chunk = draw(lengths, num_new, window, **drawn, **layout)
    check(slots, chunk, group, scores)


@pytest.mark.parametrize("tile", [Tile(16, 32), Tile(64, 16)])
def test_blocks_of_other_shapes_give_the_same(tile, monkeypatch):
    monkeypatch.setattr(kernels, "choose_chunk_tile", lambda width, dtype, num_rows: tile)
    check(*draw([[40, 70]], 45, 7, behind=20), 3, Scores(0.3, sliding_window=50))


@pytest.mark.parametrize("storage", ["model", "int8"])
def test_bfloat16_errs_at_most_twice_as_much_as_plain_bfloat16(storage):
    slots, chunk = draw([[60, 21]], 30, 8, dtype=torch.bfloat16, storage=storage, widths=(32, 32))
    query = normal(1, 4, 30, 32, seed=5).bfloat16()
    found, _ = paged.attend_chunk(query, chunk, slots, Scores(0.2))
    plain = exact(query, chunk, slots, Scores(0.2), torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert errs_like(found, plain, exact(query, chunk, slots, Scores(0.2)))


def test_no_bit_of_a_row_depends_on_the_rows_beside_it():
    slots, chunk = draw([[40, 9], [70, 3]], 20, 8, dtype=torch.bfloat16)
    query = normal(2, 4, 20, 16, seed=5).bfloat16()
    together, _ = paged.attend_chunk(query, chunk, slots, Scores(0.2))
    size = int(slots.length[0].max())
    parts = {name: getattr(chunk, name)[:1] for name in ("key", "value", "position", "evicted")}
    past = {name: getattr(chunk, name)[:1, :, :size] for name in ("past_position", "past_evicted")}
    mine = replace(slots, table=slots.table[:1, :, :11], length=slots.length[:1])
    alone, _ = paged.attend_chunk(query[:1], replace(chunk, **parts, **past), mine, Scores(0.2))
    assert torch.equal(together[:1], alone)


def test_tensors_as_a_model_gives_them_change_nothing():
    slots, chunk = draw([[20, 9]], 30, 8)
    query = normal(1, 4, 30, 16, seed=5)
    wanted, _ = paged.attend_chunk(query, chunk, slots, Scores(0.3))
    fused = torch.cat([x.transpose(1, 2) for x in (query, chunk.key, chunk.value)], 2)  # [B, T, heads, D]
    query, key, value = (x.transpose(1, 2) for x in fused.split([4, 2, 2], 2))
    found, _ = paged.attend_chunk(query, replace(chunk, key=key, value=value), slots, Scores(0.3))
    assert torch.equal(found, wanted)


# -- what is left out --------------------------------------------------------------------------------------------------
@pytest.fixture
def read_blocks(monkeypatch):
    """Counts the blocks of keys that are multiplied."""
    if not kernels.INTERPRETED:
        pytest.skip("counted in the interpreter")
    original, count = paged_chunk.attend_block, []
    monkeypatch.setattr(paged_chunk, "attend_block", lambda *args: count.append(1) or original(*args))
    return count


def num_blocks(read_blocks, slots, chunk, scores):
    read_blocks.clear()
    check(slots, chunk, 1, scores)
    return len(read_blocks)


def test_blocks_that_no_query_sees_are_not_read(read_blocks):
    slots, chunk = draw([[64]], 64, None)
    assert num_blocks(read_blocks, slots, chunk, Scores(0.3)) == 4 * 4 + (1 + 2 + 3 + 4)
    in_order = replace(chunk, past_position=torch.arange(64, device=DEVICE)[None, None], position=chunk.position * 0)
    in_order = replace(in_order, position=64 + torch.arange(64, device=DEVICE)[None])
    # A sliding window of 20: the first block of queries sees 19 old tokens before it, the second 3.
    assert num_blocks(read_blocks, slots, in_order, Scores(0.3, sliding_window=20)) == (2 + 1) + (1 + 2) + 3 + 3


def test_evicted_tokens_cost_a_window_and_kept_ones_are_packed(read_blocks):
    everything = torch.ones(1, 1, 128, dtype=torch.bool, device=DEVICE)
    slots, chunk = draw([[0]], 128, 16)
    chunk = replace(chunk, evicted=everything)
    assert num_blocks(read_blocks, slots, chunk, Scores(0.3)) == 1 + 7 * 2
    one_in_8 = everything.clone()
    one_in_8[..., ::8] = False
    # The 16 kept ones fill one block, which every query block but the first reads once, beside its window.
    assert num_blocks(read_blocks, slots, replace(chunk, evicted=one_in_8), Scores(0.3)) == 1 + 7 * 3
    # All kept: before its window a block of queries has 24 of a sliding window's 40 tokens in the list.
    sliding = Scores(0.3, sliding_window=40)
    assert num_blocks(read_blocks, slots, replace(chunk, evicted=~everything), sliding) == 1 + 7 * 2 + 1 + 2 * 6


def test_old_tokens_decided_for_eviction_are_read_until_they_are_a_window_old(read_blocks):
    slots, chunk = draw([[32]], 48, 20)
    position = torch.arange(32, device=DEVICE)[None, None]
    chunk = replace(
        chunk,
        past_position=position,
        past_evicted=position >= 16,  # the second block of slots, whose last token goes 20 tokens later
        position=32 + torch.arange(48, device=DEVICE)[None],
        evicted=torch.zeros_like(chunk.evicted),
    )
    new = (1 + 2 + 3) + 1  # the third block's near range begins in the middle of one
    assert num_blocks(read_blocks, slots, chunk, Scores(0.3)) == 3 + 2 + new


def test_numbers_that_nobody_sees_do_not_leak():
    slots, chunk = draw([[48]], 64, 4, behind=100)
    evicted = torch.zeros_like(chunk.evicted)
    evicted[..., 20:40] = True
    old = torch.arange(48, device=DEVICE)[None, None]
    chunk = replace(chunk, past_position=old, past_evicted=torch.zeros_like(chunk.past_evicted), evicted=evicted)
    chunk = replace(chunk, position=100 + torch.arange(64, device=DEVICE)[None])
    scores, query = Scores(0.3, sliding_window=70), normal(1, 1, 64, 16, seed=4)
    wanted = exact(query, chunk, slots, scores)
    address = slots.table.repeat_interleave(4, 2)[0, 0] * 4 + torch.arange(slots.table.shape[2] * 4, device=DEVICE) % 4
    slots.pool.key.data.view(-1, 16)[address[:30]] = torch.nan  # positions 0 to 29: 71 or more before the first query
    slots.pool.value.data.view(-1, 16)[address[:30]] = torch.nan
    found, _ = paged.attend_chunk(query, chunk, slots, scores)
    torch.testing.assert_close(found.double(), wanted, rtol=3e-6, atol=3e-6)
    chunk.key[:, :, 20:40] = torch.nan
    chunk.value[:, :, 20:40] = torch.nan
    found, _ = paged.attend_chunk(query, chunk, slots, scores)
    torch.testing.assert_close(found[:, :, 48:].double(), wanted[:, :, 48:], rtol=3e-6, atol=3e-6)


def test_what_is_said_of_the_keys_has_their_size_and_not_that_of_a_mask():
    slots, chunk = draw([[64, 20]], 80, 8)
    past, new = until.past_keys(chunk, slots, 30, 16), until.new_keys(chunk, 30)
    assert sum(x.numel() for x in past) == 2 * (64 + 4 + 4 + 1)
    assert sum(x.numel() for x in new[:3]) == 2 * (80 + 80 + 81)
    seen = rule(chunk, slots, 30)
    token = torch.arange(80, device=DEVICE)[:, None]
    assert torch.equal(seen[..., :64], token < past.until[:, :, None])
    assert torch.equal(seen[..., 64:], (token < new.until[:, :, None]) & (token >= token.T))


# -- compiled, measured ------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not kernels.INTERPRETED, reason="a GPU is here: the kernels above were compiled for it")
@pytest.mark.parametrize(
    "kernel", ["part", "combine", "append", "append_sliding", pytest.param("chunk", marks=pytest.mark.slow)]
)
def test_the_kernels_compile_for_hopper_within_its_shared_memory(kernel, tmp_path):
    """By Triton's own compiler, without a GPU: what the interpreter lets pass may not compile."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    words = [
        "-m",
        "experiments.benchmarks.paged_attention.compiled",
        "--width",
        "64",
        "--storage",
        "fp8",
        "--kernels",
        kernel,
    ]
    done = subprocess.run([sys.executable, *words], env=environment, check=True, capture_output=True, text=True, cwd=ROOT)
    assert f"| 64 | {kernel} |" in done.stdout


def test_packages_that_can_read_the_slots_compete_unless_they_compute_something_else(monkeypatch):
    def choose(name, pool):
        if name == "flash_attn":
            raise ValueError("not installed")

    def decode(query, slots, scores):
        return query * (1 + off * (slots.backend == "flashinfer"))

    monkeypatch.setattr(paged, "choose_backend", choose)
    monkeypatch.setattr(paged, "decode", decode)
    slots, off = fill([[5, 9]]), 1e-3
    assert list(measure.others(normal(1, 4, 1, 16), slots, Scores(0.3))) == ["flashinfer"]
    off = 0.1
    with pytest.raises(SystemExit, match=r"flashinfer differs from torch by 0\.100"):
        list(measure.others(normal(1, 4, 1, 16), slots, Scores(0.3)))


def test_the_benchmark_checks_and_times_the_kernels(tmp_path):
    words = ["-m", "experiments.benchmarks.paged_attention.measure", "--short", "--storage", "int8"]
    done = subprocess.run(
        [sys.executable, *words, "--out", tmp_path / "out.json"], check=True, capture_output=True, text=True, cwd=ROOT
    )
    assert "tiny, int8: errs" in done.stdout
    about, rows = harness.read(tmp_path / "out.json")
    assert about["copy_bandwidth"] > 0
    assert [row.name for row in rows] == ["triton", "torch", "dense"] * 2
