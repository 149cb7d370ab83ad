"""What a run and a benchmark end with: tables and figures show every method and point."""

import dataclasses

from result_rows import POINT, some_results

from dms_lab import plots


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


def test_a_text_s_perplexity_has_the_text_s_own_ratio_beside_it():
    import pandas as pd

    *answered, text = some_results()
    frame = pd.DataFrame([vars(r) for r in (*answered, dataclasses.replace(text, measured_cr=3.4))])
    table = plots.summary_table(frame)
    columns = {column.header: list(column.cells) for column in table.columns}
    assert columns["measured"] == ["7.90", "7.90"]
    assert columns["at text CR"] == ["", "3.40"]


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


def drawn(frame):
    """Of each panel of a benchmark's figure its frontiers as (x, y), by the colour of their method."""
    measured = frame[frame["accuracy"].notna() & (frame["kv_reads"] > 0)]
    figure = plots.benchmark_figure(measured, str(measured["task"].iloc[0]))
    by_colour = {look.colour: look.name for look in plots.STYLE.values()}
    return [
        {
            by_colour[line.get_color()]: [list(map(float, line.get_xdata())), list(line.get_ydata())]
            for line in panel.lines
            if line.get_linestyle() != "None" and len(line.get_xdata()) and line.get_marker() not in ("None", "|", "_")
        }
        for panel in figure.axes
    ]


def test_a_benchmark_s_figure_draws_every_point_and_the_frontier_of_each_method(tmp_path):
    beaten = a_point("dms", 2, 8192, 0.25, 2000.0)
    frame = benchmark_frame(beaten, WITHOUT_COST, WITHOUT_INTERVAL, PERPLEXITY)
    paths = plots.benchmark_figures(frame, tmp_path)
    reads, peaks = drawn(frame)
    assert [path.name for path in paths] == ["pareto-dms_aime24.png"], "a perplexity and what it cost nothing have none"
    assert paths[0].stat().st_size > 10_000
    assert reads["DMS"] == [[1000.0, 4000.0], [50.0, 75.0]]
    assert reads["full attention"] == [[4000.0, 5000.0, 8000.0], [37.5, 50.0, 62.5]]
    assert peaks["DMS"] == [[100.0, 400.0], [50.0, 75.0]]


def test_each_task_has_a_figure_of_its_own_and_without_a_cost_there_is_none(tmp_path):
    frame = benchmark_frame(a_point("full", 1, 8192, 0.5, 10.0, task="dms_math500"))
    paths = plots.benchmark_figures(frame, tmp_path)
    assert [path.name for path in paths] == ["pareto-dms_aime24.png", "pareto-dms_math500.png"]
    assert list(drawn(frame[frame["task"] == "dms_math500"])[0]) == ["full attention"]
    import pandas as pd

    assert plots.benchmark_figures(pd.DataFrame([vars(WITHOUT_COST), vars(PERPLEXITY)]), tmp_path) == []


def test_an_interval_that_ends_a_rounding_beside_its_value_is_drawn(tmp_path):
    point = a_point("dms", 1, 64, 0.3, 10.0, accuracy_low=0.30000000000000004, accuracy_high=0.29999999999999993)
    assert len(plots.benchmark_figures(benchmark_frame(point), tmp_path)) == 1
