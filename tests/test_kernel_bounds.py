"""The bounds of interpreted kernels are those of the tensors they are launched with, to the element."""

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed: pip install dms_lab[gpu]")

import triton
import triton.language as tl
from kernel_bounds import within_bounds  # noqa: F401  every test of this file has it

from dms_lab.attention.kernels import relaxed

pytestmark = pytest.mark.skipif(not relaxed.INTERPRETED, reason="kernels that were compiled for a GPU are not watched")


@triton.jit
def _copy_kernel(source, target, first_read, end_read, first_written, end_written):
    places = tl.arange(0, 16) - 4
    x = tl.load(source + places, mask=(places >= first_read) & (places < end_read), other=0.0)
    tl.store(target + places, x, mask=(places >= first_written) & (places < end_written))


def _copied(*limits):
    memory = torch.zeros(2, 16)  # what lies before and behind the tensors is the test's own
    source, target = memory[0, 4:12].fill_(1.0), memory[1, 4:12]
    try:
        _copy_kernel[(1,)](source, target, *limits)
    finally:
        assert memory[1, :4].sum() == memory[1, 12:].sum() == 0
    return target.tolist()


def test_what_lies_in_the_tensors_is_read_and_written():
    assert _copied(0, 8, 0, 8) == [1.0] * 8


@pytest.mark.parametrize("limits", [(0, 9, 0, 8), (-1, 8, 0, 8)])
def test_a_kernel_that_reads_one_element_beyond_fails(limits):
    with pytest.raises(Exception, match="a kernel reads outside its tensors"):
        _copied(*limits)


@pytest.mark.parametrize("limits", [(0, 8, 0, 9), (0, 8, -1, 8)])
def test_a_kernel_that_writes_one_element_beyond_fails(limits):
    with pytest.raises(Exception, match="a kernel writes outside its tensors"):
        _copied(*limits)


def test_training_attention_that_reads_a_row_too_many_fails(monkeypatch):
    @triton.jit
    def one_more(base, rows, stride, num_rows, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDED: tl.constexpr):
        columns = tl.arange(0, BLOCK_D)
        pointers = base + rows[:, None] * stride + columns[None, :]
        return tl.load(pointers, mask=(rows <= num_rows)[:, None] & (columns < WIDTH)[None, :], other=0.0)

    query, key, value = (torch.randn(1, 1, 5, 16) for _ in range(3))
    scoring = relaxed.Scoring(2, 0.25)
    relaxed.relaxed_attention(query, key, value, None, None, None, scoring)
    monkeypatch.setattr("dms_lab.attention.kernels.forward.load_rows", one_more)
    with pytest.raises(Exception, match="a kernel reads outside its tensors"):
        relaxed.relaxed_attention(query, key, value, None, None, None, scoring)
