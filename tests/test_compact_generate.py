"""Hugging Face's own generate uses the compact cache without a word, and gives what a dense model would give."""

import copy

import pytest
import torch
from test_compact_cache import POLICIES, DenseCache, tokens
from test_retrofit import build, decide
from transformers import DynamicCache

from dms_lab.attachment import retrofit
from dms_lab.cache.compact import CompactCache
from dms_lab.cache.masked import MaskedCache
from dms_lab.policies import FullPolicy, TovaPolicy
from dms_lab.policies.dms import DmsConfig

(PROMPT,) = tokens(20, seed=11)
NEW = 14


def endless(seed=0):
    """A model that no end token stops."""
    model = build("llama", seed=seed)
    model.generation_config.eos_token_id = None
    return model


def attach(config=None, seed=0):
    config = config or DmsConfig(window=3)
    return decide(retrofit(endless(seed), config))


@pytest.fixture
def handle():
    return attach()


def generate(handle, rows=(PROMPT,), number=NEW, **kwargs):
    """Continues `rows`, padded on the left: the new tokens [B, T]."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    settings = {"max_new_tokens": number, "do_sample": False} | kwargs
    return handle.model.generate(ids, attention_mask=mask, **settings)[:, longest:]


@torch.no_grad()
def greedy(handle, policy, row, number=NEW):
    """The argmax of one dense forward over everything so far, token by token."""
    row = list(row)
    for _ in range(number):
        cache = DenseCache(policy)
        row.append(handle.model(torch.tensor([row]), past_key_values=cache).logits[0, -1].argmax().item())
    return row[-number:]


# --- greedy


@pytest.mark.parametrize("decided_by", ["self", "next", "delayed"])
@pytest.mark.parametrize("predictor", ["adapter", "neuron"])
def test_greedy_tokens_are_those_of_a_dense_forward_for_each(predictor, decided_by):
    handle = attach(DmsConfig(window=3, predictor=predictor, decided_by=decided_by))
    wanted = greedy(handle, handle.policy(), PROMPT)
    assert generate(handle)[0].tolist() == wanted
    ids = torch.tensor([PROMPT])
    out = handle.model.generate(ids, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    assert out.sequences[0].tolist() == PROMPT + wanted
    cache = out.past_key_values
    assert isinstance(cache, CompactCache)
    assert cache.get_seq_length() == len(PROMPT) + NEW - 1
    assert cache.live_slots().float().mean() < 0.8 * cache.get_seq_length(), "it evicted"
    with handle.disabled():
        assert generate(handle)[0].tolist() != wanted, "and that shows"


@pytest.mark.parametrize("kind", POLICIES)
def test_greedy_tokens_of_every_rule_are_those_of_a_dense_forward_for_each(kind):
    handle = retrofit(endless(), None)
    cache = CompactCache(POLICIES[kind](), page_size=4, chunk=7)
    assert generate(handle, past_key_values=cache)[0].tolist() == greedy(handle, POLICIES[kind](), PROMPT)


def test_a_left_padded_batch_gives_each_prompt_what_it_gets_alone(handle):
    rows = tokens(20, 1, 9, seed=4)
    for row, found in zip(rows, generate(handle, rows), strict=True):
        assert found.tolist() == greedy(handle, handle.policy(), row)


def test_a_sequence_that_ends_early_does_not_disturb_the_others(handle):
    rows = tokens(20, 9, seed=4)
    wanted = [greedy(handle, handle.policy(), row) for row in rows]
    end = wanted[0][4]
    found = generate(handle, rows, eos_token_id=end, pad_token_id=0)
    for row, plain in zip(found.tolist(), wanted, strict=True):
        stop = plain.index(end) + 1 if end in plain else NEW
        assert row[:stop] == plain[:stop]
        assert not any(row[stop:])


@pytest.mark.parametrize("size", [1, 3, 6, 50])
def test_a_prompt_in_chunks_gives_the_same(handle, size):
    assert torch.equal(generate(handle, prefill_chunk_size=size), generate(handle))


def test_without_a_cache_the_tokens_are_the_same(handle):
    assert torch.equal(generate(handle, use_cache=False), generate(handle))


def test_a_plain_forward_that_asks_for_a_cache_gets_a_compact_one(handle):
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        first = handle.model(ids[:, :13], use_cache=True)
        assert isinstance(first.past_key_values, CompactCache)
        rest = handle.model(ids[:, 13:], past_key_values=first.past_key_values, use_cache=True).logits
        whole = handle.model(ids, past_key_values=DenseCache(handle.policy())).logits
        assert handle.model(ids, use_cache=False).past_key_values is None
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), whole, rtol=0, atol=2e-5)


# --- several sequences of one prompt


@pytest.mark.parametrize("copies", [1, 3])
def test_the_same_seed_samples_the_same_tokens_as_over_the_masked_cache(handle, copies):
    rows, found = tokens(20, 9, seed=4), []
    for cache in (None, MaskedCache(handle.policy())):
        torch.manual_seed(7)
        kwargs = {} if cache is None else {"past_key_values": cache}
        found.append(generate(handle, rows, do_sample=True, top_k=20, num_return_sequences=copies, **kwargs))
    assert found[0].shape == (2 * copies, NEW)
    assert torch.equal(*found)
    assert found[0].unique(dim=0).shape[0] == 2 * copies


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("num_beams", [2, 4])
def test_beam_search_finds_the_same_beams_as_over_the_masked_cache(handle, num_beams, padded):
    rows = tokens(20, 9, seed=4) if padded else [PROMPT]
    kwargs = {"num_beams": num_beams, "num_return_sequences": 2}
    wanted = generate(handle, rows, past_key_values=MaskedCache(handle.policy()), **kwargs)
    assert torch.equal(generate(handle, rows, **kwargs), wanted)
    small = CompactCache(handle.policy(), page_size=2, chunk=5)
    assert torch.equal(generate(handle, rows, past_key_values=small, **kwargs), wanted)
    small.release(torch.arange(small.layers[0].slots.length.shape[0]))
    assert small.pool.count_free() == small.pool.num_pages, "no page was lost among the beams"


def test_with_a_window_beyond_the_end_beams_and_tokens_are_the_original_model_s():
    handle = attach(DmsConfig(window=100))
    rows = tokens(20, 9, seed=4)
    for kwargs in ({}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3, "rows": [PROMPT[:5] * 3]}):
        with handle.disabled():
            wanted = generate(handle, **{"rows": rows} | kwargs)
        assert torch.equal(generate(handle, **{"rows": rows} | kwargs), wanted)


# --- over several calls


@pytest.mark.parametrize("page_size", [2, 32])
def test_a_cache_carried_into_the_next_turns_goes_on_as_one_text(handle, page_size):
    cache, text = CompactCache(handle.policy(), page_size=page_size, chunk=7), list(PROMPT)
    for seed, length in ((1, 1), (2, 9), (3, 4)):
        answer = generate(handle, [text], past_key_values=cache)[0].tolist()
        assert answer == greedy(handle, handle.policy(), text)
        (question,) = tokens(length, seed=seed)
        text += answer + question
    assert cache.get_seq_length() == len(text) - length - 1, "the last token went through no model yet"


def test_turns_of_unequal_lengths_in_a_batch_give_each_what_it_gets_alone(handle):
    """What is padded in a later turn stands in the middle of the attention mask."""
    texts = [list(row) for row in tokens(20, 9, seed=4)]
    columns = [[0] * (20 - len(text)) + text for text in texts]
    masks = [[0] * (20 - len(text)) + [1] * len(text) for text in texts]
    cache = CompactCache(handle.policy(), page_size=4, chunk=7)
    for turn in range(3):
        ids, mask = torch.tensor(columns), torch.tensor(masks)
        out = handle.model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=6, do_sample=False)
        answers = out[:, ids.shape[1] :].tolist()
        questions = tokens(*((5, 2), (3, 8), (1, 1))[turn], seed=turn)
        longest = max(map(len, questions))
        for i, (answer, question) in enumerate(zip(answers, questions, strict=True)):
            assert answer == greedy(handle, handle.policy(), texts[i], 6)
            texts[i] += answer + question
            columns[i] += answer + [0] * (longest - len(question)) + question
            masks[i] += [1] * 6 + [0] * (longest - len(question)) + [1] * len(question)


def test_a_prefix_read_once_is_continued_twice(handle):
    prefix = CompactCache(handle.policy(), page_size=4)
    with torch.no_grad():
        handle.model(torch.tensor([PROMPT]), past_key_values=prefix)
    before = prefix.live_slots()
    for seed in (1, 2):
        (question,) = tokens(5, seed=seed)
        found = generate(handle, [PROMPT + question], past_key_values=copy.deepcopy(prefix))
        assert found[0].tolist() == greedy(handle, handle.policy(), PROMPT + question)
    assert torch.equal(prefix.live_slots(), before)
    assert prefix.get_seq_length() == len(PROMPT)


def test_a_second_request_is_untouched_by_the_first(handle):
    alone = generate(handle)
    generate(handle, tokens(9, 13, 2, seed=8), do_sample=True)
    assert torch.equal(generate(handle), alone)


# --- cropping


@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize("kind", ["full", "wide window", "wide budget"])
def test_crop_takes_back_what_nothing_was_evicted_for(kind, chunk):
    handle = attach(DmsConfig(window=100))
    policy = {"full": FullPolicy(), "wide window": handle.policy(), "wide budget": TovaPolicy(100)}[kind]
    cache = CompactCache(policy, page_size=4, chunk=chunk)
    (other,) = tokens(6, seed=2)
    with torch.no_grad():
        handle.model(torch.tensor([PROMPT + other]), past_key_values=cache)
        with pytest.raises(ValueError, match="or before its start"):
            cache.crop(-27)
        cache.crop(-6)
        assert cache.get_seq_length() == len(PROMPT)
        for part in (PROMPT[:1], PROMPT[1:9]):
            found = handle.model(torch.tensor([part]), past_key_values=cache).logits
        text = PROMPT + PROMPT[:9]
        wanted = handle.model(torch.tensor([text]), past_key_values=DenseCache(policy)).logits[:, -8:]
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


def test_crop_is_refused_by_name_once_something_was_evicted_and_nothing_changes(handle):
    handle.predictors[0].offset = 1e6  # the first layer keeps everything: on its own it could be cropped
    cache = CompactCache(handle.policy(), page_size=4)
    with torch.no_grad():
        handle.model(torch.tensor([PROMPT]), past_key_values=cache)
        twin = copy.deepcopy(cache)
        with pytest.raises(ValueError, match="cannot be cropped by 7 tokens: it freed slots since"):
            cache.crop(-7)
        with pytest.raises(ValueError, match=r"crop\(3\): give a negative count"):
            cache.crop(3)
        with pytest.raises(ValueError, match="or before its start"):
            cache.crop(-30)
        logits = [handle.model(torch.tensor([PROMPT]), past_key_values=c).logits for c in (cache, twin)]
    assert torch.equal(*logits)
    assert cache.get_seq_length() == twin.get_seq_length() == 2 * len(PROMPT)


@pytest.mark.parametrize("way", ["prompt lookup", "assistant"])
def test_guessing_ahead_is_right_or_refused_by_name(handle, way):
    """Guesses that turn out wrong are cropped, which a cache that evicted since cannot do."""
    kwargs = {"prompt_lookup_num_tokens": 3} if way == "prompt lookup" else {"assistant_model": endless(seed=1)}
    rows = [PROMPT[:5] * 3]
    with pytest.raises(ValueError, match=r"cannot be cropped .*: it freed slots since"):
        generate(handle, rows, **kwargs)
    wide = attach(DmsConfig(window=100))
    assert torch.equal(generate(wide, rows, **kwargs), generate(wide, rows))


# --- what is refused, and what is left behind


def test_another_kind_of_cache_is_refused_with_what_works(handle):
    with pytest.raises(ValueError, match="cache_implementation='static' is the original model's"):
        generate(handle, cache_implementation="static")
    with pytest.raises(ValueError, match="was given a DynamicCache, which keeps no decisions"):
        generate(handle, past_key_values=DynamicCache())
    with handle.disabled():
        generate(handle, number=2, cache_implementation="dynamic")
        generate(handle, number=2, past_key_values=DynamicCache())


def test_switched_off_or_detached_generate_is_the_original_s():
    model = endless()
    wanted = model.generate(torch.tensor([PROMPT]), max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    handle = attach()
    with handle.disabled():
        assert torch.equal(generate(handle), wanted.sequences[:, len(PROMPT) :])
    assert not torch.equal(generate(handle), wanted.sequences[:, len(PROMPT) :])
    model = handle.detach()
    found = model.generate(torch.tensor([PROMPT]), max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(found.sequences, wanted.sequences)
    assert type(found.past_key_values) is DynamicCache


def test_a_seam_without_predictor_generates_as_the_original_unless_given_a_cache():
    handle = retrofit(endless(), None)
    out = handle.model.generate(torch.tensor([PROMPT]), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert type(out.past_key_values) is DynamicCache


@pytest.mark.parametrize("storage", ["fp8", "int8"])
def test_quantised_storage_generates_in_a_fraction_of_the_bytes_and_mostly_the_same(handle, storage):
    caches = [CompactCache(handle.policy(), s) for s in ("model", storage)]
    plain, found = (generate(handle, past_key_values=cache)[0].tolist() for cache in caches)
    assert found[:4] == plain[:4]
    assert caches[1].pool.page_bytes < caches[0].pool.page_bytes / 3
