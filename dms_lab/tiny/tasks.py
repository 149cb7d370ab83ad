"""Generated problems of the embedded model: facts far back among distracting text, a chain of thought, a checkable answer.

    document                                   question            thought                       answer
    The old cat sat by a red door. coin Mia 4.  ->  add Mia Ben Zoe  ->  Mia 4 = 4. Ben 7 = 1. ...  ->  4

Every family needs the same skill at each step of its thought: fetch what stands behind a name, hundreds of tokens back.
They differ in what is done with it:

| family    | fact                  | thought                                      | answer               |
|-----------|-----------------------|----------------------------------------------|----------------------|
| `ledger`  | ``coin Mia 4.``       | recall the asked names, keep a running sum   | the sum modulo 10    |
| `road`    | ``road Mia Ben.``     | follow the road from a name until ``end``    | the last name        |
| `program` | ``jump Mia Ben 4.``   | run jumps, add each number, until ``halt``   | the register mod 10  |

`prose` and `code` have neither question nor answer: they are there so that perplexity means something.
Everything here is a pure function of a `random.Random`; two calls with equal generators give equal problems.
"""

import itertools
import random
import re
from dataclasses import dataclass

FAMILIES = ("ledger", "road", "program")

NAMES = tuple(
    "Ada Amy Ann Ari Ava Bea Ben Bob Cal Cleo Dan Dee Don Dot Eli Ella Emma Eva Fay Finn Flo Fred Gil Gus Hal Hana Hope "
    "Ian Ida Ines Ivan Ivy Jack Jan Jill Jim Joe Jon Jude Kai Kate Ken Kim Lars Lea Lena Leo Lia Liz Lou Luke Mae Mark "
    "Max Mei Mia Mila Nat Ned Nina Noah Nora Olaf Ole Omar Otto Pam Pat Paul Pia Ray Rex Rita Rob Rosa Roy Ruth Sam "
    "Sara Seth Sue Tara Ted Theo Tim Tina Tom Una Uma Val Vera Wes Will Yara Zac Zoe".split()
)
ADJECTIVES = tuple("grey red big dark cold warm late soft tall dry wet pale slow loud thin kind new long".split())
NOUNS = tuple(
    "cat dog man hill sea door boat tree lake car road bell barn bird shop king lamp wall farm ship rain moon song "
    "stone garden river bridge letter market winter".split()
)
VERBS = tuple("saw met left held lost made kept found sold drew passed heard painted carried".split())
PLACES = tuple("near by under behind above beside past along".split())
TIMES = tuple("Then Later Soon Once Today Again".split())
KEYWORDS = tuple("coin road jump add from run end halt a the The A and but so it was of to in =".split())

# One piece is one token for every word above: the tokenizer splits with the same expression.
PIECE = re.compile(r" ?[0-9]| ?[A-Za-z]+|\n+| ?[^\sA-Za-z0-9]+|\s+")


@dataclass(frozen=True)
class Problem:
    """One generated problem. `prompt` is what the user says, `thought` the chain a perfect reasoner writes."""

    family: str
    prompt: str
    thought: str
    answer: str


def words() -> list[str]:
    """Every word the generators use, as it stands in text (with its leading space)."""
    pool = NAMES + ADJECTIVES + NOUNS + VERBS + PLACES + TIMES + KEYWORDS
    return [f" {word}" for word in dict.fromkeys(pool)] + [f" {digit}" for digit in range(10)]


def count_pieces(text: str) -> int:
    """Length of generated text in tokens of the embedded tokenizer, without running it."""
    return len(PIECE.findall(text))


def sentence(rng: random.Random) -> str:
    """One sentence of distracting prose; one in eight is about somebody whose name may also stand in a fact."""
    subject = rng.choice(NAMES) if rng.random() < 0.125 else f"the {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
    text = (
        f" {rng.choice(TIMES)} {subject} {rng.choice(VERBS)} a {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
        f" {rng.choice(PLACES)} the {rng.choice(NOUNS)}"
    )
    if rng.random() < 0.3:
        text += f" and {rng.choice(VERBS)} the {rng.choice(NOUNS)}"
    return text + "."


def prose(rng: random.Random, num_tokens: int) -> str:
    """Distracting prose of about `num_tokens` tokens (at most; one sentence short of it at worst)."""
    parts: list[str] = []
    budget = num_tokens
    while budget > 0:
        parts.append(sentence(rng))
        budget -= count_pieces(parts[-1])
    return "".join(parts[:-1] if budget < 0 else parts)


