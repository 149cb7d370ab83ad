"""The Triton kernels equal the dense reference in output and in every gradient, through the interpreter or on a GPU."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from dms_lab.attention import reference, soft
from dms_lab.attention.soft import soft_attention
from experiments.benchmarks import harness

pytest.importorskip("triton", reason="the package triton is not installed: pip install dms_lab[gpu]")

from kernel_bounds import within_bounds  # noqa: F401  every test of this file has it

from dms_lab.attention.kernels import far, relaxed, spans
from dms_lab.attention.kernels.tiles import Tile, Tiles

DEVICE = "cpu" if relaxed.INTERPRETED else "cuda"
BENCHMARK = Path(__file__).parent.parent / "experiments" / "benchmarks" / "training_attention"
LEFT = ((-1, 7), (4, 30))  # runs of (document, tokens)
PACKED = ((0, 11), (1, 9), (2, 12), (-1, 5))
REUSED = ((0, 11), (1, 9), (0, 12), (-1, 5))  # an id that comes back: those tokens see each other
SHARED = ((3, 37),)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 16, so that few tokens have blocks of every kind."""
    monkeypatch.setattr(relaxed, "choose_tiles", lambda width, dtype: Tiles(*[Tile(16, 16)] * 3))
    monkeypatch.setattr(spans, "GRANULE", 8)


def documents(*rows):
    return torch.tensor([[name for name, length in runs for _ in range(length)] for runs in rows], device=DEVICE)


