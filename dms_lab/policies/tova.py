"""TOVA (Oren et al. 2024): the token the newest query attends to least goes, one choice for all heads of a layer."""

from torch import Tensor

from dms_lab.cache.policy import Ranking
from dms_lab.policies.base import RankedPolicy


class TovaPolicy(RankedPolicy):
    """Drops the live token with the lowest attention weight of the newest query, summed over the query heads."""

    name = "tova"

    def rank(self, seen: Ranking) -> Tensor:
        return seen.weights.sum(1, keepdim=True).expand(seen.position.shape)
