"""The figures of one model and set of tasks for a browser: plotly, the same looks, numbers under the pointer."""

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from dms_lab.plots.accuracy import error_sides, held, measured, on_frontier
from dms_lab.plots.axes import BUDGETS, in_unit, log2_ticks, padded, plain
from dms_lab.plots.margins import published_margin, short
from dms_lab.plots.ratio import equal_length, published_means
from dms_lab.plots.retention import retained
from dms_lab.plots.style import INK, Look, display_name, looks, looks_of_methods

if TYPE_CHECKING:
    import pandas as pd
    from plotly.graph_objects import Figure, Scatter

BEST = "best of all"
_BAND = "rgba(128,128,128,0.25)"
_ERROR = "#808080"  # visible on light and dark
_HOVER = (
    "<b>%{customdata[0]}</b><br>%{customdata[1]} % [%{customdata[2]}-%{customdata[3]}]<br>"
    "CR %{customdata[4]}, measured %{customdata[5]}; W %{customdata[6]}, L %{customdata[7]}<br>"
    "KV reads %{customdata[8]}, peak %{customdata[9]}<br>seeds %{customdata[10]}, problems %{customdata[11]}<extra></extra>"
)


def accuracy(points: "pd.DataFrame", budget: str, title: str = "accuracy (%)") -> "Figure":
    """`plots.accuracy_figure` of one model: every point, the frontier of each curve and of all, full attention's line."""
    from plotly import graph_objects as go

    name, unit = in_unit(budget, points[budget].dropna().tolist() or [0])
    rows = measured(points, budget)
    rows = rows.assign(x=rows[budget] / unit)
    best = on_frontier(rows, "x")
    figure = go.Figure()
    figure.add_scatter(
        x=best["x"],
        y=100 * best["accuracy"],
        mode="lines",
        line={"width": 10, "color": _BAND},
        name=BEST,
        legendgroup=BEST,
        hoverinfo="skip",
    )
    for curve, look in looks(rows).items():
        mine = rows[_is(rows, curve)]
        best = on_frontier(mine, "x")
        figure.add_trace(_curve(best, "x", look, "lines+markers"))
        beaten = mine.drop(best.index)
        if len(beaten):
            figure.add_trace(_curve(beaten, "x", look, "markers"))
        if held(mine, "x"):
            line = {"color": look.colour, "dash": look.dash, "width": 1}
            height = [100 * mine["accuracy"].max()] * 2
            figure.add_scatter(
                x=held(mine, "x"),
                y=height,
                mode="lines",
                line=line,
                legendgroup=look.name,
                showlegend=False,
                hoverinfo="skip",
            )
    _finish(figure, rows, "x", name, title)
    return figure


def ratio(points: "pd.DataFrame", published: "pd.DataFrame | None" = None, title: str = "accuracy (%)") -> "Figure":
    """`plots.ratio_figure` of one model: single chains of equal length, published scores hollow."""
    from plotly import graph_objects as go

    rows = equal_length(points)
    if rows.empty:
        raise ValueError("there is nothing to draw: no point has both an accuracy and a compression ratio")
    figure = go.Figure()
    for curve, look in looks(rows).items():
        figure.add_trace(_curve(rows[_is(rows, curve)].sort_values("target_cr"), "target_cr", look, "lines+markers"))
    elsewhere = published_means(published, rows)
    groups = {name: mine for name, mine in elsewhere.groupby(["method", "said"])}
    styles = looks_of_methods(elsewhere["method"])
    for (method, said), mine in sorted(groups.items(), key=lambda group: (list(styles).index(group[0][0]), group[0][1])):
        look = styles[method]
        figure.add_scatter(
            x=mine["compression_ratio"],
            y=100 * mine["accuracy"],
            mode="markers",
            name=f"{escape(look.name)}, {said}",
            legendgroup=look.name,
            hovertemplate="%{fullData.name}: %{y:.1f} % at CR %{x}<extra></extra>",
            marker={"symbol": f"{look.symbol}-open", "color": look.colour, "size": 12, "line": {"width": 2}},
        )
    ratios = [*rows["target_cr"], *elsewhere["compression_ratio"]]
    _finish(figure, rows, "target_cr", "compression ratio (target)", title, ratios)
    return figure


