"""Needle in a haystack and variable tracking to 128k tokens, after RULER (arXiv 2404.06654), generated here.

    (seed, length, number) -> keys, values, depths -> as many haystack lines as fit the tokenizer -> prompt, answers

| task            | RULER's name       | haystack                     | hidden in it, at uniform depth            |
|-----------------|--------------------|------------------------------|-------------------------------------------|
| `niah_single`   | `niah_single_1`    | five sentences, repeated     | one number under a key                    |
| `niah_multikey` | `niah_multikey_2`  | other keys with numbers      | the same; nothing but the key tells it    |
| `vt`            | `variable_tracking`| five sentences, repeated     | 1 chain of 4 hops: 5 variables, one value |

RULER's wording and sizes; what differs: keys are joined from the word lists below (RULER: wonderwords) and never repeat in
a prompt, depths are uniform (RULER: a grid of 40), variable tracking has no solved example in front, the haystack is as
long as fits (RULER: in steps), and the model's answer begins where it likes: `answer_prefix` has the words that RULER puts
into the model's mouth (`gen_prefix: answer_prefix` in a YAML file that includes a task's does so).
"""

import itertools
import json
import random
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from datasets import Dataset

from dms_lab.evaluation.problems import as_split

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic numbers for {key} is: {value}."
NUM_HOPS = 4

ADJECTIVES = (
    "able agile airy alert amber ample aqua arid azure bald bare basic bitter bland blank bleak blond blunt bold bony "
    "brave brief bright brisk broad bronze brown bulky busy calm candid chilly civil clean clear clever close cloudy "
    "coarse cold cool copper coral costly cozy crimson crisp cruel curly cyan daily damp dark deaf dear deep dense "
    "dim dire dizzy double drab dry dull dusty eager early easy eerie elder empty equal even exact faint fair false "
    "famous fancy fast fatal fierce final fine firm flat fluffy fond frail frank free fresh frosty full funny fuzzy "
    "gentle giant glad golden grand grave green grim gritty gross handy happy hard harsh hasty hazy heavy hollow "
    "honest huge humble icy ideal indigo inner ivory jolly keen kind large late lavish lazy lean level light lilac "
    "limp lively local lofty lone long loose loud loyal lucky lunar magic major maroon mellow merry mild minor misty "
    "modest moist narrow nasty neat nimble noble noisy novel odd olive open pale patient plain polite proud pure "
    "quick quiet rapid rare raw ready regal rich ripe robust rosy rough round royal rusty sandy sharp shiny short shy "
    "silent silky silver simple slim slow smart smooth snug sober soft solar solid sour"
).split()
NOUNS = (
    "acorn actor album anchor ankle apple apron arch arrow artist attic badge bagel baker bamboo banjo barber barn "
    "barrel basket beach beaver bell bench berry bird blanket blossom boat bonnet book bottle boulder bowl branch "
    "brick bridge broom brush bucket button cabin cactus camel canal candle canoe canyon carpet carrot castle cave "
    "cedar cello chain chair chalk cheese cherry chimney circle cliff clock cloud clover coast coat comet compass "
    "cookie corner cotton cousin cradle crane crayon cricket crown curtain daisy desert desk diamond dock doctor "
    "dolphin donkey door dragon drawer drum eagle easel elbow engine fabric falcon farmer feather fence fern ferry "
    "fiddle field finch flag flame flute forest fork fossil fountain fox galaxy garden garlic gate geese ginger "
    "glacier glove goat grape gravel guitar hammer hammock harbor harp hawk hedge helmet heron hill hinge honey horse "
    "hotel igloo inlet island jacket jar jewel jungle kayak kettle kitten ladder lagoon lake lamp lantern lemon "
    "letter lily lizard lobster locket magnet mango maple marble market meadow melon mirror mitten monkey moon moss "
    "mountain museum napkin needle nest oak oasis ocean onion orchard otter oven owl oyster paddle palace panda paper "
    "parrot peach pebble pencil pepper piano pigeon pillow pine planet pocket pond potato puzzle quilt rabbit raft "
    "river rocket saddle"
).split()

# A haystack of so many lines -> the prompt.
Render = Callable[[int], str]


