"""The training paths equal the dense reference in output and in every gradient."""

import itertools

import pytest
import torch

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
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_errs_at_most_twice_as_much_as_the_reference_in_that_precision(dtype):
    exact_out, exact = run("reference", inputs(), 5, None, True)
    plain_out, plain = run("reference", inputs(dtype), 5, None, True)
    out, grads = run("chunked", inputs(dtype), 5, None, True)
    floor = 1e-6 if dtype == torch.float32 else 1e-3
    for got, low, want in zip((out, *grads), (plain_out, *plain), (exact_out, *exact), strict=True):
        assert (got - want).abs().max() <= 2 * (low - want).abs().max() + floor


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


def test_auto_is_named_and_flex_is_refused_where_it_cannot_train():
    assert choose_backend("auto", "cpu") == "chunked"
    assert choose_backend("auto", "cuda") == "flex"
    with pytest.raises(ValueError, match="no backward on cpu"):
        choose_backend("flex", "cpu")
    with pytest.raises(ValueError, match="choose one of auto, reference, chunked, flex"):
        choose_backend("sdpa", "cpu")
