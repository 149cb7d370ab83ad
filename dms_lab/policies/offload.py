"""Paging to host memory: nothing is evicted, only moved away, and moved back for every query."""

from torch import Tensor

from dms_lab.cache.policy import LayerState, OffloadingRule
from dms_lab.policies.base import WindowedPolicy


class OffloadPolicy(WindowedPolicy, OffloadingRule):
    """Keeps the newest `window` tokens on the device and all older ones in host memory; every query sees all."""

    name = "offload"

    def __init__(self, window: int = 256) -> None:
        if window < 1:
            raise ValueError(f"offload needs a window of at least 1 token on the device, got window={window}")
        self.window = window

    def flags(self, evict_logit: Tensor | None, position: Tensor, num_kv_heads: int) -> Tensor:
        return (position >= 0)[:, None].expand(-1, num_kv_heads, -1)

    def evict(self, state: LayerState, key: Tensor) -> None:
        """In the masked cache everything is on the device."""
