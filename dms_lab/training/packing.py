"""Several documents in one row, which do not see each other.

[doc 0 ............][doc 1 .....][pad]   ids
 0 0 0 0 0 0 0 0 0   1 1 1 1 1   -1      document
 0 1 2 3 4 5 6 7 8   0 1 2 3 4    0      position_ids
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from dms_lab.tiny.corpus import Document


def pack(documents: Iterable[Document], context: int) -> list[list[Document]]:
    """Rows of documents that fit in `context` tokens together: each goes to the first of the open rows with room.

    Raises `ValueError` for a document that is empty or longer than the context.
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
            rows.append([document])
            room.append(context - size)
        first_open = max(first_open, len(rows) - 16)  # older rows stay as they are: the search stays short
    return rows


def collate(rows: list[list[Document]], context: int, pad_id: int) -> dict[str, Tensor]:
    """Rows as tensors [B, T], T the longest row (at most `context`): ids, document, position_ids, is_completion."""
    length = min(context, max(sum(len(d.ids) for d in row) for row in rows))
    shape = (len(rows), length)
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
            batch["ids"][index, start:stop] = torch.tensor(document.ids)
            batch["document"][index, start:stop] = number
            batch["position_ids"][index, start:stop] = torch.arange(stop - start)
            batch["is_completion"][index, start:stop] = torch.tensor(document.is_completion)
            start = stop
    return batch
