"""Batches of the retrofit: a pure function of (seed, step, micro-batch, rank), so a resumed run sees the same.

    RetrofitData.batch(step, micro_batch, rank) -> ids, document, position_ids, is_completion   [B, T]

The Lightning loader only counts steps; the training step asks for its batch by number.
"""

import logging
import random
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from dms_lab.config import TrainConfig
from dms_lab.tiny import corpus
from dms_lab.tiny.corpus import Document
from dms_lab.training import documents
from dms_lab.training.packing import PackedRows, collate, fit, pack, trim

_log = logging.getLogger(__name__)


class RetrofitData(L.LightningDataModule):
    """Training rows of `config.data` for one tokenizer. Reads all files at construction, so errors come early.

    `evaluated` holds the texts of evaluation problems, which OpenR1-Math is cleared of. `long_documents` says what
    becomes of a chat or trace beyond the context: `cut` or `split`.
    """

    def __init__(
        self,
        config: TrainConfig,
        tokenizer: PreTrainedTokenizerBase,
        evaluated: Sequence[str] = (),
        long_documents: str = "cut",
    ) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.held_out: list[Document] = []
        self.bad = documents.BadLines(config.data.max_bad_lines)
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self._code: list[str] = []
        self.packed: PackedRows | None = None
        if config.data.kind == "tiny":
            self._code = corpus.standard_library(held_out=False)
            return
        found = list(islice(fit(self._read(evaluated), config.context, long_documents), config.data.limit))
        if not found:
            raise ValueError(f"data={config.data.kind} data.path={config.data.path} holds no document to train on")
        rows = pack(found, config.context)
        self.packed = PackedRows(rows, config.context, config.batch_size, self._pad, config.seed)

    def _read(self, evaluated: Sequence[str]) -> Iterable[Document]:
        data, tokenizer, context = self.config.data, self.tokenizer, self.config.context
        if data.kind == "openr1_math":
            return documents.openr1_documents(data.path, tokenizer, evaluated, self.bad)
        if data.kind == "jsonl":
            found = list(documents.chat_documents(documents.text_files(data.path, (".jsonl",)), tokenizer, self.bad))
            return self._hold_out_last(found, context)
        training, held_out = documents.split_held_out(documents.text_files(data.path, data.extensions))
        if not held_out:
            return self._hold_out_last(list(documents.text_documents(training, tokenizer, context)), context)
        self.held_out = list(documents.text_documents(held_out, tokenizer, context))
        return documents.text_documents(training, tokenizer, context)

    def _hold_out_last(self, found: list[Document], context: int) -> list[Document]:
        """All but the last twentieth (at least one document), which is held out; a lone document serves both, aloud."""
        if len(found) == 1:
            _log.warning("%s holds one document alone: held-out figures are of text trained on", self.config.data.path)
            self.held_out = list(fit(found, context))
            return found
        num_held_out = max(1, len(found) // 20)
        self.held_out = list(fit(found[-num_held_out:], context))
        return found[:-num_held_out]

    def batch(self, step: int, micro_batch: int = 0, rank: int = 0, world_size: int = 1) -> dict[str, Tensor]:
        """The batch of a micro-step on a rank, on the CPU. Rows of files are `context` wide, generated ones trimmed."""
        config = self.config
        number = (step * config.accumulate + micro_batch) * world_size + rank
        if self.packed is not None:
            return self.packed.batch(number)
        rng = random.Random(f"{config.seed} {number}")
        rows = [
            [documents.tiny_document(rng, self.tokenizer, config.context, self._code)] for _ in range(config.batch_size)
        ]
        return trim(collate(rows, config.context, self._pad))

    def train_dataloader(self) -> DataLoader:
        """Numbers alone: enough micro-steps for the whole run."""
        return DataLoader(torch.arange(self.config.steps * self.config.accumulate), batch_size=None)


def held_out_documents(config: TrainConfig, data: RetrofitData, num_tokens: int) -> list[Document]:
    """Held-out plain text of about `num_tokens` tokens in documents of the context's length."""
    found = data.held_out
    if config.data.kind == "tiny":
        files = [Path(p) for p in corpus.standard_library_files(held_out=True)]
        found = list(documents.text_documents(files, data.tokenizer, config.context))
    total, kept = 0, []
    for document in found:
        if total >= num_tokens:
            break
        kept.append(document)
        total += len(document.ids)
    return kept
