"""Figures of comparisons: looks that stay apart, frontiers of the points, plain ticks, files that do not change."""

import itertools
import json
import math

import frames
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dms_lab import plots
from dms_lab.pareto import frontier
from dms_lab.plots import axes, interactive, style
from dms_lab.plots import margins as margins_module

METHODS = [
    "full",
    "dms",
    "dms_immediate",
    "streaming_llm",
    "streaming_llm_tuned",
    "tova",
    "h2o",
    "keydiff",
    "random",
    "quest",
    "offload",
]
PRESSES = ["KnormPress", "KeyDiffPress", "SnapKVPress", "ExpectedAttentionPress", "KVzipPress", "TOVAPress", "none"]


# -- looks ---------------------------------------------------------------------------------------------------------------
def test_every_method_of_the_project_has_a_name_and_a_marker_of_its_own():
    found = plots.looks_of_methods(METHODS + [f"kvpress/{press}" for press in PRESSES])
    assert len(found) == len(METHODS) + len(PRESSES)
    for attribute in ("name", "colour", "marker", "symbol"):
        values = [getattr(look, attribute) for look in found.values()]
        assert len(set(values)) == len(values), attribute
    assert plots.display_name("dms") == "DMS"
    assert plots.display_name("knorm") == plots.display_name("kvpress/KnormPress") == "Knorm (kvpress)"
    assert list(plots.looks_of_methods(["zeta", "quest", "dms", "full"])) == ["full", "dms", "quest", "zeta"]


def test_a_press_within_another_looks_like_the_inner_one_with_another_line_and_name():
    found = plots.looks_of_methods(["kvpress/KeyDiffPress", "kvpress/DecodingPress(KeyDiffPress)"])
    wrapped, plain = (found[method] for method in sorted(found))
    assert (plain.colour, plain.marker) == (wrapped.colour, wrapped.marker)
    assert plain.line != wrapped.line
    assert wrapped.name == "Decoding: KeyDiff (kvpress)"


@given(st.sets(st.text("abcdefgh_0123", min_size=1, max_size=6), min_size=1, max_size=40))
def test_methods_without_a_style_look_different_from_each_other(names):
    names = {f"my_{name}" for name in names}
    looks = plots.looks_of_methods(names)
    assert {look.name for look in looks.values()} == names
    assert len({(look.colour, look.marker) for look in looks.values()}) == len(names)


def test_a_method_without_a_style_looks_alike_in_every_figure():
    alone = plots.looks_of_methods(["my_method"])["my_method"]
    assert plots.looks_of_methods(["full", "dms", "my_method"])["my_method"] == alone


def test_variants_of_a_method_differ_in_line_and_lightness_and_are_named_by_what_differs():
    looks = plots.looks(frames.points())
    first, second = looks["dms", "decided_by=next window=4"], looks["dms", "decided_by=next window=16"]
    assert (first.name, second.name) == ("DMS (window=4)", "DMS (window=16)")
    assert first.marker == second.marker
    assert first.line != second.line
    assert luminance(first.colour) < luminance(second.colour) - 0.1
    assert looks["dms_immediate", "window=1"].name == "DMS, immediate eviction"  # it has one variant
    names = [look.name for look in looks.values()]
    assert names[:3] == ["full attention", "DMS (window=4)", "DMS (window=16)"]  # by number, not by letter


def test_many_variants_of_a_method_are_told_apart_in_grey():
    many = [("dms", f"window={window}", 4.0, 0.3) for window in range(20)]
    found = list(plots.looks(frames.points(methods=many)).values())
    for names in (("line", "marker"), ("dash", "symbol"), ("hatch",)):
        assert len({tuple(getattr(look, name) for name in names) for look in found}) == 20, names
    assert {look.marker for look in found[:6]} == {plots.STYLE["dms"].marker}
    assert found[6].marker != found[0].marker


def luminance(colour):
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue


