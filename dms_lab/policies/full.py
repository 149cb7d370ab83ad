"""Everything is kept: the original model, in the cache and accounting of its rivals."""

from torch import Tensor

from dms_lab.policies.base import WindowedPolicy


class FullPolicy(WindowedPolicy):
    """Keeps every token."""

    name = "full"
    window = None

    def flags(self, evict_logit: Tensor | None, position: Tensor, num_kv_heads: int) -> Tensor | None:
        return None
