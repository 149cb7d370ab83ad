"""Everything is kept: the original model, in the cache and accounting of its rivals."""

from torch import Tensor

from dms_lab.cache.policy import LayerState
from dms_lab.policies.base import WindowedPolicy


class FullPolicy(WindowedPolicy):
    """Keeps every token."""

    name = "full"
    window = None

    def evict(self, state: LayerState, key: Tensor) -> Tensor | None:
        return None
