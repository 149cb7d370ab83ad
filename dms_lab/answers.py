"""Prompts read from JSONL, answers written to JSONL, a line a chain, so that a stopped run goes on.

    {"prompt": text} or {"messages": [...]}, {"id": ...} -> token ids -> engine -> {"id", "chain", "text", ..., "run"}

`run` is a hash of everything that decides the tokens: lines of another run are never mixed with this one's.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dms_lab.chains import Generated, Prompt
from dms_lab.checkpoint import METADATA, WEIGHTS
from dms_lab.config import GenerateConfig, ModelConfig

# What may change between a stop and the next start without another token coming out, near-ties apart.
_NOT_HASHED = {"model", "prompt", "prompts", "out", "chains", "places", "num_pages", "page_size", "reserve", "threads"}


def run_hash(config: GenerateConfig, model: ModelConfig) -> str:
    """12 hex digits over what decides the tokens: model, checkpoint, policy, sampling."""
    parts = {key: value for key, value in dataclasses.asdict(config).items() if key not in _NOT_HASHED}
    parts |= {"path": model.path, "dtype": model.dtype}
    if config.deterministic:  # the shapes of the matrices are part of the promise
        parts |= {"places": config.places}
    if config.checkpoint is not None:
        folder = Path(config.checkpoint)
        parts["checkpoint"] = [(folder / METADATA).read_text(), (folder / WEIGHTS).stat().st_size]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def encode(content: str | list[dict], tokenizer: PreTrainedTokenizerBase, chat: bool) -> list[int]:
    """Token ids of a text to continue, or of a conversation (a text is a user's message) by the chat template."""
    if isinstance(content, str) and not chat:
        return tokenizer(content)["input_ids"]
    if tokenizer.chat_template is None:
        raise ValueError("this model's tokenizer has no chat template; add chat=false to continue the text as it is")
    messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase, chat: bool, chains: int) -> list[Prompt]:
    """Every chain of every line of a JSONL file; `ValueError` with file and line for one that cannot be read."""
    if not path.is_file():
        raise ValueError(f"prompts={path} is no file; give a JSONL file with a prompt or messages in each line")
    found: dict[int | str, list[int]] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not a JSON object ({error.msg})") from error
        content = (row.get("prompt") or row.get("messages")) if isinstance(row, dict) else None
        if not isinstance(content, str | list):
            raise ValueError(f'{where} has neither a "prompt" (text) nor "messages" (a list of role and content)')
        name = row.get("id", number)
        if not isinstance(name, int | str) or name in found:
            raise ValueError(f'{where} has "id" {name!r}: an id is a whole number or a text, and no two are the same')
        found[name] = encode(content, tokenizer, chat)
    if not found:
        raise ValueError(f"{path} is empty; give a JSONL file with a prompt or messages in each line")
    return [Prompt(name, ids, chain) for name, ids in found.items() for chain in range(chains)]


class AnswerFile:
    """The answers of one run at `path`. Opened anew, it knows what is done; a line cut off by a stop is taken away.

    Raises `ValueError` if the file holds lines of another run, and leaves it as it is then.
    """

    def __init__(self, path: Path, run: str) -> None:
        self.path, self.run = path, run
        self.done: set[tuple[int | str, int]] = set()
        whole = 0
        for number, line in self._lines():
            try:
                row = json.loads(line)
                key, mine = (row["id"], row["chain"]), row["run"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                if not line.endswith(b"\n"):
                    break
                raise ValueError(f"{path}:{number} is no answer of dms_lab.generate; give another out=") from error
            if mine != run:
                raise ValueError(
                    f"{path} holds answers of run {mine}, this is run {run}: something that decides the tokens differs "
                    "(model, checkpoint, policy, sampling); give another out="
                )
            self.done.add(key)
            whole += len(line)
        if path.is_file() and whole < path.stat().st_size:
            os.truncate(path, whole)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        if self.path.is_file():
            with self.path.open("rb") as file:
                yield from enumerate(file, 1)

    def append(self, found: Generated) -> None:
        """Adds one answer, whole, and waits until the disk has it."""
        row = {"id": found.problem, "chain": found.chain, "run": self.run} | {
            name: value for name, value in dataclasses.asdict(found).items() if name not in ("problem", "chain")
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            file.write(json.dumps(row).encode() + b"\n")
            os.fsync(file.fileno())
