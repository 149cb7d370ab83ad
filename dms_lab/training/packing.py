"""Several documents in one row, which do not see each other.

    [doc 0 ............][doc 1 .....][pad]   ids
     0 0 0 0 0 0 0 0 0   1 1 1 1 1   -1      document
     0 1 2 3 4 5 6 7 8   0 1 2 3 4    0      position_ids

Rows are packed once, in the order of the documents; what changes from epoch to epoch is the order of the rows. So batch
number n is a pure function of (seed, n), and that pair is the whole state.
"""

import random
from array import array
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from dms_lab.tiny.corpus import Document

LONG_DOCUMENTS = ("cut", "split")
NUM_OPEN_ROWS = 16


def fit(documents: Iterable[Document], context: int, long_documents: str = "cut") -> Iterator[Document]:
    """Documents of at most `context` tokens: a longer one loses its end (`cut`) or becomes several (`split`).

    The pieces of a split document do not see each other. Raises `ValueError` for another setting.
    """
    if long_documents not in LONG_DOCUMENTS:
        raise ValueError(f"long_documents={long_documents!r} is not known; choose one of {', '.join(LONG_DOCUMENTS)}")
    for document in documents:
        stop = context if long_documents == "cut" else len(document.ids)
        for start in range(0, min(stop, len(document.ids)), context):
            yield Document(document.ids[start : start + context], max(0, document.num_prompt - start))


def compact(documents: Iterable[Document]) -> Iterator[Document]:
    """The documents with four bytes a token: a reasoning recipe keeps a hundred million of them in memory."""
    return (Document(array("i", document.ids), document.num_prompt) for document in documents)


def pack(documents: Iterable[Document], context: int, num_rows: int | None = None) -> list[list[Document]]:
    """Rows of documents that fit in `context` tokens together: each goes to the first of the open rows with room.

    The newest `NUM_OPEN_ROWS` rows are open. Stops reading where row `num_rows` would begin (None: never). `ValueError`
    for a document that is empty or longer than the context.
    """
    rows: list[list[Document]] = []
    room: list[int] = []
    first_open = 0
    for document in documents:
        size = len(document.ids)
        if not 0 < size <= context:
            raise ValueError(f"a document of {size} tokens cannot be packed into rows of {context}; cut it first")
        for row in range(first_open, len(rows)):
            if room[row] >= size:
                rows[row].append(document)
                room[row] -= size
                break
        else:
            if len(rows) == num_rows:
                break
            rows.append([document])
            room.append(context - size)
        first_open = max(first_open, len(rows) - NUM_OPEN_ROWS)
    return rows


def collate(rows: list[list[Document]], context: int, pad_id: int) -> dict[str, Tensor]:
    """Rows as tensors [B, context]: ids, document (-1 padding), position_ids, is_completion (bool)."""
    shape = (len(rows), context)
    batch = {
        "ids": torch.full(shape, pad_id, dtype=torch.long),
        "document": torch.full(shape, -1, dtype=torch.long),
        "position_ids": torch.zeros(shape, dtype=torch.long),
        "is_completion": torch.zeros(shape, dtype=torch.bool),
    }
    for index, row in enumerate(rows):
        start = 0
        for number, document in enumerate(row):
            stop = start + len(document.ids)
            batch["ids"][index, start:stop] = torch.as_tensor(document.ids)
            batch["document"][index, start:stop] = number
            batch["position_ids"][index, start:stop] = torch.arange(stop - start)
            batch["is_completion"][index, start + document.num_prompt : stop] = True
            start = stop
    return batch


def trim(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch without the columns at its end that are padding in every row."""
    length = int((batch["document"] >= 0).any(0).sum())
    return {key: value[:, :length].contiguous() for key, value in batch.items()}


class PackedRows:
    """An endless stream of batches over packed rows, every row once an epoch, shuffled by seed and epoch."""

    def __init__(self, rows: list[list[Document]], context: int, batch_size: int, pad_id: int, seed: int) -> None:
        if not rows:
            raise ValueError("there is no row to draw batches from; give at least one document")
        self.rows, self.context, self.batch_size, self.pad_id, self.seed = rows, context, batch_size, pad_id, seed
        self._epoch, self._order = -1, list[int]()

    def batch(self, number: int) -> dict[str, Tensor]:
        """Batch `number`, counted from 0 over all epochs."""
        first = number * self.batch_size
        return collate([self._row(i) for i in range(first, first + self.batch_size)], self.context, self.pad_id)

    def _row(self, index: int) -> list[Document]:
        epoch, place = divmod(index, len(self.rows))
        if self._epoch != epoch:
            self._order = list(range(len(self.rows)))
            random.Random(f"{self.seed} epoch {epoch}").shuffle(self._order)
            self._epoch = epoch
        return self.rows[self._order[place]]
