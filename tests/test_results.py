"""Results come back as they were written, strictly; figures and intervals are what their definitions say."""

import dataclasses
import itertools
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dms_lab import accounting, pareto, plots, results

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


def test_results_come_back_as_written(tmp_path):
    path = tmp_path / "run" / results.RESULTS
    results.append(path, some_results()[:2])
    results.append(path, some_results()[2:])
    frame = results.load(tmp_path)
    assert list(frame["task"]) == ["road", "road", "ledger", "held_out_text"]
    assert frame["versions"][0]["torch"]


def test_a_cut_line_and_an_unknown_schema_are_named(tmp_path):
    path = tmp_path / results.RESULTS
    results.append(path, some_results()[:1])
    good = path.read_text()
    path.write_text(good + good[:50])
    with pytest.raises(ValueError, match=r"results.jsonl:2 is not a JSON object"):
        results.load(path)
    path.write_text(json.dumps(json.loads(good) | {"schema_version": 7}) + "\n")
    with pytest.raises(ValueError, match=r"results.jsonl:1 has schema version 7"):
        results.load(path)
    with pytest.raises(ValueError, match="no results in"):
        results.load(tmp_path / "nothing")


def test_figures_and_table_are_made(tmp_path):
    import pandas as pd
    from rich.console import Console

    frame = pd.DataFrame([vars(r) for r in some_results()])
    for path in plots.pareto_figures(frame, tmp_path):
        assert path.stat().st_size > 10_000
    html = (tmp_path / "pareto.html").read_text()
    assert "full attention" in html
    assert "https://cdn.plot.ly" not in html.split("</script>")[-2]
    console = Console(record=True, width=200)
    console.print(plots.summary_table(frame))
    text = console.export_text()
    assert "80.0" in text  # the mean over tasks of DMS
    assert "12.00" in text


def test_wilson_interval_matches_published_values():
    assert pareto.wilson_interval(0, 10) == (0.0, pytest.approx(0.2775, abs=1e-4))
    assert pareto.wilson_interval(5, 10) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert pareto.wilson_interval(10, 10)[1] == 1.0


POINTS = st.lists(st.tuples(st.floats(1, 1e4), st.floats(0, 1)), min_size=1, max_size=8, unique_by=lambda p: p[0])


@settings(deadline=None)
@given(POINTS, POINTS, st.sampled_from(pareto.AXES))
def test_margins_are_antisymmetric_and_frontiers_rise(a, b, axis):
    xa, ya = zip(*a, strict=True)
    xb, yb = zip(*b, strict=True)
    kept = pareto.frontier(xa, ya)
    assert all(xa[i] < xa[j] and ya[i] < ya[j] for i, j in itertools.pairwise(kept))
    assert all(any(xa[i] <= x and ya[i] >= y for i in kept) for x, y in a)
    assert pareto.margin(xa, ya, xa, ya, axis) == 0
    there, back = pareto.margin(xa, ya, xb, yb, axis), pareto.margin(xb, yb, xa, ya, axis)
    assert (math.isnan(there) and math.isnan(back)) or there == pytest.approx(-back, abs=1e-9)


def test_a_margin_by_hand():
    assert pareto.margin([1, 4], [0.0, 1.0], [1, 4], [0.0, 0.5], "linear") == pytest.approx(0.25)
    assert pareto.margin([1, 4], [0.5, 0.9], [2, 8], [0.1, 0.3], "log2") == pytest.approx((0.6 + 0.7) / 2, abs=1e-9)


def test_usage_by_hand():
    requests = [accounting.Request(100, 20, 10, 80, 5), accounting.Request(300, 40, 30, 120, 7)]
    found = accounting.usage(requests, bytes_per_token=4)
    assert (found.kv_reads, found.peak_tokens, found.kv_bytes_peak) == (200, 30, 120)
    assert (found.measured_cr, found.live_tokens, found.tokens_generated) == (5, 20, 12)
    assert accounting.slot_bytes(4, 2, 32, 2) == 1024
