"""Batches of the retrofit: a pure function of (seed, step, micro-batch), so a resumed run sees the same.

    RetrofitData.batch(step, micro_batch) -> ids, document, position_ids, is_completion   [B, T]

Micro-batches are numbered over all processes of a run, each of which reads and packs the same rows and takes its own out of
them. The Lightning loader only counts steps; the training step asks for its batch by number.
"""

import hashlib
import random
from itertools import islice

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from dms_lab.config import TrainConfig, num_processes
from dms_lab.tiny import corpus
from dms_lab.tiny.corpus import Document
from dms_lab.training import documents
from dms_lab.training.packing import PackedRows, collate, compact, fit, pack, trim
from dms_lab.training.sources import training_documents


class RetrofitData(L.LightningDataModule):
    """Training rows of `config.data` for one tokenizer. Reads what the run needs at construction, so errors come early.

    `long_documents` says what becomes of a chat or trace beyond the context: `cut` or `split`.
    """

    def __init__(self, config: TrainConfig, tokenizer: PreTrainedTokenizerBase, long_documents: str = "cut") -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self._code: list[str] = []
        self.packed: PackedRows | None = None
        if config.data.kind == "tiny":
            self._code = corpus.standard_library(held_out=False)
            return
        found = islice(fit(training_documents(config, tokenizer), config.context, long_documents), config.data.limit)
        rows = pack(compact(found), config.context, config.steps * config.accumulate * config.batch_size)
        if not rows:
            raise ValueError(f"data={config.data.kind} data.path={config.data.path} holds no document to train on")
        self.packed = PackedRows(rows, config.context, config.batch_size, self._pad, config.seed)

    def batch(self, step: int, micro_batch: int = 0) -> dict[str, Tensor]:
        """A micro-batch of a step, on the CPU. Rows of files are `context` wide, generated ones trimmed."""
        config = self.config
        number = step * config.accumulate + micro_batch
        if self.packed is not None:
            return self.packed.batch(number)
        rng = random.Random(f"{config.seed} {number}")
        rows = [
            [documents.tiny_document(rng, self.tokenizer, config.context, self._code)] for _ in range(config.batch_size)
        ]
        return trim(collate(rows, config.context, self._pad))

    def fingerprint(self) -> str:
        """12 hex digits over everything that batches are made of; equal on every process, or they train on other rows."""
        digest = hashlib.sha256(repr([self._code, len(self.tokenizer), self._pad]).encode())
        for row in self.packed.rows if self.packed is not None else ():
            for document in row:
                digest.update(memoryview(document.ids))
                digest.update(b"%d" % document.num_prompt)
        return digest.hexdigest()[:12]

    def train_dataloader(self) -> DataLoader:
        """Numbers alone: enough micro-steps of one process for the whole run."""
        return DataLoader(
            torch.arange(self.config.steps * self.config.accumulate // num_processes(self.config)), batch_size=None
        )


def check_reachable(rows: list[list[Document]], config: TrainConfig) -> None:
    """Raises `ValueError` if the windows at the ends of these documents alone keep more than `cr` allows."""
    if config.method != "dms" or config.count != "live" or config.cr == 1:
        return
    sizes = [len(document.ids) for row in rows for document in row]
    kept = sum(min(size, config.window) for size in sizes)
    if sum(sizes) <= config.cr * kept:
        raise ValueError(
            f"cr={config.cr:g} cannot be reached on this data: its documents have {sum(sizes) / len(sizes):.0f} tokens on "
            f"average, and window={config.window} alone keeps {kept} of {sum(sizes)}, which is a ratio of "
            f"{sum(sizes) / kept:.2f}; lower cr or window, give longer documents, or count decisions (count=decisions)"
        )
