"""A token is a function of its own row and uniform; a chain ends where a slow statement of the rule ends it."""

import itertools
import math
import random
import re

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dms_lab.sampling import Sampler, SamplingConfig, StopRule, chain_generator
from dms_lab.tiny.tokenizer import train_tokenizer

END, END_THINK = 3, 5  # of the byte-level tokenizer
ALMOST_ONE = 1 - 2.0**-53


def sentencepiece_like():
    """Decodes as Llama 2 does: bytes for what is not in the vocabulary, the leading space dropped."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "ab", "</s", ">"]
    tokenizer = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def wordpiece():
    """Decodes as BERT does: pieces joined, no space before punctuation."""
    pieces = ["[UNK]", "do", "##do", "n", "'", "##t", ".", "a", "##a", "</s>"]
    tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


BYTE_LEVEL = train_tokenizer(["def f(x):\n    return x + 1\n"] * 20)
BYTE_LEVEL.clean_up_tokenization_spaces = True  # as published tokenizers have it: a stop rule must not follow it
BYTE_LEVEL.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output = True
SENTENCEPIECE, WORDPIECE = sentencepiece_like(), wordpiece()


def byte_ids(text):
    """`text` in the byte-level tokenizer with one token a byte."""
    ((letters, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return BYTE_LEVEL.convert_tokens_to_ids(list(letters))


def ids_of(text):
    return BYTE_LEVEL(text, add_special_tokens=False).input_ids


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


# --- the configuration


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("temperature", -0.5, "0 (greedy) or a number of at least 1e-4"),
        ("temperature", 1e-9, "0 (greedy) or a number of at least 1e-4"),
        ("temperature", math.nan, "0 (greedy) or a number of at least 1e-4"),
        ("top_p", 0.0, "above 0 and at most 1"),
        ("top_p", 1.01, "above 0 and at most 1"),
        ("top_k", -1, "a whole number of at least 0"),
        ("top_k", 2.0, "a whole number of at least 0"),
        ("min_p", -0.1, "from 0 to 1"),
        ("min_p", 1.1, "from 0 to 1"),
        ("repetition_penalty", 0, "a number above 0"),
        ("repetition_penalty", math.inf, "a number above 0"),
        ("stop", "abc", "a tuple of texts"),
        ("stop", ("a", ""), "a tuple of texts"),
        ("stop", ("a\ufffd",), "a tuple of texts"),
        ("stop_ids", (1, -1), "a tuple of token ids"),
        ("stop_ids", 3, "a tuple of token ids"),
        ("stop_after", "", "None or a text"),
        ("stop_after", 7, "None or a text"),
        ("seed", 0.5, "a whole number"),
        ("seed", True, "a whole number"),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name_with_what_would_work(name, value, words):
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} is not valid")) as error:
        SamplingConfig(**{name: value})
    assert words in str(error.value)


def test_the_ends_of_the_ranges_are_allowed():
    SamplingConfig(1e-4, 1, 0, 1, 0.1, ("a",), (0,), "b", -1)
    SamplingConfig(0, 1e-9, 9, 0, 9)


# --- random numbers


def test_draws_depend_on_seed_problem_chain_and_step_alone():
    names = list(itertools.product((0, 1, -1), (1, "1", "a", "a1"), (0, 1, 11), (0, 1, 2**40)))
    drawn = {name: chain_generator(*name[:3]).uniform(name[3]) for name in names}
    assert len(set(drawn.values())) == len(names)
    generators = {name[:3]: chain_generator(*name[:3]) for name in names}
    random.Random(0).shuffle(names)
    assert all(generators[name[:3]].uniform(name[3]) == drawn[name] for name in names)


def test_draws_are_the_same_in_every_process():
    draws = [chain_generator(7, "aime-3", 2).uniform(step) for step in (0, 1)]
    assert draws == [0.3728758141425458, 0.7570434464932978]


def test_draws_are_uniform_and_neighbours_unrelated():
    draws = np.array([[chain_generator(0, "p", chain).uniform(step) for step in range(200)] for chain in range(100)])
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, 20, (0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 45  # chi-square of 19 degrees: once in 1,400
    for one, other in ((draws[1:], draws[:-1]), (draws[:, 1:], draws[:, :-1])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.03


@pytest.mark.parametrize("name", [(0.5, "p", 0), (0, 1.0, 0), (0, None, 0), (0, "p", "0")])
def test_what_names_no_chain_is_refused(name):
    with pytest.raises(ValueError, match="do not name a chain"):
        chain_generator(*name)


# --- choosing


def slow_probabilities(row, history, config):
    """The definition in float64, and how far the nearest decision of a filter was from going the other way."""
    q = config.repetition_penalty
    row = [(x * q if x < 0 else x / q) if i in history else x for i, x in enumerate(row)]
    p = np.exp(np.array(row) / config.temperature)
    p, margin = p / p.sum(), np.diff(sorted(row)).min(initial=1)  # of two equal ones top-p may keep either
    if config.top_k:
        p[p < sorted(p)[-min(config.top_k, len(p))]] = 0
        p /= p.sum()
    if config.top_p < 1:
        order = np.argsort(-p)
        before = np.cumsum(p[order]) - p[order]
        margin = min(margin, abs(before - config.top_p).min())
        p[order[before >= config.top_p]] = 0
        p /= p.sum()
    if config.min_p:
        margin = min(margin, abs(p - config.min_p * p.max())[p < p.max()].min(initial=1))
        p[p < config.min_p * p.max()] = 0
    return p / p.sum(), margin


CONFIGS = st.builds(
    SamplingConfig,
    temperature=st.sampled_from([0.5, 0.7, 1, 1.5]),
    top_p=st.sampled_from([1.0, 0.95, 0.8, 0.5, 0.1]),
    top_k=st.sampled_from([0, 1, 2, 4, 20]),
    min_p=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
)


@settings(deadline=None, max_examples=150)
@given(CONFIGS, st.lists(st.integers(-20, 20), min_size=1, max_size=8, unique=True), st.sets(st.integers(0, 9)))
def test_the_intervals_of_the_uniform_are_those_of_the_definition(config, tenths, history):
    row = [x / 10 for x in tenths]
    p, margin = slow_probabilities(row, history, config)
    assume(margin > 1e-5)
    high = np.cumsum(p)
    wide = np.flatnonzero(p > 1e-5)
    uniforms = [*(high - p)[wide] + 3e-6, *high[wide] - 3e-6]  # from edge to edge: a token too many would push one over
    logits = torch.tensor(row).repeat(len(uniforms), 1)
    tokens, valid = Sampler(config, ()).choose(logits, [sorted(history)] * len(uniforms), uniforms)
    assert tokens.tolist() == [*wide, *wide]
    assert valid.all()


def test_the_processors_act_as_in_the_generation_of_transformers(base_folder):
    settings = {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3}
    prompt = [40, 41, 42, 40]
    model = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    for weight in model.lm_head.parameters():
        weight.data *= 20  # a random model has flat logits: too flat for a filter
    torch.manual_seed(0)
    out = model.generate(
        torch.tensor([prompt]),
        do_sample=True,
        max_new_tokens=12,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )
    sampler = Sampler(SamplingConfig(**settings), ())
    supports = set()
    for step, (logits, scores) in enumerate(zip(out.logits, out.scores, strict=True)):
        p = scores[0].double().softmax(-1)
        kept = p.nonzero()[:, 0]
        middle = (p.cumsum(-1) - p / 2)[kept]
        history = out.sequences[0, : len(prompt) + step].tolist()
        tokens, _ = sampler.choose(logits.repeat(len(kept), 1), [history] * len(kept), middle.tolist())
        assert tokens.tolist() == kept.tolist()
        supports.add(len(kept))
    assert len(supports) > 2  # the filters were at work


def test_frequencies_of_many_chains_are_the_probabilities():
    config, logits = SamplingConfig(temperature=0.7, top_k=4, seed=5), torch.tensor([0.3, -0.2, 1.0, 0.1, -4.0])
    num_draws = 4000
    draws = [chain_generator(config.seed, "p", chain).uniform(step) for chain in range(500) for step in range(8)]
    tokens, _ = Sampler(config, ()).choose(logits.repeat(num_draws, 1), [[]] * num_draws, draws)
    expected = slow_probabilities(logits.tolist(), set(), config)[0] * num_draws
    found = np.bincount(tokens, minlength=5)
    assert found[4] == expected[4] == 0
    assert ((found - expected)[:4] ** 2 / expected[:4]).sum() < 16  # chi-square of 3 degrees: once in 900


def test_greedy_takes_the_largest_and_the_penalty_counts_for_it():
    logits = torch.tensor([[1.0, 3.0, 2.9], [1.0, 3.0, 2.9], [-3.0, -1.0, -1.1]])
    histories = [[1, 0], [], [0, 1, 1, 7]]
    plain = Sampler(SamplingConfig(top_k=1, min_p=0.9), ()).choose(logits, histories, [0.0] * 3)
    assert plain[0].tolist() == [1, 1, 1]
    penalised = Sampler(SamplingConfig(repetition_penalty=1.2), ()).choose(logits, histories, [0.0] * 3)
    assert penalised[0].tolist() == [2, 1, 2]
    assert penalised[0].dtype == torch.long
    assert penalised[1].tolist() == [True] * 3


def make_rows(seed, num_rows, size, temperature):
    """Rows of which some are unsound, histories of any length, and uniforms of which half sit where two tokens meet."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    logits = torch.randn(num_rows, size, generator=g) * 3
    meet = (logits / temperature).double().softmax(-1).cumsum(-1)
    histories = [[rng.randrange(size) for _ in range(rng.choice((0, 1, 30)))] for _ in range(num_rows)]
    at = [rng.randrange(size - 1) for _ in range(num_rows)]
    uniforms = [rng.choice((rng.random(), (meet[r, i] / meet[r, -1]).item())) for r, i in enumerate(at)]
    for row in range(num_rows):
        kind = rng.randrange(6)
        if kind == 0:
            logits[row, rng.randrange(size)] = rng.choice((math.nan, math.inf))
        elif kind == 1:
            logits[row] = -math.inf
    return logits, histories, [min(u, ALMOST_ONE) for u in uniforms]


