"""Results come back as they were written, strictly; figures and table show every method."""

import dataclasses
import json

import pytest

from dms_lab import plots, results

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


def test_a_line_after_a_cut_one_is_not_lost(tmp_path):
    path = tmp_path / results.RESULTS
    results.append_result(path, POINT)
    path.write_text(path.read_text()[:-40])
    results.append_result(path, POINT)
    _, second = path.read_text().splitlines()
    assert json.loads(second)["task"] == "road"
    with pytest.raises(ValueError, match=r"results.jsonl:1 is not a JSON object"):
        results.load(path)
    path.write_text(second + "\n")
    results.append_result(path, POINT)
    assert len(results.load(path)) == 2


def test_a_line_without_a_key_is_named(tmp_path):
    path = tmp_path / results.RESULTS
    results.append_result(path, POINT)
    row = json.loads(path.read_text())
    del row["kv_reads"]
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"results.jsonl:1 lacks kv_reads"):
        results.load(path)


def test_a_method_without_a_style_is_drawn_and_last():
    import pandas as pd

    frame = pd.DataFrame([vars(dataclasses.replace(POINT, method=m)) for m in ("quest", "dms", "full")])
    assert list(plots.styles(frame)) == ["full", "dms", "quest"]


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
