"""One layer of the compact cache: attention over its slots, and the storing of new tokens.

one token     its slot is that of the token leaving the window, or a new one -> attention over the live slots
more tokens   in pieces of `chunk`: attention over live slots and the piece -> what is still visible is stored
              (a ranked rule, which decides after every token, goes one by one once its budget is near)
"""

import functools
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from dms_lab.attention.blocks import read_blocks
from dms_lab.attention.paged import Chunk, Slots, attend_chunk, decode
from dms_lab.cache.policy import RankedRule, Ranking, ReadingRule, Scores, WindowedRule, choose_victim, keys_to_rank
from dms_lab.cache.slots import SlotTable

if TYPE_CHECKING:
    from dms_lab.cache.compact import CompactCache


def in_any_mode(function):
    """`function` without gradients, on tensors that any later call may change, in whatever mode it is called.

    What inference mode makes can be changed in inference mode alone, and a prompt may be read in one mode, continued in
    another.
    """

    @functools.wraps(function)
    def run(*args, **kwargs):
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run


class CompactLayer(CacheLayerMixin):
    """One layer's slots. Made by `CompactCache`."""

    is_sliding = False

    def __init__(self, cache: "CompactCache", index: int) -> None:
        super().__init__()
        self.cache, self.index = cache, index
        self.slots: SlotTable | None = None
        self.columns = 0  # tokens and padding handed to this layer, as Hugging Face counts them
        self._reads: Tensor | None = None  # tokens that the newest query of each place read, [B, K]; None: all live ones

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    @in_any_mode
    def reset(self) -> None:
        if self.slots is not None:
            self.slots.release(torch.arange(self.slots.length.shape[0], device=self.slots.length.device))
            self.cache.pool.shrink()
        self.slots, self._reads, self.columns = None, None, 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove and self.slots is not None:
            self.slots.crop(-tokens_to_remove)
            self.columns += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    @in_any_mode
    def batch_select_indices(self, indices: Tensor) -> None:
        if self.slots is not None:
            self.select(indices.to(self.slots.length.device))

    @in_any_mode
    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.slots is not None:
            rows = torch.arange(self.slots.length.shape[0], device=self.slots.length.device)
            self.select(rows.repeat_interleave(repeats))

    def note_reads(self, counts: Tensor) -> None:
        """Notes how many tokens the rows in use read, [B, K] or [B, 1], where that is not what is live."""
        if self._reads is None:
            self._reads = torch.zeros_like(self.slots.length)
        rows = slice(None) if self.slots.rows is None else self.slots.rows
        self._reads[rows] = counts.expand(-1, self._reads.shape[1])

    def reads(self) -> Tensor:
        """Tokens that the newest query of the rows in use read, [B, K]."""
        rows = slice(None) if self.slots.rows is None else self.slots.rows
        return self.slots.get("length") if self._reads is None else self._reads[rows]

    def select(self, indices: Tensor) -> None:
        """Keeps the sequences `indices` [n] in that order."""
        self.slots.select(indices)
        self._reads = None if self._reads is None else self._reads[indices]

    def live(self) -> Tensor:
        """Tokens that the rows in use hold, [B, K]."""
        return self.slots.get("length")

    def release(self, rows: Tensor) -> None:
        """Makes the places `rows` [n] empty."""
        self.slots.release(rows)
        if self._reads is not None:
            self._reads[rows] = 0

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Makes the empty places `target` [n] hold what `source` [n] do."""
        self.slots.copy(source, target)
        if self._reads is not None:
            self._reads[target] = self._reads[source]

    # -- attention ---------------------------------------------------------------------------------------------------
    @in_any_mode
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scores: Scores, logit: Tensor | None, real: Tensor | None):
        """Attention [B, H, Q, D] of new tokens, of which `real` [B, Q] (None: all), and their storing."""
        cache, batch, num_columns = self.cache, query.shape[0], query.shape[2]
        if self.slots is None:
            self.slots = cache.new_table(self.index, batch, key, value, scores)
        self.slots.rows = cache.rows
        if num_columns == 1:
            self.columns += not cache.is_fixed  # a step that is repeated without this code is counted where that is done
            return self._one(query, key, value, scores, logit, None if real is None else real[:, 0])
        if cache.is_fixed:
            raise ValueError(f"step=graph takes a token at a time, but layer {self.index} was given {num_columns}")
        self.columns += num_columns
        order = None
        if real is not None:
            self.slots.note_columns(real, num_columns)
            order = (~real).to(torch.int8).argsort(dim=-1, stable=True)  # tokens first, padding behind them
            query, key, value = (_ordered(x, order) for x in (query, key, value))
            logit = None if logit is None else logit.gather(2, order[:, None].expand(logit.shape))
        else:
            self.slots.note_columns(None, num_columns)
        count = torch.full((batch,), num_columns, device=key.device) if real is None else real.sum(1)
        output = self._pieces(query, key, value, scores, logit, count, is_padded=order is not None)
        if order is None:
            return output
        output = torch.zeros_like(output).scatter_(2, order[:, None, :, None].expand(output.shape), output)
        return output.masked_fill_(~real[:, None, :, None], 0.0)

    def _pieces(self, query, key, value, scores, logit, count, is_padded):
        """Attends and stores piece by piece; a ranked rule up to the last token of the longest row."""
        outputs, start, total = [], 0, query.shape[2]
        if is_padded and isinstance(self.cache.policy, RankedRule):  # which goes one by one
            total = max(1, int(count.max()))
        while start < total:
            left = (count - start).clamp(min=0)
            stop = start + self._piece_size(total - start, left, scores)
            piece = [x[:, :, start:stop] for x in (query, key, value)]
            flags = None if logit is None else logit[:, :, start:stop]
            if stop - start == 1 and isinstance(self.cache.policy, RankedRule):
                outputs.append(self._one(*piece, scores, flags, left > 0, note=False))
            else:
                outputs.append(self._piece(*piece, scores, flags, left.clamp(max=stop - start)))
            start = stop
        return F.pad(torch.cat(outputs, 2), (0, 0, 0, query.shape[2] - total))

    def _piece_size(self, columns: int, left: Tensor, scores: Scores) -> int:
        """How many of the next columns go at once: a ranked rule decides after every token once its budget is near."""
        policy, size = self.cache.policy, min(columns, self.cache.chunk)
        if isinstance(policy, WindowedRule):
            return size
        room = policy.budget - 1 - int(self.slots.get("length").max())
        return max(1, min(size, room))

    def _slots(self) -> Slots:
        cache, slots = self.cache, self.slots
        return Slots(cache.pool, slots.get("table"), slots.get("length"), cache.apart, cache.backend)

    def _piece(self, query, key, value, scores, logit, count):
        """A chunk [B, *, C, D], the first `count` [B] of it tokens: attention by the visibility rule, then storing."""
        slots, policy = self.slots, self.cache.policy
        position = slots.get("seen")[:, None] + torch.arange(key.shape[2], device=key.device)
        flags = self._flags(logit, position, key.shape[1])
        governed = slots.governed(flags, count)
        address, past_position, in_use = slots.past()
        new_position = position[:, None].expand(-1, key.shape[1], -1)
        chunk = Chunk(
            key,
            value,
            position,
            slots.is_evicted(governed, new_position),
            past_position,
            slots.is_evicted(governed, past_position),
            slots.window,
        )
        sums = isinstance(policy, RankedRule) and policy.needs_total
        output, weights = attend_chunk(query, chunk, self._slots(), scores, want_weights=sums)
        slots.append_chunk(key, value, flags, count)
        if sums:
            self._sum_weights(weights, address[in_use], in_use, count)
        if isinstance(policy, ReadingRule):
            self.note_reads(slots.get("length"))
        return output

    def _sum_weights(self, weights: Tensor, address: Tensor, in_use: Tensor, count: Tensor) -> None:
        """Adds a chunk's attention to the slots' totals; nothing was evicted, so new tokens stand at the end."""
        pool, size = self.cache.pool, in_use.shape[2]
        is_query = torch.arange(weights.shape[2], device=weights.device) < count[:, None]
        received = (weights.float() * is_query[:, None, :, None]).sum(2)
        received = received.view(*in_use.shape[:2], -1, weights.shape[3]).sum(2)
        pool.weight.view(-1)[address] += received[:, :, :size][in_use]
        length = self.slots.get("length")
        slot = torch.arange(weights.shape[2], device=weights.device) + length[:, :, None] - count[:, None, None]
        fresh = is_query[:, None].expand(slot.shape)
        pool.weight.view(-1)[self.slots.address(slot.clamp(min=0))[fresh]] = received[:, :, size:][fresh]

    def _flags(self, logit: Tensor | None, position: Tensor, num_kv_heads: int) -> Tensor | None:
        policy = self.cache.policy
        counts = isinstance(policy, WindowedRule) and self.slots.window is not None
        return policy.flags(logit, position, num_kv_heads) if counts else None

    def _one(self, query, key, value, scores, logit, real, note=True):
        """One new token a sequence: its slot, then attention over what is live. `real` [B] False: nothing is stored."""
        cache, slots = self.cache, self.slots
        pool, policy = cache.pool, cache.policy
        now, tail = slots.get("seen"), slots.get("tail")
        flag = self._flags(logit, now[:, None], key.shape[1])
        flag = None if flag is None else flag[:, :, 0]
        if cache.is_fixed or (cache.appends_at_once and slots.claim_one()):
            from dms_lab.attention.kernels.paged import append

            append(slots, flag, real, key, value)
        else:
            address = slots.append_one(flag, real)
            if not note:
                slots.put("tail", tail)
            position = now[:, None].expand(address.shape).flatten()
            if real is not None:  # what is written where nobody reads stays finite: it may be gathered, and masked
                key, value = (x.masked_fill(~real[:, None, None, None], 0.0) for x in (key, value))
            pool.write(address.flatten(), key.flatten(0, 2), value.flatten(0, 2), position, one_a_page=True)
        ranked = isinstance(policy, RankedRule)
        held = self._slots()
        if isinstance(policy, ReadingRule) and policy.selects(self.index, scores) and not cache.reads_prompt:
            held = read_blocks(query, held, policy.budget // policy.block)
        if isinstance(policy, ReadingRule):
            self.note_reads(held.length)
        output, weights = decode(query, held, scores, want_weights=ranked and policy.needs_weights)
        if ranked:
            self._rank(weights, now, real, scores.sliding_window)
        return output if real is None else output.masked_fill(~real[:, None, None, None], 0.0)

    def _rank(self, weights: Tensor | None, now: Tensor, real: Tensor | None, sliding_window: int | None) -> None:
        """Chooses the slot of the next token: the lowest in rank, once the budget is reached."""
        slots, pool, policy = self.slots, self.cache.pool, self.cache.policy
        address, position, in_use = slots.past()
        if not in_use.shape[2]:  # padding before any token
            return
        is_token = torch.ones_like(now, dtype=torch.bool) if real is None else real
        total = None if weights is None else weights.view(*in_use.shape[:2], -1, in_use.shape[2]).sum(2)
        if pool.weight is not None:
            held = in_use & is_token[:, None, None]
            pool.weight.view(-1)[address[held]] += total[held]
            total = pool.weight.view(-1)[address]
        key = keys_to_rank(pool.key.read(address), in_use) if policy.needs_keys else None
        ranking = Ranking(weights, total, position, now, self.index, key)
        victim, has_to = choose_victim(policy, ranking, in_use, sliding_window)
        victim = torch.where(has_to, victim, -1)
        slots.put("victim", torch.where(is_token[:, None], victim, slots.get("victim")))


def _ordered(x: Tensor, order: Tensor) -> Tensor:
    """`x` [B, heads, C, D] with its tokens in `order` [B, C]."""
    return x.gather(2, order[:, None, :, None].expand(x.shape))
