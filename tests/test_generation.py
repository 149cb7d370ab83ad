"""Batched decoding with hard decisions equals decoding alone, and counts what it says."""

import dataclasses
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from dms_lab import eviction
from dms_lab.attachment import retrofit
from dms_lab.cache.masked import MaskedCache
from dms_lab.chains import Prompt, Settings
from dms_lab.evaluation import hard
from dms_lab.generation import Engine, generate_greedy
from dms_lab.policies import (
    FullPolicy,
    H2OPolicy,
    KeyDiffPolicy,
    OffloadPolicy,
    QuestPolicy,
    RandomPolicy,
    StreamingLLMPolicy,
    TovaPolicy,
)
from dms_lab.policies.dms import DmsConfig
from dms_lab.sampling import SamplingConfig
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


# -- the engine: refill, preemption, seeds -----------------------------------------------------------------------------
SAMPLED = SamplingConfig(temperature=0.8, top_p=0.95, seed=3)
MANY = [Prompt(f"p{i}", ids, chain) for i, ids in enumerate([*PROMPTS, list(range(200, 260))]) for chain in range(3)]
RULES = {
    "dms": None,
    "full": FullPolicy,
    "tova": lambda: TovaPolicy(12),
    "h2o": lambda: H2OPolicy(12),
    "keydiff": lambda: KeyDiffPolicy(12),
    "random": lambda: RandomPolicy(12),
    "streaming_llm": lambda: StreamingLLMPolicy(12),
    "quest": lambda: QuestPolicy(12, block=4, dense_layers=1),
    "offload": lambda: OffloadPolicy(12),
}


def chains(handle, prompts=MANY, make=None, sampling=SAMPLED, eos=(3,), tokenizer=None, **changes):
    """Runs prompts; every page is free at the end."""
    settings = Settings(**({"max_new_tokens": 24, "page_size": 4, "prefill_chunk": 16, "places": 4} | changes))
    engine = Engine(handle, (make or handle.policy)(), settings, sampling, eos, tokenizer)
    found = {(g.problem, g.chain): g for g in engine.run(prompts)}
    assert engine.cache.pool is None or engine.cache.pool.count_free() == engine.cache.pool.num_pages
    return found


def tokens(found):
    return {key: (g.ids, g.finish_reason) for key, g in found.items()}


@pytest.mark.parametrize("name", RULES)
def test_deterministic_chains_depend_on_nothing_but_themselves(handle, name):
    alone = chains(handle, make=RULES[name], deterministic=True)
    assert len({tuple(g.ids) for g in alone.values()}) > 8  # the seeds differ
    tight = {"full": 130, "quest": 130, "dms": 90}.get(name, 52)
    other = chains(handle, MANY[::-1], RULES[name], deterministic=True, num_pages=tight)
    assert sum(g.preemptions for g in other.values()) > 0
    assert tokens(other) == tokens(alone)
    some = chains(handle, MANY[4:6], RULES[name], deterministic=True)
    assert tokens(some).items() <= tokens(alone).items()


@pytest.mark.parametrize("places", [1, 3, 12])
@pytest.mark.parametrize("num_pages", [None, 110])
def test_chains_are_the_same_whatever_the_batch_and_the_pool(handle, places, num_pages):
    """In float32 no near-tie occurs in these prompts."""
    assert tokens(chains(handle, places=places, num_pages=num_pages)) == tokens(chains(handle, deterministic=True))


def test_a_finished_chain_makes_room_and_its_neighbours_cost_the_same(handle):
    one, many = chains(handle, places=1), chains(handle, places=4)
    for key, g in one.items():
        assert many[key].usage.kv_reads == pytest.approx(g.usage.kv_reads)
        assert many[key].usage.peak_tokens == pytest.approx(g.usage.peak_tokens)


@pytest.mark.parametrize("name", ["tova", "dms"])
def test_prompts_that_are_read_token_by_token_wait_for_company_but_not_for_ever(handle, name, monkeypatch):
    g = torch.Generator().manual_seed(5)
    many = [Prompt(f"q{i}", torch.randint(4, 300, (30,), generator=g).tolist()) for i in range(16)]
    groups = []
    read = Engine._forward_prompts

    def counted(self, prompts, places):
        groups.append(len(prompts))
        return read(self, prompts, places)

    ends = tuple(range(3, 43))
    alone = chains(handle, many, RULES[name], places=1, eos=ends)
    assert len({len(g.ids) for g in alone.values()}) > 3  # they end at different times
    monkeypatch.setattr(Engine, "_forward_prompts", counted)
    assert tokens(chains(handle, many, RULES[name], places=8, eos=ends)) == tokens(alone)
    assert groups[0] == 8
    if name == "dms":
        assert min(groups) == 1  # a place that is free is filled
    else:
        assert len(groups) <= 4
    groups.clear()
    long = chains(handle, many[:9], RULES[name], places=8, max_new_tokens=400, eos=(-1,))
    assert len(long) == 9
    assert groups == [8, 1]


