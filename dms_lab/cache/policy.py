"""The seam between a cache layer and a policy.

    new keys, values -> cache -> LayerState -> Policy.attend -> output [B, H, Q, D], live slots [B, K, Q]

Shapes: B batch, Q new queries, S keys seen so far (Q of them new), H query heads, K KV heads, D head width.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """How a layer turns a product of query and key into a weight."""

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None
    sliding_window: int | None = None


@dataclass
class LayerState:
    """What a policy knows of one layer: which of the S tokens are real, and whatever it notes down itself."""

    document: Tensor | None = None  # [B, S]; -1 is padding; None: every token is real
    evict_logit: Tensor | None = None  # [B, K, S], as computed at each token (not yet governed)
    notes: dict[str, Tensor] = field(default_factory=dict)

    def real(self, key: Tensor) -> Tensor:
        """True where a key is a token and not padding, [B, S]."""
        if self.document is None:
            return torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
        return self.document >= 0


class Policy(Protocol):
    """Decides what the queries of one layer see."""

    name: str

    def attend(self, state: LayerState, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        """Attention of the newest Q queries [B, H, Q, D] over S keys [B, K, S, D]; live slots per query [B, K, Q]."""
        ...