# -- axes ----------------------------------------------------------------------------------------------------------------
@given(st.floats(1e-3, 1e9), st.floats(1, 1e6), st.integers(2, 8))
def test_ticks_are_within_the_axis_few_and_a_constant_factor_or_step_apart(low, factor, most):
    high = low * factor
    ticks = axes.log2_ticks(low, high, most)
    assert 1 <= len(ticks) <= most
    assert ticks == sorted(ticks)
    if factor >= 1.2:
        assert all(low * 0.999 <= tick <= high * 1.001 for tick in ticks)
    if factor >= 8:
        ratios = {round(math.log2(b / a), 6) for a, b in itertools.pairwise(ticks)}
        assert len(ratios) <= 1
        assert all(math.log2(tick).is_integer() for tick in ticks)


@pytest.mark.parametrize(("number", "text"), [(65536, "65536"), (0.125, "0.125"), (2.0, "2"), (1.5, "1.5"), (128.0, "128")])
def test_ticks_are_plain_numbers(number, text):
    assert axes.plain(number) == text


def test_budgets_come_in_the_unit_that_suits_the_largest():
    assert axes.in_unit("kv_bytes_peak", [3e5, 5e6]) == ("peak KV memory per problem (MiB)", 2**20)
    assert axes.in_unit("kv_bytes_peak", [3e9])[1] == 2**30
    assert axes.in_unit("kv_reads", [97865.0]) == ("KV reads per problem (tokens)", 1)
    assert axes.in_unit("kv_reads", [3e9]) == ("KV reads per problem (million tokens)", 1e6)
    with pytest.raises(ValueError, match="budget='bytes' is not known; choose one of kv_reads, peak_tokens, kv_bytes_peak"):
        axes.in_unit("bytes", [1])


# -- accuracy against cost -----------------------------------------------------------------------------------------------
def line(panel, name):
    """Two lists, x and y, of what is drawn under a name."""
    (found,) = (line for line in panel.lines if line.get_label() == name)
    return list(map(float, found.get_xdata())), list(map(float, found.get_ydata()))


@pytest.mark.parametrize("budget", ["kv_reads", "peak_tokens", "kv_bytes_peak"])
def test_a_figure_draws_each_curve_s_frontier_as_a_line_and_its_other_points_beside_it(budget):
    points = frames.points()
    panel = plots.accuracy_figure(points, budget).axes[0]
    unit = axes.in_unit(budget, points[budget])[1]
    for (method, variant), look in plots.looks(points).items():
        mine = points[(points["method"] == method) & (points["variant"] == variant)]
        best = mine.iloc[frontier(mine[budget], mine["accuracy"])]
        joined, beside = line(panel, look.name), line(panel, f"{look.name}, beaten")
        assert joined == (pytest.approx(list(best[budget] / unit)), pytest.approx(list(100 * best["accuracy"])))
        assert len(joined[0]) + len(beside[0]) == len(mine)
    dotted = [line for line in panel.lines if len(set(line.get_ydata())) == 1 and line.get_xdata() == [0, 1]]
    assert [line.get_ydata()[0] for line in dotted] == [pytest.approx(81.0)], "the highest accuracy of full attention"


def test_a_frontier_goes_on_to_the_largest_budget_that_was_measured():
    points = frames.points(methods=[("full", "", 1.0, 0.6), ("dms", "", 4.0, 0.5)])
    points.loc[(points["method"] == "dms") & (points["width"] == 8), "accuracy"] = 0.2
    panel = plots.accuracy_figure(points).axes[0]
    assert line(panel, "DMS")[0] == [3000.0, 6000.0, 12000.0]
    assert line(panel, "DMS, held") == ([12000.0, 24000.0], [pytest.approx(64.0)] * 2)
    assert "full attention, held" not in [drawn.get_label() for drawn in panel.lines]
    thin = [trace for trace in interactive.accuracy(points, "kv_reads").data if trace.line.width == 1]
    assert [list(trace.x) for trace in thin] == [[12000.0, 24000.0]]