def margins(rows: "pd.DataFrame", published: "pd.DataFrame | None" = None) -> "Figure":
    """`plots.margins_figure` of one model and set of tasks: a bar a curve and budget."""
    from plotly import graph_objects as go

    rows = rows[rows["margin"].notna()]
    if rows.empty:
        raise ValueError("there is nothing to draw: no curve shares a range of budgets with the baseline")
    styles = looks(rows)
    figure = go.Figure()
    for budget, pattern in zip(BUDGETS, ("", "/", "."), strict=True):
        mine = rows[rows["budget"] == budget].set_index(["method", "variant"])
        mine = mine.loc[[curve for curve in styles if curve in mine.index]]
        if mine.empty:
            continue
        shown = [styles[curve] for curve in mine.index]
        ends = {"array": 100 * (mine["high"] - mine["margin"]), "arrayminus": 100 * (mine["margin"] - mine["low"])}
        figure.add_bar(
            y=[escape(look.name) for look in shown],
            x=100 * mine["margin"],
            error_x={name: side.fillna(0.0) for name, side in ends.items()} | {"color": _ERROR, "thickness": 1, "width": 3},
            orientation="h",
            name=short(budget),
            marker={"color": [look.colour for look in shown], "pattern": {"shape": pattern}},
            hovertemplate="%{y}: %{x:.1f} points<extra>%{fullData.name}</extra>",
        )
        unheld = mine[mine["margin_unheld"].notna()]
        if len(unheld):
            figure.add_scatter(
                y=[escape(styles[curve].name) for curve in unheld.index],
                x=100 * unheld["margin_unheld"],
                mode="markers",
                name=f"{short(budget)}, not held",
                marker={"symbol": "line-ns-open", "color": _ERROR, "size": 14, "line": {"width": 3}},
                hovertemplate="%{y}: %{x:.1f} points<extra>%{fullData.name}</extra>",
            )
        elsewhere = {curve: published_margin(published, rows[_is(rows, curve)], budget) for curve in mine.index}
        elsewhere = {curve: value for curve, value in elsewhere.items() if value is not None}
        if elsewhere:
            figure.add_scatter(
                y=[escape(styles[curve].name) for curve in elsewhere],
                x=[100 * value for value in elsewhere.values()],
                mode="markers",
                name=f"{short(budget)}, published",
                marker={"symbol": "diamond-open", "color": _ERROR, "size": 11, "line": {"width": 2}},
            )
    figure.update_layout(barmode="group", showlegend=True, meta={"rows": len(styles)})
    figure.update_xaxes(title_text=f"points over {escape(display_name(str(rows['against'].iloc[0])))}", zeroline=True)
    figure.update_yaxes(autorange="reversed", automargin=True)
    return figure


def _is(rows: "pd.DataFrame", curve: tuple[str, str]) -> "pd.Series":
    return (rows["method"] == curve[0]) & (rows["variant"] == curve[1])


def retention(folder: Path) -> "Figure":
    """`plots.retention_figure`: the share of tokens that each layer and head of a run kept, over its steps."""
    from plotly import graph_objects as go

    steps, shares = retained(folder)
    num_layers, num_heads = shares.shape[1:]
    names = [f"layer {layer}, head {head}" for layer in range(num_layers) for head in range(num_heads)]
    figure = go.Figure(
        go.Heatmap(
            x=steps,
            y=names,
            z=shares.reshape(len(steps), -1).T.round(4),
            colorscale="Cividis",
            zmin=0,
            zmax=1,
            colorbar={"title": {"text": "kept", "side": "right"}, "thickness": 12},
            hovertemplate="%{y}, step %{x}: %{z:.3f} kept<extra></extra>",
        )
    )
    figure.update_xaxes(title_text="step")
    shown = [layer * num_heads for layer in range(0, num_layers, max(1, num_layers // 12))]
    figure.update_yaxes(
        autorange="reversed",
        tickvals=[names[place] for place in shown],
        ticktext=[f"layer {place // num_heads}" for place in shown],
        automargin=True,
    )
    return figure


def _curve(rows: "pd.DataFrame", x: str, look: Look, mode: str) -> "Scatter":
    from plotly import graph_objects as go

    below, above = error_sides(rows)
    is_line = "lines" in mode
    return go.Scatter(
        x=rows[x],
        y=100 * rows["accuracy"],
        error_y={"array": above, "arrayminus": below, "thickness": 1, "width": 3, "color": f"{look.colour}80"},
        customdata=[_numbers(row, look) for row in rows.to_dict("records")],
        hovertemplate=_HOVER,
        name=escape(look.name),
        legendgroup=look.name,
        showlegend=is_line,
        mode=mode,
        opacity=1.0 if is_line else 0.45,
        marker={"symbol": look.symbol, "color": look.colour, "size": 9},
        line={"color": look.colour, "dash": look.dash, "width": 2},
    )


def _numbers(row: dict, look: Look) -> list[str]:
    """What the pointer shows of a point."""
    shares = [
        f"{100 * row[name]:.1f}" if _is_known(row[name]) else "" for name in ("accuracy", "accuracy_low", "accuracy_high")
    ]
    names = ("target_cr", "measured_cr", "width", "max_tokens", "kv_reads", "peak_tokens", "num_seeds", "num_problems")
    return [escape(look.name), *shares, *(plain(round(row[name], 2)) if _is_known(row[name]) else "?" for name in names)]


def _is_known(value: object) -> bool:
    return value is not None and value == value


def _finish(
    figure: "Figure", rows: "pd.DataFrame", x: str, name: str, title: str, values: list[float] | None = None
) -> None:
    """A log2 axis with plain numbers, and the dotted line of full attention."""
    import math

    low, high = padded(values or rows[x].tolist())
    ticks = log2_ticks(low, high, most=7)
    figure.update_xaxes(
        type="log",
        range=[math.log10(low), math.log10(high)],
        tickvals=ticks,
        ticktext=[plain(tick) for tick in ticks],
        title_text=name,
    )
    figure.update_yaxes(title_text=title)
    full = rows[rows["method"] == "full"]["accuracy"]
    if len(full):
        figure.add_hline(y=100 * float(full.max()), line={"color": INK, "width": 1, "dash": "dot"})