def make_problem(family: str, rng: random.Random, num_tokens: int = 512, num_steps: int | None = None) -> Problem:
    """A problem whose prompt, thought and answer together take at most `num_tokens` tokens, and nearly that many.

    `num_steps` is the number of facts the thought must fetch; drawn from 3 to 8 (fewer in short problems) if not given.
    Raises `ValueError` for an unknown family or for a length below 48 tokens.
    """
    if family not in _BUILDERS:
        raise ValueError(f"unknown task family {family!r}; choose one of {', '.join(_BUILDERS)}")
    if num_tokens < 48:
        raise ValueError(f"num_tokens={num_tokens} is too short for a problem; use at least 48")
    longest = max(2, min(8, (num_tokens - 32) // 14))
    steps = num_steps if num_steps is not None else rng.randint(min(3, longest), longest)
    density = rng.uniform(0.6, 1.3)
    num_facts = max(steps + 2, min(round(num_tokens / 26 * density), len(NAMES) - 8))
    facts, question, thought, answer = _BUILDERS[family](rng, steps, num_facts)
    fixed = count_pieces("".join(facts) + question + thought + answer) + 12  # 12: the chat template
    while fixed > num_tokens and len(facts) > steps + 1:  # drop facts that nobody asks for, from the end of the list
        fixed -= count_pieces(facts.pop())
    filler = [sentence(rng) for _ in range(max(0, num_tokens - fixed) // 11 + 1)]
    room = num_tokens - fixed
    kept: list[str] = []
    for line in filler:
        if (size := count_pieces(line)) <= room:
            kept.append(line)
            room -= size
    lines = facts + kept
    rng.shuffle(lines)
    return Problem(family, "".join(lines) + question, thought, answer)


def _ledger(rng: random.Random, steps: int, num_facts: int) -> tuple[list[str], str, str, str]:
    names = rng.sample(NAMES, num_facts)
    values = {name: rng.randrange(10) for name in names}
    asked, total, chain = names[:steps], 0, []
    for name in asked:
        total = (total + values[name]) % 10
        chain.append(f" {name} {values[name]} = {total}.")
    facts = [f" coin {name} {value}." for name, value in values.items()]
    return facts, "\n add " + " ".join(asked), "".join(chain), f" {total}"


def _road(rng: random.Random, steps: int, num_facts: int) -> tuple[list[str], str, str, str]:
    names = rng.sample(NAMES, num_facts)
    path = names[:steps]
    facts = [f" road {a} {b}." for a, b in itertools.pairwise(path)] + [f" road {path[-1]} end."]
    facts += [f" road {name} {rng.choice(('end', *others))}." for name, others in _side_paths(names[steps:])]
    return facts, f"\n from {path[0]}", " " + " ".join(path) + " end.", f" {path[-1]}"


def _program(rng: random.Random, steps: int, num_facts: int) -> tuple[list[str], str, str, str]:
    names = rng.sample(NAMES, num_facts)
    path, total, chain = names[:steps], 0, []
    facts = []
    for a, b in itertools.pairwise(path):
        value = rng.randrange(10)
        total = (total + value) % 10
        facts.append(f" jump {a} {b} {value}.")
        chain.append(f" {a} {b} {value} = {total}.")
    facts.append(f" jump {path[-1]} halt.")
    chain.append(f" {path[-1]} halt.")
    for name, others in _side_paths(names[steps:]):
        facts.append(f" jump {name} {others[0]} {rng.randrange(10)}." if others else f" jump {name} halt.")
    return facts, f"\n run {path[0]}", "".join(chain), f" {total}"


def _side_paths(names: list[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Names that are not on the asked path, each with the name it leads to (none for the last)."""
    return [(name, tuple(names[i + 1 : i + 2])) for i, name in enumerate(names)]


_BUILDERS = {"ledger": _ledger, "road": _road, "program": _program}


def copying(rng: random.Random, num_tokens: int) -> str:
    """Warm-up text: shuffled pairs of names and values, said twice in different orders. Teaches to look up."""
    size = max(2, min(num_tokens // 8, len(NAMES)))
    names = rng.sample(NAMES, size)
    pairs = [f" {name} {rng.randrange(10) if rng.random() < 0.5 else rng.choice(NAMES)}." for name in names]
    again = rng.sample(pairs, len(pairs))
    return "".join(pairs + again)
