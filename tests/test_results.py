"""Results come back as they were written, strictly; figures and table show every method."""

import dataclasses
import importlib.metadata
import json
from pathlib import Path

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


def test_only_what_computed_results_is_in_their_versions(monkeypatch):
    def without_extras(name):
        if name in ("lm_eval", "math_verify"):
            raise importlib.metadata.PackageNotFoundError(name)
        return importlib.metadata.version(name)

    monkeypatch.setattr(results, "version", without_extras)
    assert set(results.versions()) == {"python", "torch", "transformers"}


@pytest.mark.parametrize("name", ["lm_eval", "math_verify"])
def test_an_extra_that_is_installed_is_in_the_versions(name):
    pytest.importorskip(name, reason="the extra `eval` is not installed")
    assert results.versions()[name] == importlib.metadata.version(name)


# -- results that are there already --------------------------------------------------------------------------------------


def written(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_that_are_there_but_for_the_time_they_took_and_what_computed_them_are_not_written_again(tmp_path):
    path = tmp_path / "run" / results.RESULTS
    results.append_new(path, some_results())
    first = path.read_text()
    assert len(first.splitlines()) == 4
    later = {"seconds": 9.0, "versions": {"torch": "0"}, "git_revision": "another"}
    results.append_new(path, [dataclasses.replace(row, **later) for row in some_results()])
    assert path.read_text() == first
    more = dataclasses.replace(POINT, width=4)
    results.append_new(path, [POINT, more])
    assert path.read_text().startswith(first)
    assert [row["width"] for row in written(path)] == [1, 1, 1, 1, 4]


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": {"prompts": "b", "generation": {"temperature": 0.6}}},
        {"settings": {"prompts": "a", "generation": {"temperature": 0.7}}},
        {"settings": {}},
        {"accuracy": 0.8},
        {"max_tokens": 96},
        {"sampling_seeds": [1]},
        {"method": "full"},
        {"run_id": "another"},
        {"metrics": {"avg": [0.5, 0.4, 0.6]}},
    ],
)
def test_a_row_that_differs_in_anything_else_is_written(tmp_path, changes):
    path = tmp_path / results.RESULTS
    row = dataclasses.replace(POINT, settings={"prompts": "a", "generation": {"temperature": 0.6}})
    results.append_new(path, [row])
    for _ in range(2):
        results.append_new(path, [dataclasses.replace(row, **changes)])
    assert len(written(path)) == 2


NULLS = dict.fromkeys(
    ("measured_cr", "window", "accuracy", "accuracy_low", "accuracy_high", "kv_reads", "peak_tokens", "kv_bytes_peak")
)


@pytest.mark.parametrize(
    "beside", [[], [POINT], [dataclasses.replace(POINT, max_tokens=96, num_samples=4, perplexity=2.0)]]
)
def test_nulls_do_not_make_a_row_look_new_whatever_stands_beside_it(tmp_path, beside):
    path = tmp_path / results.RESULTS
    settings = {"limit": None, "deterministic": False, "generation": {"temperature": 1.0, "top_k": 20}}
    row = dataclasses.replace(
        POINT, **NULLS, metrics={"bits,none": [0.5, None, None], "ppl,none": [2.0, float("nan"), 3.0]}, settings=settings
    )
    nan = dataclasses.replace(row, accuracy_low=float("nan"), accuracy_high=float("nan"))
    results.append_new(path, [*beside, row])
    for again in ([row], [nan], [*beside, row]):
        results.append_new(path, again)
        assert len(written(path)) == len(beside) + 1


def test_a_row_of_version_1_is_not_taken_for_a_new_one_that_says_more(tmp_path):
    path = tmp_path / results.RESULTS
    results.append_new(path, [POINT])
    (line,) = written(path)
    old = {key: value for key, value in line.items() if key not in SINCE_2 | SINCE_3} | {"schema_version": 1}
    path.write_text(json.dumps(old) + "\n")
    results.append_new(path, [POINT])
    assert len(written(path)) == 1
    results.append_new(path, [dataclasses.replace(POINT, settings={"storage": "fp8"})])
    assert [row["schema_version"] for row in written(path)] == [1, 3]


def test_a_bad_line_stops_new_rows_before_anything_is_written(tmp_path):
    path = tmp_path / results.RESULTS
    results.append_new(path, [POINT])
    text = path.read_text()[:-40]
    path.write_text(text)
    with pytest.raises(ValueError, match=r"results.jsonl:1 is not a JSON object"):
        results.append_new(path, [POINT])
    assert path.read_text() == text


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


# -- results of version 1, and of benchmarks ----------------------------------------------------------------------------

DEMO = Path(__file__).parent.parent / "experiments" / "tiny_demo"
SINCE_2 = {
    "width": 1,
    "max_tokens": None,
    "headline": "exact_match",
    "metrics": {},
    "truncation_rate": None,
    "num_samples": None,
    "sampling_seeds": [],
    "settings": {},
}
SINCE_3 = {"problem_scores": [], "variant": ""}


