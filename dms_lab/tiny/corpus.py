"""Token sequences from the generated tasks and from source code, for pretraining and retrofit alike.

    Problem --chat template--> <|im_start|>user ... <think> thought </think> answer <|im_end|>
    code    ------------------> <|begin|> text

A `Document` knows where what the assistant writes begins (thought, answer, end of turn).
"""

import hashlib
import random
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dms_lab.tiny import tasks
from dms_lab.tiny.tokenizer import BEGIN, END, END_THINK


@dataclass(frozen=True)
class Document:
    """`ids` of `num_prompt` tokens of prompt, then of what the assistant says (of plain text: all)."""

    ids: Sequence[int]
    num_prompt: int = 0

    @property
    def is_completion(self) -> list[bool]:
        """One entry a token, True where the assistant speaks."""
        return [index >= self.num_prompt for index in range(len(self.ids))]


def encode_prompt(problem: tasks.Problem, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The chat prompt of a problem as token ids, ending in an open thought."""
    message = [{"role": "user", "content": problem.prompt}]
    text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False).input_ids


def encode_problem(problem: tasks.Problem, tokenizer: PreTrainedTokenizerBase) -> Document:
    """The solved problem as one document."""
    prompt = encode_prompt(problem, tokenizer)
    completion = f"{problem.thought}{END_THINK}{problem.answer}{END}"
    completion_ids = tokenizer(completion, add_special_tokens=False).input_ids
    return Document(prompt + completion_ids, len(prompt))


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> Document:
    """Plain text after a begin token, cut to `num_tokens`; all of it counts as completion."""
    ids = tokenizer(BEGIN + text, add_special_tokens=False).input_ids[:num_tokens]
    return Document(ids)


def standard_library_files(held_out: bool) -> list[Path]:
    """Top-level modules of the running Python's standard library, in order of name.

    One module in ten, chosen by a hash of its name, is held out: `held_out` selects those or all others.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [
        path
        for path in sorted(folder.glob("*.py"))
        if (hashlib.sha256(path.name.encode()).digest()[0] % 10 == 0) is held_out
    ]


def standard_library(held_out: bool) -> list[str]:
    """The sources of `standard_library_files`."""
    return [path.read_text(encoding="utf-8", errors="replace") for path in standard_library_files(held_out)]


def excerpt(sources: list[str], rng: random.Random, num_characters: int) -> str:
    """A piece of one source, from the start of a line."""
    text = rng.choice(sources)
    start = rng.randrange(max(1, len(text) - num_characters))
    start = text.rfind("\n", 0, start) + 1
    return text[start : start + num_characters]