@settings(deadline=None, max_examples=60)
@given(CONFIGS | st.just(SamplingConfig()), st.integers(0, 10**6), st.integers(1, 6), st.sampled_from([5, 37, 301]))
def test_a_row_is_what_it_is_alone(config, seed, num_rows, size):
    logits, histories, uniforms = make_rows(seed, num_rows, size, config.temperature or 1)
    sampler, before = Sampler(config, ()), logits.clone()
    tokens, valid = sampler.choose(logits, histories, uniforms)
    assert torch.equal(logits.nan_to_num(7), before.nan_to_num(7))
    for row in range(num_rows):
        alone = sampler.choose(logits[row : row + 1], histories[row : row + 1], uniforms[row : row + 1])
        assert (tokens[row].item(), valid[row].item()) == (alone[0].item(), alone[1].item())


@pytest.mark.parametrize("config", [SamplingConfig(), SamplingConfig(1.0, 0.9, 3, 0.1, 1.2)], ids=["greedy", "sampled"])
def test_unsound_rows_are_reported_and_no_others(config):
    good, inf = [1.0, 2.0, -math.inf, 0.0], math.inf
    logits = torch.tensor([good, [1, math.nan, 2, 3], [1, inf, 2, 3], [-inf] * 4, [-inf, -inf, 1, -inf], good])
    tokens, valid = Sampler(config, ()).choose(logits, [[1]] * 6, [0.5] * 6)
    assert valid.tolist() == [True, False, False, False, True, True]
    assert tokens[[1, 2, 3]].tolist() == [0, 0, 0]
    assert tokens[4] == 2


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from([-math.inf, -2000.0, 0.0, 1.0]), min_size=2, max_size=9), st.sampled_from([0, 1, 2]))
def test_a_token_of_probability_zero_is_never_chosen(row, top_k):
    assume(max(row) > -math.inf)
    config = SamplingConfig(temperature=1.0, top_k=top_k)
    tokens, valid = Sampler(config, ()).choose(torch.tensor([row] * 3), [[]] * 3, [0.0, 0.5, ALMOST_ONE])
    assert valid.all()
    weight = [math.exp(x - max(row)) for x in row]
    possible = {i for i, w in enumerate(weight) if w > 0}
    assert set(tokens.tolist()) <= possible
    if not top_k:
        assert (tokens[0], tokens[2]) == (min(possible), max(possible))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32), st.sampled_from([1.0, 0.95, 0.5]))
