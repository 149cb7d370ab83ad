"""Documents to train on and documents held out, of each kind of data: no text is in both.

config.data -> files, lines or problems, one in ten held out -> documents of at most the context's length
"""

import logging
import random
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase

from dms_lab.config import TrainConfig
from dms_lab.tiny import corpus
from dms_lab.tiny.corpus import Document
from dms_lab.training import documents
from dms_lab.training.packing import fit
from dms_lab.training.text_files import text_files

_log = logging.getLogger(__name__)


def training_documents(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Iterable[Document]:
    """Documents to train on, read as they are asked for; files, lines and problems in an order drawn from the seed."""
    data, bad = config.data, documents.BadLines(config.data.max_bad_lines)
    if data.kind == "openr1_math":
        evaluated = documents.evaluation_texts(data.decontaminate)
        return documents.openr1_documents(data.path, tokenizer, evaluated, bad, seed=config.seed)
    if data.kind == "jsonl":
        return _chats(config, tokenizer, bad, held_out=False)
    training, held_out = documents.split_held_out(text_files(data.path, data.extensions))
    if not held_out:
        return _split_last(list(documents.text_documents(training, tokenizer, config.context)), data.path)[0]
    random.Random(f"{config.seed} files").shuffle(training)
    return documents.text_documents(training, tokenizer, config.context)


def held_out_documents(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> list[Document]:
    """Held-out text of about `num_tokens` tokens in documents of at most the context's length; `ValueError` if none."""
    kept: list[Document] = []
    for document in fit(_held_out(config, tokenizer), config.context):
        if sum(len(d.ids) for d in kept) >= num_tokens:
            break
        kept.append(document)
    if not kept:
        raise ValueError(
            f"data={config.data.kind} data.path={config.data.path} holds out no document to evaluate on (one file, line or "
            "problem in ten is, and texts below 32 tokens are left out); give more data, or eval_after=false"
        )
    return kept


def _held_out(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> Iterable[Document]:
    """Documents that `training_documents` never gives (of a lone document: the same one, which it says aloud)."""
    data, bad = config.data, documents.BadLines(config.data.max_bad_lines)
    if data.kind == "tiny":
        return documents.text_documents(corpus.standard_library_files(held_out=True), tokenizer, config.context)
    if data.kind == "openr1_math":
        return documents.openr1_documents(data.path, tokenizer, [], bad, held_out=True)
    if data.kind == "jsonl":
        return _chats(config, tokenizer, bad, held_out=True)
    training, held_out = documents.split_held_out(text_files(data.path, data.extensions))
    if not held_out:
        return _split_last(list(documents.text_documents(training, tokenizer, config.context)), data.path)[1]
    random.Random("held-out files").shuffle(held_out)
    return documents.text_documents(held_out, tokenizer, config.context)


def _chats(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, bad: documents.BadLines, held_out: bool
) -> Iterable[Document]:
    training, kept = documents.split_lines(text_files(config.data.path, (".jsonl",)))
    if held_out and not kept:
        _log.warning("%s holds one line alone: held-out figures are of text trained on", config.data.path)
        kept = training
    chosen = kept if held_out else training
    random.Random(f"{config.seed} lines" if not held_out else "held-out lines").shuffle(chosen)
    return documents.chat_documents(chosen, tokenizer, bad)


def _split_last(found: list[Document], place: str) -> tuple[list[Document], list[Document]]:
    """All but the last twentieth (at least one document), and that; a lone document is both."""
    if len(found) == 1:
        _log.warning("%s holds one document alone: held-out figures are of text trained on", place)
        return found, found
    num_held_out = max(1, len(found) // 20)
    return found[:-num_held_out], found[-num_held_out:]
