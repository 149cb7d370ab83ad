"""Documents to train on, from generated problems, text files, chats and reasoning traces.

    source -> Document(ids, num_prompt) -> packing.fit -> packing.pack

Text comes in pieces of at most the context; chats and traces in full length. Bad lines of a jsonl file are reported
with file and line, counted, and end the run above a limit.
"""

import hashlib
import json
import logging
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dms_lab.tiny import corpus, tasks
from dms_lab.tiny.corpus import Document

_log = logging.getLogger(__name__)
THINK = "<think>"
OPENR1_MATH = "open-r1/OpenR1-Math-220k"


def tiny_document(rng: random.Random, tokenizer: PreTrainedTokenizerBase, context: int, code: list[str]) -> Document:
    """A generated problem that fills the context, or, one time in sixteen, an excerpt of source code."""
    if rng.random() < 0.0625:
        return corpus.encode_text(corpus.excerpt(code, rng, 4 * context), tokenizer, context)
    length = context
    while True:  # many steps in a short context, or a tokenizer that needs more tokens than the embedded one
        problem = tasks.make_problem(rng.choice(tasks.FAMILIES), rng, length)
        document = corpus.encode_problem(problem, tokenizer)
        if len(document.ids) <= context:
            return document
        length = int(0.9 * length)


# -- text files -----------------------------------------------------------------------------------------------------
def is_held_out(name: str) -> bool:
    """Whether something of that name (a relative path, a problem's text) is kept for evaluation: one in ten, by a hash."""
    return hashlib.sha256(name.encode()).digest()[0] % 10 == 0


def split_held_out(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """Training and held-out files, which never overlap; the last file is held out where the hash chooses none or all.

    Paths are hashed relative to the deepest folder they share. A single file gives no held-out file.
    """
    if len(files) < 2:
        return files, []
    root = os.path.commonpath([f.parent for f in files])
    held_out = [f for f in files if is_held_out(Path(os.path.relpath(f, root)).as_posix())]
    if not 0 < len(held_out) < len(files):
        held_out = files[-1:]
    chosen = set(held_out)
    return [f for f in files if f not in chosen], held_out


def text_documents(files: list[Path], tokenizer: PreTrainedTokenizerBase, context: int) -> Iterator[Document]:
    """Every file cut into documents of at most `context` tokens; pieces shorter than 32 tokens are left out.

    A file that is not UTF-8 is left out with a warning.
    """
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            _log.warning("%s is not UTF-8 (byte %d) and was left out", file, error.start)
            continue
        ids = tokenizer(text, add_special_tokens=False).input_ids
        room = context - len(begin)
        for start in range(0, len(ids), room):
            piece = begin + ids[start : start + room]
            if len(piece) >= 32:
                yield Document(piece)


# -- chats ----------------------------------------------------------------------------------------------------------
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


@dataclass(frozen=True)
class Line:
    """A line of a jsonl file: its number, from 1, and where it begins."""

    file: Path
    number: int
    offset: int


def split_lines(files: list[Path]) -> tuple[list[Line], list[Line]]:
    """Lines to train on and held-out ones, without empty lines: one in ten by a hash of its text, so equal lines stay
    together; the last line where the hash chooses none or all. A single line gives no held-out one."""
    training: list[Line] = []
    held_out: list[Line] = []
    for file in files:
        with file.open("rb") as lines:  # bytes: a line that is not UTF-8 must cost that line alone
            offset = 0
            for number, text in enumerate(lines, 1):
                if text.strip():
                    chosen = held_out if is_held_out(text.strip().hex()) else training
                    chosen.append(Line(file, number, offset))
                offset += len(text)
    if len(training) + len(held_out) > 1 and not (training and held_out):
        both = training + held_out
        return both[:-1], both[-1:]
    return (training, held_out) if training else (held_out, [])


def chat_documents(lines: Sequence[Line], tokenizer: PreTrainedTokenizerBase, bad: BadLines) -> Iterator[Document]:
    """One document a line: `messages`, or `prompt` and `completion`, or `text` (which gets the begin token, if any)."""
    for line in lines:
        with line.file.open("rb") as file:
            file.seek(line.offset)
            text = file.readline()
        try:
            yield _encode_row(json.loads(text.decode("utf-8")), tokenizer)
        except (ValueError, TemplateError) as error:
            bad.report(f"{line.file}:{line.number}", str(error) or type(error).__name__)


def _encode_row(row: object, tokenizer: PreTrainedTokenizerBase) -> Document:
    if not isinstance(row, dict):
        raise ValueError("a line must be a JSON object")
    if isinstance(row.get("messages"), list) and row["messages"]:
        if not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in row["messages"]):
            raise ValueError("every message must be an object with `role` and a text as `content`")
        *history, last = row["messages"]
        if last.get("role") != "assistant" or not history:
            raise ValueError("messages must end with an assistant message that answers something")
        return encode_trace(history, last["content"], tokenizer)
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return encode_trace([{"role": "user", "content": row["prompt"]}], row["completion"], tokenizer)
    if isinstance(row.get("text"), str) and row["text"]:
        begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        return Document(begin + tokenizer(row["text"], add_special_tokens=False).input_ids)
    raise ValueError("a line needs `messages`, or `prompt` and `completion`, or `text`")


