"""The generated problems are what they say, the tokenizer loses nothing, the embedded model loads as any other."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from dms_lab.models import EMBEDDED
from dms_lab.tiny import corpus, tasks


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED)


def solve(problem):
    """The answer, found from the prompt by other means than the generator's."""
    text, question = problem.prompt.rsplit("\n", 1)
    word, *names = question.split()
    if word == "add":
        return str(sum(int(re.search(rf"coin {name} (\d)\.", text)[1]) for name in names) % 10)
    name, total = names[0], 0
    while True:
        if word == "from":
            (after,) = re.findall(rf"road {name} (\w+)\.", text)
            if after == "end":
                return name
            name = after
        else:
            (after,) = re.findall(rf"jump {name} ([^.]+)\.", text)
            if after == "halt":
                return str(total)
            name, value = after.split()
            total = (total + int(value)) % 10


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(tasks.FAMILIES), st.integers(64, 1024), st.integers(0, 10**6))
def test_the_answer_follows_from_the_prompt(family, length, seed):
    problem = tasks.make_problem(family, random.Random(seed), length)
    assert solve(problem) == problem.answer.strip()
    assert problem == tasks.make_problem(family, random.Random(seed), length)


@pytest.mark.parametrize("length", [96, 256, 512, 1024])
@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_a_problem_fills_the_length_it_was_asked_for(tokenizer, family, length):
    for seed in range(20):
        document = corpus.encode_problem(tasks.make_problem(family, random.Random(seed), length), tokenizer)
        assert 0.85 * length <= len(document.ids) <= length


def test_a_length_or_family_that_cannot_be_made_is_refused():
    with pytest.raises(ValueError, match="at least 48"):
        tasks.make_problem("road", random.Random(0), 20)
    with pytest.raises(ValueError, match="choose one of ledger, road, program"):
        tasks.make_problem("chess", random.Random(0))


@settings(deadline=None, max_examples=200)
@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids, skip_special_tokens=False) == text


def test_every_word_of_the_tasks_is_one_token(tokenizer):
    assert all(len(tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in tasks.words())


def test_the_embedded_model_loads_as_any_other_and_is_small():
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED)
    assert model.config.num_attention_heads > model.config.num_key_value_heads
    assert sum(f.stat().st_size for f in EMBEDDED.iterdir()) < 8e6