def test_points_without_a_cost_or_an_accuracy_are_left_out_and_without_any_a_sentence_says_so():
    points = frames.points()
    points.loc[points["method"] == "tova", "kv_reads"] = np.nan
    points.loc[points["method"] == "h2o", "accuracy"] = np.nan
    figure = plots.accuracy_figure(points, "kv_reads")
    (legend,) = figure.legends
    names = {text.get_text() for text in legend.get_texts()}
    assert {"full attention", "Quest", "best of all"} <= names
    assert not {"TOVA", "H2O"} & names
    points["accuracy"] = np.nan
    with pytest.raises(ValueError, match="there is nothing to draw: no point has both an accuracy and kv_reads"):
        plots.accuracy_figure(points, "kv_reads")
    with pytest.raises(ValueError, match="there is nothing to draw"):
        plots.ratio_figure(points)


def test_each_model_and_set_of_tasks_has_a_panel_with_its_name_and_equal_looks():
    others = frames.points("tiny").assign(tasks="ledger, road")
    figure = plots.accuracy_figure(pd.concat([frames.points(), others], ignore_index=True), "peak_tokens")
    assert [panel.get_title() for panel in figure.axes] == ["qwen_r1_1_5b: dms_aime24", "tiny: ledger, road"]
    assert [len(panel.lines) for panel in figure.axes] == [len(figure.axes[0].lines)] * 2


def test_a_figure_of_many_curves_is_as_wide_as_the_text():
    many = [("dms", f"window={window}", 4.0, 0.3 + window / 100) for window in range(14)]
    assert plots.accuracy_figure(frames.points(methods=many)).get_figwidth() == style.TEXT
    assert plots.accuracy_figure(frames.points(methods=many[:12])).get_figwidth() == style.COLUMN


def test_an_interval_is_drawn_where_it_is_known():
    points = frames.points(methods=[("dms", "", 4.0, 0.5), ("full", "", 1.0, 0.6)], widths=(1,))
    points.loc[points["method"] == "full", ["accuracy_low", "accuracy_high"]] = np.nan
    panel = plots.accuracy_figure(points).axes[0]
    full, dms = (container.lines[2][0].get_segments()[0][:, 1] for container in panel.containers)  # as in the legend
    assert list(full) == pytest.approx([60, 60])
    assert list(dms) == pytest.approx([46, 54])


# -- accuracy against the ratio ------------------------------------------------------------------------------------------
def test_the_ratio_s_figure_has_single_chains_of_the_longest_limit_alone():
    shorter = frames.points().assign(max_tokens=8192, accuracy=0.01)
    rows = plots.ratio.equal_length(pd.concat([frames.points(), shorter], ignore_index=True))
    assert set(rows["width"]) == {1}
    assert set(rows["max_tokens"]) == {32768}
    own = plots.ratio.equal_length(frames.points().assign(max_tokens=None))
    assert len(own) == len(rows), "a run's own tasks have no limit"


def test_published_scores_are_hollow_and_only_where_model_and_tasks_are_the_same():
    points = frames.points()
    panel = plots.ratio_figure(points, frames.published()).axes[0]
    hollow = [line for line in panel.lines if line.get_markerfacecolor() == "white"]
    drawn = {(x, round(y, 3)) for line in hollow for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)}
    assert drawn == {(1.0, 63.0), (4.0, 61.0), (8.0, 57.0), (4.0, 45.0)}
    for elsewhere in (frames.published("qwen3_8b"), frames.published().assign(task="dms_math500"), None):
        panel = plots.ratio_figure(points, elsewhere).axes[0]
        assert not [line for line in panel.lines if line.get_markerfacecolor() == "white"]
    wide = points[points["width"] > 1]
    assert plots.ratio.published_means(frames.published(), plots.ratio.equal_length(wide)).empty, "not of single chains"
    both = points.assign(tasks="dms_aime24, dms_math500")
    assert plots.ratio.published_means(frames.published(), both).empty, "a mean over two tasks is none over one of them"


def test_the_legend_says_where_the_length_of_published_chains_is_not_stated():
    unknown = frames.published().assign(max_tokens=None)
    for elsewhere, said in ((frames.published(), "published"), (unknown, "published, length not stated")):
        (legend,) = plots.ratio_figure(frames.points(), elsewhere).legends
        assert f"DMS, {said}" in {text.get_text() for text in legend.get_texts()}
        names = {trace.name for trace in interactive.ratio(frames.points(), elsewhere).data}
        assert {f"DMS, {said}", f"TOVA, {said}"} <= names