def draw(num_tokens, width, group=2, num_kv_heads=1, batch=1, keep="random", seed=0, dtype=torch.float32):
    """Query, key, value of `dtype`, log_keep and sinks of float32, and a cotangent, all of them requiring a gradient."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(DEVICE)

    q, co = (normal(batch, group * num_kv_heads, num_tokens, width) for _ in range(2))
    k, v = (normal(batch, num_kv_heads, num_tokens, width) for _ in range(2))
    gone = torch.rand(batch, num_kv_heads, num_tokens, generator=g).to(DEVICE) < 0.6
    log_keep = {
        "none": None,
        "zero": torch.zeros(gone.shape, device=DEVICE),
        "hard": torch.zeros(gone.shape, device=DEVICE).masked_fill(gone, -math.inf),
        "holes": torch.zeros(gone.shape, device=DEVICE).masked_fill(
            torch.arange(num_tokens, device=DEVICE) % 9 == 4, -math.inf
        ),
        "random": torch.nn.functional.logsigmoid(20 * normal(*gone.shape)),
        "shared": torch.nn.functional.logsigmoid(5 * normal(batch, 1, num_tokens)),
    }[keep]
    sinks = normal(group * num_kv_heads)
    return [None if x is None else x.requires_grad_() for x in (q.to(dtype), k.to(dtype), v.to(dtype), log_keep, sinks)], co


def run(backend, tensors, cotangent, window, document=None, use_sinks=False, dtype=None, **scores):
    """Output and the gradients of all tensors that are used, computed from copies of `dtype`."""
    copies = [None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    q, k, v, log_keep, sinks = copies
    scaling = q.shape[-1] ** -0.5
    sinks = sinks if use_sinks else None
    out = soft_attention(q, k, v, log_keep, window, document, scaling, sinks=sinks, backend=backend, **scores)
    used = [x for x in (q, k, v, log_keep, sinks) if x is not None]
    return out.detach(), *torch.autograd.grad((out * cotangent.to(out.dtype)).sum(), used)


def check(tensors, cotangent, *args, **settings):
    expected = run("reference", tensors, cotangent, *args, dtype=torch.float64, **settings)
    found = run("triton", tensors, cotangent, *args, **settings)
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5 * max(1.0, float(want.abs().max())))


@pytest.mark.parametrize(
    ("shape", "keep", "window", "rows", "scores"),
    [
        (dict(num_tokens=1, width=16), "random", 1, None, {}),
        (dict(num_tokens=16, width=32, group=1), "zero", 1, None, {}),
        (dict(num_tokens=17, width=16, group=3), "random", 17, None, {}),
        (dict(num_tokens=33, width=8, group=1), "none", 3, None, {}),
        (dict(num_tokens=70, width=16, group=1), "random", 20, None, {}),
        (dict(num_tokens=50, width=16), "hard", 1, None, {}),
        (dict(num_tokens=37, width=80, group=1, num_kv_heads=2), "random", 5, (PACKED,), {}),
        (dict(num_tokens=37, width=16, group=4), "shared", 3, (REUSED,), {}),
        (dict(num_tokens=37, width=16, group=1, batch=2, num_kv_heads=2), "shared", 18, (LEFT, SHARED), {}),
        (dict(num_tokens=37, width=16, group=1, batch=2), "none", 40, (PACKED, ((-1, 37),)), {}),
        (dict(num_tokens=37, width=32), "random", 4, (PACKED,), {"softcap": 2.0, "use_sinks": True}),
        (dict(num_tokens=60, width=16), "random", 3, None, {"sliding_window": 25, "use_sinks": True}),
        (dict(num_tokens=37, width=16), "hard", 3, (LEFT,), {"sliding_window": 2}),
    ],
)
def test_the_kernels_equal_the_reference_in_output_and_every_gradient(shape, keep, window, rows, scores):
    tensors, cotangent = draw(**shape, keep=keep)
    check(tensors, cotangent, window, None if rows is None else documents(*rows), **scores)


@pytest.mark.parametrize(
    ("keep", "window", "rows", "sliding"),
    [
        ("zero", 31, None, None),  # one more token in a window would be one more block that no row is masked in
        ("zero", 32, None, None),
        ("zero", 4, None, 52),
        ("holes", 4, None, None),
        ("zero", 3, ((0, 55), (1, 25)), None),
        ("zero", 3, ((0, 20), (1, 10), (0, 50)), None),
        ("none", 80, ((0, 70), (1, 10)), 40),
        ("none", 80, None, 63),
    ],
)
def test_blocks_without_masks_end_where_a_row_sees_less(keep, window, rows, sliding):
    tensors, cotangent = draw(80, 16, group=1, keep=keep)
    check(tensors, cotangent, window, None if rows is None else documents(rows), sliding_window=sliding)


@pytest.mark.parametrize("seed", range(6))
def test_random_cases_equal_the_reference(seed):
    g = torch.Generator().manual_seed(100 + seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=g))]

    num_tokens = int(torch.randint(1, 50, (), generator=g))
    shape = {"num_tokens": num_tokens, "width": pick(16, 24), "group": pick(1, 2), "num_kv_heads": pick(1, 2), "seed": seed}
    tensors, cotangent = draw(**shape, keep=pick("none", "zero", "hard", "random", "shared"))
    ends = torch.randint(0, num_tokens + 1, (3,), generator=g).sort().values.tolist()
    lengths = [b - a for a, b in zip([0, *ends], [*ends, num_tokens], strict=True)]
    rows = tuple(zip(pick((0, 1, 2, -1), (-1, 5, 5, 2), (1, 0, 1, 0), (0, -1, 0, 0)), lengths, strict=True))
    scores = {"softcap": pick(None, 3.0), "sliding_window": pick(None, 1, 19), "use_sinks": pick(False, True)}
    check(tensors, cotangent, int(torch.randint(1, num_tokens + 3, (), generator=g)), documents(rows), **scores)


@pytest.mark.parametrize("tile", [Tile(16, 32), Tile(32, 16)])
def test_blocks_of_other_shapes_give_the_same(tile, monkeypatch):
    monkeypatch.setattr(relaxed, "choose_tiles", lambda width, dtype: Tiles(tile, tile, tile))
    tensors, cotangent = draw(70, 16)
    check(tensors, cotangent, 7, documents(((0, 50), (1, 20))))


@pytest.mark.parametrize("width", [16, 80])
def test_bfloat16_errs_at_most_twice_as_much_as_plain_bfloat16(width):
    tensors, cotangent = draw(48, width, dtype=torch.bfloat16)
    cotangent = cotangent.bfloat16()
    exact = run("reference", tensors, cotangent, 9, documents(((0, 40), (1, 8))), dtype=torch.float64)
    plain = run("reference", tensors, cotangent, 9, documents(((0, 40), (1, 8))))
    found = run("triton", tensors, cotangent, 9, documents(((0, 40), (1, 8))))
    for got, naive, want in zip(found, plain, exact, strict=True):
        assert got.dtype == naive.dtype
        assert (got - want).abs().max() <= 2 * (naive - want).abs().max()
        assert (got - want).norm() <= (naive - want).norm()


def test_the_same_inputs_give_the_same_bits():
    tensors, cotangent = draw(37, 16, dtype=torch.bfloat16)
    first, second = (run("triton", tensors, cotangent, 5, documents(PACKED)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_under_checkpointing_the_forward_runs_once_where_it_is_kept_and_gives_the_same_bits(monkeypatch):
    tensors, cotangent = draw(20, 16)
    q, k, v, log_keep, _ = tensors
    calls, found = [], []
    forward = relaxed._forward
    monkeypatch.setattr(relaxed, "_forward", lambda *x: calls.append(1) or forward(*x))
    for kept in (None, []):
        calls.clear()
        settings = {"backend": "triton", "kept": kept, "use_reentrant": False}
        out = checkpoint(soft_attention, q, k, v, log_keep, 5, documents(((0, 12), (1, 8))), 0.3, **settings)
        found.append((out.detach().clone(), *torch.autograd.grad((out * cotangent).sum(), (q, k, v, log_keep))))
        assert len(calls) == (2 if kept is None else 1)
        assert not kept
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_tensors_as_a_model_gives_them_change_nothing():
    tensors, cotangent = draw(37, 16, num_kv_heads=2)
    expected = run("triton", tensors, cotangent, 5)
    q, k, v, log_keep, _ = (x.detach() for x in tensors)
    fused = torch.cat([x.transpose(1, 2) for x in (q, k, v)], 2)  # one projection for all three, as [B, T, heads, D]
    fused.requires_grad_()
    q, k, v = (x.transpose(1, 2) for x in fused.split([4, 2, 2], 2))
    log_keep.requires_grad_()
    out = soft_attention(q, k, v, log_keep, 5, None, 16**-0.5, backend="triton")
    cotangent = cotangent.transpose(2, 3).contiguous().transpose(2, 3)  # columns apart
    grad, keep_grad = torch.autograd.grad(out, (fused, log_keep), cotangent)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(grad.transpose(1, 2), torch.cat(expected[1:4], 1))
    torch.testing.assert_close(keep_grad, expected[4])


# -- what is left out --------------------------------------------------------------------------------------------------
def test_keys_that_are_left_out_change_nothing(monkeypatch):
    tensors, cotangent = draw(70, 16)
    q, k, v, log_keep, sinks = tensors
    low = log_keep.detach() * 0 - 1
    low[..., ::2] = -200.0
    low[..., 20:50] = -300.0  # whole blocks
    tensors = [q, k, v, low.requires_grad_(), sinks]
    chosen = []
    monkeypatch.setattr(relaxed, "select_far", lambda *args: chosen.append(far.select_far(*args)) or chosen[-1])
    found = run("triton", tensors, cotangent, 7)
    monkeypatch.setattr(far, "noise_floor", lambda num_tokens: -math.inf)
    everything = run("triton", tensors, cotangent, 7)
    assert [int(x.count[0, 0, -1]) for x in chosen] == [20, 70]
    for got, want in zip(found, everything, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_a_window_that_is_tuned_leaves_nothing_but_its_sinks():
    log_keep = torch.full((1, 2, 50), -math.inf)
    log_keep[..., :4] = 0
    q, k = torch.randn(1, 4, 50, 8), torch.randn(1, 2, 50, 8)
    padded = torch.zeros(1, 50, dtype=torch.long)
    padded[:, 2:4] = -1
    assert far.select_far(q, k, log_keep, padded, 0.3).position[0, 0, :3].tolist() == [0, 1, 50]
    chosen = far.select_far(q, k, log_keep, None, 0.3)
    assert chosen.position[..., :5].tolist() == [[[0, 1, 2, 3, 50]] * 2]
    assert chosen.count[0, 0].tolist() == [0, 1, 2, 3] + [4] * 47
    assert torch.equal(chosen.pack(k)[:, :, :4], k[:, :, :4])


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.floats(0.1, 8.0), st.integers(2, 60), st.booleans())
def test_all_that_is_left_out_weighs_less_than_half_a_unit_in_the_last_place(seed, size, num_tokens, use_softcap):
    (q, k, v, log_keep, _), _ = draw(num_tokens, 8, group=2, num_kv_heads=2, seed=seed)
    q, k, v, log_keep = (x.detach().cpu() for x in (q, k, v, log_keep))
    q, k, log_keep = size * q, k + 5, 3 * log_keep  # a mean that all keys share does not count
    alive = far.select_far(q, k, log_keep, None, 0.35).alive
    bias = reference.soft_bias(log_keep.double(), 2)
    _, weights = reference.attend(q.double(), k.double(), v.double(), bias, 0.35, 4.0 if use_softcap else None)
    distance = torch.arange(num_tokens)[:, None] - torch.arange(num_tokens)
    left_out = (distance >= 2) & ~alive.repeat_interleave(2, 1)[:, :, None]
    assert (weights * left_out).sum(-1).max() <= 2**-25


def test_a_key_is_left_out_by_a_bound_that_is_met():
    k = torch.tensor([[[[2.0, 0.0], [-2.0, 0.0]]]])  # opposite keys, and a query that points from its own to the other
    q = torch.tensor([[[[0.0, 0.0], [10.0, 0.0]]]])
    edge = far.noise_floor(2) - 0.5 * 10 * 4
    for log_keep, count in ((edge - 0.01, 0), (edge + 0.01, 1)):
        keep = torch.tensor([[[log_keep, -math.inf]]])
        assert int(far.select_far(q, k, keep, None, 0.5).count[0, 0, -1]) == count


def test_values_that_are_no_numbers_reach_the_output():
    tensors, cotangent = draw(20, 16, keep="zero")
    tensors[3].data[0, 0, 2] = math.nan
    out, *_ = run("triton", tensors, cotangent, 3)
    assert out[:, :, 5:].isnan().any(-1).all()
    assert not out[:, :, :5].isnan().any()


@example([(0, 5), (-1, 3), (0, 9)])
@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(1, 12)), min_size=1, max_size=6))
def test_spans_hold_what_a_token_sees_and_runs_nothing_else(runs):
    document = documents(runs).cpu()
    found = spans.document_spans(document)
    for t, name in enumerate(document[0].tolist()):
        seen_from, seen_until, run_start, run_end = (int(x[0, t]) for x in found)
        if name < 0:
            assert seen_from >= seen_until
            assert run_start >= run_end
            continue
        same = (document[0] == name).nonzero()[:, 0].tolist()
        assert seen_from <= same[0]
        assert seen_until > same[-1]
        run = set(range(run_start, run_end))
        assert t in run
        assert run <= set(same)
        assert run_start == 0 or document[0, run_start - 1] != name
        assert run_end == document.shape[1] or document[0, run_end] != name


# -- refusals ----------------------------------------------------------------------------------------------------------
def test_what_the_kernels_cannot_do_is_refused_with_what_can():
    (q, k, v, log_keep, _), _ = draw(8, 16)
    with pytest.raises(ValueError, match="not float64, float64, float64; use attention=chunked"):
        soft_attention(q.double(), k.double(), v.double(), log_keep, 3, None, 0.3, backend="triton")
    with pytest.raises(ValueError, match="not float32, float32, bfloat16"):
        soft_attention(q, k, v.bfloat16(), log_keep, 3, None, 0.3, backend="triton")
    wide = torch.zeros(1, 1, 4, 264, device=DEVICE)
    with pytest.raises(ValueError, match="width up to 256, not 264 and 264; use attention=flex or attention=chunked"):
        soft_attention(wide, wide, wide, None, 3, None, 0.3, backend="triton")
    out = soft_attention(q, k, v, log_keep, 3, None, 0.3, backend="triton")
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


def test_a_device_without_kernels_and_a_missing_package_are_named(monkeypatch):
    monkeypatch.setattr(relaxed, "INTERPRETED", False)
    choose = soft.choose_backend.__wrapped__
    assert choose("triton", "cuda") == "triton"
    with pytest.raises(ValueError, match="kernels for cuda, not for cpu; use attention=chunked"):
        choose("triton", "cpu")
    monkeypatch.setitem(sys.modules, "dms_lab.attention.kernels.relaxed", None)
    monkeypatch.delattr("dms_lab.attention.kernels.relaxed")
    with pytest.raises(ValueError, match=r"pip install 'dms_lab\[gpu\]'"):
        choose("triton", "cuda")


def test_importing_the_training_attention_leaves_triton_alone():
    code = "import sys, dms_lab.attention.soft; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- compiled ----------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not relaxed.INTERPRETED, reason="a GPU is here: the kernels above were compiled for it")
def test_the_kernels_compile_for_hopper_within_its_shared_memory(tmp_path):
    """By Triton's own compiler, without a GPU: what the interpreter lets pass may not compile."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    words = [sys.executable, BENCHMARK / "compiled.py", "--width", "64", "--kernels", "key_grad_far"]
    text = subprocess.run(words, env=environment, check=True, capture_output=True, text=True).stdout
    assert "| 64 | key_grad_far |" in text


def test_the_benchmark_times_the_kernels_against_dense_attention(tmp_path):
    words = [
        sys.executable,
        "-m",
        "experiments.benchmarks.training_attention.measure",
        "time",
        "--short",
        "--shapes",
        "tiny",
    ]
    words += ["--tokens", "48", "--documents", "2", "--rounds", "1", "--contestants", "triton", "math"]
    subprocess.run([*words, "--out", tmp_path / "out.json"], check=True, capture_output=True, cwd=BENCHMARK.parents[2])
    about, rows = harness.read(tmp_path / "out.json")
    assert about["git_revision"]
    assert about["versions"]["torch"] == torch.__version__
    assert {row.name for row in rows} == {"triton", "math"}
    assert {place[1] for place in harness.ratios(rows)} == {"triton"}
