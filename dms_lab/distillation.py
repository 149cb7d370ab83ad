"""Distillation losses on hidden states, chunked over tokens: logits of one chunk exist at a time, and are recomputed.

    hidden [N, d] --head--> logits [C, V] of student and teacher -> KL of the chunk -> sum over chunks / N

`forward` is KL(teacher || student): the student covers what the teacher finds possible. `reverse` is
KL(student || teacher): the student avoids what the teacher finds impossible. Means are per token, in nats.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

DIRECTIONS = ("forward", "reverse")
Head = Callable[[Tensor], Tensor]


def kl_loss(
    hidden: Tensor,
    teacher_hidden: Tensor,
    head: Head,
    teacher_head: Head,
    direction: str = "forward",
    chunk_tokens: int = 1024,
    temperature: float = 1.0,
) -> Tensor:
    """Mean KL per token between the distributions of `hidden` and `teacher_hidden` [N, d]; the teacher gets no gradient.

    Both logits are divided by `temperature`, and the loss is multiplied by its square, so that gradients keep their size
    (Hinton et al. 2015, section 2.1). Raises `ValueError` for an unknown direction, a temperature that is not positive,
    or when there is no token.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"kl_direction={direction!r} is not known; choose one of {', '.join(DIRECTIONS)}")

    if not temperature > 0:
        raise ValueError(f"temperature={temperature!r} divides the logits; give a number above 0, 1 for the plain KL")

    def chunk_loss(student: Tensor, teacher: Tensor) -> Tensor:
        log_q = F.log_softmax(_wide(head(student), temperature), -1)
        with torch.no_grad():
            log_p = F.log_softmax(_wide(teacher_head(teacher), temperature), -1)
        first, second = (log_q, log_p) if direction == "forward" else (log_p, log_q)
        return F.kl_div(first, second, reduction="sum", log_target=True)

    return _chunked_mean(chunk_loss, chunk_tokens, hidden, teacher_hidden.detach()) * temperature**2


def lm_loss(hidden: Tensor, labels: Tensor, head: Head, chunk_tokens: int = 1024) -> Tensor:
    """Mean cross-entropy per token of `hidden` [N, d] against `labels` [N], all of which count.

    Raises `ValueError` when N is 0.
    """

    def chunk_loss(student: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(_wide(head(student)), target, reduction="sum")

    return _chunked_mean(chunk_loss, chunk_tokens, hidden, labels)


def _chunked_mean(chunk_loss: Callable[..., Tensor], chunk_tokens: int, *tensors: Tensor) -> Tensor:
    num_tokens = tensors[0].shape[0]
    if num_tokens == 0:
        raise ValueError("a loss over no tokens is undefined; the batch holds only padding")
    parts = zip(*(tensor.split(chunk_tokens) for tensor in tensors), strict=True)
    if num_tokens <= chunk_tokens or not torch.is_grad_enabled():
        return sum(chunk_loss(*part) for part in parts) / num_tokens
    return sum(checkpoint(chunk_loss, *part, use_reentrant=False) for part in parts) / num_tokens


def _wide(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Logits over `temperature`, in a precision to sum in."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide if temperature == 1 else wide / temperature
