"""Generated retrieval problems: what is asked for stands in the prompt once, at any depth; prompts have their length."""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dms_lab.config import ModelConfig
from dms_lab.evaluation import ruler
from dms_lab.models import load_tokenizer

TASKS = ["niah_single", "niah_multikey", "vt"]


class Words:
    """A tokenizer whose tokens are words, with one special token in front of them."""

    def encode(self, text, add_special_tokens=True):
        return ["<s>"] * add_special_tokens + text.split()


@pytest.fixture(scope="module", params=["embedded", "words"])
def tokenizer(request):
    if request.param == "words":
        return Words()
    config = ModelConfig(name="tiny", path="embedded", context=512, window=8, lr=0.0, adapter_lr=0.0, batch_size=1)
    return load_tokenizer(config)


def num_tokens(tokenizer, prompt):
    """Counted as a model sees it: in the chat template, where there is one."""
    if isinstance(tokenizer, Words):
        return len(tokenizer.encode(prompt))
    chat = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
    return len(tokenizer.encode(chat, add_special_tokens=False))


def line_tokens(tokenizer, task):
    """A line of the haystack, at its longest."""
    line = ruler.NEEDLE.format(key="crimson-crimson", value=1234567) if task == "niah_multikey" else ruler.NOISE
    return len(tokenizer.encode(line + "\n", add_special_tokens=False)) + 1


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [1024, 4096, 32768])
def test_a_prompt_with_its_answer_fits_the_length_and_comes_close_to_it(task, length, tokenizer):
    for problem in ruler.make_problems(task, 3, length, 0, tokenizer):
        found = num_tokens(tokenizer, problem.prompt)
        assert found == problem.num_tokens
        assert found + 128 <= length
        assert found + 128 >= length - line_tokens(tokenizer, task)
        assert found + 128 > (0.98 if length > 1024 else 0.95) * length
        assert len(tokenizer.encode(" ".join(problem.answers), add_special_tokens=False)) < 64


@pytest.mark.parametrize("task", TASKS)
def test_128k_tokens_are_reached(task, tokenizer):
    (problem,) = ruler.make_problems(task, 1, 131072, 0, tokenizer)
    assert 131072 - 64 < problem.num_tokens + 128 <= 131072


@pytest.mark.parametrize("task", TASKS)
def test_more_tokens_for_the_answer_leave_fewer_for_the_prompt(task, tokenizer):
    (short,) = ruler.make_problems(task, 1, 4096, 0, tokenizer, answer_tokens=1024)
    assert 0.96 * 4096 < short.num_tokens + 1024 <= 4096


@pytest.mark.parametrize("task", TASKS)
def test_problems_are_a_function_of_seed_length_and_number(task, tokenizer):
    found = ruler.make_problems(task, 3, 1024, 0, tokenizer)
    assert ruler.make_problems(task, 3, 1024, 0, tokenizer) == found
    assert [p.answers for p in ruler.make_problems(task, 2, 1024, 0, tokenizer)] == [p.answers for p in found[:2]]
    assert len({p.answers for p in found}) == 3
    assert {p.answers for p in ruler.make_problems(task, 3, 1024, 1, tokenizer)}.isdisjoint(p.answers for p in found)
    assert {p.answers for p in ruler.make_problems(task, 3, 2048, 0, tokenizer)}.isdisjoint(p.answers for p in found)


@pytest.mark.parametrize("task", ["niah_single", "niah_multikey"])
def test_the_needle_stands_once_at_its_depth_under_the_key_that_is_asked_for(task, tokenizer):
    for problem in ruler.make_problems(task, 8, 2048, 0, tokenizer):
        key = re.search(r"What is the special magic number for (\S+) mentioned", problem.prompt)[1]
        (value,) = problem.answers
        assert re.fullmatch(r"\d{7}", value)
        needle = f"One of the special magic numbers for {key} is: {value}."
        _, *lines, _ = problem.prompt.split("\n")
        assert lines.count(needle) == 1
        assert problem.prompt.count(value) == 1
        assert len(lines) == problem.num_lines + 1
        assert abs(lines.index(needle) / len(lines) - problem.depths[0]) <= 1 / len(lines)
        assert key in problem.answer_prefix


def test_the_distractors_of_multikey_are_needles_under_other_keys(tokenizer):
    (problem,) = ruler.make_problems("niah_multikey", 1, 32768, 0, tokenizer)
    found = re.findall(r"One of the special magic numbers for (\S+) is: (\d{7})\.", problem.prompt)
    assert len(found) == problem.num_lines + 1
    assert len({key for key, _ in found}) == len(found)
    assert len({value for _, value in found}) == len(found)


def test_following_the_assignments_gives_the_answer(tokenizer):
    for problem in ruler.make_problems("vt", 8, 2048, 0, tokenizer):
        value = re.search(r"assigned the value (\d{5}) in the text above", problem.prompt)[1]
        (first,) = re.findall(r"^VAR ([A-Z]{5}) = (\d{5})$", problem.prompt, re.MULTILINE)
        assert first[1] == value
        chain = [first[0]]
        for name, before in re.findall(r"^VAR ([A-Z]{5}) = VAR ([A-Z]{5})$", problem.prompt, re.MULTILINE):
            assert before == chain[-1]  # in order, each from the one before
            chain.append(name)
        assert tuple(chain) == problem.answers
        assert len(set(chain)) == 5


@pytest.mark.parametrize("task", TASKS)
def test_depths_are_uniform(task):
    depths = [d for number in range(150) for d in ruler.TASKS[task](random.Random(f"depths {number}")).depths]
    for quarter in range(4):
        share = sum(quarter <= 4 * d < quarter + 1 for d in depths) / len(depths)
        assert 0.14 < share < 0.36


def test_keys_are_many_and_words_stand_once():
    assert len(set(ruler.ADJECTIVES)) == len(ruler.ADJECTIVES)
    assert len(set(ruler.NOUNS)) == len(ruler.NOUNS)
    assert len(ruler.ADJECTIVES) * len(ruler.NOUNS) > 131072 / 10  # a needle has ten words


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=400),
    base=st.integers(0, 50),
    budget=st.integers(0, 4000),
    guess=st.integers(0, 600),
)
def test_what_fits_is_found_whatever_the_guess(sizes, base, budget, guess):
    """Lines of very different sizes: what is found fits, and half an average line at most is left unlooked at."""
    counts = []

    def count(n):
        counts.append(n)
        return base + sum(sizes[i % len(sizes)] for i in range(n))

    if base > budget:
        with pytest.raises(ValueError, match="the question alone takes"):
            ruler.fit(count, budget, guess)
        return
    n, at = ruler.fit(count, budget, guess)
    assert count(n) == at <= budget
    assert count(n + 1) > budget or budget - at < max(sizes)


def test_a_length_without_room_or_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="ask for a larger length"):
        ruler.make_problems("vt", 1, 128, 0, Words())
    with pytest.raises(ValueError, match="choose one of niah_single, niah_multikey, vt"):
        ruler.make_problems("niah_single_1", 1, 4096, 0, Words())


def test_a_good_guess_makes_sizing_cost_a_few_counts():
    calls = []

    class Counted(Words):
        def encode(self, text, add_special_tokens=True):
            calls.append(len(text))
            return super().encode(text, add_special_tokens)

    ruler.make_problems("niah_single", 10, 32768, 0, Counted())
    long = [size for size in calls if size > 10_000]
    assert len(long) <= 10 * 3
