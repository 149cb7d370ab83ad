"""The mathematics of Dynamic Memory Sparsification, pure: who decides, who is seen, how much must go.

    evict_logit [B, K, T] --+ noise--> govern --> evict (hard) or log_keep (relaxed) --> visible / attention bias

One definition holds everywhere: query i sees key j iff

    j <= i   and   ( not evict[j]   or   i - j < window )

    window = 3, token 1 evicted (x = visible)      keys:   0 1 2 3 4
                                                  q0       x
                                                  q1       x x
                                                  q2       x x x
                                                  q3       x x x x      3 - 1 = 2 < 3: still there
                                                  q4       x . x x x    gone, its slot is free

Shapes: B batch, K KV heads, T tokens, Q queries, S keys. Source: Lancucki et al. 2025, section 3.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

DECIDED_BY = ("self", "next", "delayed")
GRANULARITIES = ("head", "layer")
COUNTS = ("live", "decisions")
RETENTIONS = ("one_sided", "two_sided")


# -- decisions ---------------------------------------------------------------------------------------------------------
def noise_generator(seed: int, step: int, micro_batch: int, layer: int) -> torch.Generator:
    """A CPU generator that depends on these four numbers alone: a resumed run draws the same noise, and so do several
    processes, because micro-batches are numbered over all of them."""
    key = hashlib.sha256(f"{seed} {step} {micro_batch} 0 {layer}".encode()).digest()  # 0: a fifth number that once was
    return torch.Generator().manual_seed(int.from_bytes(key[:7], "little"))


def logistic_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Standard logistic noise, float32: the difference of two Gumbels (one alone is biased by +0.58)."""
    uniform = torch.rand(shape, generator=generator).clamp_(1e-7, 1 - 1e-7)
    return torch.logit(uniform)


def govern(x: Tensor, decided_by: str, window: int, document: Tensor | None = None, fill: float = -math.inf) -> Tensor:
    """Moves what each token computed to the token it decides about, [B, K, T] -> [B, K, T].

    `self`: token j decides about j; `next`: j + 1 does; `delayed`: j + window does. Where the deciding token lies beyond
    the end, in another document or in padding (`document` [B, T], -1), the value is `fill`: nobody decided, so kept.
    """
    if decided_by not in DECIDED_BY:
        raise ValueError(f"decided_by={decided_by!r} is not known; choose one of {', '.join(DECIDED_BY)}")
    shift = {"self": 0, "next": 1, "delayed": window}[decided_by]
    num_tokens = x.shape[-1]
    if shift:
        moved = x[..., shift:]
        x = F.pad(moved, (0, min(shift, num_tokens)), value=fill)
    if document is None:
        return x
    decider = F.pad(document[:, shift:], (0, min(shift, num_tokens)), value=-1)
    decided = (decider == document) & (document >= 0)
    return x.masked_fill(~decided[:, None], fill)


def evict_probability(evict_logit: Tensor, noise: Tensor, tau: float) -> Tensor:
    """The relaxed decision, sigmoid((logit + noise) / tau), in [0, 1]."""
    return torch.sigmoid((evict_logit + noise) / tau)


def log_keep(evict_logit: Tensor, noise: Tensor, tau: float) -> Tensor:
    """log(1 - relaxed decision), what a key's score gets once it left the window; 0 for a logit of -inf."""
    return F.logsigmoid(-(evict_logit + noise) / tau)


def visible(
    evict: Tensor,
    window: int,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    query_document: Tensor | None = None,
    key_document: Tensor | None = None,
) -> Tensor:
    """The one definition of visibility, [B, K, Q, S] from `evict` [B, K, S].

    Positions [B, Q] and [B, S] default to 0, 1, 2, ...; with documents (-1: padding) a query sees its own alone.
    """
    batch, _, num_keys = evict.shape
    if key_positions is None:
        key_positions = torch.arange(num_keys, device=evict.device).expand(batch, -1)
    if query_positions is None:
        query_positions = key_positions
    distance = query_positions[:, None, :, None] - key_positions[:, None, None, :]
    seen = (distance >= 0) & (~evict[:, :, None, :] | (distance < window))
    if key_document is not None:
        query_document = key_document if query_document is None else query_document
        same = (query_document[:, :, None] == key_document[:, None, :]) & (key_document[:, None, :] >= 0)
        seen = seen & same[:, None]
    return seen


