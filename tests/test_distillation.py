"""Chunking changes memory, never a value or a gradient."""

import pytest
import torch
import torch.nn.functional as F
from live_bytes import LiveBytes
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dms_lab.distillation import kl_loss, lm_loss

N, WIDTH, VOCABULARY = 23, 5, 11


class Capped(nn.Module):
    """A head with two weights, a bias used twice and a soft-cap; one of its weights is frozen."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, 7, bias=False), nn.Linear(7, VOCABULARY)
        self.outer.weight.requires_grad_(False)

    def forward(self, hidden):
        return 5 * torch.tanh((self.outer(self.inner(hidden)) + (self.outer.bias + self.outer.bias**2)) / 5)


def plain_kl(student, teacher, head, teacher_head, direction, temperature=1.0):
    p, q = ((h(x) / temperature).log_softmax(-1) for h, x in ((teacher_head, teacher.detach()), (head, student)))
    if direction == "reverse":
        p, q = q, p
    return temperature**2 * (p.exp() * (p - q)).sum(-1).mean()


def setting():
    g = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(N, WIDTH, generator=g, dtype=torch.float64) for _ in range(2))
    head, teacher_head = nn.Linear(WIDTH, VOCABULARY).double(), nn.Linear(WIDTH, VOCABULARY).double()
    return student.requires_grad_(), teacher.requires_grad_(), head, teacher_head


@pytest.mark.parametrize("chunk", [1, 4, 22, 23, 100])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_chunked_kl_equals_the_definition_in_value_and_gradient(direction, chunk):
    student, teacher, head, teacher_head = setting()
    teacher_head.requires_grad_(False)
    expected = plain_kl(student, teacher, head, teacher_head, direction)
    wanted = torch.autograd.grad(expected, [student, *head.parameters()])
    loss = kl_loss(student, teacher, head, teacher_head, direction, chunk)
    torch.testing.assert_close(loss, expected)
    for got, want in zip(torch.autograd.grad(loss, [student, *head.parameters()]), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("trained", ["hidden", "head", "both"])
def test_any_head_gets_its_gradients_over_any_number_of_losses_and_backwards(trained, direction, temperature):
    student, teacher, _, teacher_head = setting()
    teacher_head.requires_grad_(False)
    head = Capped().double()
    student.requires_grad_(trained != "head")
    head.inner.requires_grad_(trained != "hidden")
    head.outer.bias.requires_grad_(trained != "hidden")
    inputs = [x for x in (student, *head.parameters()) if x.requires_grad]
    expected = sum(
        weight * plain_kl(student[n:], teacher[n:], head, teacher_head, direction, temperature)
        for n, weight in ((0, 0.25), (3, 2.0))
    )
    wanted = torch.autograd.grad(expected, inputs)
    loss = sum(
        weight * kl_loss(student[n:], teacher[n:], head, teacher_head, direction, 6, temperature)
        for n, weight in ((0, 0.25), (3, 2.0))
    )
    torch.testing.assert_close(loss, expected)
    loss.backward(retain_graph=True)
    loss.backward()
    for x, want in zip(inputs, wanted, strict=True):
        torch.testing.assert_close(x.grad, 2 * want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("autocast", [False, True])
def test_in_bfloat16_gradients_err_no_more_than_twice_what_plain_bfloat16_does(direction, autocast):
    g = torch.Generator().manual_seed(0)
    exact = [torch.randn(*size, generator=g, dtype=torch.float64) for size in ((64, 32), (64, 32), (90, 32), (90, 32))]

    def gradients(loss, dtype, dtype_of_sums):
        student, teacher, weight, teacher_weight = (x.to(dtype, copy=True).requires_grad_() for x in exact)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype_of_sums == torch.float32):
            head = lambda x: F.linear(x, weight)  # noqa: E731
            loss(student, teacher, head, lambda x: F.linear(x, teacher_weight)).backward()
        assert {student.grad.dtype, weight.grad.dtype} == {dtype}
        return [student.grad.double(), weight.grad.double()]

    def plain(student, teacher, head, teacher_head):
        q, p = head(student).float().log_softmax(-1), teacher_head(teacher).detach().float().log_softmax(-1)
        p, q = (p, q) if direction == "forward" else (q, p)
        return (p.exp() * (p - q)).sum(-1).mean()

    def ours(*given):
        return kl_loss(*given, direction, 17)

    low = torch.float32 if autocast else torch.bfloat16
    wanted = gradients(lambda *x: plain_kl(*x, direction), torch.float64, torch.float64)
    for got, usual, want in zip(
        gradients(ours, low, torch.float32), gradients(plain, low, torch.float32), wanted, strict=True
    ):
        assert (got - want).norm() < 2 * (usual - want).norm()


@pytest.mark.parametrize(("is_trained", "products"), [(False, 3), (True, 4)])
def test_the_head_is_multiplied_once_for_the_teacher_and_once_each_way_for_the_student(is_trained, products):
    student, teacher, head, teacher_head = setting()
    head.requires_grad_(is_trained)
    with FlopCounterMode(display=False) as counter:
        kl_loss(student, teacher, head, teacher_head, chunk_tokens=7).backward()
    assert counter.get_total_flops() == products * 2 * N * WIDTH * VOCABULARY


@pytest.mark.parametrize(("dtype", "copies"), [(torch.float32, 3.0), (torch.bfloat16, 3.5)])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_chunk_holds_no_more_copies_of_its_logits_than_is_said(direction, dtype, copies):
    student, teacher = torch.randn(64, 4, dtype=dtype, requires_grad=True), torch.randn(64, 4, dtype=dtype)
    head = nn.Linear(4, 5000, dtype=dtype).requires_grad_(False)
    with LiveBytes() as live:
        kl_loss(student, teacher, head, head, direction, chunk_tokens=16).backward()
    assert live.peak == pytest.approx(copies * 16 * 5000 * 4, rel=0.01)


def test_without_gradients_the_values_are_the_same_and_nothing_is_kept():
    student, teacher, head, teacher_head = setting()
    loss = kl_loss(student, teacher, head, teacher_head, chunk_tokens=7)
    with torch.no_grad():
        alone = kl_loss(student, teacher, head, teacher_head, chunk_tokens=7)
    assert torch.equal(loss.detach(), alone)
    assert not alone.requires_grad
    assert not kl_loss(student.detach(), teacher, head.requires_grad_(False), teacher_head).requires_grad


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
