"""Eviction and quantised storage together: python experiments/storage/measure.py <checkpoint> [<checkpoint> ...]

Exact match of the embedded tasks with each storage of the compact cache, for full attention and each checkpoint, with the
factor that each saves and the bytes really held; appends a line of JSON a row to measured.jsonl beside this file.
"""

import json
import sys
from pathlib import Path

import torch

from dms_lab import accounting, models
from dms_lab.attachment import retrofit
from dms_lab.chains import Prompt, Settings
from dms_lab.checkpoint import load_checkpoint
from dms_lab.config import ModelConfig
from dms_lab.evaluation import hard
from dms_lab.generation import Engine, end_ids
from dms_lab.policies import FullPolicy
from dms_lab.results import git_revision
from dms_lab.sampling import SamplingConfig
from dms_lab.tiny import corpus, tasks

NUM_PROBLEMS, LENGTH, SEED = 64, 512, 0
MODEL = ModelConfig("tiny", "embedded", LENGTH, 16, 1e-3, 1e-4, 4, "float32", False)


def measure(checkpoint: Path | None, storage: str) -> dict:
    """One row: accuracy by family in percent, factors by eviction, storage and bytes, KV bytes of a chain at its peak."""
    base, tokenizer = models.load_base(MODEL), models.load_tokenizer(MODEL)
    handle = retrofit(base, None) if checkpoint is None else load_checkpoint(checkpoint, base)
    policy = FullPolicy() if checkpoint is None else handle.policy()
    settings = Settings(96, places=32, storage=storage)
    engine = Engine(handle, policy, settings, SamplingConfig(), end_ids(base, tokenizer), tokenizer)
    row = {"method": "full" if checkpoint is None else f"dms {checkpoint.name}", "storage": storage}
    requests = []
    for family in tasks.FAMILIES:
        problems = hard.make_problems(family, NUM_PROBLEMS, LENGTH, SEED)
        prompts = [Prompt(i, corpus.encode_prompt(problem, tokenizer)) for i, problem in enumerate(problems)]
        found = list(engine.run(prompts))
        row[family] = 100 * sum(hard.is_right(g, problems[g.problem], tokenizer) for g in found) / len(found)
        requests += [g.usage for g in found]
    usage = accounting.usage(requests)
    tokens = sum(r.num_tokens for r in requests) / len(requests)
    return row | {
        "by_eviction": usage.measured_cr,
        "by_storage": engine.cache.storage_factor,
        "in_bytes": tokens * engine.cache.plain_bytes_per_token / usage.kv_bytes_peak,
        "kv_bytes_peak": usage.kv_bytes_peak,
        "git_revision": git_revision(),
    }


def main() -> None:
    """Measures and prints every row as Markdown."""
    torch.set_num_threads(1)
    print("| method | storage | " + " | ".join(tasks.FAMILIES) + " | by eviction | by storage | in bytes | MB a chain |")
    print("|---" * (6 + len(tasks.FAMILIES)) + "|")
    for checkpoint in (None, *map(Path, sys.argv[1:])):
        for storage in ("model", "fp8", "int8"):
            row = measure(checkpoint, storage)
            with (Path(__file__).parent / "measured.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            cells = [f"{row[family]:.1f}" for family in tasks.FAMILIES]
            cells += [f"{row[name]:.2f}" for name in ("by_eviction", "by_storage", "in_bytes")]
            print(
                f"| {row['method']} | {storage} | " + " | ".join(cells) + f" | {row['kv_bytes_peak'] / 1e6:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
