"""The counts of the benchmarks against what torch counts in the same operations, and against numbers worked out by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from dms_lab import economics
from experiments.benchmarks import counts

SMALL = counts.Shape(num_layers=3, hidden=32, mlp=48, num_heads=4, num_kv_heads=2, head_dim=8, vocabulary=50)


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def layer_products(shape, rows):
    query, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    sizes = [(shape.hidden, query), (shape.hidden, kv), (shape.hidden, kv), (query, shape.hidden)]
    sizes += [(shape.hidden, shape.mlp)] * 2 + [(shape.mlp, shape.hidden)]
    for inner, outer in sizes:
        F.linear(torch.zeros(rows, inner), torch.zeros(outer, inner))


def test_operations_of_a_layer_are_those_that_torch_counts():
    assert counts.matrices(SMALL, 7, 2).flops == counted(lambda: layer_products(SMALL, 7))
    head = lambda: F.linear(torch.zeros(7, SMALL.hidden), torch.zeros(SMALL.vocabulary, SMALL.hidden))  # noqa: E731
    assert counts.head(SMALL, 7, 2).flops == counted(head)


def dense_attention(tokens):
    q, k, v = (torch.zeros(2, 4, tokens, 8, requires_grad=True) for _ in range(3))
    scores = (q @ k.transpose(2, 3)).softmax(-1)
    return scores @ v


@pytest.mark.parametrize("tokens", [1, 5, 64])
def test_operations_of_attention_are_the_causal_part_of_what_torch_counts_without_a_mask(tokens):
    share = (tokens + 1) / (2 * tokens)  # of T * T pairs
    forward = counted(lambda: dense_attention(tokens))
    both = counted(lambda: dense_attention(tokens).sum().backward())
    assert counts.attention_forward(SMALL, 2, tokens, 2).flops == pytest.approx(share * forward)
    backward = counts.attention_backward(SMALL, 2, tokens, 2).flops
    assert backward == pytest.approx(share * (both - forward) * 5 / 4)  # the scores are computed once more


def test_pairs_that_are_visible():
    seen = [[j > i - 3 or j % 2 == 0 for j in range(i + 1)] for i in range(10)]
    old = sum(i - 3 + 1 for i in range(3, 10))
    kept = sum(j % 2 == 0 and j <= i - 3 for i in range(10) for j in range(i + 1))
    assert counts.visible_pairs(10, 3, kept / old) == pytest.approx(sum(map(sum, seen)))
    assert counts.visible_pairs(10, 3, 1.0) == 55
    assert counts.visible_pairs(2, 3, 0.0) == 3


def test_bytes_by_hand():
    assert counts.decode_attention(SMALL, 1, 100, 2).bytes == 2 * 2 * 8 * 2 * (100 + 2) + 2 * 4 * 8 * 2
    forward = counts.attention_forward(SMALL, 1, 10, 2, relaxed=False).bytes
    assert forward == 2 * 10 * 8 * (4 + 2 + 2 + 4) + 4 * 10 * 4  # query, key, value, output; log-sum-exp
    assert counts.attention_forward(SMALL, 1, 10, 2).bytes == forward + 4 * 10 * 2
    weights = 32 * (2 * 32 + 2 * 16 + 3 * 48)
    assert SMALL.layer_weights == weights
    inputs_and_outputs = 32 + 32 + 16 + 16 + 32 + 32 + 32 + 48 + 48 + 48 + 32
    assert counts.matrices(SMALL, 1, 2).bytes == 2 * (weights + inputs_and_outputs)


@pytest.mark.parametrize("name", counts.SHAPES)
def test_a_step_of_decoding_moves_what_the_cost_model_of_the_paper_says(name):
    shape = counts.SHAPES[name]
    kv = shape.num_kv_heads * shape.head_dim
    model = economics.ModelShape(shape.num_layers, shape.hidden, shape.mlp, kv, shape.vocabulary)
    known = economics.decode_step(model, economics.H100_SXM, batch=8, context=32768, cr=8)
    found = counts.decode_step(shape, 8, 32768 / 8, 2)
    assert found.flops == pytest.approx(known.flops, rel=1e-9)
    assert found.bytes == pytest.approx(known.total_bytes, rel=0.005)  # activations are in ours alone
    assert found.bytes > known.total_bytes


def test_the_dearer_ways_of_training_cost_more_and_floors_follow_the_ceilings():
    shape = counts.SHAPES["Qwen3-8B"]
    frozen, checkpointed = (counts.training_step(shape, 1, 4096, 2, "adapter", c) for c in (False, True))
    assert checkpointed.flops > frozen.flops
    kept = counts.training_step(shape, 1, 4096, 2, "adapter", keep_attention=True)
    assert checkpointed.flops - kept.flops == shape.num_layers * counts.attention_forward(shape, 1, 4096, 2).flops
    whole = counts.training_step(shape, 1, 4096, 2, "all", False)
    weights = shape.num_layers * shape.layer_weights + shape.vocabulary * shape.hidden
    assert whole.flops - frozen.flops == pytest.approx(2 * 4096 * weights)  # gradients of the weights
    ceilings = counts.Ceilings(flops=2e12, bandwidth=1e11)
    assert counts.Work(4e12, 5e11).floors(ceilings) == (2.0, 5.0)


@pytest.mark.parametrize("name", counts.SHAPES)
def test_teacher_and_student_in_one_pass_gain_nothing_at_the_lengths_of_the_recipes(name):
    h100 = counts.Ceilings(989e12, 3.35e12)
    for num_rows in (4096, 8192, 32768):
        two, one = counts.passes(counts.SHAPES[name], num_rows, 2, h100)
        assert one == pytest.approx(two)
    two, one = counts.passes(counts.SHAPES[name], 16, 2, h100)
    assert one < 0.6 * two
