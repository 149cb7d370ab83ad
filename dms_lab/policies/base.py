"""The two kinds of policy: one decision per token and a window, or a ranking of the live tokens.

Shapes: B batch, Q new queries, S keys seen so far (Q of them new), H query heads, K KV heads, D head width.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from dms_lab import eviction
from dms_lab.attention import reference
from dms_lab.attention.soft import soft_attention
from dms_lab.cache.policy import LayerState, Scores


class WindowedPolicy(ABC):
    """A policy that is one decision per token: the visibility rule does the rest."""

    name: str
    window: int | None  # None: nothing is ever evicted

    @abstractmethod
    def evict(self, state: LayerState, key: Tensor) -> Tensor | None:
        """True where a token is to go once it is `window` old, [B, K, S]; None: none."""

    def attend(self, state: LayerState, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        evict = self.evict(state, key)
        window = self.window if self.window is not None else key.shape[2]
        if query.shape[2] == key.shape[2]:
            log_keep = None
            if evict is not None:
                log_keep = torch.zeros(evict.shape, dtype=torch.float32, device=key.device)
                log_keep.masked_fill_(evict, float("-inf"))
            document = state.document if state.document is None or bool((state.document < 0).any()) else None
            output = soft_attention(
                query,
                key,
                value,
                log_keep,
                window,
                document,
                scores.scaling,
                softcap=scores.softcap,
                sinks=scores.sinks,
                sliding_window=scores.sliding_window,
                backend="chunked",
            )
        else:
            visible = visible_keys(evict, window, state, query, key, scores.sliding_window)
            output, _ = attend_wide(query, key, value, visible, scores)
        return output, live_keys(evict, window, state, query.shape[2], key, scores.sliding_window)


def visible_keys(
    evict: Tensor | None, window: int, state: LayerState, query: Tensor, key: Tensor, sliding_window: int | None
) -> Tensor:
    """The visibility rule for the newest queries over all keys, [B, K, Q, S]."""
    batch, num_kv_heads, num_keys = key.shape[:3]
    positions = torch.arange(num_keys, device=key.device).expand(batch, -1)
    queries = positions[:, num_keys - query.shape[2] :]
    if evict is None:
        evict = torch.zeros(batch, num_kv_heads, num_keys, dtype=torch.bool, device=key.device)
    visible = eviction.visible(evict, window, queries, positions)
    if state.document is not None:
        mine = state.document[:, num_keys - query.shape[2] :, None] == state.document[:, None, :]
        mine &= state.document[:, None, :] >= 0
        visible = visible & mine[:, None]
    if sliding_window is not None:
        visible = visible & (queries[:, :, None] - positions[:, None, :] < sliding_window)[:, None]
    return visible


def live_keys(
    evict: Tensor | None, window: int, state: LayerState, num_queries: int, key: Tensor, sliding_window: int | None
) -> Tensor:
    """How many keys `visible_keys` shows each of the newest queries, [B, K, Q], in linear time; 0 for one that is padding.

    By differences of running sums: what is kept, and what is decided for eviction and still in the window.
    """
    num_kv_heads, num_keys = key.shape[1:3]
    real = state.real(key)[:, None].expand(-1, num_kv_heads, -1)
    gone = torch.zeros_like(real) if evict is None else evict & real

    def of_the_last(marked: Tensor, width: int) -> Tensor:
        total = F.pad(marked.long().cumsum(-1), (1, 0))
        return total[:, :, 1:] - total[:, :, (torch.arange(1, num_keys + 1, device=key.device) - width).clamp(min=0)]

    wide = num_keys if sliding_window is None else sliding_window
    live = of_the_last(real & ~gone, wide) + of_the_last(gone, min(window, wide))
    return (live * real)[:, :, num_keys - num_queries :]


def attend_wide(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """The dense reference, computed in float32 whatever the model's dtype; output [B, H, Q, D] in that dtype, weights not.

    In bfloat16 a softmax over thousands of keys would err several times as much as the original model does.
    """
    wide = (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in (query, key, value))
    output, weights = reference.attend(*wide, visible, scores.scaling, scores.softcap, scores.sinks)
    return output.to(query.dtype), weights


class RankedPolicy(ABC):
    """A policy that ranks the live keys after each query and drops the lowest while more than `budget` are live.

    The rule is sequential, so a prompt is walked through query by query inside each layer: dense until the budget is
    reached, never above it afterwards. `budget` is in tokens per KV head, at least 2.
    """

    name: str

    def __init__(self, budget: int) -> None:
        if budget < 2:
            raise ValueError(f"{self.name} needs a budget of at least 2 live tokens per head, got budget={budget}")
        self.budget = budget

    @abstractmethod
    def rank(self, state: LayerState, weights: Tensor, live: Tensor) -> Tensor:
        """Score of each key after a query with attention `weights` [B, H, S]: the lowest live one goes, [B, K, S]."""

    def attend(self, state: LayerState, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        batch, num_kv_heads, num_keys = key.shape[:3]
        num_queries = query.shape[2]
        real = state.real(key)
        live = _grown(state.notes.get("live"), (batch, num_kv_heads, num_keys), torch.bool, key.device)
        outputs, counts = [], []
        for row in range(num_queries):
            now = num_keys - num_queries + row
            live[:, :, now] = real[:, None, now]
            seen = live[:, :, : now + 1]
            if scores.sliding_window is not None:
                seen = seen.clone()
                seen[:, :, : max(0, now + 1 - scores.sliding_window)] = False
            seen_keys = (key[:, :, : now + 1], value[:, :, : now + 1], seen[:, :, None])
            output, weights = attend_wide(query[:, :, row : row + 1], *seen_keys, scores)
            outputs.append(output)
            counts.append(seen.sum(-1))
            ranks = self.rank(state, weights[:, :, 0].float(), live[:, :, : now + 1])
            lowest = ranks.masked_fill(~live[:, :, : now + 1], float("inf")).argmin(-1, keepdim=True)
            is_full = live[:, :, : now + 1].sum(-1, keepdim=True) >= self.budget
            live.scatter_(2, lowest, live.gather(2, lowest) & ~is_full)  # room for the next token
        state.notes["live"] = live
        return torch.cat(outputs, 2), torch.stack(counts, 2)


def _grown(old: Tensor | None, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`old` with room for the new tokens behind it, zero there."""
    new = torch.zeros(shape, dtype=dtype, device=device)
    if old is not None:
        new[:, :, : old.shape[2]] = old
    return new


def grown_note(state: LayerState, name: str, live: Tensor) -> Tensor:
    """The float note `name` of a ranked policy, grown to the shape of `live` [B, K, S]."""
    note = _grown(state.notes.get(name), tuple(live.shape), torch.float32, live.device)
    state.notes[name] = note
    return note
