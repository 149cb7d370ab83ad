"""Whole decode steps, tokens a second: python -m experiments.benchmarks.decode_step.measure [--cases 8192x8]

    dense    transformers' dynamic cache, eager             static   its static cache, compiled with CUDA graphs (a GPU)
    eager    the compact cache, followed by the host         graph    the same in a fixed form, captured (`decode_step`)

Random weights of the real sizes in bfloat16, caches filled with the same random keys and values. At CR 1 everything is
kept, else decisions come in runs of tokens and heads keep unequal shares. Contestants take turns of some greedy steps, and
each brings every token to the host, as a stop rule needs it. Where not all layers of all contestants fit, all have fewer.
What is wrong is not timed: at CR 1 the logits have to be those of the dense cache, up to bfloat16.
On a CPU, which has the short form alone, the kernels run through the interpreter: that says nothing about speed.
"""

import argparse
import copy
import gc
import os
import statistics
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from dms_lab.attachment import Retrofit, retrofit
from dms_lab.cache.compact import CompactCache
from dms_lab.cache.policy import Scores
from dms_lab.decode_step import DecodeStep, Given
from dms_lab.policies.dms import DmsConfig
from dms_lab.sampling import Sampler, SamplingConfig
from experiments.benchmarks import counts, harness

HERE = Path(__file__).parent
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16
SHAPES = counts.SHAPES | {"tiny": counts.TINY}
FAMILIES = {"Llama-3.2-1B": "llama", "Qwen-R1-7B": "qwen2", "Qwen3-8B": "qwen3", "tiny": "qwen3"}
PAGE = 32
RUN = 64  # tokens of a run that share a decision
CHUNK = 2048  # tokens stored at once
ALLOWED = 0.05  # of the norm of dense logits
FIRST, SECOND = 5, 7  # the tokens of the steps that are checked


def build(name: str, shape: counts.Shape) -> PreTrainedModel:
    """A model of that shape with random weights."""
    config = AutoConfig.for_model(
        FAMILIES[name],
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        max_position_embeddings=2**17,
        tie_word_embeddings=name.startswith("Llama"),
    )
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=DTYPE, attn_implementation="sdpa").eval()


