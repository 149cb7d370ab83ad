"""What stays in the cache: one policy a file, all in the same cache, with the same attention and the same accounting.

A policy is a rule that every cache serves: a decision per token and a window (`flags`), or a ranking of the live tokens and
a budget (`rank`). `dms` learned its decisions; `streaming_llm`, `tova`, `h2o`, `keydiff` and `random` have a fixed rule;
`full` keeps everything, `quest` keeps everything and reads a part, `offload` keeps everything but not on the device.
"""

from dms_lab.cache.policy import Policy
from dms_lab.policies.dms import DmsPolicy
from dms_lab.policies.full import FullPolicy
from dms_lab.policies.h2o import H2OPolicy
from dms_lab.policies.keydiff import KeyDiffPolicy
from dms_lab.policies.offload import OffloadPolicy
from dms_lab.policies.quest import QuestPolicy
from dms_lab.policies.random import RandomPolicy
from dms_lab.policies.streaming_llm import StreamingLLMPolicy
from dms_lab.policies.tova import TovaPolicy

HEURISTICS = {
    "streaming_llm": StreamingLLMPolicy,
    "tova": TovaPolicy,
    "h2o": H2OPolicy,
    "keydiff": KeyDiffPolicy,
    "random": RandomPolicy,
    "quest": QuestPolicy,
}

__all__ = ["HEURISTICS", "DmsPolicy", "FullPolicy", "OffloadPolicy", "Policy", *(p.__name__ for p in HEURISTICS.values())]
