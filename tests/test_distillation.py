"""Chunking changes memory, never a value or a gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dms_lab.distillation import kl_loss, lm_loss

N, WIDTH, VOCABULARY = 23, 5, 11


def setting():
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(N, WIDTH, generator=g, dtype=torch.float64) for _ in range(2))
    head, teacher_head = nn.Linear(WIDTH, VOCABULARY).double(), nn.Linear(WIDTH, VOCABULARY).double()
    return student.requires_grad_(), teacher.requires_grad_(), head, teacher_head


@pytest.mark.parametrize("chunk", [1, 4, 22, 23, 100])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_chunked_kl_equals_the_definition_in_value_and_gradient(direction, chunk):
    student, teacher, head, teacher_head = setting()
    p, q = teacher_head(teacher).detach().log_softmax(-1), head(student).log_softmax(-1)
    if direction == "reverse":
        p, q = q, p
    expected = (p.exp() * (p - q)).sum(-1).mean()
    wanted = torch.autograd.grad(expected, [student, *head.parameters()])
    loss = kl_loss(student, teacher, head, teacher_head, direction, chunk)
    torch.testing.assert_close(loss, expected)
    for got, want in zip(torch.autograd.grad(loss, [student, *head.parameters()]), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_the_teacher_gets_no_gradient():
    student, teacher, head, teacher_head = setting()
    kl_loss(student, teacher, head, teacher_head, chunk_tokens=7).backward()
    assert teacher.grad is None
    assert all(p.grad is None for p in teacher_head.parameters())


def test_equal_distributions_cost_nothing():
    student, _, head, _ = setting()
    assert kl_loss(student, student, head, head).abs() < 1e-6


@pytest.mark.parametrize("chunk", [1, 6, 64])
def test_chunked_cross_entropy_equals_the_unchunked_one(chunk):
    student, _, head, _ = setting()
    labels = torch.arange(N) % VOCABULARY
    loss, expected = lm_loss(student, labels, head, chunk), F.cross_entropy(head(student), labels)
    torch.testing.assert_close(loss, expected)
    inputs = [student, *head.parameters()]
    for got, want in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_a_temperature_divides_both_logits_and_keeps_the_gradients_size():
    student, teacher, head, teacher_head = setting()
    p, q = (teacher_head(teacher) / 3).log_softmax(-1), (head(student) / 3).log_softmax(-1)
    loss = kl_loss(student, teacher, head, teacher_head, chunk_tokens=7, temperature=3.0)
    torch.testing.assert_close(loss, 9 * (p.exp() * (p - q)).sum(-1).mean())
    with pytest.raises(ValueError, match="above 0"):
        kl_loss(student, teacher, head, teacher_head, temperature=0.0)


def test_nothing_to_learn_from_is_refused():
    _, _, head, _ = setting()
    with pytest.raises(ValueError, match="only padding"):
        lm_loss(torch.zeros(0, WIDTH, dtype=torch.float64), torch.zeros(0, dtype=torch.long), head)
    with pytest.raises(ValueError, match="choose one of forward, reverse"):
        kl_loss(torch.zeros(1, WIDTH), torch.zeros(1, WIDTH), head, head, "both")