@dataclass(frozen=True)
class Hidden:
    """One problem before its haystack is sized. `answers` must all be named; `depths` in [0, 1), 0 first line, sorted."""

    render: Render
    answers: tuple[str, ...]
    depths: tuple[float, ...]
    answer_prefix: str


@dataclass(frozen=True)
class Needle:
    """One sized problem. `num_tokens` counts the prompt in its chat template, without the answer."""

    prompt: str
    answers: tuple[str, ...]
    depths: tuple[float, ...]
    answer_prefix: str
    num_lines: int
    num_tokens: int


def make_problems(task: str, count: int, length: int, seed: int, tokenizer: Any, answer_tokens: int = 128) -> list[Needle]:
    """`count` problems whose prompt, chat template and `answer_tokens` take at most `length` tokens, a line less at worst.

    The first n problems are the same for every `count` of at least n. Raises `ValueError` for an unknown task, and where
    not even an empty haystack fits.
    """
    if task not in TASKS:
        raise ValueError(f"task={task!r} is unknown; choose one of {', '.join(TASKS)}")
    budget = length - answer_tokens - _template_tokens(tokenizer)

    problems, num_lines = [], 64
    for number in range(count):
        hidden = TASKS[task](random.Random(f"{task} {seed} {length} {number}"))
        num_lines, num_tokens = fit(lambda n, hidden=hidden: _count(tokenizer, hidden.render(n)), budget, num_lines)
        problems.append(
            Needle(
                prompt=hidden.render(num_lines),
                answers=hidden.answers,
                depths=hidden.depths,
                answer_prefix=hidden.answer_prefix,
                num_lines=num_lines,
                num_tokens=num_tokens + length - answer_tokens - budget,
            )
        )
    return problems


def fit(count: Callable[[int], int], budget: int, guess: int) -> tuple[int, int]:
    """The largest n with `count(n) <= budget`, and that count, for a `count` that grows about linearly.

    Interpolates between what fits and what does not, so that a good guess costs two or three counts. Stops where what is
    left is less than half of what a step takes on average. Raises `ValueError` where `count(0)` exceeds the budget.
    """
    low, at_low = 0, count(0)
    if at_low > budget:
        raise ValueError(
            f"the question alone takes {at_low} tokens where {max(budget, 0)} are left for it: ask for a larger length, or "
            "for fewer answer_tokens"
        )
    base, high, n = at_low, None, max(guess, 1)
    while True:
        at = count(n)
        step = max((at - base) / n, 1e-3)
        if at <= budget:
            low, at_low = n, at
        else:
            high = n
        if (high is not None and high - low <= 1) or budget - at_low < step / 2:
            return low, at_low
        n = low + max(1, int((budget - at_low) / step))
        if high is not None:
            n = min(n, high - 1)


def load_niah_single(**options: Any) -> dict[str, Dataset]:
    """One number in repeated noise; options as `_load`."""
    return _load("niah_single", **options)


def load_niah_multikey(**options: Any) -> dict[str, Dataset]:
    """One number among numbers under other keys; options as `_load`."""
    return _load("niah_multikey", **options)


def load_vt(**options: Any) -> dict[str, Dataset]:
    """The five variables of one chain in repeated noise; options as `_load`."""
    return _load("vt", **options)


def _load(
    task: str,
    lengths: int | Iterable[int] = LENGTHS,
    num_problems: int = 100,
    data_seed: int = 0,
    answer_tokens: int = 128,
    tokenizer: Any = None,
    pretrained: str | None = None,
    model_path: str | None = None,
    **_: Any,
) -> dict[str, Dataset]:
    """`num_problems` of each of the `lengths`; `answer` is a JSON list of what must be named, `max_length` the length.

    The first of `tokenizer` (an object, or a path), `pretrained` and `model_path` that is given sizes the prompts; raise
    `answer_tokens` together with `max_gen_toks` for models that think. Raises `ValueError` where no tokenizer can be had.
    """
    given = next((t for t in (tokenizer, pretrained, model_path) if t is not None), None)
    if given is None:
        raise ValueError(
            f"{task} sizes its prompts by tokens: give tokenizer=<a hub id, a folder, `embedded` or an object>, or the "
            "model's pretrained= or model_path="
        )
    sizer = _load_tokenizer(given) if isinstance(given, str) else given
    return as_split(
        {
            "id": f"{task}-{data_seed}-{length}-{number}",
            "prompt": needle.prompt,
            "answer": json.dumps(needle.answers),
            "answer_prefix": needle.answer_prefix,
            "max_length": length,
            "num_tokens": needle.num_tokens,
            "depths": list(needle.depths),
        }
        for length in ([lengths] if isinstance(lengths, int) else lengths)
        for number, needle in enumerate(make_problems(task, num_problems, length, data_seed, sizer, answer_tokens))
    )


