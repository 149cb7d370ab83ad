"""H2O (Zhang et al. 2023): heavy hitters by cumulative attention, and half the budget for the most recent tokens."""

from torch import Tensor

from dms_lab.cache.policy import Ranking
from dms_lab.policies.base import RankedPolicy


class H2OPolicy(RankedPolicy):
    """Drops, per KV head, the live token with the lowest cumulative attention outside the recent half of the budget."""

    name = "h2o"
    needs_total = True

    def rank(self, seen: Ranking) -> Tensor:
        age = seen.now[:, None, None] - seen.position
        return seen.total.masked_fill(age < self.budget // 2, float("inf"))
