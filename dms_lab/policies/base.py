"""The attention of the masked cache under the two kinds of rule: the oracle that frees nothing.

Shapes: B batch, Q new queries, S keys seen so far (Q of them new), H query heads, K KV heads, D head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dms_lab import eviction
from dms_lab.attention import reference
from dms_lab.attention.soft import soft_attention
from dms_lab.cache.policy import LayerState, RankedRule, Ranking, Scores, WindowedRule, choose_victim, keys_to_rank


class WindowedPolicy(WindowedRule):
    """A decision per token and the visibility rule."""

    def evict(self, state: LayerState, key: Tensor) -> Tensor | None:
        """True where a token is to go once it is `window` old, [B, K, S]; None: none."""
        flags = self.flags(state.evict_logit, state.positions(key), key.shape[1])
        if flags is None:
            return None
        window = self.window if self.window is not None else key.shape[2]
        if state.document is None:
            return eviction.govern(flags.float(), self.decided_by, window, fill=0.0) > 0
        order = (state.document < 0).to(torch.int8).argsort(dim=-1, stable=True)  # tokens first: neighbours meet
        spread = order[:, None].expand(flags.shape)
        document = state.document.gather(1, order)
        governed = eviction.govern(flags.float().gather(2, spread), self.decided_by, window, document, fill=0.0)
        return torch.zeros_like(governed).scatter(2, spread, governed) > 0

    def attend(self, state: LayerState, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        """Attention of the newest Q queries [B, H, Q, D] over S keys [B, K, S, D]; live slots per query [B, K, Q]."""
        evict = self.evict(state, key)
        window = self.window if self.window is not None else key.shape[2]
        parted = state.document is not None and _has_padding_inside(state.document)
        if query.shape[2] == key.shape[2] and not parted:
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
            if parted:
                live = visible.sum(-1) * state.real(key)[:, None, key.shape[2] - query.shape[2] :]
                return output, live.expand(-1, key.shape[1], -1)
        return output, live_keys(evict, window, state, query.shape[2], key, scores.sliding_window)


def _has_padding_inside(document: Tensor) -> bool:
    """Whether padding stands between tokens of a row, as where a later turn of a conversation was padded."""
    real = document >= 0
    runs = (real[:, 1:] & ~real[:, :-1]).sum(-1) + real[:, 0].long()
    return bool((runs > 1).any())


def visible_keys(
    evict: Tensor | None, window: int, state: LayerState, query: Tensor, key: Tensor, sliding_window: int | None
) -> Tensor:
    """The visibility rule for the newest queries over all keys, [B, K, Q, S]."""
    batch, num_kv_heads, num_keys = key.shape[:3]
    positions = state.positions(key)
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

    By differences of running sums: what is kept, and what is decided for eviction and still in the window. For rows
    without padding between tokens.
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


class RankedPolicy(RankedRule):
    """A ranking of the live keys after each query, of which the lowest goes while `budget` are live.

    The rule is sequential, so a prompt is walked through query by query inside each layer: dense until the budget is
    reached, never above it afterwards. `budget` is in tokens per KV head, at least `least_budget`.
    """

    least_budget = 2

    def __init__(self, budget: int) -> None:
        if budget < self.least_budget:
            raise ValueError(
                f"{self.name} needs a budget of at least {self.least_budget} live tokens per head, got budget={budget}"
            )
        self.budget = budget

    def attend(self, state: LayerState, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        """Attention of the newest Q queries [B, H, Q, D] over S keys [B, K, S, D]; live slots per query [B, K, Q]."""
        batch, num_kv_heads, num_keys = key.shape[:3]
        num_queries = query.shape[2]
        real, position = state.real(key), state.positions(key)
        shape = (batch, num_kv_heads, num_keys)
        live = _grown(state.notes.get("live"), shape, torch.bool, key.device)
        total = _grown(state.notes.get("total"), shape, torch.float32, key.device)
        outputs, counts = [], []
        for row in range(num_queries):
            now = num_keys - num_queries + row
            is_token = real[:, None, now, None]
            live[:, :, now] = real[:, None, now]
            seen = live[:, :, : now + 1]
            if scores.sliding_window is not None:
                seen = seen & (position[:, now, None] - position[:, : now + 1] < scores.sliding_window)[:, None]
            seen_keys = (key[:, :, : now + 1], value[:, :, : now + 1], seen[:, :, None])
            output, weights = attend_wide(query[:, :, row : row + 1], *seen_keys, scores)
            outputs.append(output)
            counts.append(seen.sum(-1) * real[:, None, now])
            weights = weights[:, :, 0].float()
            total[:, :, : now + 1] += weights.view(batch, num_kv_heads, -1, now + 1).sum(2) * is_token
            places = position[:, None, : now + 1].expand(-1, num_kv_heads, -1)
            held = live[:, :, : now + 1]
            keys = keys_to_rank(key[:, :, : now + 1], held) if self.needs_keys else None
            ranking = Ranking(weights, total[:, :, : now + 1], places, position[:, now], state.layer, keys)
            victim, has_to = choose_victim(self, ranking, held, scores.sliding_window)
            victim = victim[:, :, None]
            live.scatter_(2, victim, live.gather(2, victim) & ~(has_to[:, :, None] & is_token))
        state.notes |= {"live": live, "total": total}
        return torch.cat(outputs, 2), torch.stack(counts, 2)


def _grown(old: Tensor | None, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`old` with room for the new tokens behind it, zero there."""
    new = torch.zeros(shape, dtype=dtype, device=device)
    if old is not None:
        new[:, :, : old.shape[2]] = old
    return new
