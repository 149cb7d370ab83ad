"""Attention's output and log-sum-exp, kept over activation checkpointing: the backward recomputes a layer without them.

    forward          computes both and puts them into the list that it was given
    recomputation    takes them out; only its own graph holds them then, and they go with the layer's backward

Torch's selective checkpointing does that for operators that it sees dispatched, in a mode that looks at every operator of a
layer; what is inside an `autograd.Function`, as attention is here, it would compute again.
"""

from collections.abc import Callable

from torch import Tensor

Kept = list[tuple[Tensor, Tensor]]


def once(kept: Kept | None, compute: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp: taken out of `kept`, or computed and left there; None keeps nothing.

    The list serves a forward and its recomputation on the same inputs, which nothing here compares.
    """
    if kept:
        return kept.pop()
    output, lse = compute()
    if kept is not None:
        kept.append((output.detach(), lse.detach()))  # else they would hold the graph that is about to hold them
    return output, lse