def encode_trace(history: list[dict], trace: str, tokenizer: PreTrainedTokenizerBase) -> Document:
    """Prompt by the chat template, then the raw trace, then the end token.

    Templates of reasoning models rewrite assistant turns (R1's drop what stands before ``</think>``), so a trace never
    goes through one. A template that opens the thought itself must not be followed by a second opening.
    """
    prompt = tokenizer.apply_chat_template(history, add_generation_prompt=True, tokenize=False)
    if prompt.rstrip().endswith(THINK) and trace.lstrip().startswith(THINK):
        trace = trace.lstrip()[len(THINK) :]
        if prompt.endswith("\n"):
            trace = trace.removeprefix("\n")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end token, so a trace cannot be ended; set tokenizer.eos_token")
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    trace_ids = tokenizer(trace, add_special_tokens=False).input_ids
    ids = prompt_ids + trace_ids + [tokenizer.eos_token_id]
    document = Document(ids, len(prompt_ids))
    check_round_trip(document, prompt, trace, tokenizer)
    return document


def check_round_trip(document: Document, prompt: str, trace: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `ValueError` unless the decoded document is the prompt, then the trace verbatim, then the end token.

    Also if the trace is empty (the prompt must be a strict prefix) or opens a thought that the prompt has opened.
    """
    if not trace.strip():
        raise ValueError("the completion is empty, so there is nothing to learn from")
    text = tokenizer.decode(document.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if not text.startswith(prompt):
        raise ValueError("the tokenizer does not give the prompt back; it would train on another prompt")
    if text[len(prompt) :] != trace + tokenizer.eos_token:
        raise ValueError("the tokenizer does not give the trace back; it would train on another text")
    if prompt.rstrip().endswith(THINK) and trace.lstrip().startswith(THINK):
        raise ValueError("the chat template opens a thought and the trace opens it again; drop one of them")


# -- OpenR1-Math ----------------------------------------------------------------------------------------------------
def openr1_documents(
    path: str | None,
    tokenizer: PreTrainedTokenizerBase,
    evaluated: Sequence[str],
    bad: BadLines,
    held_out: bool = False,
    seed: int = 0,
) -> Iterator[Document]:
    """Every correct trace (`correctness_math_verify`) of open-r1/OpenR1-Math-220k, decontaminated, in an order of `seed`.

    `path` is a hub id, a local folder or a jsonl file of that schema. One problem in ten is held out: `held_out` selects
    those or all others. A problem that shares a run of 13 words with a text in `evaluated` is left out; how many of those
    read were is logged. `ValueError` if the data cannot be had.
    """
    path = path or OPENR1_MATH
    evaluation_runs = {run for text in evaluated for run in word_runs(text)}
    removed = read = 0
    try:
        for number, row in enumerate(_openr1_rows(path).shuffle(seed=seed)):
            if is_held_out(row["problem"]) is not held_out:
                continue
            read += 1
            if evaluation_runs & word_runs(row["problem"]):
                removed += 1
                continue
            history = [{"role": "user", "content": row["problem"]}]
            for trace, correct in zip(row["generations"], row["correctness_math_verify"] or [], strict=False):
                if not correct:
                    continue
                try:
                    yield encode_trace(history, trace, tokenizer)
                except (ValueError, TemplateError) as error:
                    bad.report(f"{path}: row {number} of order {seed}", str(error))
    finally:  # also where the reader has had enough
        level = logging.WARNING if removed else logging.INFO
        what = "%s: %d of %d problems overlap with an evaluation set and were left out"
        _log.log(level, what, path, removed, read)


def _openr1_rows(path: str):
    try:
        return load_rows(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"data.path={path} cannot be loaded ({error}); download it where there is a network with "
            f"`hf download --repo-type dataset {OPENR1_MATH}`, or give a local folder or jsonl file of its schema"
        ) from error


def load_rows(path: str, name: str | None = None):
    """All rows of a jsonl file, a local folder or a data set of the hub (`name` is its configuration), splits joined."""
    from datasets import concatenate_datasets, load_dataset

    if Path(path).is_file():
        return load_dataset("json", data_files=path, split="train")
    return concatenate_datasets(list(load_dataset(path, name).values()))


# -- decontamination ------------------------------------------------------------------------------------------------
def evaluation_texts(sets: Sequence[str]) -> list[str]:
    """The problems of evaluation sets, each named as `<hub id, folder or jsonl file>[@configuration]:<column>`.

    Raises `ValueError` for a set that cannot be read: training on what is evaluated must not happen by accident.
    """
    texts: list[str] = []
    for entry in sets:
        place, _, column = entry.rpartition(":")
        path, _, name = place.partition("@")
        if not path or not column:
            raise ValueError(
                f"data.decontaminate holds {entry!r}; name a set as <hub id, folder or jsonl file>[@configuration]:<column>"
            )
        try:
            texts += load_rows(path, name or None)[column]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"data.decontaminate: {entry} cannot be read ({error}), so problems of it could be trained on; download it "
                f"with `hf download --repo-type dataset {path}` (a gated set needs `hf auth login`), give a jsonl file, or "
                "leave it out of data.decontaminate and do not evaluate on it"
            ) from error
    return texts


def word_runs(text: str, size: int = 13) -> set[tuple[str, ...]]:
    """Runs of `size` words, lower case and without punctuation; the whole text as one run where it is shorter."""
    words = "".join(c.lower() if c.isalnum() else " " for c in text).split()
    return {tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1))} if words else set()