@pytest.mark.parametrize("file", sorted(path.name for path in DEMO.glob("results_*.jsonl")))
def test_a_record_of_version_1_loads_with_what_it_lacks_filled_in(file):
    rows = results.load(DEMO / file).to_dict("records")
    lines = [json.loads(line) for line in (DEMO / file).read_text().splitlines()]
    assert len(rows) == len(lines) == 64
    assert {row["schema_version"] for row in rows} == {1}
    for row, line in zip(rows, lines, strict=True):
        assert {name: row[name] for name in SINCE_2 | SINCE_3} == SINCE_2 | SINCE_3
        assert (row["method"], row["task"], row["target_cr"]) == (line["method"], line["task"], line["target_cr"])
        assert set(row) == set(line) | set(SINCE_2) | set(SINCE_3) == {f.name for f in dataclasses.fields(results.Result)}


def test_what_version_1_has_is_not_replaced_and_what_it_should_have_is_missed(tmp_path):
    line = json.loads((DEMO / "results_seed0.jsonl").read_text().splitlines()[0])
    path = tmp_path / results.RESULTS
    path.write_text(json.dumps(line | {"width": 4}) + "\n")
    assert results.load(path)["width"].tolist() == [4]
    del line["kv_reads"]
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=r"results.jsonl:1 lacks kv_reads"):
        results.load(path)


def test_a_line_needs_all_keys_of_its_version_and_versions_to_come_are_refused(tmp_path):
    path = tmp_path / results.RESULTS
    results.append_result(path, POINT)
    line = json.loads(path.read_text())
    assert line["schema_version"] == 3
    of_2 = {key: value for key, value in line.items() if key not in SINCE_3} | {"schema_version": 2}
    path.write_text(json.dumps(of_2) + "\n")
    assert results.load(path)[list(SINCE_3)].to_dict("records") == [SINCE_3]
    for row, lost in ((of_2, "width"), (line, "width"), (line, "variant"), (of_2, "kv_reads")):
        path.write_text(json.dumps({key: value for key, value in row.items() if key != lost}) + "\n")
        with pytest.raises(ValueError, match=f"results.jsonl:1 lacks {lost};"):
            results.load(path)
    for version in (0, 4, "2", None, True, 2.0):
        path.write_text(json.dumps(line | {"schema_version": version}) + "\n")
        with pytest.raises(ValueError, match=f"results.jsonl:1 has schema version {version!r}; .* reads 1 to 3"):
            results.load(path)


def a_point(method, width, max_tokens, accuracy, kv_reads, task="dms_aime24", **changes):
    metrics = {"avg": [accuracy - 0.125, 0.0, 1.0], "maj": [accuracy, 0.0, 1.0], "pass_at_k": [accuracy + 0.125, 0.0, 1.0]}
    values = {
        "method": method,
        "task": task,
        "target_cr": 1.0 if method == "full" else 8.0,
        "width": width,
        "max_tokens": max_tokens,
        "accuracy": accuracy,
        "accuracy_low": accuracy - 0.1,
        "accuracy_high": accuracy + 0.1,
        "kv_reads": kv_reads,
        "peak_tokens": None if kv_reads is None else kv_reads / 10,
        "kv_bytes_peak": None if kv_reads is None else 2.5e6,
        "headline": "maj",
        "metrics": metrics,
        "truncation_rate": 0.0625,
        "num_samples": 4,
        "sampling_seeds": [0],
    }
    return dataclasses.replace(POINT, **(values | changes))


def benchmark_frame(*more):
    import pandas as pd

    points = [
        a_point("dms", 4, 16384, 0.75, 4000.0),
        a_point("dms", 1, 8192, 0.5, 1000.0),
        a_point("full", 1, 16384, 0.625, 8000.0),
        a_point("full", 1, 8192, 0.375, 4000.0),
        *more,
    ]
    return pd.DataFrame([vars(point) for point in points])


WITHOUT_COST = a_point("dms", 8, 8192, 0.8125, None, measured_cr=None, truncation_rate=None)
WITHOUT_INTERVAL = a_point("full", 2, 8192, 0.5, 5000.0, accuracy_low=float("nan"), accuracy_high=float("nan"))
UNKNOWN = {"accuracy": None, "accuracy_low": None, "accuracy_high": None, "metrics": {}, "truncation_rate": None}
PERPLEXITY = dataclasses.replace(
    a_point("dms", 1, None, 0.5, None, task="wikitext"),
    **UNKNOWN | {"metrics": {"word_perplexity,none": [12.345, float("nan"), float("nan")]}},
    perplexity=12.345,
    headline="word_perplexity,none",
)


