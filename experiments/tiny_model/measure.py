"""Exact match of the embedded model with full attention and with a window of 64 tokens and 4 sinks, per length.

python experiments/tiny_model/measure.py [folder of another model]
"""

import sys

import torch

from dms_lab.attachment import retrofit
from dms_lab.config import ModelConfig
from dms_lab.evaluation import hard
from dms_lab.models import load_base, load_tokenizer
from dms_lab.policies import FullPolicy, StreamingLLMPolicy
from dms_lab.tiny import tasks

torch.set_num_threads(1)
path = sys.argv[1] if len(sys.argv) > 1 else "embedded"
config = ModelConfig("tiny", path, 512, 16, 0.0, 0.0, 1, "float32", False)
handle, tokenizer = retrofit(load_base(config), None), load_tokenizer(config)
for length, count in ((256, 200), (512, 200), (1024, 200), (1536, 50)):
    problems = {family: hard.make_problems(family, count, length, 1) for family in tasks.FAMILIES}
    for name, policy in (("full", FullPolicy), ("window 64 + 4 sinks", lambda: StreamingLLMPolicy(68))):
        label = hard.Label("measure", "tiny", name, 1.0, None, 1, "")
        results, _ = hard.evaluate_tasks(handle, policy, tokenizer, problems, label)
        print(length, name, *(f"{r.task} {100 * r.accuracy:.1f}" for r in results), flush=True)