def test_preempted_work_is_not_counted_twice(handle):
    roomy, tight = chains(handle, make=FullPolicy), chains(handle, make=FullPolicy, num_pages=130)
    assert sum(g.preemptions for g in tight.values()) > 0
    for key, g in roomy.items():
        assert tight[key].usage.kv_reads == g.usage.kv_reads
        assert tight[key].usage.num_generated == len(g.ids)


def test_a_problems_prompt_is_read_once_for_all_its_chains(handle):
    sizes = []
    hook = handle.model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    chains(handle, places=2, prefill_chunk=64)
    hook.remove()
    assert sum(size for size in sizes if size > 1) == sum(len(p.ids) for p in MANY) // 3


def test_bytes_are_those_of_the_pages_that_a_chain_held(handle):
    (found,) = chains(handle, MANY[:1], FullPolicy, eos=()).values()
    pages = 2 * 2 * -(-(len(PROMPTS[0]) + 23) // 4)  # layers, KV heads; the last token is not stored
    slot = 2 * 8 * 4 + 4  # keys and values of 8 floats, a position
    assert found.finish_reason == "length"
    assert pages * 4 * slot <= found.usage.kv_bytes_peak <= pages * 4 * slot * 1.3


def test_a_pool_too_small_for_one_chain_says_what_it_needs_and_the_others_are_answered(handle):
    prompts = [
        Prompt("long", list(range(10, 300))),
        Prompt("short", [5, 6, 7]),
        Prompt("empty", []),
        Prompt("far", [5] * 500),
    ]
    found = chains(handle, prompts, FullPolicy, num_pages=40, max_new_tokens=16)
    assert "a pool of 40 pages is too small for this sequence alone" in found["long", 0].error
    assert f"{4 * -(-(290 + 16) // 4)} are enough in any case" in found["long", 0].error
    assert "is empty" in found["empty", 0].error
    assert "exceeds the model's 512 positions" in found["far", 0].error
    assert {g.finish_reason for g in found.values()} == {"error", "length"}
    assert tokens(found)["short", 0] == tokens(chains(handle, prompts[1:2], FullPolicy, max_new_tokens=16))["short", 0]


def test_a_pool_that_runs_out_in_the_middle_of_the_only_chain_ends_it_with_a_sentence(handle):
    found = chains(handle, [Prompt("a", list(range(10, 26)))], FullPolicy, eos=(), num_pages=18, max_new_tokens=40)
    assert found["a", 0].finish_reason == "error"
    assert "too small for this sequence alone" in found["a", 0].error
    assert 0 < len(found["a", 0].ids) < 40


def test_logits_that_are_not_finite_end_their_chain_alone(handle):
    head, calls = handle.model.get_output_embeddings(), []

    def poison(module, args, output):
        calls.append(output.shape[0])
        if len(calls) == 9 and output.shape[0] == 4:
            output[1] = float("nan")
        return output

    wanted = tokens(chains(handle, eos=()))
    hook = head.register_forward_hook(poison)
    found = chains(handle, eos=())
    hook.remove()
    bad = [key for key, g in found.items() if g.error]
    assert len(bad) == 1
    assert "not finite" in found[bad[0]].error
    assert {k: v for k, v in tokens(found).items() if k not in bad} == {k: v for k, v in wanted.items() if k not in bad}


def test_stop_ids_end_a_chain_and_the_first_token_is_timed(handle):
    plain = chains(handle, MANY[:1], eos=())[("p0", 0)]
    stop = plain.ids[5]
    found = chains(handle, MANY[:1], sampling=dataclasses.replace(SAMPLED, stop_ids=(stop,)), eos=())[("p0", 0)]
    assert found.finish_reason == "stop"
    assert found.ids == plain.ids[: plain.ids.index(stop) + 1]
    assert 0 < found.seconds_to_first_token < 60


def test_an_abandoned_run_leaves_an_empty_engine(handle):
    engine = Engine(handle, handle.policy(), Settings(8, places=2, page_size=4), SAMPLED, [3])
    next(engine.run(MANY))
    again = {(g.problem, g.chain): g for g in engine.run(MANY[:3])}
    assert tokens(again) == tokens(chains(handle, MANY[:3], max_new_tokens=8))


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="places=0 must be at least 1"):
        Settings(places=0)
    with pytest.raises(ValueError, match="share of the pool"):
        Settings(reserve=1.0)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("num_pages", range(10, 45, 3))
