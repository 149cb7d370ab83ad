"""A checkpoint at other ratios than it was trained for: `evaluate checkpoint=<run or checkpoint> cr=3,6`.

calibration text -> calibration.dial -> the same comparison as a run's own evaluation, method `dms_dialled`
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dms_lab import models
from dms_lab.config import DataConfig, TrainConfig
from dms_lab.evaluation.report import method_name, record, subject_of
from dms_lab.evaluation.suite import Job, checkpoints_of, measured
from dms_lab.tiny import corpus
from dms_lab.tiny.corpus import Document
from dms_lab.training import documents
from dms_lab.training.packing import fit
from dms_lab.training.sources import held_out_documents
from dms_lab.training.text_files import text_files

CALIBRATION_TOKENS = 16384


def dialled_jobs(
    place: Path, ratios: Sequence[float], config: TrainConfig | None, text: str | None, tokenizer: PreTrainedTokenizerBase
) -> list[Job]:
    """A job for each ratio, of the checkpoint at `place`, or of the member with the highest CR of the run there.

    Dialling down loses nothing that was learned, dialling far up does (`experiments/dial`), hence the highest. `text` is a
    file, folder or glob of the user's own (`.jsonl`: chats); None: what the run in `config` was trained on, held out.
    """
    method = "dms" if config is None else method_name(config)
    if method == "streaming_llm_tuned":
        raise ValueError(f"{place} has a fixed window, which makes no decisions whose threshold cr= could move")
    _, checkpoint = max(checkpoints_of(place, method).items())
    rows = tuple(tuple(ids) for ids in calibration_rows(config, text, tokenizer))
    return [Job(f"{method}_dialled", cr, checkpoint=checkpoint, calibration=rows) for cr in ratios]


def calibration_rows(config: TrainConfig | None, text: str | None, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """About `CALIBRATION_TOKENS` tokens of documents of at most the run's context (4,096 tokens where there is no run)."""
    if text is not None:
        found = fit(_own_documents(text, tokenizer), config.context if config else 4096)
    elif config is None:
        raise ValueError("this checkpoint lies in no run that names its data; give calibrate=<file or folder of your text>")
    elif config.data.kind == "tiny":
        rng, code = random.Random("calibration"), corpus.standard_library(held_out=False)
        found = (documents.tiny_document(rng, tokenizer, config.context, code) for _ in itertools.count())
    else:
        found = held_out_documents(config, tokenizer, CALIBRATION_TOKENS)
    rows: list[list[int]] = []
    for document in found:
        rows.append(list(document.ids))
        if sum(map(len, rows)) >= CALIBRATION_TOKENS:
            break
    if not rows:
        raise ValueError(f"calibrate={text} holds no document of 32 tokens or more; give more of the text to compress")
    return rows


def _own_documents(text: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    """The user's documents: chats of `.jsonl` files, else text files in pieces."""
    if text.endswith(".jsonl"):
        lines, held_out = documents.split_lines(text_files(text, (".jsonl",)))
        return documents.chat_documents([*lines, *held_out], tokenizer, documents.BadLines(20))
    files = text_files(text, DataConfig("text").extensions)
    return documents.text_documents(files, tokenizer, CALIBRATION_TOKENS)


def evaluate_dialled(config: TrainConfig, folder: Path, place: Path, ratios: Sequence[float], text: str | None) -> None:
    """A run's own evaluation of its checkpoint at other ratios; appends to `results.jsonl`, prints the table."""
    jobs = dialled_jobs(place, ratios, config, text, models.load_tokenizer(config.model))
    subject = subject_of(config, folder, {})
    record((found for _, (found, _) in measured(subject, jobs)), folder, tracking=config.tracking)
