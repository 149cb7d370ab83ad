"""Documents to train on, from generated problems, text files, chats and reasoning traces.

    source -> Document(ids, is_completion)        a Document is never longer than the context

Bad lines of a jsonl file are reported with file and line, counted, and end the run above a limit.
"""

import hashlib
import json
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dms_lab.config import DataConfig
from dms_lab.tiny import corpus, tasks
from dms_lab.tiny.corpus import Document

_log = logging.getLogger(__name__)


def tiny_document(rng: random.Random, tokenizer: PreTrainedTokenizerBase, context: int, code: list[str]) -> Document:
    """A generated problem that fills the context, or, one time in eight, an excerpt of source code."""
    if rng.random() < 0.125:
        return corpus.encode_text(corpus.excerpt(code, rng, 4 * context), tokenizer, context)
    problem = tasks.make_problem(rng.choice(tasks.FAMILIES), rng, context)
    return corpus.encode_problem(problem, tokenizer)


# -- text files ----------------------------------------------------------------------------------------------------------
def text_files(path: str, extensions: tuple[str, ...]) -> list[Path]:
    """The files that a path, folder (searched with its subfolders) or glob names, in order; `ValueError` if none."""
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    if place.is_dir():
        found = [p for p in place.rglob("*") if p.suffix in extensions and p.is_file()]
        what = f"the folder {path} with extensions {', '.join(extensions)}"
    else:
        found = [Path(p) for p in glob(str(place), recursive=True) if Path(p).is_file()]
        what = f"the glob {path}"
    if not found:
        raise ValueError(f"data.path: no file found by {what}; give a file, a folder or a glob, or set data.extensions")
    return sorted(found)


def is_held_out(name: str) -> bool:
    """Whether a file is kept for evaluation: one in ten, by a hash of its name."""
    return hashlib.sha256(name.encode()).digest()[0] % 10 == 0


def split_held_out(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """Training and held-out files; a single file, or a split that leaves one side empty, gives its last file to both."""
    held_out = [f for f in files if is_held_out(f.name)] or files[-1:]
    training = [f for f in files if f not in held_out] or files
    return training, held_out


def text_documents(files: list[Path], tokenizer: PreTrainedTokenizerBase, context: int) -> Iterator[Document]:
    """Every file cut into documents of at most `context` tokens; pieces shorter than 32 tokens are left out."""
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    for file in files:
        ids = tokenizer(file.read_text(encoding="utf-8", errors="replace"), add_special_tokens=False).input_ids
        room = context - len(begin)
        for start in range(0, len(ids), room):
            piece = begin + ids[start : start + room]
            if len(piece) >= 32:
                yield Document(piece, [True] * len(piece))


# -- chats ---------------------------------------------------------------------------------------------------------------
@dataclass
class BadLines:
    """Counts lines that could not be used; `ValueError` with the first of them above `limit`."""

    limit: int
    found: list[str] = field(default_factory=list)

    def report(self, where: str, reason: str) -> None:
        """Notes one line, logs it, and stops the run above the limit."""
        self.found.append(f"{where}: {reason}")
        _log.warning("%s: %s", where, reason)
        if len(self.found) > self.limit:
            first = "; ".join(self.found[:3])
            raise ValueError(f"more than data.max_bad_lines={self.limit} unusable lines, the first: {first}")


def chat_documents(
    files: list[Path], tokenizer: PreTrainedTokenizerBase, context: int, bad: BadLines
) -> Iterator[Document]:
    """One document a line of jsonl files: `messages`, or `prompt` and `completion`, or `text`; cut to the context."""
    for file in files:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    document = _encode_row(json.loads(line), tokenizer)
                except (ValueError, KeyError, TypeError) as error:
                    bad.report(f"{file}:{number}", str(error) or type(error).__name__)
                    continue
                yield Document(document.ids[:context], document.is_completion[:context])


def _encode_row(row: object, tokenizer: PreTrainedTokenizerBase) -> Document:
    if not isinstance(row, dict):
        raise ValueError("a line must be a JSON object")
    if isinstance(row.get("messages"), list) and row["messages"]:
        *history, last = row["messages"]
        if last.get("role") != "assistant" or not history:
            raise ValueError("messages must end with an assistant message that answers something")
        return encode_trace(history, last["content"], tokenizer)
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return encode_trace([{"role": "user", "content": row["prompt"]}], row["completion"], tokenizer)
    if isinstance(row.get("text"), str) and row["text"]:
        ids = tokenizer(row["text"], add_special_tokens=False).input_ids
        return Document(ids, [True] * len(ids))
    raise ValueError("a line needs `messages`, or `prompt` and `completion`, or `text`")


def encode_trace(history: list[dict], trace: str, tokenizer: PreTrainedTokenizerBase) -> Document:
    """Prompt by the chat template, then the raw trace, then the end token.

    Templates of reasoning models rewrite assistant turns (R1's drop what stands before ``</think>``), so a trace never
    goes through one. A template that opens the thought itself must not be followed by a second opening.
    """
    prompt = tokenizer.apply_chat_template(history, add_generation_prompt=True, tokenize=False)
    opening = "<think>"
    if prompt.rstrip().endswith(opening) and trace.lstrip().startswith(opening):
        trace = trace.lstrip()[len(opening) :]
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    trace_ids = tokenizer(trace, add_special_tokens=False).input_ids
    if tokenizer.decode(trace_ids, skip_special_tokens=False) != trace:
        raise ValueError("the tokenizer does not give the trace back; it would train on another text")
    ids = prompt_ids + trace_ids + [tokenizer.eos_token_id]
    return Document(ids, [False] * len(prompt_ids) + [True] * (len(trace_ids) + 1))


# -- OpenR1-Math ---------------------------------------------------------------------------------------------------------
def openr1_documents(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, context: int, evaluated: list[str], bad: BadLines
) -> Iterator[Document]:
    """Correct traces of open-r1/OpenR1-Math-220k (hub id, local folder or jsonl), decontaminated, cut to the context.

    A problem that shares a run of 13 words with a text in `evaluated` is left out.
    """
    from datasets import load_dataset

    path = data.path or "open-r1/OpenR1-Math-220k"
    is_file = Path(path).is_file()
    rows = load_dataset("json", data_files=path, split="train") if is_file else load_dataset(path, split="train")
    seen = {gram for text in evaluated for gram in _word_runs(text)}
    dropped = 0
    for number, row in enumerate(rows):
        if seen & _word_runs(row["problem"]):
            dropped += 1
            continue
        correct = [t for t, right in zip(row["generations"], row["correctness_math_verify"], strict=False) if right]
        for trace in correct[:1]:
            try:
                document = encode_trace([{"role": "user", "content": row["problem"]}], trace, tokenizer)
            except ValueError as error:
                bad.report(f"{path}:{number}", str(error))
                continue
            yield Document(document.ids[:context], document.is_completion[:context])
    if dropped:
        _log.warning("%d problems of %s overlap with an evaluation set and were left out", dropped, path)


def _word_runs(text: str, size: int = 13) -> set[tuple[str, ...]]:
    words = "".join(c.lower() if c.isalnum() else " " for c in text).split()
    return {tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1))} if words else set()
