"""What inspection shows of a chain is what the caches do with it."""

import json
import random
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from test_retrofit import build, decide
from transformers import AutoModelForCausalLM, AutoTokenizer

from dms_lab import eviction, inspection
from dms_lab.attachment import retrofit
from dms_lab.cache.masked import MaskedCache
from dms_lab.checkpoint import fingerprint, save_checkpoint
from dms_lab.generation import generate_greedy
from dms_lab.inspection import Decisions, coloured_html, kept
from dms_lab.models import EMBEDDED
from dms_lab.policies.dms import DmsConfig
from dms_lab.tiny import tasks

WINDOW = 5


@pytest.fixture
def model(base_folder):
    return AutoModelForCausalLM.from_pretrained(base_folder).eval(), AutoTokenizer.from_pretrained(base_folder)


@pytest.fixture
def ids():
    return torch.randint(6, 400, (40,), generator=torch.Generator().manual_seed(0)).tolist()


def attach(model, **changes):
    return decide(retrofit(model, DmsConfig(**({"window": WINDOW} | changes))))


def chain_of(evict, window=3, texts=None, **more):
    evict = np.array(evict, dtype=bool)
    return Decisions(evict, window, texts or [f" t{i}" for i in range(evict.shape[-1])], **more)


# --- the truth


@torch.no_grad()
def step(handle, cache, token):
    return handle.model(torch.tensor([[token]]), past_key_values=cache).logits


@pytest.mark.parametrize("decided_by", eviction.DECIDED_BY)
def test_what_is_hidden_may_hold_anything_and_what_is_shown_may_not(model, ids, decided_by):
    handle = attach(model[0], decided_by=decided_by)
    chain = kept(handle, ids, model[1])
    seen = chain.visible_until == len(ids) - 1  # by the query of the last token, which goes through a filled cache below
    assert 0.1 < seen.mean() < 0.9

    def logits(layer=None, head=None, tokens=None):
        cache = MaskedCache(handle.policy())
        with torch.no_grad():
            handle.model(torch.tensor([ids[:-1]]), past_key_values=cache)
        if layer is not None:
            cache.layers[layer].values[0, head, tokens] += 100.0
        return step(handle, cache, ids[-1])

    expected = logits()
    for layer, head in np.ndindex(seen.shape[:2]):
        old = torch.from_numpy(seen[layer, head, :-1])
        torch.testing.assert_close(logits(layer, head, ~old), expected, rtol=0, atol=0)
        for token in old.nonzero()[:, 0].tolist()[::4]:
            assert (logits(layer, head, [token]) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("config", [{}, {"window": 1}, {"granularity": "layer"}, {"predictor": "sinks", "num_sinks": 2}])
def test_live_slots_are_those_that_a_generation_accounts_for(model, ids, config):
    handle = attach(model[0], **config)
    (answer,) = generate_greedy(handle.model, handle.policy, [ids], max_new_tokens=12, end_id=3)
    chain = kept(handle, ids + answer.ids, model[1], num_prompt=len(ids))
    live = chain.live.mean((0, 1))
    steps = slice(len(ids) - 1, len(ids) - 1 + len(answer.ids))  # the last token never went through the model
    np.testing.assert_allclose(live[steps], answer.trace.live)
    assert live[-2] == pytest.approx(answer.usage.live_tokens)
    assert chain.measured_cr[-2] == pytest.approx(answer.usage.num_tokens / answer.usage.live_tokens)
    assert live[-1] < len(chain.texts) * 0.9


@pytest.mark.parametrize("window", [1, 2, 7, 50])
def test_live_and_visible_until_follow_the_rule_of_visibility(window):
    rng = np.random.default_rng(window)
    chain = chain_of(rng.random((2, 3, 20)) < 0.5, window)
    seen = eviction.visible(torch.from_numpy(chain.evict), window).numpy()  # layers as the batch
    assert (chain.live == seen.sum(-1)).all()
    last = 19 - seen[:, :, ::-1].argmax(2)
    assert (chain.visible_until == last).all()


def test_the_texts_are_those_of_the_tokens(model):
    handle = attach(model[0])
    text = "x\u00e9 y\n<think> 7"
    chain = kept(handle, model[1](text, add_special_tokens=False).input_ids, model[1])
    assert "".join(chain.texts).replace("\ufffd", "") == text.replace("\u00e9", "")
    assert "<think>" in chain.texts


# --- what is refused


def test_a_model_whose_layers_slide_is_refused():
    handle = attach(build("gemma2"))
    with pytest.raises(ValueError, match="sliding window"):
        kept(handle, [3, 4, 5], None)


def test_no_tokens_unknown_tokens_and_no_policy_are_refused_in_a_sentence(model):
    handle = attach(model[0])
    with pytest.raises(ValueError, match="at least one token"):
        kept(handle, [], model[1])
    with pytest.raises(ValueError, match="the model knows 0 to"):
        kept(handle, [10**6], model[1])
    handle.detach()
    with pytest.raises(ValueError, match="without a policy"):
        kept(retrofit(model[0], None), [5], model[1])


# --- files


def test_saved_chains_come_back_as_they_were(tmp_path):
    rng = np.random.default_rng(0)
    texts = ["\u2028", " \u00e9", "\n", "<|im_end|>", "a", "b", "c", "d", "e", "f"]
    chains = [chain_of(rng.random((2, 2, 10)) < 0.5, 3, texts, num_prompt=2, about={"cr": 8.0, "task": "road"})] * 2
    path = tmp_path / "new" / "decisions.jsonl"
    inspection.save(chains, path)
    for old, new in zip(chains, inspection.load(path), strict=True):
        assert (old.evict == new.evict).all()
        assert (old.window, old.texts, old.num_prompt, old.about) == (new.window, new.texts, new.num_prompt, new.about)


def test_the_last_chain_counts_without_the_end_of_its_line_too(tmp_path):
    path = tmp_path / "decisions.jsonl"
    inspection.save([], path)
    assert inspection.load(path) == []
    inspection.save([chain_of([[[0, 1]]])] * 2, path)
    path.write_text(path.read_text().removesuffix("\n"))
    assert len(inspection.load(path)) == 2
    path.write_text(path.read_text()[:-5])
    with pytest.raises(ValueError, match=r"decisions\.jsonl:2 holds no decisions"):
        inspection.load(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda row: row | {"schema_version": 9},
        lambda row: row | {"texts": ["one"] * 9},
        lambda row: row | {"evict": [["40", "4"]]},
        lambda row: {k: v for k, v in row.items() if k != "window"},
        lambda row: [],
    ],
)
def test_a_damaged_line_is_named(tmp_path, damage):
    path = tmp_path / "decisions.jsonl"
    inspection.save([chain_of([[[0, 1]]])] * 2, path)
    first, second = path.read_text().splitlines()
    path.write_text(f"{first}\n{json.dumps(damage(json.loads(second)))}\n")
    with pytest.raises(ValueError, match=r"decisions\.jsonl:2 holds no decisions"):
        inspection.load(path)