# -- margins -------------------------------------------------------------------------------------------------------------
def test_margins_are_bars_in_points_with_intervals_and_say_where_budgets_do_not_meet():
    margins = frames.margins()
    figure = plots.margins_figure(margins)
    assert [panel.get_title() for panel in figure.axes] == ["KV reads", "peak live tokens", "peak KV memory"]
    curves = list(plots.looks(margins))
    for panel in figure.axes:
        widths = {round(bar.get_y() + bar.get_height() / 2): bar.get_width() for bar in panel.patches}
        assert widths[curves.index(("dms", "decided_by=next window=16"))] == pytest.approx(15.0)
        assert widths[curves.index(("quest", ""))] == pytest.approx(-3.0)
        assert [text.get_text() for text in panel.texts] == ["no common budget"]
        assert round(panel.texts[0].xy[1]) == curves.index(("h2o", ""))
    assert {bar.get_hatch() for bar in figure.axes[0].patches} != {""}, "grey prints need hatches"
    with pytest.raises(ValueError, match="there is nothing to draw: no curve shares a range of budgets"):
        plots.margins_figure(margins.assign(margin=np.nan))


def test_a_published_margin_stands_beside_the_bar_of_its_model_method_and_tasks():
    known = {"budget": "kv_reads", "task": "dms_aime24", "model": "qwen_r1_1_5b", "method": "dms", "against": "full"}
    published = pd.DataFrame([known | {"margin": 0.106}, known | {"margin": 0.5, "model": "tiny"}])
    reads, peaks, _ = plots.margins_figure(frames.margins(), published).axes
    assert [list(line.get_xdata()) for line in reads.lines if line.get_marker() == "D"] == [[pytest.approx(10.6)]] * 2
    assert not [line for line in peaks.lines if line.get_marker() == "D"]


def test_a_mean_of_published_margins_is_over_all_tasks_of_the_curve_or_there_is_none():
    known = {"budget": "kv_reads", "model": "qwen_r1_1_5b", "method": "dms", "against": "full"}
    values = {"dms_aime24": 0.1, "dms_math500": 0.3, "dms_gpqa_diamond": float("nan")}
    elsewhere = pd.DataFrame([known | {"task": task, "margin": margin} for task, margin in values.items()])
    rows = frames.margins().query("method == 'dms' and budget == 'kv_reads'").head(1)
    for tasks, mean, lacking in (
        ("dms_aime24, dms_math500", 0.2, []),
        ("dms_aime24, dms_gpqa_diamond", None, ["dms_gpqa_diamond"]),
        ("dms_aime24, dms_livecodebench", None, ["dms_livecodebench"]),
        ("dms_gpqa_diamond", None, []),
    ):
        mine = rows.assign(tasks=tasks)
        assert margins_module.published_margin(elsewhere, mine, "kv_reads") == (mean and pytest.approx(mean))
        assert margins_module.unpublished_tasks(elsewhere, mine, "kv_reads") == lacking
        drawn = plots.margins_figure(mine, elsewhere).axes[0]
        assert len([line for line in drawn.lines if line.get_marker() == "D"]) == (mean is not None)
        names = [trace.name for trace in interactive.margins(mine, elsewhere).data]
        assert ("KV reads, published" in names) == (mean is not None)


def test_beside_a_bar_stands_the_margin_without_what_is_held():
    rows = frames.margins().query("method == 'dms'").head(3)
    reads = plots.margins_figure(rows).axes[0]
    assert [list(line.get_xdata()) for line in reads.lines if line.get_label() == "not held"] == [[pytest.approx(7.5)]]
    (trace,) = (trace for trace in interactive.margins(rows).data if trace.name == "KV reads, not held")
    assert list(trace.x) == [pytest.approx(7.5)]
    without = plots.margins_figure(rows.assign(margin_unheld=np.nan)).axes[0]
    assert not [line for line in without.lines if line.get_label() == "not held"]


# -- retention -----------------------------------------------------------------------------------------------------------
def run_with(tmp_path, *lines):
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    return tmp_path