def cells(frame, task="dms_aime24"):
    """The table of one task, as its columns' texts, a row each."""
    table = plots.benchmark_table(frame[frame["task"] == task], task)
    assert task in table.title
    names = [column.header for column in table.columns]
    return [dict(zip(names, row, strict=True)) for row in zip(*(column.cells for column in table.columns), strict=True)]


def test_the_table_of_a_benchmark_has_every_point_by_cr_and_what_stands_for_it():
    rows = cells(benchmark_frame())
    assert [(row["method"], row["CR"], row["W"], row["L"]) for row in rows] == [
        ("full attention", "1", "1", "16384"),
        ("full attention", "1", "1", "8192"),
        ("DMS", "8", "4", "16384"),
        ("DMS", "8", "1", "8192"),
    ]
    assert rows[2] == {
        "method": "DMS",
        "CR": "8",
        "measured": "7.90",
        "W": "4",
        "L": "16384",
        "headline": "maj 75.0 [65-85]",
        "avg": "62.5",
        "maj": "75.0",
        "pass@k": "87.5",
        "truncated": "6.2",
        "KV reads": "4000",
        "peak": "400",
        "MB": "2.500",
    }


def test_what_was_not_measured_is_left_empty_in_the_table():
    frame = benchmark_frame(WITHOUT_COST, WITHOUT_INTERVAL, PERPLEXITY)
    rows = cells(frame)
    (row,) = (row for row in rows if row["W"] == "8")
    assert row["headline"] == "maj 81.2 [71-91]"
    assert {name for name, text in row.items() if not text} == {"measured", "truncated", "KV reads", "peak", "MB"}
    (row,) = (row for row in rows if row["W"] == "2")
    assert row["headline"] == "maj 50.0 [-]"
    (row,) = cells(frame, "wikitext")
    assert row["headline"] == "word_perplexity,none 12.35"
    assert {name for name, text in row.items() if text} == {"method", "CR", "measured", "W", "headline"}
    nothing = dataclasses.replace(a_point("dms", 16, 8192, 0.5, 1.0), **UNKNOWN)
    (row,) = (row for row in cells(benchmark_frame(nothing, PERPLEXITY)) if row["W"] == "16")
    assert row["headline"] == row["avg"] == ""


def drawn(monkeypatch, frame, folder):
    """Paths of the figures, and of each panel its lines as (label, x, y); a label stands for a frontier."""
    from matplotlib import pyplot as plt

    figures, make = [], plt.subplots

    def subplots(*shape, **options):
        figure, panels = make(*shape, **options)
        figures.append(panels)
        return figure, panels

    monkeypatch.setattr(plt, "subplots", subplots)
    paths = plots.benchmark_figures(frame, folder)
    lines = [
        [
            {line.get_label(): [list(map(float, line.get_xdata())), list(line.get_ydata())] for line in panel.lines}
            for panel in f
        ]
        for f in figures
    ]
    return paths, lines


def test_a_benchmark_s_figure_draws_every_point_and_the_frontier_of_each_method(monkeypatch, tmp_path):
    beaten = a_point("dms", 2, 8192, 0.25, 2000.0)
    frame = benchmark_frame(beaten, WITHOUT_COST, WITHOUT_INTERVAL, PERPLEXITY)
    paths, ((reads, peaks),) = drawn(monkeypatch, frame, tmp_path)
    assert [path.name for path in paths] == ["pareto-dms_aime24.png"], "a perplexity and what it cost nothing have none"
    assert paths[0].stat().st_size > 10_000
    assert reads["DMS"] == [[1000.0, 4000.0], [50.0, 75.0]]
    assert reads["full attention"] == [[4000.0, 5000.0, 8000.0], [37.5, 50.0, 62.5]]
    assert peaks["DMS"] == [[100.0, 400.0], [50.0, 75.0]]


def test_each_task_has_a_figure_of_its_own_and_without_a_cost_there_is_none(monkeypatch, tmp_path):
    frame = benchmark_frame(a_point("full", 1, 8192, 0.5, 10.0, task="dms_math500"))
    paths, lines = drawn(monkeypatch, frame, tmp_path)
    assert [path.name for path in paths] == ["pareto-dms_aime24.png", "pareto-dms_math500.png"]
    assert [set(panels[0]) & {"DMS", "full attention"} for panels in lines] == [
        {"DMS", "full attention"},
        {"full attention"},
    ]
    import pandas as pd

    assert plots.benchmark_figures(pd.DataFrame([vars(WITHOUT_COST), vars(PERPLEXITY)]), tmp_path) == []


def test_an_interval_that_ends_a_rounding_beside_its_value_is_drawn(tmp_path):
    point = a_point("dms", 1, 64, 0.3, 10.0, accuracy_low=0.30000000000000004, accuracy_high=0.29999999999999993)
    assert len(plots.benchmark_figures(benchmark_frame(point), tmp_path)) == 1
