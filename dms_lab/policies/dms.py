"""Dynamic Memory Sparsification: each KV head has learned which tokens it can do without.

    adapter   residual stream [B, T, hidden] -> RMSNorm -> Linear -> scale * x - offset          -> evict_logit [B, K, T]
    neuron    query before RoPE, first head of each group, element n -> scale * x - offset       -> evict_logit [B, K, T]
    sinks     no feature: all but the first tokens of a document are decided for eviction, which makes the same
              training a fine-tuned sliding window, the fair control

Source: Lancucki et al. 2025, "Inference-Time Hyper-Scaling with KV Cache Compression", section 3.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dms_lab import eviction
from dms_lab.attention import autocast
from dms_lab.policies.base import WindowedPolicy

PREDICTORS = ("adapter", "neuron", "sinks")


@dataclass(frozen=True)
class DmsConfig:
    """The policy a model is retrofitted with. `window` in tokens, the query itself included."""

    window: int = 256
    predictor: str = "adapter"
    granularity: str = "head"
    decided_by: str = "next"
    scale: float = 100.0
    offset: float = 5.0
    neuron_index: int = -1
    num_sinks: int = 4
    tau: float = 0.1
    lora_rank: int = 0  # 0: no LoRA on the attention projections
    lora_alpha: float = 32.0

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("predictor", self.predictor, PREDICTORS),
            ("granularity", self.granularity, eviction.GRANULARITIES),
            ("decided_by", self.decided_by, eviction.DECIDED_BY),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(choices)}")
        if self.window < 1:
            raise ValueError(f"window={self.window} is too small; it counts the query itself, so use at least 1")
        if not self.tau > 0:
            raise ValueError(f"tau={self.tau} must be above 0; the published recipes use 0.1")
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank={self.lora_rank} must not be negative; 0 means no LoRA, 16 is usual")
        if self.predictor == "neuron" and self.granularity == "layer":
            raise ValueError("the neuron predictor decides per KV head; use granularity=head or predictor=adapter")
        if self.predictor == "neuron" and self.lora_rank:
            raise ValueError("the neuron predictor needs the projections themselves trained; use lora_rank=0")


class AdapterPredictor(nn.Module):
    """Eviction logits from the residual stream; zero-initialised, so a fresh one keeps everything (logit = -offset)."""

    def __init__(self, hidden_size: int, num_outputs: int, config: DmsConfig, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm_weight = nn.Parameter(torch.ones(hidden_size))
        self.weight = nn.Parameter(torch.zeros(num_outputs, hidden_size))
        self.scale, self.offset, self.eps = config.scale, config.offset, eps

    def forward(self, residual: Tensor) -> Tensor:
        """`residual` [B, T, hidden] of any float dtype -> logits [B, K or 1, T] in float32, under autocast too."""
        x = residual.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        with autocast.off(x.device):
            logits = (x * self.norm_weight.float()) @ self.weight.float().T
        return (self.scale * logits - self.offset).transpose(1, 2)


class NeuronPredictor(nn.Module):
    """Eviction logits from one element of the query before RoPE. No parameters: the projection itself is trained."""

    def __init__(self, num_kv_heads: int, config: DmsConfig) -> None:
        super().__init__()
        self.num_kv_heads, self.index = num_kv_heads, config.neuron_index
        self.scale, self.offset = config.scale, config.offset

    def forward(self, query: Tensor) -> Tensor:
        """`query` [B, T, H, D] before RoPE (after its norm, where there is one) -> logits [B, K, T] in float32."""
        group = query.shape[2] // self.num_kv_heads
        return (self.scale * query[:, :, ::group, self.index].float() - self.offset).transpose(1, 2)

    def rows(self, num_heads: int, head_dim: int) -> list[int]:
        """The outputs of the query projection that this predictor reads, one a KV head."""
        group = num_heads // self.num_kv_heads
        return [head * head_dim + self.index % head_dim for head in range(0, num_heads, group)]

    def zeroed(self, query: Tensor, keep: float) -> Tensor:
        """`query` [B, T, H, D] with the element multiplied by `keep` in the first query head of each group.

        Applied before and after RoPE, which mixes the element with its partner: while it fades, what the element says to
        the partner goes with `keep`, what stays in its own place with `keep` squared.
        """
        factor = torch.ones(query.shape[2:], dtype=query.dtype, device=query.device)
        factor[:: query.shape[2] // self.num_kv_heads, self.index] = keep
        return query * factor


class DmsPolicy(WindowedPolicy):
    """Keeps what the predictor did not decide to evict, and everything younger than the window."""

    name = "dms"

    def __init__(self, config: DmsConfig) -> None:
        self.config, self.window, self.decided_by = config, config.window, config.decided_by

    def flags(self, evict_logit: Tensor | None, position: Tensor, num_kv_heads: int) -> Tensor:
        if evict_logit is None:
            raise ValueError(
                "the DMS policy got no eviction logits: this model has no predictor; load a checkpoint with "
                "dms_lab.load_checkpoint, or attach one with dms_lab.retrofit"
            )
        return (evict_logit > 0).expand(-1, num_kv_heads, -1)
