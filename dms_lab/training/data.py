"""Batches of the retrofit: a pure function of (seed, step, micro-batch, rank), so a resumed run sees what it would have.

    RetrofitData.batch(step, micro_batch, rank) -> ids, document, position_ids, is_completion   [B, T]

The Lightning loader only counts steps; the training step asks for its batch by number.
"""

import random
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
from dms_lab.training.packing import collate, pack


class RetrofitData(L.LightningDataModule):
    """Training rows of `config.data` for one tokenizer. Reads all files at construction, so errors come early."""

    def __init__(self, config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.held_out: list[Document] = []
        self.rows: list[list[Document]] = []
        self._code: list[str] = []
        if config.data.kind == "tiny":
            self._code = corpus.standard_library(held_out=False)
        else:
            found = list(self._read())
            if not found:
                raise ValueError(f"data={config.data.kind} data.path={config.data.path} holds no document to train on")
            self.rows = pack(found[: config.data.limit], config.context)

    def _read(self):
        data, tokenizer, context = self.config.data, self.tokenizer, self.config.context
        bad = documents.BadLines(data.max_bad_lines)
        if data.kind == "text":
            training, held_out = documents.split_held_out(documents.text_files(data.path, data.extensions))
            self.held_out = list(documents.text_documents(held_out, tokenizer, context))
            return documents.text_documents(training, tokenizer, context)
        if data.kind == "jsonl":
            files = documents.text_files(data.path, (".jsonl",))
            found = list(documents.chat_documents(files, tokenizer, context, bad))
            self.held_out = found[::20] if len(found) > 1 else found
            return [d for i, d in enumerate(found) if i % 20] or found
        return documents.openr1_documents(data, tokenizer, context, [], bad)

    def batch(self, step: int, micro_batch: int = 0, rank: int = 0, world_size: int = 1) -> dict[str, Tensor]:
        """The batch of a micro-step on a rank, on the CPU."""
        size, config = self.config.batch_size, self.config
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        number = (step * config.accumulate + micro_batch) * world_size + rank
        if config.data.kind == "tiny":
            rng = random.Random(f"{config.seed} {number}")
            rows = [[documents.tiny_document(rng, self.tokenizer, config.context, self._code)] for _ in range(size)]
        else:
            rows = [self.rows[i] for i in self._epoch_rows(number * size, size)]
        return collate(rows, config.context, pad)

    def _epoch_rows(self, first: int, count: int) -> list[int]:
        """Row numbers `first .. first + count` of an endless stream of epochs, each shuffled by seed and epoch."""
        total = len(self.rows)
        chosen = []
        for index in range(first, first + count):
            epoch, place = divmod(index, total)
            if getattr(self, "_order_epoch", None) != epoch:
                order = list(range(total))
                random.Random(f"{self.config.seed} epoch {epoch}").shuffle(order)
                self._order, self._order_epoch = order, epoch
            chosen.append(self._order[place])
        return chosen

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