def prompt(shape: counts.Shape, batch: int, num_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random keys and values [B, K, T, D] of each layer, the same ones at every call."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    size = (batch, shape.num_kv_heads, num_tokens, shape.head_dim)
    for _ in range(shape.num_layers):
        yield tuple(torch.randn(size, device=DEVICE, dtype=DTYPE, generator=generator) for _ in range(2))


def dense_cache(cache: Cache, layers: Iterator[tuple[Tensor, Tensor]]) -> Cache:
    """One of transformers' caches, filled."""
    for layer, (key, value) in enumerate(layers):
        cache.update(key, value, layer)
    return cache


def compact_cache(
    handle: Retrofit, shape: counts.Shape, batch: int, num_tokens: int, ratio: float, room: int, storage: str
) -> CompactCache:
    """A compact cache of about that ratio, filled by what stores a prompt, with pages for `room` more tokens."""
    size, window = (shape.num_layers, batch, shape.num_kv_heads), handle.config.window
    kept = torch.rand(*size, device=DEVICE).square() * 3 / ratio if ratio > 1 else torch.ones(size, device=DEVICE)
    runs = torch.rand(*size, -(-num_tokens // RUN), device=DEVICE) >= kept[..., None]
    flags = runs.repeat_interleave(RUN, 3)[..., :num_tokens]
    num_pages = int(torch.ceil(((~flags).sum(3).clamp(max=num_tokens) + window + room) / PAGE + 1).sum())
    cache = CompactCache(handle.policy(), storage, PAGE, num_pages, num_places=batch, attention="triton")
    handle.hard(cache)
    count = torch.full((batch,), CHUNK, device=DEVICE)
    for layer, (key, value) in enumerate(prompt(shape, batch, num_tokens)):
        cache.update(key, value, layer)
        slots = cache.new_table(layer, batch, key, value, Scores(shape.head_dim**-0.5))
        for start in range(0, num_tokens, CHUNK):
            mine = [x[:, :, start : start + CHUNK] for x in (key, value, flags[layer])]
            slots.append_chunk(*mine, count.clamp(max=num_tokens - start))
        slots.note_columns(None, num_tokens)
        cache.layers[layer].slots, cache.layers[layer].columns = slots, num_tokens
    cache.close()
    return cache


# -- contestants -------------------------------------------------------------------------------------------------------
class Eager:
    """Greedy steps that the host follows; `forward` gives the logits [B, V] after ids and positions [B, 1]."""

    def __init__(self, forward: Callable[[Tensor, Tensor], Tensor], batch: int, num_tokens: int, num_steps: int) -> None:
        self.forward, self.position, self.num_steps = forward, num_tokens, num_steps
        self.ids = torch.full((batch, 1), FIRST, device=DEVICE)

    def step(self) -> Tensor:
        """One token of each sequence; the logits."""
        logits = self.forward(self.ids, torch.full_like(self.ids, self.position))
        self.ids, self.position = logits.argmax(-1, keepdim=True), self.position + 1
        self.ids.tolist()
        return logits

    def __call__(self) -> None:
        for _ in range(self.num_steps):
            self.step()


class Graph:
    """Greedy steps in a fixed form, the tokens of each read while the next one runs."""

    def __init__(self, handle: Retrofit, cache: CompactCache, batch: int, num_steps: int) -> None:
        self.fixed = DecodeStep(handle, cache, Sampler(SamplingConfig(), ()), batch)
        self.places, self.num_steps = range(batch), num_steps

    def step(self, token: int) -> Tensor:
        """One step with that token everywhere; the logits."""
        self.launch(token).read()
        return self.fixed.logits

    def launch(self, token: int):
        if not self.fixed.is_ready(self.places) and not self.fixed.make_ready(self.places):
            raise RuntimeError("the pool of this benchmark is too small for its steps")
        position = self.fixed.cache.get_seq_length()
        return self.fixed.launch(dict.fromkeys(self.places, Given(token, position)))

    def __call__(self) -> None:
        flights = deque()
        for _ in range(self.num_steps):
            flights.append(self.launch(-1))
            if len(flights) > 1:
                flights.popleft().read()
        flights.popleft().read()


def over_dense(model: PreTrainedModel, cache: Cache) -> Callable[[Tensor, Tensor], Tensor]:
    """A forward over a cache of transformers, compiled over one that can be."""
    run = torch.compile(model, mode="reduce-overhead") if isinstance(cache, StaticCache) else model

    def forward(ids: Tensor, positions: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return run(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).logits[:, -1].clone()

    return forward


def over_compact(handle: Retrofit, cache: CompactCache) -> Callable[[Tensor, Tensor], Tensor]:
    """A forward over the compact cache as the engine has it."""
    base, head = handle.model.get_decoder(), handle.model.get_output_embeddings()

    def forward(ids: Tensor, positions: Tensor) -> Tensor:
        cache.rows = torch.arange(ids.shape[0], device=DEVICE)
        plan = handle.hard(cache)
        found = base(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, dms=plan)
        return head(found.last_hidden_state[:, -1])

    return forward


def check(dense: Eager, eager: Eager, graph: Graph) -> None:
    """Two steps of each at CR 1; exits where logits are not those of the dense cache."""
    for name, token, run in (("eager", FIRST, eager.step), ("graph", SECOND, lambda: graph.step(SECOND))):
        dense.ids.fill_(token)
        wanted, found = dense.step().float(), run().float()
        error = float((found - wanted).norm() / wanted.norm())
        if not error <= ALLOWED:
            sys.exit(f"{name}: logits are {error:.3f} of their norm away from those of the dense cache")


# -- cases -------------------------------------------------------------------------------------------------------------
def that_fits(shape: counts.Shape, batch: int, num_tokens: int) -> counts.Shape:
    """The shape with as many layers as fit with all caches: three dense ones, compact ones, and what fills them."""
    if not CUDA:
        return shape
    kv = 2 * DTYPE.itemsize * batch * num_tokens * shape.num_kv_heads * shape.head_dim
    free = 0.9 * torch.cuda.mem_get_info()[0] - 2 * DTYPE.itemsize * shape.vocabulary * shape.hidden - 6 * kv
    layers = int(free // (3.5 * kv + DTYPE.itemsize * shape.layer_weights))
    return replace(shape, num_layers=max(1, min(shape.num_layers, layers)))


def measure(name: str, num_tokens: int, batch: int, args: argparse.Namespace) -> list[harness.Row]:
    """One shape and context: all contestants, in turns."""
    whole = SHAPES[name]
    shape = that_fits(whole, batch, num_tokens)
    layers = f", {shape.num_layers} of {whole.num_layers} layers" * (shape != whole)
    case = f"{name}{layers}, {num_tokens:,} tokens x {batch}" + f", {args.storage}" * (args.storage != "model")
    original = build(name, shape)
    model = copy.deepcopy(original, memo={id(weight): weight for weight in original.parameters()})
    handle = retrofit(model, DmsConfig(window=args.window))
    room = 2 * args.steps * (args.rounds + args.warm_up) + 2

    def eager(forward: Callable[[Tensor, Tensor], Tensor]) -> Eager:
        return Eager(forward, batch, num_tokens, args.steps)

    contestants = {"dense": eager(over_dense(original, dense_cache(DynamicCache(), prompt(shape, batch, num_tokens))))}
    if CUDA:
        static = StaticCache(original.config, max_cache_len=num_tokens + room)
        contestants["static"] = eager(over_dense(original, dense_cache(static, prompt(shape, batch, num_tokens))))
    for ratio in args.ratios:
        cache = compact_cache(handle, shape, batch, num_tokens, ratio, room, args.storage)
        print(f"{case}: CR {cache.compression().eviction:.2f} asked for as {ratio:g}", flush=True)
        contestants[f"eager, CR {ratio:g}"] = eager(over_compact(handle, cache))
        contestants[f"graph, CR {ratio:g}"] = Graph(handle, cache, batch, args.steps)
    if 1 in args.ratios and args.storage == "model":
        check(contestants["dense"], contestants["eager, CR 1"], contestants["graph, CR 1"])
    taken = harness.take_turns(contestants, args.rounds, DEVICE, args.warm_up)
    notes = {"tokens": batch * args.steps, "layers": shape.num_layers}
    # What the interpreter takes is held against what it takes: beside it, the dense cache takes no time at all.
    against = {who: "dense" if CUDA or who == "dense" else f"eager, CR {args.ratios[0]:g}" for who in taken}
    return [harness.Row(case, who, values, against[who], is_race=CUDA, notes=notes) for who, values in taken.items()]


def table(rows: list[harness.Row]) -> str:
    """Tokens a second, and how many times those of the dense cache."""
    speeds = {(row.case, row.name): row.notes["tokens"] / statistics.median(row.values) for row in rows}
    cells = [
        (case, name, f"{speed:,.3g}" if speed < 100 else f"{speed:,.0f}", f"{speed / speeds[case, 'dense']:.3g}")
        for (case, name), speed in speeds.items()
    ]
    return harness.table(("shape and context", "contestant", "tokens/s", "x dense"), cells)


def case_of(word: str) -> tuple[int, int]:
    """Tokens and streams of `8192x8`."""
    num_tokens, _, batch = word.partition("x")
    return int(num_tokens), int(batch)


@torch.no_grad()
def main() -> None:
    """The command."""
    parser = harness.parser(__doc__, HERE)
    parser.add_argument("--shapes", nargs="+", default=[*counts.SHAPES], choices=SHAPES)
    cases = ["1024x1", "8192x8", "32768x32", "40960x8"]
    parser.add_argument("--cases", nargs="+", type=case_of, default=[*map(case_of, cases)], help="tokens x streams")
    parser.add_argument("--ratios", type=float, nargs="+", default=[1, 8])
    parser.add_argument("--storage", default="model", choices=("model", "fp8", "int8"), help="of the compact cache")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--steps", type=int, default=32, help="of a turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warm-up", type=int, default=2, help="turns that are not counted")
    if "--short" in sys.argv:
        parser.set_defaults(shapes=["tiny"], cases=[(96, 2)], window=8, steps=3, rounds=2, warm_up=1)
    args = parser.parse_args()
    if not CUDA and not args.short:
        parser.error("no CUDA device is here: the interpreter would take days; use --short")
    torch.manual_seed(0)
    rows = []
    for name in args.shapes:
        for num_tokens, batch in args.cases:
            rows += measure(name, num_tokens, batch, args)
            gc.collect()
            torch.compiler.reset()
            if CUDA:
                torch.cuda.empty_cache()
    print(table(rows))
    harness.write(harness.out(args), rows, DEVICE, dtype=str(DTYPE).removeprefix("torch."))


if __name__ == "__main__":
    main()