# -- budgets -----------------------------------------------------------------------------------------------------------
def cr_at(step: int, cr: float, steps: int, ramp: float = 0.8, start: int = 0) -> float:
    """Compression ratio aimed at in `step`: 1 until `start`, then linear to `cr`, then `cr`.

    It rises over the first `ramp` share of the `steps - start` steps that are left.
    """
    rising = max(1, round(ramp * (steps - start)))
    return 1.0 + (cr - 1.0) * min(1.0, max(0, step - start) / rising)


def old_tokens(document: Tensor, window: int) -> Tensor:
    """True where a token is `window` tokens or more before the last one of its document, [B, T].

    These are the tokens whose eviction has freed a slot by the end of their document. `document` [B, T] holds an id per
    document in consecutive runs, -1 for padding (False there).
    """
    ahead = F.pad(document[:, window:], (0, min(window, document.shape[1])), value=-1)
    return (document >= 0) & (ahead == document)


def live_ratio(evicted: Sequence[Tensor], document: Tensor, window: int) -> Tensor:
    """Compression ratio at the end of each document: tokens / live slots, both summed over the batch, a scalar.

    `evicted` holds one [B, K or 1, T] a layer: probabilities, or hard decisions as 0 and 1. The mean live slots run over
    layers and KV heads.
    """
    old = old_tokens(document, window)[:, None]
    freed = torch.stack([(e * old).sum((0, 2)).mean() for e in evicted]).mean()
    num_tokens = (document >= 0).sum()
    return num_tokens / (num_tokens - freed).clamp(min=1e-9)


def evict_target(cr: float, num_tokens: int, num_old_tokens: int, count: str = "live") -> float:
    """Share of decisions that must be evictions, in [0, 1].

    `count="live"`: so that full / live is `cr` at the end of the documents, the window's tokens being live whatever was
    decided: (1 - 1/cr) * num_tokens / num_old_tokens, the latter summed over documents as max(length - window, 0).
    `count="decisions"`: 1 - 1/cr of the decisions, as in the papers; the window then costs extra.
    """
    if count not in COUNTS:
        raise ValueError(f"count={count!r} is not known; choose one of {', '.join(COUNTS)}")
    share = 1.0 - 1.0 / cr
    if count == "live":
        share *= num_tokens / max(1, num_old_tokens)
    return min(1.0, share)


def retention_loss(
    evict_probabilities: Sequence[Tensor], real: Tensor, target: float, retention: str = "one_sided"
) -> Tensor:
    """max(target - mean relaxed decision, 0); the mean runs over layers, KV heads and real tokens.

    `evict_probabilities` holds one [B, K or 1, T] a layer, `real` [B, T] is False for padding. Global: heads share the
    budget as they like. One-sided lets every batch that is below the target push and none pull: where documents differ in
    what they can do without, more goes than was asked. `retention="two_sided"` takes the absolute value, so that evicting
    too much costs as well; not at a target of 0, before anything is asked, where it would teach a fresh predictor that
    nothing may ever go.
    """
    if retention not in RETENTIONS:
        raise ValueError(f"retention={retention!r} is not known; choose one of {', '.join(RETENTIONS)}")
    weight = real[:, None].to(evict_probabilities[0].dtype)
    means = torch.stack([(p * weight).sum() / (weight.sum() * p.shape[1]) for p in evict_probabilities])
    missing = target - means.mean()
    return missing.abs() if retention == "two_sided" and target > 0 else missing.clamp(min=0.0)
