"""Distillation losses on hidden states, chunked over tokens: logits of one chunk exist at a time, and once.

    hidden [N, d] --head--> logits [C, V] of student and teacher --> loss of the chunk, gradient of the student's logits
    gradient [N, d] <-------------- product with the head ------------------'

So the head is multiplied three times, not five: what the backward needs is kept, [N, d] and the gradients of the head's own
weights where it is trained. The sum over chunks / N is the loss.

`forward` is KL(teacher || student): the student covers what the teacher finds possible. `reverse` is
KL(student || teacher): the student avoids what the teacher finds impossible. Means are per token, in nats.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

DIRECTIONS = ("forward", "reverse")
CHUNK_TOKENS = 1024
Head = Callable[[Tensor], Tensor]
Loss = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def kl_loss(
    hidden: Tensor,
    teacher_hidden: Tensor,
    head: Head,
    teacher_head: Head,
    direction: str = "forward",
    chunk_tokens: int = CHUNK_TOKENS,
    temperature: float = 1.0,
) -> Tensor:
    """Mean KL per token between the distributions of `hidden` and `teacher_hidden` [N, d]; the teacher gets no gradient.

    Both logits are divided by `temperature`, and the loss is multiplied by its square, so that gradients keep their size
    (Hinton et al. 2015, section 2.1). At its peak a chunk holds [C, V] three times in float32, of heads in lower
    precision once more in theirs. Differentiable once, with respect to `hidden` and to the leaf tensors that `head`
    computes with. Raises `ValueError` for an unknown direction, a temperature that is not positive, or when there is no
    token.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"kl_direction={direction!r} is not known; choose one of {', '.join(DIRECTIONS)}")

    if not temperature > 0:
        raise ValueError(f"temperature={temperature!r} divides the logits; give a number above 0, 1 for the plain KL")
    divergence = _forward_kl if direction == "forward" else _reverse_kl

    def loss(log_q: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        return divergence(log_q, _log_probabilities(teacher_head(teacher), temperature))

    return _chunked_mean(loss, head, chunk_tokens, hidden, teacher_hidden.detach(), temperature)


def lm_loss(hidden: Tensor, labels: Tensor, head: Head, chunk_tokens: int = CHUNK_TOKENS) -> Tensor:
    """Mean cross-entropy per token of `hidden` [N, d] against `labels` [N], all of which count; once differentiable.

    Raises `ValueError` when N is 0.
    """
    return _chunked_mean(_cross_entropy, head, chunk_tokens, hidden, labels)


# -- losses of a chunk: their sums, and the gradients of the student's logits, written over what they are given ------------
def _forward_kl(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    loss = log_p.sub_(log_q).mul_(p).sum()
    return loss, log_q.exp_().sub_(p)


def _reverse_kl(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    gap = log_p.neg_().add_(log_q)
    q = log_q.exp_()
    rows = (q * gap).sum(-1, keepdim=True)
    return rows.sum(), gap.sub_(rows).mul_(q)


def _cross_entropy(log_q: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    labels = labels[:, None]
    loss = -log_q.gather(1, labels).sum()
    return loss, log_q.exp_().scatter_add_(1, labels, log_q.new_full(labels.shape, -1.0))


# -- over the chunks -----------------------------------------------------------------------------------------------------
def _chunked_mean(
    loss: Loss, head: Head, chunk_tokens: int, hidden: Tensor, targets: Tensor, temperature: float = 1.0
) -> Tensor:
    num_tokens = hidden.shape[0]
    if num_tokens == 0:
        raise ValueError("a loss over no tokens is undefined; the batch holds only padding")
    total: Tensor | float = 0.0
    sums: dict[Tensor, Tensor] = {}
    parts = hidden.detach().requires_grad_(hidden.requires_grad).split(chunk_tokens)
    for part, target in zip(parts, targets.split(chunk_tokens), strict=True):
        total = total + _chunk(loss, head, part, target, temperature, sums)
    of_hidden = [sums.pop(part) for part in parts if part in sums]
    inputs = [*([hidden] if of_hidden else []), *sums]
    kept = [*([torch.cat(of_hidden)] if of_hidden else []), *sums.values()]
    return _WithKept.apply(total * (temperature**2 / num_tokens), temperature / num_tokens, kept, *inputs)


def _chunk(
    loss: Loss, head: Head, hidden: Tensor, target: Tensor, temperature: float, sums: dict[Tensor, Tensor]
) -> Tensor:
    """The sum over a chunk; to `sums` are added its gradients, but for a factor, of `hidden` and of the head's leaves."""
    logits = head(hidden)
    edge, dtype = get_gradient_edge(logits) if logits.requires_grad else None, logits.dtype
    with torch.no_grad():
        logits = _log_probabilities(logits, temperature)  # what the head gave is gone before the teacher's logits come
        value, slope = loss(logits, target)
    if edge is None:
        return value
    inputs = _leaves(edge, hidden.grad_fn) + ([hidden] if hidden.requires_grad else [])
    for tensor, gradient in zip(inputs, torch.autograd.grad(edge, inputs, slope.to(dtype)), strict=True):
        if tensor not in sums:
            sums[tensor] = torch.zeros_like(tensor)
        sums[tensor] += gradient
    return value


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Of logits over `temperature`, in a precision to sum in."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.log_softmax(wide if temperature == 1 else wide / temperature, -1)


def _leaves(edge: GradientEdge, stop: Node | None) -> list[Tensor]:
    """The tensors in which a backward from `edge` to `stop` would leave gradients: the head's own."""
    found, seen, todo = [], {None, stop}, [edge.node]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo += [before for before, _ in node.next_functions]
    return found


class _WithKept(torch.autograd.Function):
    """`value`; in the backward, the gradients of `inputs` are those that were kept, times `factor`."""

    @staticmethod
    def forward(ctx, value, factor, gradients, *inputs):
        ctx.factor = factor
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        factor = grad_output * ctx.factor
        return None, None, None, *(gradient * factor for gradient in ctx.saved_tensors)
