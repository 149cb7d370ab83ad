"""H2O (Zhang et al. 2023): heavy hitters by cumulative attention, and half the budget for the most recent tokens."""

from torch import Tensor

from dms_lab.cache.policy import LayerState
from dms_lab.policies.base import RankedPolicy, grown_note


class H2OPolicy(RankedPolicy):
    """Drops, per KV head, the live token with the lowest cumulative attention outside the recent half of the budget."""

    name = "h2o"

    def rank(self, state: LayerState, weights: Tensor, live: Tensor) -> Tensor:
        batch, num_kv_heads, num_keys = live.shape
        total = grown_note(state, "attention", live)
        total += weights.view(batch, num_kv_heads, -1, num_keys).sum(2)
        ranks = total.clone()
        ranks[:, :, num_keys - self.budget // 2 :] = float("inf")
        return ranks
