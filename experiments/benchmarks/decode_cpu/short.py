"""The compact cache against transformers' dense one, in short: python -m experiments.benchmarks.decode_cpu.short --short

One contest at 1k and 4k tokens: a step of decoding, a prompt, and the bytes that are held then. `bench.py` has all sizes.
"""

import functools
import gc
from pathlib import Path

import torch

from experiments.benchmarks import harness
from experiments.benchmarks.decode_cpu.contest import Contestant, Models, held_bytes, make_cache, make_models

HERE = Path(__file__).parent
DENSE = "hf"
NAMES = (DENSE, "full", "dms", "int8")


@torch.no_grad()
def prefill(models: Models, name: str, num_tokens: int) -> None:
    """A random prompt through the model."""
    ids = torch.randint(models.original.config.vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(2))
    models.of(name)(input_ids=ids, past_key_values=make_cache(name), use_cache=True, logits_to_keep=1)


def measure(models: Models, num_tokens: int, rounds: int, device: torch.device) -> list[harness.Row]:
    """Steps, bytes and a prompt of one sequence of so many tokens."""
    rivals = {name: Contestant(name, models, num_tokens, 1) for name in NAMES}
    taken = harness.take_turns({name: rival.step for name, rival in rivals.items()}, rounds, device, warm_up=2)
    rows = [harness.Row(f"step of decoding, {num_tokens:,} tokens", name, taken[name], DENSE) for name in NAMES]
    for name, rival in rivals.items():
        bytes_held = [held_bytes(rival.cache)]
        rows.append(harness.Row(f"bytes held, {num_tokens:,} tokens", name, bytes_held, DENSE, "byte"))
    del rivals
    gc.collect()
    prompts = {name: functools.partial(prefill, models, name, num_tokens) for name in (DENSE, "dms")}
    taken = harness.take_turns(prompts, 3, device)
    return rows + [harness.Row(f"prompt of {num_tokens:,} tokens", name, taken[name], DENSE) for name in prompts]


def main() -> None:
    """The command; a benchmark of the CPU, whatever else is there."""
    args = harness.parser(__doc__, HERE).parse_args()
    torch.set_num_threads(1)
    device, models = torch.device("cpu"), make_models(torch.float32)
    rows = [row for num_tokens in (1024, 4096) for row in measure(models, num_tokens, 7, device)]
    ratios = harness.ratios(rows)
    cells = [(case, name, f"{ratio:.3f}") for (case, name), ratio in ratios.items()]
    print(harness.table(("what", "cache", f"of {DENSE}"), cells))
    harness.write(harness.out(args), rows, device, dtype="float32")


if __name__ == "__main__":
    main()
