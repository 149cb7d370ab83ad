"""Packing loses nothing, mixes nothing, and is decided by its seed and a count."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dms_lab.tiny.corpus import Document
from dms_lab.training.packing import PackedRows, collate, compact, fit, pack, trim

PAD = 0


@st.composite
def packings(draw):
    """Documents with token ids of their own (from 1, so that none is padding), and a context."""
    context = draw(st.integers(4, 24))
    found, first = [], 1
    for size in draw(st.lists(st.integers(1, 60), min_size=1, max_size=40)):
        learned = draw(st.integers(0, size))
        found.append(Document(list(range(first, first + size)), size - learned))
        first += size
    return found, context


def batch_of(found, context, long_documents="split"):
    return collate(pack(fit(found, context, long_documents), context), context, PAD)


@settings(deadline=None, max_examples=60)
@given(packings())
def test_no_token_is_lost_or_doubled_and_each_keeps_its_mask(packing):
    found, context = packing
    batch = batch_of(found, context)
    real = batch["document"] >= 0
    packed = sorted(zip(batch["ids"][real].tolist(), batch["is_completion"][real].tolist(), strict=True))
    assert packed == [pair for d in found for pair in zip(d.ids, d.is_completion, strict=True)]
    assert (batch["ids"][~real] == PAD).all()
    assert not batch["is_completion"][~real].any()


@settings(deadline=None, max_examples=60)
@given(packings())
def test_cutting_keeps_exactly_the_start_of_every_document(packing):
    found, context = packing
    batch = batch_of(found, context, "cut")
    assert sorted(batch["ids"][batch["document"] >= 0].tolist()) == [i for d in found for i in d.ids[:context]]


@settings(deadline=None, max_examples=60)
@given(packings())
def test_rows_are_context_wide_and_documents_never_share_an_id_within_a_row(packing):
    found, context = packing
    pieces = {tuple(d.ids) for d in fit(found, context, "split")}
    batch = batch_of(found, context)
    assert batch["ids"].shape[1] == context
    for ids, document in zip(batch["ids"], batch["document"], strict=True):
        for number in range(int(document.max()) + 1):
            piece = tuple(ids[document == number].tolist())
            assert piece in pieces
            pieces.remove(piece)
    assert not pieces


@settings(deadline=None, max_examples=60)
@given(packings())
def test_positions_restart_at_every_document(packing):
    found, context = packing
    batch = batch_of(found, context)
    for position_ids, document in zip(batch["position_ids"], batch["document"], strict=True):
        for number in range(int(document.max()) + 1):
            of_document = position_ids[document == number].tolist()
            assert of_document == list(range(len(of_document)))


@settings(deadline=None, max_examples=30)
@given(packings(), st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 3), st.integers(0, 3))
def test_a_batch_depends_on_its_number_alone_and_not_on_those_drawn_before(packing, numbers, batch_size, seed):
    found, context = packing
    rows = pack(fit(found, context), context)
    stream = PackedRows(rows, context, batch_size, PAD, seed)
    for number in numbers:
        expected = PackedRows(rows, context, batch_size, PAD, seed).batch(number)
        assert all(torch.equal(value, expected[key]) for key, value in stream.batch(number).items())


def test_every_epoch_draws_every_row_once_in_another_order():
    rows = [[Document([i])] for i in range(1, 33)]
    stream = PackedRows(rows, 1, 4, PAD, seed=0)
    epochs = [[i for n in range(8) for i in stream.batch(8 * epoch + n)["ids"].flatten().tolist()] for epoch in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(1, 33))
    assert epochs[0] != epochs[1]


def test_a_row_with_room_is_filled_before_a_new_one_is_opened():
    sizes = [6, 6, 4, 4]
    rows = pack([Document([1] * n) for n in sizes], 10)
    assert [[len(d.ids) for d in row] for row in rows] == [[6, 4], [6, 4]]


def test_trimming_drops_the_columns_that_are_padding_everywhere():
    batch = trim(collate([[Document([1, 2])], [Document([3])]], 9, PAD))
    assert batch["ids"].tolist() == [[1, 2], [3, PAD]]


def test_what_cannot_be_packed_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="5 tokens cannot be packed into rows of 4"):
        pack([Document([1] * 5)], 4)
    with pytest.raises(ValueError, match="choose one of cut, split"):
        list(fit([], 4, "drop"))
    with pytest.raises(ValueError, match="at least one document"):
        PackedRows([], 4, 1, PAD, 0)


def test_packing_stops_reading_at_the_number_of_rows_asked_for():
    stream = (Document([i] * 6) for i in range(1, 100))
    rows = pack(stream, 10, num_rows=5)
    assert [d.ids[0] for row in rows for d in row] == [1, 2, 3, 4, 5]
    assert next(stream).ids[0] == 7
    assert collate(pack(compact([Document([7, 8, 9], 1)]), 4), 4, PAD)["ids"].tolist() == [[7, 8, 9, PAD]]