def test_the_order_of_adding_changes_no_draw(seed, top_p):
    """A device may add up in any order; backwards is one of them."""
    logits = 3 * torch.randn(8, 1000, generator=torch.Generator().manual_seed(seed))
    sampler, uniforms = Sampler(SamplingConfig(temperature=0.6, top_p=top_p), ()), [k / 8 for k in range(8)]
    forwards, _ = sampler.choose(logits, [[]] * 8, uniforms)
    total, exact = torch.Tensor.sum, torch.Tensor.cumsum
    with pytest.MonkeyPatch.context() as patch:
        for name in ("cumsum", "cumsum_"):
            patch.setattr(torch.Tensor, name, lambda x, dim: total(x, dim, True) - exact(x.flip(dim), dim).flip(dim) + x)
        backwards, _ = sampler.choose(logits, [[]] * 8, uniforms)
    assert torch.equal(forwards, backwards)


def test_the_largest_vocabulary_has_room_and_a_larger_one_is_refused():
    sampler = Sampler(SamplingConfig(temperature=1.0, top_p=0.75), ())
    tokens, _ = sampler.choose(torch.zeros(3, 2**19), [[]] * 3, [0.0, 0.5, ALMOST_ONE])
    assert tokens.tolist() == [0, 3 * 2**16, 3 * 2**17 - 1]
    with pytest.raises(ValueError, match="a vocabulary of 524289"):
        sampler.choose(torch.zeros(1, 2**19 + 1), [[]], [0.5])