@cache
def _load_tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    from dms_lab.models import resolve_path

    try:
        return AutoTokenizer.from_pretrained(resolve_path(path), model_max_length=10**9)  # counts, never runs
    except OSError as error:
        raise ValueError(f"tokenizer={path} cannot be loaded: {error}") from error


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))


def _template_tokens(tokenizer: Any) -> int:
    """What stands around a user's message in the chat template; the special tokens where there is none."""
    if getattr(tokenizer, "chat_template", None) is None:
        return len(tokenizer.encode("x", add_special_tokens=True)) - _count(tokenizer, "x")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], add_generation_prompt=True, tokenize=False)
    return _count(tokenizer, chat) - _count(tokenizer, "x")


def _niah_single(rng: random.Random) -> Hidden:
    key, value, depth = _keys(rng, 1)[0], str(rng.randrange(10**6, 10**7)), rng.random()
    needle = NEEDLE.format(key=key, value=value)
    return _niah(key, value, depth, lambda n: _with([NOISE] * n, [needle], [depth]))


def _niah_multikey(rng: random.Random) -> Hidden:
    most = len(ADJECTIVES) * len(NOUNS)
    (key, *others), depth = _keys(rng, most), rng.random()
    value, *values = rng.sample(range(10**6, 10**7), most)
    needle = NEEDLE.format(key=key, value=value)

    def haystack(n: int) -> list[str]:
        if n >= most:
            raise ValueError(f"niah_multikey has {most} keys, too few for this length: ask for a smaller one")
        lines = [NEEDLE.format(key=k, value=v) for k, v in zip(others[:n], values, strict=False)]
        return _with(lines, [needle], [depth])

    return _niah(key, str(value), depth, haystack)


def _niah(key: str, value: str, depth: float, haystack: Callable[[int], list[str]]) -> Hidden:
    def render(n: int) -> str:
        return (
            "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
            f"the number afterwards.\n{chr(10).join(haystack(n))}\n"
            f"What is the special magic number for {key} mentioned in the provided text?"
        )

    prefix = f"The special magic number for {key} mentioned in the provided text is"
    return Hidden(render, (value,), (depth,), prefix)


def _variable_tracking(rng: random.Random) -> Hidden:
    names: list[str] = []
    while len(names) < NUM_HOPS + 1:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        if name not in names:
            names.append(name)
    value = rng.randrange(10**4, 10**5)
    depths = sorted(rng.random() for _ in names)
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {name} = VAR {before}" for before, name in itertools.pairwise(names)]

    def render(n: int) -> str:
        return (
            "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
            f"{chr(10).join(_with([NOISE] * n, chain, depths))}\n"
            f"Question: Find all variables that are assigned the value {value} in the text above."
        )

    prefix = (
        f"Answer: According to the chain(s) of variable assignment in the text above, {len(names)} variables are assgined "
        f"the value {value}, they are:"  # "assgined" is RULER's
    )
    return Hidden(render, tuple(names), tuple(depths), prefix)


def _keys(rng: random.Random, count: int) -> list[str]:
    numbers = rng.sample(range(len(ADJECTIVES) * len(NOUNS)), count)
    return [f"{ADJECTIVES[n // len(NOUNS)]}-{NOUNS[n % len(NOUNS)]}" for n in numbers]


def _with(lines: list[str], hidden: list[str], depths: Iterable[float]) -> list[str]:
    """`hidden` among `lines`, each at its depth, in its order."""
    places = [int(depth * (len(lines) + 1)) for depth in depths]
    found, start = [], 0
    for place, line in zip(places, hidden, strict=True):
        found += [*lines[start:place], line]
        start = place
    return found + lines[start:]


TASKS: dict[str, Callable[[random.Random], Hidden]] = {
    "niah_single": _niah_single,
    "niah_multikey": _niah_multikey,
    "vt": _variable_tracking,
}
