"""Where the time of the embedded model goes on a CPU: python -m experiments.benchmarks.where_time_goes.measure [--short]

    a training step near the end, problems answered, prompts read token by token -> torch's profiler -> shares

Shares of the time of all operators: matrix products of the layers, attention, everything else. What is left of a step is
Python between them (`operators`: their sum as a share of the processor time without the profiler).
"""

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.profiler import ProfilerActivity, profile

from dms_lab import config, models
from dms_lab.attachment import retrofit
from dms_lab.cache.policy import Policy
from dms_lab.evaluation import hard
from dms_lab.generation import generate_greedy
from dms_lab.policies import HEURISTICS, FullPolicy
from dms_lab.tiny import corpus
from dms_lab.training.run import _load_data, build_module
from experiments.benchmarks import harness

FOLDER = Path(__file__).parent
CPU = torch.device("cpu")
PRODUCTS = ("aten::mm", "aten::addmm")
ATTENTION = ("_ChunkedAttention", "_ChunkedAttentionBackward", "aten::scaled_dot_product_attention", "aten::einsum")
ATTENTION += ("aten::_scaled_dot_product_flash_attention_for_cpu_backward",)


def train_config() -> config.TrainConfig:
    """The embedded model's recipe, as `train` reads it."""
    with initialize_config_dir(str(harness.ROOT / "conf"), version_base=None):
        composed = compose("train", ["model=tiny", "experiment=tiny_recipe", "cr=8", "eval_after=false"])
    plain = OmegaConf.to_container(composed, resolve=False)
    plain.pop("hydra", None)
    return config.resolve(plain)


def training(asked: config.TrainConfig) -> Callable[[], None]:
    """One step of distillation, AdamW's included."""
    module, _ = build_module(asked)
    data = _load_data(asked)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4)
    step = asked.steps - 10
    batch = data.batch(step, 0)

    def run() -> None:
        module.loss(batch, step).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def answering(asked: config.TrainConfig, make: Callable[[], Policy], count: int, new_tokens: int) -> Callable[[], None]:
    """So many problems of 512 tokens, prompts included, through the compact cache."""
    tokenizer = models.load_tokenizer(asked.model)
    handle = retrofit(models.load_base(asked.model, "cpu"), None)
    problems = hard.make_problems("ledger", count, 512, 0)
    prompts = [corpus.encode_prompt(problem, tokenizer) for problem in problems]
    return functools.partial(
        generate_greedy, handle.model, make, prompts, new_tokens, end_id=tokenizer.eos_token_id, batch_size=count
    )


def activities(count: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """What is looked at, by name."""
    asked = train_config()
    yield "a training step", training(asked)
    yield f"{count} problems answered, full cache", answering(asked, FullPolicy, count, 64)
    yield (
        f"{count} prompts read token by token (TOVA, 64 slots)",
        answering(asked, lambda: HEURISTICS["tova"](64), count, 1),
    )


def shares(name: str, run: Callable[[], None]) -> list[harness.Row]:
    """Seconds by kind; ratios are to the sum of all operators, which is held against the processor time."""
    run()
    started = time.process_time()
    run()
    plain = time.process_time() - started
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run()
    events = profiled.key_averages()
    every = sum(event.self_cpu_time_total for event in events) / 1e6
    products = sum(event.self_cpu_time_total for event in events if event.key in PRODUCTS) / 1e6
    attention = sum(event.cpu_time_total for event in events if event.key in ATTENTION) / 1e6
    kinds = {"products": products, "attention": attention, "rest": every - products - attention, "operators": every}
    kinds["processor"] = plain
    return [harness.Row(name, kind, [seconds], "operators", is_race=False) for kind, seconds in kinds.items()]


def main() -> None:
    """The command; on a CPU, whatever else is there."""
    args: argparse.Namespace = harness.parser(__doc__, FOLDER).parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, run in activities(8 if args.short else 32):
        rows += shares(name, run)
    ratios = harness.ratios(rows)
    cells = []
    for row in rows:
        if row.name == "operators":
            parts = (f"{ratios[row.case, kind]:.0%}" for kind in ("products", "attention", "rest"))
            cells.append([row.case, *parts, f"{row.values[0]:.2f}", f"{ratios[row.case, 'processor']:.2f}"])
    head = ("what", "products", "attention", "rest", "operators s, profiled", "processor time without profiler, of them")
    print(harness.table(head, cells))
    harness.write(harness.out(args), rows, CPU, dtype="float32")


if __name__ == "__main__":
    main()