def test_the_retention_map_holds_each_layer_s_and_head_s_share_over_the_steps(tmp_path):
    rows = [{"step": step, "retained_per_head": [[1.0, 0.9], [0.5, 1 / step], [0.25, 0.1]]} for step in (10, 20, 30)]
    folder = run_with(tmp_path / "run", *map(json.dumps, rows))
    steps, shares = plots.retained(folder)
    assert steps.tolist() == [10, 20, 30]
    assert shares.shape == (3, 3, 2)
    figure = plots.retention_figure(folder)
    values = figure.axes[0].collections[0].get_array()
    assert values.shape == (6, 3)
    assert values[3].tolist() == pytest.approx([0.1, 0.05, 1 / 30])
    trace = interactive.retention(folder).data[0]
    assert np.asarray(trace.z).shape == (6, 3)
    assert trace.y[3] == "layer 1, head 1"


def test_a_run_without_metrics_and_a_bad_line_are_told(tmp_path):
    with pytest.raises(ValueError, match=r"no metrics.jsonl in .*: give the folder of a run"):
        plots.retained(tmp_path)
    good = json.dumps({"step": 10, "retained_per_head": [[1.0]]})
    with pytest.raises(ValueError, match=r"metrics.jsonl:2 has no step with retained_per_head"):
        plots.retained(run_with(tmp_path / "cut", good, good[:20]))
    with pytest.raises(ValueError, match=r"metrics.jsonl:2 has no step with retained_per_head"):
        plots.retained(run_with(tmp_path / "other", good, '{"step": 20}'))
    with pytest.raises(ValueError, match="is empty"):
        plots.retained(run_with(tmp_path / "empty"))


# -- files ---------------------------------------------------------------------------------------------------------------
def test_a_figure_is_written_as_png_and_svg_of_a_column_the_same_bytes_each_time(tmp_path):
    first, second = (
        [path.read_bytes() for path in plots.save_figure(plots.accuracy_figure(frames.points()), tmp_path / name / "a.b")]
        for name in ("one", "two")
    )
    assert first == second
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["a.b.png", "a.b.svg"]
    png, svg = first
    assert int.from_bytes(png[16:20], "big") == round(300 * style.COLUMN), "as wide as a column at 300 dots an inch"
    assert b"<dc:date>" not in svg
    assert svg.lstrip().startswith(b"<?xml")


def test_figures_leave_matplotlib_as_it_was():
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.accuracy_figure(frames.points())
    assert dict(matplotlib.rcParams) == before


# -- for the browser -----------------------------------------------------------------------------------------------------
def test_the_interactive_figure_has_the_same_points_and_looks():
    points = frames.points()
    figure = interactive.accuracy(points, "kv_bytes_peak")
    by_group = {}
    for trace in figure.data[1:]:
        by_group.setdefault(trace.legendgroup, []).append(trace)
    for (method, variant), look in plots.looks(points).items():
        mine = points[(points["method"] == method) & (points["variant"] == variant)]
        traces = by_group[look.name]
        drawn = sorted(x for trace in traces if "markers" in trace.mode for x in trace.x)
        assert drawn == pytest.approx(sorted(mine["kv_bytes_peak"] / 2**20))
        assert {trace.line.color for trace in traces} == {look.colour}
    assert figure.data[0].name == interactive.BEST
    assert [round(shape.y0, 3) for shape in figure.layout.shapes] == [81.0]
    ratios = interactive.ratio(points, frames.published())
    hollow = [trace for trace in ratios.data if str(trace.marker.symbol).endswith("-open")]
    assert [trace.name for trace in hollow] == ["full attention, published", "DMS, published", "TOVA, published"]
    bars = [trace for trace in interactive.margins(frames.margins()).data if trace.type == "bar"]
    assert [len(trace.x) for trace in bars] == [9, 9, 9], "all but the one that shares no budget"


def test_names_are_text_to_plotly_too():
    points = frames.points(methods=[("<b>bold</b>", "", 4.0, 0.5)])
    trace = interactive.accuracy(points, "kv_reads").data[1]
    assert trace.name == "&lt;b&gt;bold&lt;/b&gt;"
    assert trace.customdata[0][0] == "&lt;b&gt;bold&lt;/b&gt;"
