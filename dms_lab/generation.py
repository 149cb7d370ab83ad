"""Batched greedy decoding through a cache with a policy, with the accounting of every request.

    prompts -> left padding -> prefill -> one token at a time until the end token or the limit -> Generated

A finished sequence leaves the batch: it costs nothing more and is not counted any more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dms_lab.accounting import Meter, Request
from dms_lab.cache.masked import MaskedCache
from dms_lab.cache.policy import Policy


@dataclass(frozen=True)
class Generated:
    """One answered request: the new tokens, why they end (`eos` or `length`), and what its cache cost."""

    ids: list[int]
    finish_reason: str
    usage: Request


@torch.inference_mode()
def generate_greedy(
    model: PreTrainedModel,
    make_policy: Callable[[], Policy],
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    end_id: int,
    batch_size: int = 32,
) -> list[Generated]:
    """Continues every prompt greedily through a masked cache; returns results in the order of `prompts`.

    `model` must be retrofitted (a seam without predictor will do for policies without one). Raises `ValueError` for an
    empty prompt or one that, with `max_new_tokens`, exceeds the model's positions.
    """
    limit = model.config.get_text_config().max_position_embeddings
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty; a prompt needs at least one token")
        if len(prompt) + max_new_tokens > limit:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens; with max_new_tokens={max_new_tokens} it exceeds the model's "
                f"{limit} positions: shorten it or lower max_new_tokens"
            )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # alike lengths together: little padding
    results: dict[int, Generated] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = _generate_batch(model, make_policy(), [prompts[i] for i in chosen], max_new_tokens, end_id)
        results.update(zip(chosen, batch, strict=True))
    return [results[i] for i in range(len(prompts))]


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token rows as ids, attention mask and positions [B, T], padded on the left with id 0, mask 0 and position 0."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.as_tensor(row, device=device)
        mask[index, longest - len(row) :] = 1
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def _generate_batch(
    model: PreTrainedModel, policy: Policy, prompts: list[list[int]], max_new_tokens: int, end_id: int
) -> list[Generated]:
    device = next(model.parameters()).device
    ids, mask, positions = left_padded(prompts, device)
    cache, meter = MaskedCache(policy), Meter(len(prompts))
    active = list(range(len(prompts)))
    texts: list[list[int]] = [[] for _ in prompts]
    reasons = ["length"] * len(prompts)
    for step in range(max_new_tokens):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        meter.step(cache.live_slots(), active, prefill=step == 0)
        tokens = output.logits[:, -1].argmax(-1)
        stay = []
        for slot, (request, token) in enumerate(zip(active, tokens.tolist(), strict=True)):
            texts[request].append(token)
            if token == end_id:
                reasons[request] = "eos"
            else:
                stay.append(slot)
        if not stay:
            break
        if len(stay) < len(active):
            keep = torch.tensor(stay, device=device)
            cache.batch_select_indices(keep)
            mask, tokens, positions = mask[keep], tokens[keep], positions[keep]
            active = [active[slot] for slot in stay]
        ids = tokens[:, None]
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        positions = positions[:, -1:] + 1
    # The last token generated never went through the model.
    lengths = [len(prompt) + len(text) - 1 for prompt, text in zip(prompts, texts, strict=True)]
    usage = meter.requests(lengths, [len(text) for text in texts])
    return [Generated(*parts) for parts in zip(texts, reasons, usage, strict=True)]
