"""Costs have closed forms when the number of live slots is known."""

import dataclasses

import pytest

from dms_lab import accounting
from dms_lab.accounting import Request, Tally

REQUESTS = [Request(100, 20, 10, 80, 5, 90), Request(300, 40, 30, 120, 7, 150), Request(50, 9, 4, 33, 2, 40)]


def test_usage_by_hand():
    found = accounting.usage(REQUESTS[:2])
    assert (found.kv_reads, found.peak_tokens, found.kv_bytes_peak) == (200, 30, 120)
    assert (found.measured_cr, found.live_tokens, found.tokens_generated, found.num_requests) == (5, 20, 12, 2)


def test_full_attention_reads_the_sum_of_an_arithmetic_series():
    prompt, steps = 7, 5
    tally = Tally()
    for step in range(steps + 1):
        tally.note(prompt + step, 8 * (prompt + step), prompt + step if step else None)
    request = tally.request(prompt + steps, steps)
    assert request.kv_reads == steps * prompt + steps * (steps + 1) / 2
    assert request.peak_tokens == request.live_tokens == prompt + steps
    assert request.kv_bytes_peak == 8 * (prompt + steps)
    assert accounting.usage([request]).measured_cr == 1


def test_a_peak_that_shrinks_again_is_remembered_and_what_is_read_may_be_less_than_what_is_held():
    tally = Tally()
    tally.note(9, 90, None)
    tally.note(3, 30, 2)
    tally.note(4, 40, 2)
    assert tally.request(10, 2) == Request(4, 9, 4, 10, 2, 90)


def test_merged_usages_equal_one_count_of_all_requests():
    parts = [accounting.usage(REQUESTS[:1]), accounting.usage(REQUESTS[1:])]
    expected = dataclasses.asdict(accounting.usage(REQUESTS))
    assert dataclasses.asdict(accounting.merge(parts)) == pytest.approx(expected)


def test_a_cost_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one request"):
        accounting.usage([])
    with pytest.raises(ValueError, match="at least one usage"):
        accounting.merge([])
