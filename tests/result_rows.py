"""A few rows of results, made up."""

import dataclasses

from dms_lab import results

POINT = results.Result(
    run_id="r",
    model="tiny",
    method="dms",
    task="road",
    target_cr=8.0,
    measured_cr=7.9,
    window=16,
    seed=0,
    num_problems=10,
    accuracy=0.9,
    accuracy_low=0.6,
    accuracy_high=0.98,
    perplexity=None,
    kv_reads=900.0,
    peak_tokens=60.0,
    kv_bytes_peak=1e5,
    tokens_generated=300,
    seconds=1.0,
    config_hash="abc",
)


def some_results():
    full = dataclasses.replace(POINT, method="full", target_cr=1.0, kv_reads=7000.0, peak_tokens=500.0)
    text = dataclasses.replace(POINT, task="held_out_text", accuracy=None, perplexity=12.0, kv_reads=None, peak_tokens=None)
    return [full, POINT, dataclasses.replace(POINT, task="ledger", accuracy=0.7), text]