def test_a_shared_prompt_is_answered_or_refused_whatever_the_pool(handle, num_pages, deterministic):
    """The prompt fits not at all, once, or twice: no pool makes the engine go round in circles."""
    prompts = [Prompt("p", list(range(10, 40)), chain) for chain in range(3)]
    settings = {"num_pages": num_pages, "page_size": 8, "max_new_tokens": 8, "deterministic": deterministic, "eos": ()}
    found = chains(handle, prompts, FullPolicy, **settings)
    assert len(found) == 3
    if num_pages < 4 * 5:  # layers and KV heads, pages of the prompt and what follows
        assert {g.finish_reason for g in found.values()} == {"error"}
        assert all("20 are enough in any case" in g.error for g in found.values())
    else:
        assert tokens(found) == tokens(chains(handle, prompts, FullPolicy, **(settings | {"num_pages": None})))


@pytest.mark.parametrize("storage", ["model", "fp8"])
@pytest.mark.parametrize("name", RULES)
def test_keys_that_are_not_finite_spoil_their_own_chain_alone(handle, name, storage):
    with torch.no_grad():
        handle.model.get_input_embeddings().weight[999] = float("nan")
    bad, good = Prompt("bad", [999] * 40), [Prompt(f"g{i}", list(range(20 + i, 60))) for i in range(3)]
    settings = {"make": RULES[name], "storage": storage, "max_new_tokens": 6, "eos": ()}
    wanted = tokens(chains(handle, good, **settings))
    for places in (1, 3):
        found = chains(handle, [bad, *good], places=places, **settings)
        assert found["bad", 0].finish_reason == "error"
        assert {key: value for key, value in tokens(found).items() if key[0] != "bad"} == wanted


@pytest.mark.parametrize("shared", [1, 3])
def test_a_run_that_raises_in_a_prompt_leaves_an_empty_engine(handle, shared, monkeypatch):
    engine = Engine(handle, handle.policy(), Settings(6, places=2, page_size=4, prefill_chunk=8), SAMPLED, [3])
    prompts = [Prompt("p", list(range(10, 40)), chain) for chain in range(shared)]
    forward, calls = Engine._forward, []

    def fail(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "_forward", fail)
    with pytest.raises(KeyboardInterrupt):
        list(engine.run(prompts))
    again = {(g.problem, g.chain): g for g in engine.run(prompts)}
    assert tokens(again) == tokens(chains(handle, prompts, max_new_tokens=6))


def test_a_second_run_of_an_engine_waits_for_the_first(handle):
    engine = Engine(handle, handle.policy(), Settings(6, places=2), SAMPLED, [3])
    first = engine.run(MANY)
    next(first)
    with pytest.raises(ValueError, match="running already"):
        next(engine.run(MANY))
    first.close()
    assert len(list(engine.run(MANY[:2]))) == 2


def test_a_token_that_the_model_does_not_know_ends_its_chain_alone(handle):
    found = chains(handle, [Prompt("far", [5, 10**6]), Prompt("good", [5, 6])], max_new_tokens=4)
    assert "token ids from 5 to 1000000" in found["far", 0].error
    assert found["good", 0].error is None
    assert generate_greedy(handle.model, handle.policy, [], 4, 3) == []


def test_a_prompt_is_read_whole_however_its_chunks_end(handle):
    """Quest reads a part in decode steps only; a last chunk of one token is no decode step."""
    prompt = [Prompt("p", list(range(10, 43)))]  # 33 tokens
    by_chunk = [chains(handle, prompt, RULES["quest"], prefill_chunk=size, eos=()) for size in (16, 33)]
    assert tokens(by_chunk[0]) == tokens(by_chunk[1])


@pytest.mark.parametrize(("name", "storage"), [("quest", "model"), ("dms", "int8"), ("full", "fp8")])
def test_what_a_preempted_chain_said_is_said_again_step_by_step(handle, name, storage):
    """Where a chunk is computed otherwise than its tokens one by one, a chain that begins anew replays its steps."""
    roomy = chains(handle, make=RULES[name], storage=storage)
    tight = chains(handle, make=RULES[name], storage=storage, num_pages={"dms": 90}.get(name, 130))
    assert sum(g.preemptions for g in tight.values()) > 0
    assert tokens(tight) == tokens(roomy)
    assert {k: g.usage.kv_reads for k, g in tight.items()} == {k: g.usage.kv_reads for k, g in roomy.items()}
