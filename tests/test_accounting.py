"""Costs have closed forms when the number of live slots is known."""

import dataclasses

import pytest
import torch

from dms_lab import accounting
from dms_lab.accounting import Meter, Request

BYTES = 4


def test_usage_by_hand():
    found = accounting.usage([Request(100, 20, 10, 80, 5), Request(300, 40, 30, 120, 7)], BYTES)
    assert (found.kv_reads, found.peak_tokens, found.kv_bytes_peak) == (200, 30, 120)
    assert (found.measured_cr, found.live_tokens, found.tokens_generated, found.num_requests) == (5, 20, 12, 2)
    assert accounting.slot_bytes(4, 2, 32, 2) == 1024


def test_full_attention_reads_the_sum_of_an_arithmetic_series():
    prompt, steps = 7, 5
    meter = Meter(1)
    for step in range(steps + 1):
        meter.step(torch.full((1, 3, 2), prompt + step), prefill=step == 0)
    (request,) = meter.requests([prompt + steps], [steps])
    assert request.kv_reads == steps * prompt + steps * (steps + 1) / 2
    assert request.peak_tokens == request.live_tokens == prompt + steps
    assert accounting.usage([request], BYTES).measured_cr == 1


def test_heads_that_hold_differently_count_by_their_mean():
    meter = Meter(1)
    meter.step(torch.tensor([[[1, 3], [5, 7]]]))
    assert meter.requests([16], [1]) == [Request(4, 4, 4, 16, 1)]


def test_a_peak_that_shrinks_again_is_remembered():
    meter = Meter(2)
    meter.step(torch.tensor([[[9]], [[2]]]), prefill=True)
    meter.step(torch.tensor([[[3]], [[6]]]))
    first, second = meter.requests([10, 10], [1, 1])
    assert (first.peak_tokens, first.live_tokens, second.peak_tokens) == (9, 3, 6)
    assert meter.peak_concurrent_tokens == 11  # not 9 + 6: the two peaks are not at the same step


def test_a_finished_request_costs_nothing_more():
    meter = Meter(2)
    meter.step(torch.tensor([[[4]], [[4]]]))
    meter.step(torch.tensor([[[5]]]), active=[1])
    assert [r.kv_reads for r in meter.requests([4, 5], [1, 2])] == [4, 9]
    with pytest.raises(ValueError, match="2 are active"):
        meter.step(torch.tensor([[[5]]]))


def test_merged_usages_equal_one_count_of_all_requests():
    requests = [Request(100, 20, 10, 80, 5), Request(300, 40, 30, 120, 7), Request(50, 9, 4, 33, 2)]
    parts = [accounting.usage(requests[:1], BYTES), accounting.usage(requests[1:], BYTES)]
    expected = dataclasses.asdict(accounting.usage(requests, BYTES))
    assert dataclasses.asdict(accounting.merge(parts)) == pytest.approx(expected)


def test_a_cost_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one request"):
        accounting.usage([], BYTES)
    with pytest.raises(ValueError, match="at least one usage"):
        accounting.merge([])
