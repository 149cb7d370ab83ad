"""Batched decoding with hard decisions equals decoding alone, and counts what it says."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from dms_lab import eviction
from dms_lab.attachment import retrofit
from dms_lab.cache.masked import MaskedCache
from dms_lab.evaluation import hard
from dms_lab.generation import generate_greedy
from dms_lab.policies import FullPolicy, StreamingLLMPolicy, TovaPolicy
from dms_lab.policies.dms import DmsConfig
from dms_lab.tiny.corpus import Document

PROMPTS = [list(range(10, 31)), list(range(40, 49)), list(range(100, 133))]


@pytest.fixture
def handle(base_folder):
    handle = retrofit(AutoModelForCausalLM.from_pretrained(base_folder).eval(), DmsConfig(window=3))
    g = torch.Generator().manual_seed(0)
    for predictor in handle.predictors.values():
        predictor.offset = 0.0
        with torch.no_grad():
            predictor.weight.copy_(torch.randn(predictor.weight.shape, generator=g))
    return handle


def test_a_batch_gives_what_each_prompt_gives_alone(handle):
    together = generate_greedy(handle.model, handle.policy, PROMPTS, 12, end_id=3)
    for prompt, found in zip(PROMPTS, together, strict=True):
        (alone,) = generate_greedy(handle.model, handle.policy, [prompt], 12, end_id=3)
        assert alone.ids == found.ids
        assert alone.usage.kv_reads == pytest.approx(found.usage.kv_reads)


@torch.no_grad()
def test_each_token_is_the_argmax_of_one_hard_forward(handle):
    for prompt, found in zip(PROMPTS, generate_greedy(handle.model, handle.policy, PROMPTS, 8, end_id=3), strict=True):
        ids = torch.tensor([prompt + found.ids])
        logits = handle.model(ids).logits[0]
        assert logits.argmax(-1)[len(prompt) - 1 : -1].tolist() == found.ids


def test_full_attention_equals_transformers_own_generation(handle, base_folder):
    plain = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    for prompt, found in zip(PROMPTS, generate_greedy(handle.model, FullPolicy, PROMPTS, 8, end_id=3), strict=True):
        out = plain.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=3, pad_token_id=0)
        assert out[0, len(prompt) :].tolist() == found.ids


def test_accounting_of_full_attention_and_of_a_window_is_the_closed_form(handle):
    end = 5000  # never generated
    (full,) = generate_greedy(handle.model, FullPolicy, [PROMPTS[0]], 6, end)
    n = len(PROMPTS[0])
    assert full.usage.kv_reads == sum(range(n + 1, n + 6))
    assert full.usage.peak_tokens == full.usage.live_tokens == full.usage.num_tokens == n + 5
    assert full.finish_reason == "length"
    (window,) = generate_greedy(handle.model, lambda: StreamingLLMPolicy(8), [PROMPTS[0]], 6, end)
    assert window.usage.kv_reads == 5 * 8
    assert window.usage.live_tokens == window.usage.peak_tokens == 8


@torch.no_grad()
def test_live_slots_of_dms_are_the_kept_plus_the_window(handle):
    (found,) = generate_greedy(handle.model, handle.policy, [PROMPTS[2]], 2, end_id=5000)
    ids = torch.tensor([PROMPTS[2] + found.ids[:1]])
    residuals = handle.model(ids, output_hidden_states=True).hidden_states
    live = []
    for layer, predictor in handle.predictors.items():
        logits = eviction.govern(predictor(residuals[layer]), "next", 3)[0]
        live += [(logits[k, :-3] <= 0).sum().item() + 3 for k in range(2)]
    assert found.usage.live_tokens == pytest.approx(sum(live) / len(live))


def test_impossible_prompts_are_refused(handle):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate_greedy(handle.model, handle.policy, [[5], []], 4, 3)
    with pytest.raises(ValueError, match="exceeds the model's 512 positions"):
        generate_greedy(handle.model, handle.policy, [[5] * 510], 4, 3)


def test_plain_generate_takes_a_masked_cache(handle):
    from dms_lab.cache.masked import MaskedCache

    prompt = PROMPTS[0]
    out = handle.model.generate(
        torch.tensor([prompt]),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=3,
        pad_token_id=0,
        past_key_values=MaskedCache(handle.policy()),
    )
    (found,) = generate_greedy(handle.model, handle.policy, [prompt], 8, end_id=3)
    assert out[0, len(prompt) :].tolist() == found.ids


@torch.no_grad()
@pytest.mark.parametrize("name", ["dms", "full", "tova"])
def test_perplexity_of_a_batch_is_that_of_its_documents_one_by_one(handle, name):
    make = {"dms": handle.policy, "full": FullPolicy, "tova": lambda: TovaPolicy(9)}[name]
    documents = [Document(prompt) for prompt in PROMPTS]
    label = hard.Label("r", "m", name, 1.0, None, 0, "")
    whole = hard.evaluate_perplexity(handle, make, documents, label, "text")
    alone = [hard.evaluate_perplexity(handle, make, [document], label, "text") for document in documents]
    sizes = [len(prompt) - 1 for prompt in PROMPTS]
    mean = sum(n * math.log(r.perplexity) for n, r in zip(sizes, alone, strict=True)) / sum(sizes)
    assert whole.perplexity == pytest.approx(math.exp(mean), rel=1e-4)
    live = sum(len(p) / r.measured_cr for p, r in zip(PROMPTS, alone, strict=True))
    assert whole.measured_cr == pytest.approx(sum(map(len, PROMPTS)) / live)


def test_transformers_own_generate_works_on_a_masked_cache(handle):
    found = generate_greedy(handle.model, handle.policy, PROMPTS, 8, end_id=3)
    for prompt, wanted in zip(PROMPTS, found, strict=True):
        cache = MaskedCache(handle.policy())
        out = handle.model.generate(
            torch.tensor([prompt]), past_key_values=cache, max_new_tokens=8, do_sample=False, eos_token_id=3, pad_token_id=0
        )
        assert out[0, len(prompt) :].tolist() == wanted.ids
        assert cache.live_slots().float().mean().item() == pytest.approx(wanted.usage.live_tokens)
