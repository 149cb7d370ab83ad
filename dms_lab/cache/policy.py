"""The seam between a cache layer and a policy.

    new keys, values -> cache -> rule: which tokens stay -> attention over what is left -> output [B, H, Q, D]

A policy is one of two rules, and every cache serves both: a decision per token and a window (`WindowedRule`), or a ranking
of the live tokens and a budget (`RankedRule`).
Shapes: B batch, Q new queries, S keys or slots, H query heads, K KV heads, D head width.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import Cache


@dataclass(frozen=True)
class Scores:
    """How a layer turns a product of query and key into a weight."""

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None
    sliding_window: int | None = None


@dataclass
class LayerState:
    """What the masked cache knows of one layer: which of the S columns are tokens, and what its policy noted down."""

    document: Tensor | None = None  # [B, S]; -1 is padding; None: every column is a token
    evict_logit: Tensor | None = None  # [B, K, S], as computed at each token (not yet governed)
    notes: dict[str, Tensor] = field(default_factory=dict)
    layer: int = 0

    def real(self, key: Tensor) -> Tensor:
        """True where a column is a token and not padding, [B, S]."""
        if self.document is None:
            return torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
        return self.document >= 0

    def positions(self, key: Tensor) -> Tensor:
        """How many tokens stand before each column, [B, S]: distances count tokens, wherever padding stands."""
        if self.document is None:
            return torch.arange(key.shape[2], device=key.device).expand(key.shape[0], -1)
        return (self.document >= 0).cumsum(-1) - (self.document >= 0).long()


@dataclass(frozen=True)
class Ranking:
    """What a ranked rule may look at after a query, over S columns or slots in any order.

    `weights` [B, H, S] of the newest query; `total` [B, K, S] summed over the heads of a group and, for a rule that
    `needs_total`, over all queries so far; both may be None for a rule without `needs_weights`;
    `position` [B, K, S] in tokens; `now` [B] is the newest token's;
    `key` [B, K, S, D] as they are attended to, float32 at least, 0 where nothing is live; for a rule that `needs_keys`.
    """

    weights: Tensor | None
    total: Tensor | None
    position: Tensor
    now: Tensor
    layer: int
    key: Tensor | None = None


class WindowedRule(ABC):
    """One decision per token; the visibility rule does the rest.

    `window` in tokens, None: nothing is ever evicted. `decided_by` as in `eviction.govern`.
    """

    name: str
    window: int | None
    decided_by: str = "self"

    @abstractmethod
    def flags(self, evict_logit: Tensor | None, position: Tensor, num_kv_heads: int) -> Tensor | None:
        """What each token computed, True for eviction, before it moves to the token that it governs: [B, K, Q].

        `evict_logit` [B, K, Q] of a predictor, `position` [B, Q] in tokens. None: nothing is evicted.
        """


class RankedRule(ABC):
    """While `budget` tokens or more are live in a head after a query, the lowest in rank goes: room for the next token.

    In a layer with a sliding window, the token that the next query cannot see goes before all others.
    """

    name: str
    budget: int
    needs_weights: bool = True  # whether the rule looks at attention: the newest query's, or summed up
    needs_total: bool = False  # whether it looks at what is summed up over all queries
    needs_keys: bool = False  # whether it looks at keys

    @abstractmethod
    def rank(self, seen: Ranking) -> Tensor:
        """The rank of each column or slot, [B, K, S]; inf for what must not go. Dead ones may get anything."""


class ReadingRule(WindowedRule):
    """Keeps everything; a single query reads the best `budget // block` blocks of `block` tokens (`attention.blocks`)."""

    block: int
    budget: int
    dense_layers: int

    def selects(self, layer: int, scores: Scores) -> bool:
        """Whether a layer reads a part only."""
        return layer >= self.dense_layers and scores.sliding_window is None


class OffloadingRule(WindowedRule):
    """Keeps everything; what is older than the window is kept in host memory (see `cache.offload`)."""


Policy = WindowedRule | RankedRule


def keys_to_rank(key: Tensor, live: Tensor) -> Tensor:
    """What `Ranking.key` holds, from the keys [B, K, S, D] of all columns or slots and which of them are live."""
    key = key.float() if key.dtype in (torch.bfloat16, torch.float16) else key
    return key.masked_fill(~live[..., None], 0.0)


def choose_victim(rule: RankedRule, seen: Ranking, live: Tensor, sliding_window: int | None) -> tuple[Tensor, Tensor]:
    """Which of the live [B, K, S] goes after a query, and whether one has to: index and truth [B, K].

    Of equals the oldest goes, whatever the order of the slots.
    """
    rank = rule.rank(seen).expand(live.shape).masked_fill(~live, float("inf"))
    has_to = live.sum(-1) >= rule.budget
    if sliding_window is not None:
        leaves = live & (seen.now[:, None, None] - seen.position >= sliding_window - 1)
        rank, has_to = rank.masked_fill(leaves, -float("inf")), has_to | leaves.any(-1)
    tied = live & (rank == rank.amin(-1, keepdim=True))
    oldest = seen.position.masked_fill(~tied, torch.iinfo(seen.position.dtype).max)
    return oldest.argmin(-1), has_to


class PolicyCache(Cache, ABC):
    """A Hugging Face cache with one policy for all layers, to which attention is left as well."""

    policy: Policy
    _owner: str | None = None  # the attachment whose tokens it holds
    _is_announced: bool = False  # a forward that leaves attention to this cache is under way

    def announce(self, owner: str) -> None:
        """Lets the next forward of the attachment `owner` in; `ValueError` if the cache holds tokens of another."""
        if self._owner not in (None, owner):
            raise ValueError(
                "this cache holds tokens of another model or of another attachment to it; make a new cache for each, or "
                "call reset() on this one"
            )
        self._owner, self._is_announced = owner, True

    def close(self) -> None:
        """Ends a forward that was announced."""
        self._is_announced = False

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self._is_announced:
            raise ValueError(
                f"a {type(self).__name__} works with a retrofitted model alone, and this one is not, or no longer: attach "
                "with dms_lab.retrofit(model, config), or dms_lab.retrofit(model, None) for policies without a predictor"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def reset(self) -> None:
        super().reset()
        self._owner = None

    @abstractmethod
    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scores: Scores,
        evict_logit: Tensor | None,
        document: Tensor | None,
    ) -> Tensor:
        """Attention [B, H, Q, D] of the newest Q queries; `key`, `value` are what `update` gave back.

        `evict_logit` [B, K, Q] is of the new tokens; `document` [B, S] marks padding with -1, None: there is none.
        """

    @abstractmethod
    def live_slots(self) -> Tensor:
        """Slots that hold something the newest query could see, [B, L, K]."""