# --- kinds of tokens and tables


def test_the_roles_of_a_problem_are_those_of_its_generator():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    from dms_lab.tiny.corpus import encode_problem

    for family in tasks.FAMILIES:
        problem = tasks.make_problem(family, random.Random(family), 512)
        texts = [tokenizer.decode([i]) for i in encode_problem(problem, tokenizer).ids]
        roles = inspection.task_roles(texts)
        joined = {role: "".join(t for t, r in zip(texts, roles, strict=True) if r == role) for role in set(roles)}
        prompt, _, question = problem.prompt.rpartition("\n")
        facts = re.findall(r"(?:^|\.)(?= (?:coin|road|jump) [A-Z])( [^.]*)", prompt)
        assert "".join(r for r in re.findall(r" [a-z]+", "".join(f[:5] for f in facts))) == joined["fact: keyword"]
        assert joined["fact: name"].split() == [fact.split()[1] for fact in facts]
        assert joined["fact: value"].split() == [word for fact in facts for word in fact.split()[2:]]
        assert joined["fact: full stop"] == "." * len(facts)
        assert joined["question"] == f"\n{question}"
        assert joined["thought"] == problem.thought
        assert joined["answer"] == problem.answer
        assert joined["template"] == "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n<think></think><|im_end|>"


def test_tokens_are_told_apart_by_their_looks():
    texts = ["<|im_end|>", " 7", "12", " word", " Mia", ".", "\n", " ", "<", "\u00e9", " =="]
    wanted = "special number number word name punctuation space space punctuation word punctuation".split()
    assert inspection.lexical_types(texts) == wanted


