"""Batched greedy decoding through a cache with a policy, with the accounting of every request.

    prompts -> left padding -> prefill -> one token at a time until the end token or the limit -> Generated

A finished sequence leaves the batch: it costs nothing more and is not counted any more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from dms_lab.cache.masked import MaskedCache
from dms_lab.cache.policy import Policy


@dataclass(frozen=True)
class Generated:
    """One answered request. Counts are tokens, averaged over layers and KV heads (accounting, METHOD of the README).

    `kv_reads` sums the live slots attended to over the decode steps, `peak_tokens` is their maximum (prefill included),
    `live_tokens` what is live at the end, `num_tokens` prompt and generation together.
    """

    ids: list[int]
    finish_reason: str
    num_prompt_tokens: int
    kv_reads: float
    peak_tokens: float
    live_tokens: float

    @property
    def num_tokens(self) -> int:
        """Logical tokens that went through the model."""
        return self.num_prompt_tokens + max(0, len(self.ids) - 1)


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


def _generate_batch(
    model: PreTrainedModel, policy: Policy, prompts: list[list[int]], max_new_tokens: int, end_id: int
) -> list[Generated]:
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
        mask[row, longest - len(prompt) :] = 1
    cache = MaskedCache(policy)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    active = list(range(len(prompts)))
    texts: list[list[int]] = [[] for _ in prompts]
    reads, peaks, lives = ([0.0] * len(prompts) for _ in range(3))
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
        live = cache.live_slots().float().mean((1, 2)).tolist()
        tokens = output.logits[:, -1].argmax(-1)
        stay = []
        for slot, (request, token) in enumerate(zip(active, tokens.tolist(), strict=True)):
            texts[request].append(token)
            reads[request] += live[slot] if step else 0.0
            peaks[request] = max(peaks[request], live[slot])
            lives[request] = live[slot]
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
    return [Generated(texts[i], reasons[i], len(prompts[i]), reads[i], peaks[i], lives[i]) for i in range(len(prompts))]
