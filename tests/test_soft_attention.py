"""The training paths equal the dense reference in output and in every gradient."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dms_lab import eviction
from dms_lab.attention import soft
from dms_lab.attention.soft import choose_backend, soft_attention

B, H, K, T, D = 2, 4, 2, 37, 8


def inputs(dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(B, H, T, D, generator=g, dtype=torch.float64)
    k, v = (torch.randn(B, K, T, D, generator=g, dtype=torch.float64) for _ in range(2))
    log_keep = torch.nn.functional.logsigmoid(3 * torch.randn(B, K, T, generator=g, dtype=torch.float64))
    sinks = torch.randn(H, generator=g, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (q, k, v, log_keep, sinks)]


def packed():
    row = [0] * 11 + [1] * 9 + [2] * 12 + [-1] * 5
    left = [-1] * 7 + [4] * 30
    return torch.tensor([row, left])


def run(backend, tensors, window, document, use_sinks, **settings):
    q, k, v, log_keep, sinks = tensors
    out = soft_attention(
        q, k, v, log_keep, window, document, 0.3, sinks=sinks if use_sinks else None, backend=backend, **settings
    )
    # Eighths, exact in every precision, so that the cotangent is the same in all of them.
    weight = ((torch.arange(out.numel()) % 17 - 8) / 8).to(out.dtype).view(out.shape)
    wanted = tensors if use_sinks else tensors[:4]
    return out, torch.autograd.grad((out * weight).sum(), wanted)


@pytest.mark.parametrize("document", [None, packed(), torch.tensor([[3] * T, [5] * 20 + [-1] * (T - 20)])])
@pytest.mark.parametrize(
    ("window", "softcap", "use_sinks", "sliding"),
    [
        (1, None, False, None),
        (5, None, False, None),
        (T + 3, None, False, None),
        (4, 2.0, True, None),
        (3, None, True, 9),
    ],
)
def test_chunked_equals_the_reference_in_output_and_every_gradient(
    window, softcap, use_sinks, sliding, document, monkeypatch
):
    settings = {"softcap": softcap, "sliding_window": sliding}
    expected = run("reference", inputs(), window, document, use_sinks, **settings)
    for chunk in (1, 8, T, 128):
        monkeypatch.setattr(soft, "_CHUNK", chunk)
        out, grads = run("chunked", inputs(), window, document, use_sinks, **settings)
        torch.testing.assert_close(out, expected[0], rtol=1e-10, atol=1e-10)
        for got, want in zip(grads, expected[1], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("document", [None, packed()])
@pytest.mark.parametrize(("softcap", "sliding"), [(None, None), (2.0, 9)])
def test_without_decisions_chunked_equals_the_reference_in_every_gradient(softcap, sliding, document):
    settings = {"softcap": softcap, "sliding_window": sliding}
    results = []
    for backend in ("reference", "chunked"):
        q, k, v, _, _ = inputs()
        out = soft_attention(q, k, v, None, 5, document, 0.3, backend=backend, **settings)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("document", [None, packed()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_errs_at_most_twice_as_much_as_the_reference_in_that_precision(dtype, document):
    low = inputs(dtype)
    same = [x.detach().double().requires_grad_() for x in low]  # the rounded inputs: their rounding is nobody's error
    exact_out, exact = run("reference", same, 5, document, True)
    plain_out, plain = run("reference", low, 5, document, True)
    out, grads = run("chunked", low, 5, document, True)
    for got, naive, want in zip((out, *grads), (plain_out, *plain), (exact_out, *exact), strict=True):
        assert got.dtype == dtype
        rounding = torch.finfo(dtype).eps * want.abs().max()  # of the result itself, where the naive path is lucky
        assert (got - want).abs().max() <= 2 * (naive - want).abs().max() + rounding


def test_bfloat16_results_are_the_float32_ones_rounded_once():
    low = inputs(torch.bfloat16)
    expected = run("chunked", [x.detach().float().requires_grad_() for x in low], 5, packed(), False)
    out, grads = run("chunked", low, 5, packed(), False)
    for got, want in zip((out, *grads), (expected[0], *expected[1]), strict=True):
        assert torch.equal(got, want.bfloat16())


def test_autocast_does_not_round_what_chunked_computes():
    expected = run("chunked", inputs(torch.float32), 5, packed(), True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, grads = run("chunked", inputs(torch.float32), 5, packed(), True)
    for got, want in zip((out, *grads), (expected[0], *expected[1]), strict=True):
        assert torch.equal(got, want)


def test_a_second_derivative_is_refused_and_not_wrong():
    q, k, v, log_keep, _ = inputs()
    out = soft_attention(q, k, v, log_keep, 5, None, 0.3, backend="chunked")
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_decisions_shared_by_the_heads_get_the_sum_of_their_gradients(backend):
    q, k, v, log_keep, _ = inputs()
    shared = log_keep.detach()[:, :1].requires_grad_()
    single = shared.detach().repeat(1, K, 1).requires_grad_()
    out = soft_attention(q, k, v, shared, 5, packed(), 0.3, backend=backend)
    want = soft_attention(q, k, v, single, 5, packed(), 0.3, backend=backend)
    torch.testing.assert_close(out, want)
    (grad,) = torch.autograd.grad(out.square().sum(), shared)
    (grads,) = torch.autograd.grad(want.square().sum(), single)
    torch.testing.assert_close(grad, grads.sum(1, keepdim=True))


def test_transposed_inputs_as_a_model_gives_them_change_nothing():
    expected = run("chunked", inputs(), 5, packed(), True)
    tensors = inputs()
    for n in range(3):
        tensors[n] = tensors[n].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    out, grads = run("chunked", tensors, 5, packed(), True)
    for got, want in zip((out, *grads), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(got, want)


def test_decisions_of_minus_infinity_are_hard_evictions():
    q, k, v, _, _ = inputs()
    evict = torch.rand(B, K, T, generator=torch.Generator().manual_seed(1)) < 0.6
    log_keep = torch.zeros(B, K, T, dtype=torch.float64).masked_fill(evict, -torch.inf).requires_grad_()
    out = soft_attention(q, k, v, log_keep, 6, None, 0.3, backend="chunked")
    seen = eviction.visible(evict, 6)
    expected, _ = soft.reference.attend(q, k, v, seen, 0.3)
    torch.testing.assert_close(out, expected)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.sum(), (q, k, v, log_keep)))


def test_no_decisions_are_plain_causal_attention():
    q, k, v, log_keep, _ = inputs()
    plain = soft_attention(q, k, v, None, T, None, 0.3, backend="chunked")
    kept = soft_attention(q, k, v, torch.zeros_like(log_keep), 3, None, 0.3, backend="chunked")
    torch.testing.assert_close(plain, kept)


@pytest.mark.parametrize(("use_sinks", "document"), list(itertools.product([False, True], [None, packed()])))
def test_flex_gives_the_reference_output(use_sinks, document):
    q, k, v, log_keep, sinks = (x.detach().float() for x in inputs())
    sinks = sinks if use_sinks else None
    settings = (q, k, v, log_keep, 5, document, 0.3, 3.0, sinks, None)
    expected = soft_attention(*settings, backend="reference")
    torch.testing.assert_close(soft.flex_attention(*settings), expected, rtol=1e-4, atol=1e-5)


def test_flex_gives_the_reference_gradient_of_the_decisions():
    # Eager flex on a CPU differentiates a captured bias, but no query, key or value.
    q, k, v, log_keep, _ = (x.detach().float() for x in inputs())
    grads = []
    for backend in (soft.flex_attention, lambda *x: soft_attention(*x, backend="reference")):
        keep = log_keep.clone().requires_grad_()
        out = backend(q, k, v, keep, 5, packed(), 0.3, None, None, None)
        grads += torch.autograd.grad(out.square().sum(), keep)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@example([(0, 5), (-1, 3)], None, True)  # a block that begins as the document of the one before and ends as padding
@example([(0, 4), (1, 3), (2, 5)], None, True)
@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(-1, 3), st.integers(1, 5)), min_size=1, max_size=5),
    st.one_of(st.none(), st.integers(1, 20)),
    st.booleans(),
)
def test_the_blocks_that_flex_visits_hold_every_visible_pair(runs, sliding, with_documents):
    ids = torch.tensor([[name for name, length in runs for _ in range(length)]])
    document = ids if with_documents else None
    num_tokens = ids.shape[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(soft, "_BLOCK", 4)
        mask = soft._block_mask(None, document, num_tokens, sliding, ids.device)
    bias = soft.reference.soft_bias(torch.zeros(1, 1, num_tokens), 1, document, sliding)
    seen = bias[0, 0] == 0
    lists = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
    counts, indices, full_counts, full_indices = (x[0, 0] for x in lists)
    for row in range(len(counts)):
        some = indices[row, : counts[row]].tolist()
        full = full_indices[row, : full_counts[row]].tolist()
        assert not set(some) & set(full)
        for column in range(len(counts)):
            block = seen[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            assert column in some + full or not block.any()
            assert column not in full or (block.all() and block.shape == (4, 4))


def test_auto_is_named_and_flex_is_refused_where_it_cannot_train():
    assert choose_backend("auto", "cpu") == "chunked"
    assert choose_backend("auto", "cuda") == "flex"
    assert choose_backend("auto", "cuda", 8) == "chunked"  # flex compiles no narrower heads than 16
    with pytest.raises(ValueError, match="no backward on cpu"):
        choose_backend("flex", "cpu")
    with pytest.raises(ValueError, match="choose one of auto, reference, chunked, flex, triton"):
        choose_backend("sdpa", "cpu")
