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
    request = tally.trace().request(prompt)
    assert (request.num_tokens, request.num_generated) == (prompt + steps, steps + 1)
    assert request.kv_reads == steps * prompt + steps * (steps + 1) / 2
    assert request.peak_tokens == request.live_tokens == prompt + steps
    assert request.kv_bytes_peak == 8 * (prompt + steps)
    assert accounting.usage([request]).measured_cr == 1


def test_a_peak_that_shrinks_again_is_remembered_and_what_is_read_may_be_less_than_what_is_held():
    tally = Tally()
    tally.note(9, 90, None)
    tally.note(3, 30, 2)
    tally.note(4, 40, 2)
    assert tally.trace().request(8) == Request(4, 9, 4, 10, 3, 90)


def test_a_chain_cut_short_costs_what_it_had_cost_by_then():
    tally = Tally()
    for live, held, read in ((9, 90, None), (3, 30, 2), (11, 40, 2)):
        tally.note(live, held, read)
    trace = tally.trace()
    assert trace.request(8, 1) == Request(0, 9, 9, 8, 1, 90)
    assert trace.request(8, 2) == Request(2, 9, 3, 9, 2, 90)
    assert trace.request(8, 3) == trace.request(8, 99) == trace.request(8)
    with pytest.raises(ValueError, match="max_tokens=0"):
        trace.request(8, 0)


def test_a_chain_that_never_ran_costs_nothing():
    assert Tally().trace().request(5) == Request(0, 0, 0, 5, 0, 0)


def test_merged_usages_equal_one_count_of_all_requests():
    parts = [accounting.usage(REQUESTS[:1]), accounting.usage(REQUESTS[1:])]
    expected = dataclasses.asdict(accounting.usage(REQUESTS))
    assert dataclasses.asdict(accounting.merge(parts)) == pytest.approx(expected)


def test_a_cost_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one request"):
        accounting.usage([])
    with pytest.raises(ValueError, match="at least one usage"):
        accounting.merge([])