def test_intervals_are_half_open_and_as_fine_as_float64():
    sampler, rare = Sampler(SamplingConfig(temperature=1.0), ()), math.exp(-21)
    assert sampler.choose(torch.zeros(4, 4), [[]] * 4, [0.0, 0.25, 0.5, 0.75])[0].tolist() == [0, 1, 2, 3]
    uniforms = [1 - 1.5 * rare, 1 - 0.5 * rare]
    assert sampler.choose(torch.tensor([[0.0, -21.0]] * 2), [[]] * 2, uniforms)[0].tolist() == [0, 1]


def test_half_precision_is_computed_on_in_float32():
    config, logits = SamplingConfig(temperature=0.7, top_p=0.9), torch.randn(4, 50).bfloat16()
    uniforms = [0.1, 0.4, 0.6, 0.9]
    wide, narrow = (Sampler(config, ()).choose(x, [[]] * 4, uniforms)[0] for x in (logits.float(), logits))
    assert torch.equal(wide, narrow)


def test_no_rows_give_no_tokens():
    for temperature in (0.0, 1.0):
        tokens, valid = Sampler(SamplingConfig(temperature, 0.9, 3, 0.1, 1.1), ()).choose(torch.zeros(0, 4), [], [])
        assert tokens.shape == valid.shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(3), [[]], [0.0]), "have shape [3] and dtype torch.float32"),
        ((torch.zeros(1, 3, dtype=torch.long), [[]], [0.0]), "dtype torch.int64"),
        ((torch.zeros(1, 0), [[]], [0.0]), "have shape [1, 0]"),
        ((torch.zeros(2, 3), [[]], [0.0, 0.0]), "2 rows, but there are 1 histories and 2 uniforms"),
        ((torch.zeros(2, 3), [[], []], [0.0]), "2 rows, but there are 2 histories and 1 uniforms"),
        ((torch.zeros(1, 3), [[]], [1.0]), "uniform 0 is 1.0"),
        ((torch.zeros(1, 3), [[]], [math.nan]), "uniform 0 is nan"),
    ],
)
def test_rows_that_do_not_fit_together_are_refused(arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Sampler(SamplingConfig(), ()).choose(*arguments)


@pytest.mark.parametrize("eos_ids", [3, None, "3", [3.0]])
def test_end_ids_must_be_a_collection_of_ids(eos_ids):
    for make in (Sampler, StopRule):
        with pytest.raises(ValueError, match="is not a collection of token ids"):
            make(SamplingConfig(), eos_ids)


# --- stopping


def slow_check(config, eos_ids, tokenizer, ids):
    """The rule as it is meant: decode everything at every step."""
    begin = 0 if config.stop_after is None else None
    for n, token in enumerate(ids, start=1):
        text = decode(tokenizer, ids[:n])
        if token in eos_ids:
            return "eos", n
        if begin is not None and token in config.stop_ids:
            return "stop", n
        if begin is None and config.stop_after in text:
            begin = text.index(config.stop_after) + len(config.stop_after)
        if begin is not None and any(stop in text[begin:] for stop in config.stop):
            return "stop", n
    return None


def singles(ids):
    return [[i] for i in ids]


LETTERS = {  # whole characters, bytes in a sensible order or none, pieces of the marker, spaces
    "byte_level": (
        BYTE_LEVEL,
        [*singles([END_THINK, *ids_of(" a = 1.\n\n</think>"), *byte_ids("é😀")]), byte_ids("é你"), byte_ids("😀")],
    ),
    "sentencepiece": (
        SENTENCEPIECE,
        [*singles([*range(257, 263), 0x80 + 1, 0xE4 + 1]), *([byte + 1 for byte in c.encode()] for c in "é你😀a")],
    ),
    "wordpiece": (WORDPIECE, singles(range(10))),
}


@pytest.mark.parametrize("letters", LETTERS)
@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_chain_ends_where_the_slow_statement_ends_it(letters, data):
    tokenizer, units = LETTERS[letters]
    drawn = data.draw(st.lists(st.sampled_from(units), min_size=1, max_size=40))
    early = data.draw(st.sampled_from(units)) * data.draw(st.sampled_from([0, 20]))  # further back than a window reaches
    ids, pool = early + [i for unit in drawn for i in unit], sorted({i for unit in units for i in unit})
    text = decode(tokenizer, ids).replace("\ufffd", "")
    assume(text)
    places = st.tuples(st.integers(0, len(text) - 1), st.integers(1, 12)).map(lambda at: text[at[0] : at[0] + at[1]])
    config = SamplingConfig(
        stop=tuple(data.draw(st.lists(places, max_size=2))),
        stop_ids=tuple(data.draw(st.lists(st.sampled_from(pool), max_size=1))),
        stop_after=data.draw(st.none() | st.just("</s>") | st.just("</think>") | places),
    )
    eos_ids = data.draw(st.sets(st.sampled_from(pool), max_size=1))
    expected = slow_check(config, eos_ids, tokenizer, ids)
    end = expected[1] if expected else len(ids)

    rule = StopRule(config, eos_ids, tokenizer)
    steps = [rule.check(ids[:n]) for n in range(1, end + 1)]
    assert steps == [None] * (end - 1) + [expected]
    at_once, halfway = StopRule(config, eos_ids, tokenizer), StopRule(config, eos_ids, tokenizer)
    halfway.check(ids[: end // 2])
    assert at_once.check(ids) == halfway.check(ids) == rule.check(ids) == expected
    assert at_once.text(ids[:end]) == halfway.text(ids[:end]) == rule.text(ids[:end])


def rule_of(stop=(), stop_after=None, stop_ids=(), eos_ids=(END,)):
    return StopRule(SamplingConfig(stop=stop, stop_after=stop_after, stop_ids=stop_ids), eos_ids, BYTE_LEVEL)


def test_a_stop_string_may_straddle_tokens_and_begin_inside_one():
    ids = ids_of(" return x + 1\n\n")
    pieces = [decode(BYTE_LEVEL, [i]) for i in ids]
    assert not any(re.search("turn x|[+] 1", piece) for piece in pieces)
    rule = rule_of(stop=("turn x", "+ 1"))
    n = next(n for n in range(1, len(ids)) if "turn x" in "".join(pieces[:n]))
    assert rule.check(ids) == ("stop", n)
    assert n < len(ids)
    assert rule.text(ids[:n]) == " re"


def test_a_stop_string_of_characters_split_over_tokens_is_seen_at_its_last_byte():
    ids = byte_ids("ab 😀é你 c")
    assert rule_of(stop=("é你",)).check(ids) == ("stop", len("ab 😀é你".encode()))
    assert rule_of(stop=("é你",)).text(ids) == "ab 😀"


def test_a_tidying_tokenizer_does_not_hide_a_space():
    ids = byte_ids("a . b")
    assert BYTE_LEVEL.decode(ids) == "a. b"
    assert rule_of(stop=(" .",)).check(ids) == ("stop", 3)


@pytest.mark.parametrize("marker", [[END_THINK], byte_ids("</think>")], ids=["special token", "spelled out"])
def test_stop_strings_and_ids_hold_after_thinking_only(marker):
    stop_id = ids_of("\n")[0]
    thought, answer = ids_of("one\n\ntwo <b> 3"), ids_of("4 <b>")
    for stop, stop_ids in ((("<b>",), ()), ((), (stop_id,))):
        rule = rule_of(stop, "</think>", stop_ids)
        ids = thought + marker + answer + [stop_id]
        assert rule.check(ids[:-1]) == (("stop", len(ids) - 1) if stop else None)
        assert rule.check(ids) == ("stop", len(ids) - bool(stop))
        assert rule_of(stop, None, stop_ids).check(ids)[1] < len(thought)
    assert rule_of(("<b>",), "</think>").text(thought + marker + answer) == decode(BYTE_LEVEL, thought + marker) + "4 "


def test_a_stop_string_that_begins_in_the_marker_does_not_hold_but_the_next_does():
    rule = rule_of(("k>\n", "\n\n"), "</think>")
    ids = [*byte_ids("k>\n"), END_THINK, *byte_ids("\nk>\n\n")]
    assert [rule.check(ids[:n]) for n in range(1, len(ids))] == [None] * 7 + [("stop", 8)]
    assert rule.text(ids[:8]) == "k>\n</think>\n"


def test_the_token_that_ends_thinking_is_no_stop_id_yet():
    rule = rule_of((), "</think>", (END_THINK,))
    assert rule.check([END_THINK]) is None
    assert rule.check([END_THINK, END_THINK]) == ("stop", 2)


def test_an_end_token_holds_in_thinking_and_comes_first():
    ids = [*ids_of("one"), END]
    assert rule_of(("<b>",), "</think>").check(ids) == ("eos", len(ids))
    rule = rule_of(("|>",), stop_ids=(END,))
    assert rule.check(ids) == ("eos", len(ids))
    assert rule.text(ids) == "one<|im_end|>"
    assert rule_of(("|>",), eos_ids=()).text(ids) == "one<|im_end"


def test_of_two_stop_strings_of_one_token_the_first_to_begin_is_cut():
    assert rule_of(("im_end", "|im_"), eos_ids=()).text([*ids_of("one"), END]) == "one<"


def test_a_chain_that_goes_on_has_its_whole_text():
    rule, ids = rule_of(("xyz",), "</think>"), ids_of("one</think> two xy")
    assert rule.check(ids) is None
    assert rule.text(ids) == "one</think> two xy"


@pytest.mark.parametrize("kind", ["words", "bytes of nothing"])
def test_a_step_decodes_a_bounded_number_of_tokens(kind, monkeypatch):
    decoded = []
    original = BYTE_LEVEL.decode
    monkeypatch.setattr(BYTE_LEVEL, "decode", lambda ids, **how: decoded.append(len(ids)) or original(ids, **how))
    ids = (ids_of(" a cat") * 400 if kind == "words" else byte_ids("😀")[:1] * 800) + ids_of("xyz")
    rule, largest = rule_of(("xyz",)), 0
    for n in range(1, len(ids) + 1):
        decoded.clear()
        verdict = rule.check(ids[:n])
        largest = max(largest, sum(decoded))
    assert verdict == ("stop", len(ids))
    assert largest <= 64


def test_ids_alone_need_no_tokenizer():
    rule = Sampler(SamplingConfig(stop_ids=(9,)), [END]).stop_rule()
    assert rule.check([1, 2]) is None
    assert rule.check([1, 2, 9]) == ("stop", 3)
    assert rule.check([1, 2, 9, END]) == ("stop", 3)


def test_every_chain_gets_its_own_rule():
    sampler = Sampler(SamplingConfig(stop=("x",)), [END], BYTE_LEVEL)
    assert sampler.stop_rule().check([END]) == ("eos", 1)
    assert sampler.stop_rule().check(byte_ids("ax")) == ("stop", 2)


@pytest.mark.parametrize("config", [SamplingConfig(stop=("x",)), SamplingConfig(stop_ids=(1,), stop_after="x")])
def test_texts_to_stop_at_need_a_tokenizer(config):
    for make in (Sampler, StopRule):
        with pytest.raises(ValueError, match=r"needs the text of the tokens, but no tokenizer was given"):
            make(config, [END])


def test_text_needs_a_tokenizer():
    with pytest.raises(ValueError, match="has no tokenizer and cannot decode"):
        StopRule(SamplingConfig(), [END]).text([1])


def test_a_rule_is_not_for_two_chains():
    rule = rule_of()
    rule.check([7, 8])
    with pytest.raises(ValueError, match="has seen 2 ids and is given 1"):
        rule.check([7])
