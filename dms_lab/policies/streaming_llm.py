"""Attention sinks and a sliding window (Xiao et al. 2024, StreamingLLM): the first tokens and the last ones stay."""

import torch
from torch import Tensor

from dms_lab.policies.base import WindowedPolicy


class StreamingLLMPolicy(WindowedPolicy):
    """Keeps the first `num_sinks` real tokens of a sequence and the last `budget - num_sinks`."""

    name = "streaming_llm"

    def __init__(self, budget: int, num_sinks: int = 4) -> None:
        if budget <= num_sinks:
            raise ValueError(f"streaming_llm needs a budget above its {num_sinks} sinks, got budget={budget}")
        self.budget, self.num_sinks = budget, num_sinks
        self.window = budget - num_sinks

    def flags(self, evict_logit: Tensor | None, position: Tensor, num_kv_heads: int) -> Tensor:
        return (position >= self.num_sinks)[:, None].expand(-1, num_kv_heads, -1)


def sink_decisions(document: Tensor, num_sinks: int) -> Tensor:
    """True for every token of a packed row that is not among the first `num_sinks` of its document, [B, T].

    This is the decision a fine-tuned window trains with: `document` [B, T], -1 is padding.
    """
    position = torch.arange(document.shape[1], device=document.device).expand_as(document)
    starts = torch.ones_like(document, dtype=torch.bool)
    starts[:, 1:] = document[:, 1:] != document[:, :-1]
    first = torch.where(starts, position, torch.zeros_like(position)).cummax(-1).values
    return (position - first >= num_sinks) & (document >= 0)
