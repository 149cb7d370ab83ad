"""Prompts read from JSONL, answers written to JSONL, a line a chain, so that a stopped run goes on.

    {"prompt": text} or {"messages": [...]}, {"id": ...} -> token ids -> engine -> {"id", "chain", "text", ..., "run"}

`run` is a hash of everything that decides the tokens: lines of another run are never mixed with this one's.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dms_lab.chains import Generated, Prompt
from dms_lab.checkpoint import file_hashes
from dms_lab.config import ModelConfig
from dms_lab.generation_config import GenerateConfig

# What may change between a stop and the next start without another token coming out, near-ties apart.
_NOT_HASHED = {"model", "prompt", "prompts", "out", "chains", "places", "num_pages", "page_size", "reserve", "threads"}
_NOT_HASHED |= {"attention", "step", "cr", "calibrate"}  # auto and torch are one, auto and eager; others are told below


def run_hash(config: GenerateConfig, model: ModelConfig, calibration: Sequence[Sequence[int]] = ()) -> str:
    """12 hex digits over what decides the tokens beside the prompt: model, checkpoint (its bytes), policy, sampling, and,
    where the checkpoint is dialled to another ratio, that and the documents (rows of token ids) it is reached on."""
    parts = {key: value for key, value in dataclasses.asdict(config).items() if key not in _NOT_HASHED}
    parts |= {"path": model.path, "dtype": model.dtype}
    if config.deterministic:  # the shapes of the matrices are part of the promise
        parts |= {"places": config.places}
    if config.attention not in ("auto", "torch"):
        parts |= {"attention": config.attention}
    if config.cr is not None:
        parts |= {"cr": config.cr, "calibration": [list(ids) for ids in calibration]}
    if config.step == "graph":
        parts |= {"step": config.step}
    if config.checkpoint is not None:
        parts |= file_hashes(Path(config.checkpoint))
    return _digest(parts)


def _digest(parts) -> str:
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
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if not line and number == len(lines):
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not a JSON object ({error.msg})") from error
        name = row.get("id", number) if isinstance(row, dict) else None
        if not isinstance(name, int | str) or name in found:
            raise ValueError(f'{where} has "id" {name!r}: an id is a whole number or a text, and no two are the same')
        found[name] = encode(_content(row, where), tokenizer, chat)
    if not found:
        raise ValueError(f"{path} is empty; give a JSONL file with a prompt or messages in each line")
    return [Prompt(name, ids, chain) for name, ids in found.items() for chain in range(chains)]


def _content(row: dict, where: str) -> str | list[dict]:
    """What a line asks; raises `ValueError` unless it is a text or a conversation."""
    if isinstance(row.get("prompt"), str):
        return row["prompt"]
    messages = row.get("messages")
    if isinstance(messages, list) and messages and all(_is_message(message) for message in messages):
        return messages
    raise ValueError(
        f'{where} has neither a "prompt" (a text) nor "messages" (a list of objects with "role" and "content", both texts)'
    )


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


class AnswerFile:
    """The answers to `prompts` at `path`, a line a chain. Opened anew, it knows which prompts are `left`.

    A line that a stop cut off, and lines of chains that ended in an error, are taken away: they are done again. Raises
    `ValueError` if the file holds lines of another run or to another prompt of the same id, and leaves it as it is then.
    """

    def __init__(self, path: Path, run: str, prompts: Sequence[Prompt]) -> None:
        self.path, self.run = path, run
        self._asked = {prompt.problem: _digest(prompt.ids) for prompt in prompts}
        done, kept = set(), []
        lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                continue
            row = self._parsed(line, f"{path}:{number}")
            if row["finish_reason"] != "error":
                done.add((row["id"], row["chain"]))
                kept.append(line)
        self.left = [prompt for prompt in prompts if (prompt.problem, prompt.chain) not in done]
        if len(kept) < len(lines):
            temporary = path.with_name(path.name + ".tmp")
            temporary.write_bytes(b"".join(kept))
            temporary.replace(path)

    def _parsed(self, line: bytes, where: str) -> dict:
        try:
            row = json.loads(line)
            key, run, asked, _ = row["id"], row["run"], row["prompt_hash"], (row["chain"], row["finish_reason"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{where} is no answer of dms_lab.generate; give another out=") from error
        if run != self.run:
            raise ValueError(
                f"{where} is an answer of run {run}, this is run {self.run}: something that decides the tokens differs "
                "(model, checkpoint, policy, sampling); give another out="
            )
        if asked != self._asked.get(key, asked):
            raise ValueError(f"{where} answers another prompt of the id {key!r} than is asked now; give another out=")
        return row

    def append(self, found: Generated) -> None:
        """Adds one answer, whole, and waits until the disk has it."""
        values = dataclasses.asdict(dataclasses.replace(found, trace=None))
        values = {name: value for name, value in values.items() if name not in ("problem", "chain", "trace")}
        row = {"id": found.problem, "chain": found.chain, "run": self.run, "prompt_hash": self._asked[found.problem]}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab", buffering=0) as file:
            file.write(json.dumps(row | values).encode() + b"\n")
            os.fsync(file.fileno())
