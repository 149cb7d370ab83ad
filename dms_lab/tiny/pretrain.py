"""Pretraining of the embedded model, from nothing but a seed.

    stage, progress -> (mixture, length) -> Documents of one length -> batch -> loss -> Muon + AdamW

What makes two-token facts be looked up at all within a few million tokens: a copying warm-up, input embeddings that are
large beside the layers' outputs (untied, standard deviation 0.5), small batches, Muon, and lengths that grow.
"""

import json
import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from dms_lab.tiny import corpus, tasks
from dms_lab.tiny.tokenizer import VOCABULARY_SIZE, train_tokenizer


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights. Rates are per step, sizes in tokens; `long_lr` is a factor on both rates."""

    seed: int = 0
    num_tokens: int = 20_000_000
    long_tokens: int = 3_000_000
    batch_tokens: int = 3072
    muon_lr: float = 0.01
    adam_lr: float = 2e-3
    long_lr: float = 0.3
    prompt_weight: float = 0.25
    warmup: float = 0.01
    decay: float = 0.35
    num_layers: int = 4
    hidden_size: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    ffn_size: int = 384
    max_position: int = 2048


def build_model(recipe: Recipe) -> Qwen3ForCausalLM:
    """A freshly initialised Qwen3 of the recipe's shape."""
    config = Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        head_dim=recipe.head_dim,
        intermediate_size=recipe.ffn_size,
        max_position_embeddings=recipe.max_position,
        rope_theta=10_000.0,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=3,
    )
    torch.manual_seed(recipe.seed)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0.0, 0.5)
    return model