def test_shares_count_every_decision_once():
    chains = [chain_of([[[0, 1, 1], [0, 0, 1]]], about={"seed": s}, texts=[" Mia", " 4", "."]) for s in (0, 1)]
    frame = inspection.tidy(chains, block=2)
    assert len(frame) == 12
    by_type = inspection.kept_share(frame, "type").set_index("type")
    assert by_type["kept"].to_dict() == {"name": 1.0, "number": 0.5, "punctuation": 0.0}
    assert by_type["num_decisions"].to_dict() == {"name": 4, "number": 4, "punctuation": 4}
    by_head = inspection.kept_share(frame, ["seed", "layer", "head"])
    assert by_head["kept"].round(3).tolist() == [0.333, 0.667, 0.333, 0.667]
    assert inspection.kept_share(frame, "block")["kept"].tolist() == [0.75, 0.0]


def test_the_ratio_of_a_chain_grows_with_what_has_left_the_window():
    frame = inspection.cr_by_length([chain_of([[[1, 1, 1, 1], [0, 0, 0, 0]]], window=2, about={"cr": 8.0})])
    assert frame["live"].tolist() == [1.0, 2.0, 2.5, 3.0]
    assert frame["measured_cr"].tolist() == pytest.approx([1.0, 1.0, 1.2, 4 / 3])
    assert set(frame["cr"]) == {8.0}


# --- text


class Reader(HTMLParser):
    """Text and titles of the tokens, as a browser would have them."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.titles, self.texts, self.kinds = set(), [], [], []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        attributes = dict(attrs)
        self.within = "title" in attributes
        if self.within:
            self.titles.append(attributes["title"])
            self.kinds.append(attributes["class"])
            self.texts.append("")

    def handle_endtag(self, tag):
        self.within = False

    def handle_data(self, data):
        if self.within:
            self.texts[-1] += data


def test_the_text_of_tokens_cannot_become_markup():
    texts = ["<script>alert(1)</script>", '" onmouseover="x', "&amp;", "</span></div>", "'"]
    read = Reader(coloured_html(chain_of(np.zeros((1, 1, 5)), texts=texts)))
    assert read.texts == texts
    assert read.tags == {"div", "style", "span"}


def test_titles_name_the_heads_and_marks_count_them():
    evict = [[[1, 0, 1, 0], [1, 0, 0, 0]], [[1, 1, 1, 0], [1, 1, 1, 0]]]
    read = Reader(coloured_html(chain_of(evict)))
    assert read.titles == [
        "0: kept by 0 of 4",
        "1: kept by 2 of 4: 0.0 0.1",
        "2: kept by 1 of 4: 0.1",
        "3: kept by 4 of 4",
    ]
    assert read.kinds == ["k0", "k2", "k1", "k4"]
    one = Reader(coloured_html(chain_of(evict), heads=[(0, 1)], start=1, stop=3))
    assert (one.kinds, one.texts) == (["k4", "k4"], [" t1", " t2"])


def luminance(colour):
    digits = colour[1:] if len(colour) == 7 else "".join(2 * d for d in colour[1:])
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_marks_can_be_read_and_told_apart_without_colour():
    """Contrast of text at least 4.5 (WCAG AA); each step darker than the one before, and with another decoration."""
    styles = [style for _, style in inspection._STEPS]
    backs, fronts = (
        [luminance(c) for c in re.findall(rule, " ".join(styles))] for rule in (r"background:(#\w+)", r"(?<!-)color:(#\w+)")
    )
    for back, front in zip(backs, fronts, strict=True):
        assert (max(back, front) + 0.05) / (min(back, front) + 0.05) >= 4.5
    assert backs == sorted(backs, reverse=True)
    assert len({re.search(r"text-decoration:[^;]*|$", style)[0] for style in styles}) == len(styles)


def test_heads_that_are_none_are_refused():
    for heads in ([], [(0, 2)], [(-1, 0)]):
        with pytest.raises(ValueError, match="a layer below 1 and a head below 2"):
            coloured_html(chain_of(np.zeros((1, 2, 3))), heads)


# --- from a checkpoint


def test_a_checkpoint_of_the_embedded_model_is_asked_and_inspected(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    base = fingerprint(model)
    handle = decide(retrofit(model, DmsConfig(window=8)))
    save_checkpoint(tmp_path / "cr4", handle, "adapter", "embedded", base, {"cr": 4.0, "seed": 7})
    chains = inspection.inspect_checkpoint(tmp_path / "cr4", lengths=(64, 96), families=("road",))
    assert [c.about["length"] for c in chains] == [64, 96]
    for chain in chains:
        assert chain.about | {"cr": 4.0, "seed": 7, "task": "road"} == chain.about
        assert chain.evict.shape == (4, 2, len(chain.texts))
        assert chain.texts[chain.num_prompt - 1] == "<think>"
        assert isinstance(chain.about["right"], bool)
