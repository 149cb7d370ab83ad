"""Greedy decoding of one prompt under a press.

    prefill inside `with press(model)` -> first token -> one token at a time, inside it again if the press decodes

This is the order of kvpress's own pipeline, with two differences: the press sees the whole prompt, its question included,
and the prefill's logits give the first token.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from kvpress import BasePress
from meter import Meter
from presses import decodes, moves_positions
from transformers import Cache, DynamicCache, PreTrainedModel


@dataclass(frozen=True)
class Generation:
    """The new tokens, whether an end token closed them, and seconds for the prefill and for all later tokens."""

    ids: list[int]
    finished: bool
    prefill_seconds: float
    decode_seconds: float


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    press: BasePress | None,
    prompt: Sequence[int],
    max_new_tokens: int,
    end_ids: Sequence[int],
    meter: Meter | None = None,
) -> Generation:
    """Continues `prompt` greedily until an end token or the limit; the meter, if there is one, has counted all of it."""
    cache = meter.cache if meter else DynamicCache()
    started = _now(model)
    with press(model) if press else nullcontext():
        ids = torch.tensor([prompt], device=model.device)
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    new = [int(logits[0, -1].argmax())]
    if meter:
        meter.prefilled()
    prefilled = _now(model)
    position = cache.get_seq_length() if moves_positions(press) else len(prompt)
    with press(model) if decodes(press) else nullcontext():
        while len(new) < max_new_tokens and new[-1] not in end_ids:
            masked = meter.masked() if meter else 0.0
            new.append(_next_token(model, cache, new[-1], position))
            position += 1
            if meter:
                meter.step(masked)
    return Generation(new, new[-1] in end_ids, prefilled - started, _now(model) - prefilled)


def _next_token(model: PreTrainedModel, cache: Cache, token: int, position: int) -> int:
    ids = torch.tensor([[token]], device=model.device)
    positions = torch.tensor([[position]], device=model.device)
    logits = model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).logits
    return int(logits[0, -1].argmax())


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
