"""KeyDiff (Park et al. 2025, arXiv 2504.15364): of keys that point the same way one is enough, whatever attention says."""

import torch.nn.functional as F
from torch import Tensor

from dms_lab.cache.policy import Ranking
from dms_lab.policies.base import RankedPolicy


class KeyDiffPolicy(RankedPolicy):
    """Drops, per KV head, the live token whose key is closest in direction to the mean direction of all live keys.

    Published for blocks of a prompt, after each of which the surplus goes at once; here it goes token by token. Of two
    keys both are equally close to their mean, so the budget is at least 3.
    """

    name = "keydiff"
    least_budget = 3
    needs_keys = True
    needs_weights = False

    def rank(self, seen: Ranking) -> Tensor:
        direction = F.normalize(seen.key, dim=-1)  # a dead one's is 0 and adds nothing to the mean
        mean = F.normalize(direction.sum(2, keepdim=True), dim=-1)
        return -(direction * mean).sum(-1)
