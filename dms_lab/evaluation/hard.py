"""Generation and perplexity under hard decisions, through the masked cache.

problems -> greedy generation under a policy -> answers checked -> Result per (method, task)
held-out text -> one forward under the visibility rule ----------> perplexity
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dms_lab import accounting, pareto
from dms_lab.attachment import Retrofit
from dms_lab.cache.masked import MaskedCache
from dms_lab.cache.policy import Policy
from dms_lab.chains import Generated
from dms_lab.distillation import lm_loss
from dms_lab.generation import generate_greedy
from dms_lab.results import Result
from dms_lab.structure import output_head
from dms_lab.tiny import corpus, tasks
from dms_lab.tiny.corpus import Document
from dms_lab.tiny.tokenizer import END_THINK


@dataclass(frozen=True)
class Label:
    """What stands in every result of one method: who, with which budget."""

    run_id: str
    model: str
    method: str
    target_cr: float
    window: int | None
    seed: int
    config_hash: str


def make_problems(family: str, count: int, length: int, seed: int) -> list[tasks.Problem]:
    """Held-out problems of a family: drawn apart from all training batches."""
    rng = random.Random(f"evaluation {seed} {family} {length}")
    return [tasks.make_problem(family, rng, length) for _ in range(count)]


def is_right(generated: Generated, problem: tasks.Problem, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether what stands after the thought is the answer; a chain cut off before its end is wrong."""
    text = tokenizer.decode(generated.ids, skip_special_tokens=False)
    _, closed, answer = text.partition(END_THINK)
    return bool(closed) and generated.finish_reason == "eos" and answer.removesuffix("<|im_end|>") == problem.answer


def evaluate_tasks(
    handle: Retrofit,
    make_policy: Callable[[], Policy],
    tokenizer: PreTrainedTokenizerBase,
    problems: dict[str, list[tasks.Problem]],
    label: Label,
    batch_size: int = 32,
) -> tuple[list[Result], float]:
    """One result a family, and the mean live tokens at the end of a request (the budget that rivals get)."""
    results, live = [], []
    for family, found in problems.items():
        started = time.monotonic()
        generated = generate_greedy(
            handle.model,
            make_policy,
            [corpus.encode_prompt(p, tokenizer) for p in found],
            max_new_tokens=96,
            end_id=tokenizer.eos_token_id,
            batch_size=batch_size,
        )
        scores = [float(is_right(g, p, tokenizer)) for g, p in zip(generated, found, strict=True)]
        right = round(sum(scores))
        usage = accounting.usage(g.usage for g in generated)
        live.append(usage.live_tokens)
        low, high = pareto.wilson_interval(right, len(found))
        results.append(
            Result(
                **vars(label),
                task=family,
                measured_cr=usage.measured_cr,
                num_problems=len(found),
                accuracy=right / len(found),
                accuracy_low=low,
                accuracy_high=high,
                perplexity=None,
                kv_reads=usage.kv_reads,
                peak_tokens=usage.peak_tokens,
                kv_bytes_peak=usage.kv_bytes_peak,
                tokens_generated=usage.tokens_generated,
                seconds=time.monotonic() - started,
                problem_scores=scores,
            )
        )
    return results, sum(live) / len(live)


@torch.inference_mode()
def evaluate_perplexity(
    handle: Retrofit,
    make_policy: Callable[[], Policy],
    documents: Sequence[Document],
    label: Label,
    task: str,
    batch_size: int = 32,
) -> Result:
    """Perplexity of held-out documents with evictions active, one forward a batch through an empty cache."""
    started = time.monotonic()
    device = next(handle.model.parameters()).device
    head = output_head(handle.model)
    total, count, num_tokens, live = 0.0, 0, 0, 0.0
    for start in range(0, len(documents), batch_size):
        ids, mask, positions = left_padded([d.ids for d in documents[start : start + batch_size]], device)
        cache = MaskedCache(make_policy())
        hidden = handle.model.get_decoder()(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state
        follows = mask[:, :-1].bool()  # a token whose successor is in the batch too: padding is on the left
        size = int(follows.sum())
        total += float(lm_loss(hidden[:, :-1][follows], ids[:, 1:][follows], head)) * size
        count += size
        num_tokens += int(mask.sum())
        live += float(cache.live_slots().float().mean((1, 2)).sum())
    return Result(
        **vars(label),
        task=task,
        measured_cr=num_tokens / max(live, 1e-9),
        num_problems=len(documents),
        accuracy=None,
        accuracy_low=None,
        accuracy_high=None,
        perplexity=math.exp(total / count),
        kv_reads=None,
        peak_tokens=None,
        kv_bytes_peak=None,
        tokens_generated=0,
        seconds=time.monotonic() - started,
    )


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token rows as ids, attention mask and positions [B, T], padded on the left with id 0, mask 0 and position 0."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long, device=device)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.as_tensor(row, device=device)
        mask[index, longest - len(row) :] = 1
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)
