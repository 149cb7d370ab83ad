"""Quest (Tang et al. 2024): everything is kept, and each query reads the blocks of keys that could matter most to it."""

import torch
from torch import Tensor

from dms_lab.attention.blocks import choose_blocks
from dms_lab.cache.policy import LayerState, ReadingRule, Scores
from dms_lab.policies.base import attend_wide, visible_keys
from dms_lab.policies.full import FullPolicy


class QuestPolicy(FullPolicy, ReadingRule):
    """Reads the `budget // block` blocks of `block` tokens (16 if there are so many in the budget) with the highest bound
    on a key's score, the newest always.

    As published, every prompt and the first `dense_layers` layers are read whole; so are layers with a sliding window.
    Published for one query head per KV head, here a block counts by the best of the query heads of its group. Memory is
    that of full attention, and of the bounds.
    """

    name = "quest"

    def __init__(self, budget: int, block: int | None = None, dense_layers: int = 2) -> None:
        block = min(16, budget) if block is None else block
        if block < 1:
            raise ValueError(f"quest needs a budget and blocks of at least 1 token, got budget={budget}, block={block}")
        if budget < block:
            raise ValueError(f"quest reads whole blocks: budget={budget} must be at least block={block}")
        self.budget, self.block, self.dense_layers = budget, block, dense_layers

    def attend(self, state: LayerState, query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
        output, live = super().attend(state, query, key, value, scores)
        if query.shape[2] > 1 or not self.selects(state.layer, scores):
            return output, live
        seen = visible_keys(None, key.shape[2], state, query, key, None)
        read = self._read(state, query, key)[:, :, None] & seen
        return attend_wide(query, key, value, read, scores)[0], live

    def _read(self, state: LayerState, query: Tensor, key: Tensor) -> Tensor:
        """Which keys are in a block that the newest query reads, [B, K, S]."""
        block = torch.where(state.real(key), state.positions(key) // self.block, -1)
        blocks = [(block == index)[:, None, :, None] for index in range(int(block.max()) + 1)]
        low = torch.stack([key.masked_fill(~mine, float("inf")).amin(2) for mine in blocks], 2)
        high = torch.stack([key.masked_fill(~mine, -float("inf")).amax(2) for mine in blocks], 2)
        newest = block.amax(1)[:, None].expand(key.shape[:2])
        chosen = choose_blocks(query, low, high, newest, self.budget // self.block)
        return (block[:, None, :, None] == chosen[:, :, None]).any(-1)