def draw_document(
    stage: str, progress: float, length: int, rng: random.Random, tokenizer: PreTrainedTokenizerBase, code: list[str]
) -> corpus.Document:
    """One training document of at most `length` tokens, from the mixture that holds at `progress` (0 to 1) of a stage."""
    if stage == "main" and rng.random() < max(0.02, 1.0 - progress / 0.06):
        text = tasks.copying(rng, length)
        ids = tokenizer(text, add_special_tokens=False).input_ids[:length]
        return corpus.Document(ids, len(ids) // 2)
    kind = rng.random()
    if kind < 0.10:
        return corpus.encode_text(corpus.excerpt(code, rng, 4 * length), tokenizer, length)
    if kind < 0.13:
        return corpus.encode_text(tasks.prose(rng, length), tokenizer, length)
    # Two values a fact: `program` is what is still missed at 1,024 tokens when the main stage ends.
    weights = (1, 1, 2) if stage == "long" else (1, 1, 1)
    (family,) = rng.choices(tasks.FAMILIES, weights)
    return corpus.encode_problem(tasks.make_problem(family, rng, length), tokenizer)


def draw_length(stage: str, progress: float, rng: random.Random) -> int:
    """Document length: short at first, 128 to 1,024 at the end of the main stage, up to 1,536 in the long one."""
    if stage == "long":
        return rng.choice((256, 512, 768, 1024, 1024, 1536))
    if progress < 0.08:
        return rng.choice((64, 96))
    if progress < 0.30:
        return rng.choice((64, 96, 128, 160))
    if progress < 0.60:
        return rng.choice((96, 160, 256, 320))
    return rng.choice((128, 256, 384, 512, 512, 768, 1024) if progress > 0.75 else (128, 256, 320, 512))


def make_batch(documents: list[corpus.Document], prompt_weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids [B, T] and loss weights [B, T - 1] of the next tokens."""
    longest = max(len(d.ids) for d in documents)
    ids = torch.zeros(len(documents), longest, dtype=torch.long)
    weight = torch.zeros(len(documents), longest)
    for row, document in enumerate(documents):
        n = len(document.ids)
        ids[row, :n] = torch.tensor(document.ids)
        weight[row, :n] = torch.where(torch.tensor(document.is_completion), 1.0, prompt_weight)
    return ids, weight[:, 1:]


def learning_rate(stage: str, progress: float, recipe: Recipe) -> float:
    """Factor on both learning rates: linear warm-up, constant, cosine to 2 %. The long stage peaks at `long_lr`."""
    peak, decay = (recipe.long_lr, 0.8) if stage == "long" else (1.0, recipe.decay)
    if progress < recipe.warmup:
        return peak * progress / recipe.warmup
    if progress < 1 - decay:
        return peak
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (progress - 1 + decay) / decay)))


def pretrain(recipe: Recipe, folder: Path, start: Path | None = None) -> Qwen3ForCausalLM:
    """Trains the embedded model and saves it with its tokenizer, recipe and log in `folder`.

    Two stages: `main` from nothing, then `long`, with fresh optimizers. `start` is the folder of a model whose main stage
    is behind it: the long stage alone is then run on it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    code = corpus.standard_library(held_out=False)
    if start is None:
        tokenizer, model = train_tokenizer(code, recipe.seed), build_model(recipe)
    else:
        tokenizer = AutoTokenizer.from_pretrained(start)
        model = Qwen3ForCausalLM.from_pretrained(start, dtype=torch.float32).train()
    with (folder / "pretrain.jsonl").open("w") as log:
        for stage, num_tokens in (("main", recipe.num_tokens), ("long", recipe.long_tokens)):
            if start is None or stage == "long":
                _train(stage, num_tokens, model, tokenizer, code, recipe, log)
                tokenizer.save_pretrained(folder)
                model.save_pretrained(folder)
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
    model.to(torch.float16).save_pretrained(folder)
    return model


def _train(
    stage: str,
    num_tokens: int,
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    code: list[str],
    recipe: Recipe,
    log: TextIO,
) -> None:
    """Runs one stage; a line of `log` every 50 steps, with held-out exact match in each tenth of them."""
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers" not in name]
    muon = torch.optim.Muon(hidden, lr=recipe.muon_lr, weight_decay=0.0)
    adam = torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    rng = random.Random(recipe.seed if stage == "main" else f"{stage} {recipe.seed}")
    seen, step, started = 0, 0, time.monotonic()
    average: dict[str, float] = {}
    while seen < num_tokens:
        progress = seen / num_tokens
        length = draw_length(stage, progress, rng)
        count = max(1, recipe.batch_tokens // length)
        documents = [draw_document(stage, progress, length, rng, tokenizer, code) for _ in range(count)]
        ids, weight = make_batch(documents, recipe.prompt_weight)
        factor = learning_rate(stage, progress, recipe)
        muon.param_groups[0]["lr"] = recipe.muon_lr * factor
        adam.param_groups[0]["lr"] = recipe.adam_lr * factor
        for key, value in _step(model, ids, weight, (muon, adam)).items():
            average[key] = 0.95 * average.get(key, value) + 0.05 * value
        seen += int((weight > 0).sum())
        step += 1
        if step % 50 == 0:
            row = {"stage": stage, "step": step, "tokens": seen, "seconds": round(time.monotonic() - started, 1)}
            row |= {"length": length} | {key: round(value, 4) for key, value in average.items()}
            if step % 500 == 0:
                row |= teacher_forced(
                    model, tokenizer, 1024 if stage == "long" else min(max(length, 128), 512), recipe.seed
                )
            log.write(json.dumps(row) + "\n")
            log.flush()


def _step(model: Qwen3ForCausalLM, ids: torch.Tensor, weight: torch.Tensor, optimizers: tuple) -> dict[str, float]:
    """One step of every optimizer on the weighted loss; returns what is logged of it."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    loss_per_token = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    loss = (loss_per_token * weight).sum() / weight.sum()
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
    with torch.no_grad():
        chain = (weight == 1.0).float()
        right = (logits.argmax(-1) == ids[:, 1:]).float()
        return {
            "loss": loss.item(),
            "chain_loss": ((loss_per_token * chain).sum() / chain.sum()).item(),
            "chain_accuracy": ((right * chain).sum() / chain.sum()).item(),
        }


@torch.no_grad()
def teacher_forced(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> dict:
    """Share of held-out problems whose whole completion is the argmax at every token, per family."""
    rng = random.Random(f"held-out {seed} {length}")
    result = {}
    for family in tasks.FAMILIES:
        documents = [corpus.encode_problem(tasks.make_problem(family, rng, length), tokenizer) for _ in range(24)]
        ids, weight = make_batch(documents, 0.5)
        wrong = (model(input_ids=ids, use_cache=False).logits[:, :-1].argmax(-1) != ids[:, 1:]) & (weight == 1.0)
        result[f"{family}_exact"] = round(1.0 - wrong.any(-1).float().mean().item(), 3)
    return result
