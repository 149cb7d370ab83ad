"""What all figures share: the paper's sizes, a log2 axis with plain numbers, a legend below, files that do not change."""

import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dms_lab.plots.style import COLUMN, PAPER, TEXT, Look

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BUDGETS = {
    "kv_reads": "KV reads per problem (tokens)",
    "peak_tokens": "peak live tokens per problem",
    "kv_bytes_peak": "peak KV memory per problem",
}
TOKEN_BUDGETS = {name: title for name, title in BUDGETS.items() if name != "kv_bytes_peak"}
_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("bytes", 1))


@contextmanager
def paper() -> Iterator[None]:
    """Inside, matplotlib draws at the sizes of a paper's column; what it was set to before stands again after it."""
    import matplotlib

    with matplotlib.rc_context(PAPER):
        yield


def panels(num: int, curves: int = 0, height: float = 2.5, **options) -> tuple["Figure", list["Axes"]]:
    """A figure and its panels, row by row: as wide as a column for one panel of few curves, else as the text."""
    from matplotlib.figure import Figure

    columns = min(num, 3)
    rows = math.ceil(num / columns)
    is_narrow = num == 1 and curves <= 12
    figure = Figure(figsize=(COLUMN if is_narrow else TEXT, (height if curves <= 12 else 1.3 * height) * rows))
    figure.set_layout_engine("constrained")
    places = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for place in places[num:]:
        place.remove()
    return figure, places[:num]


def legend_below(figure: "Figure", handles: dict[str, object], title: str | None = None) -> None:
    """A legend under all panels, with the figure made higher by what it takes."""
    if not handles:
        return
    width, height = figure.get_size_inches()
    longest = max(len(name) for name in handles)
    columns = max(1, min(len(handles), int(width / (0.6 + 0.055 * longest))))
    rows = math.ceil(len(handles) / columns) + bool(title)
    figure.set_size_inches(width, height + 0.15 * rows + 0.1)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        title=title,
        handlelength=3.6,
        columnspacing=1.2,
        labelspacing=0.25,
    )


def handle(look: Look, line: bool = True, hollow: bool = False) -> object:
    """What stands for a curve in a legend."""
    from matplotlib.lines import Line2D

    return Line2D(
        [],
        [],
        color=look.colour,
        marker=look.marker,
        linestyle=look.line if line else "none",
        markerfacecolor="none" if hollow else look.colour,
    )


def log2_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Powers of two within [low, high], thinned to `most`; halves and quarters between them where only one is in it."""
    for parts in (1, 2, 4, 8, 16):
        steps = range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)
        ticks = [2.0**step * (1 + part / parts) for step in steps for part in range(parts)]
        ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(ticks) >= 3 or (parts == 16 and ticks):
            break
    stride = max(1, math.ceil(len(ticks) / most))
    return ticks[::-1][::stride][::-1] if ticks else [low]


def wrapped(title: str, width: int = 44) -> str:
    """A title in lines that a column has room for."""
    return "\n".join(textwrap.wrap(title, width))


def plain(number: float) -> str:
    """A number as one would write it: no exponent, no more digits than it needs."""
    return f"{number:.0f}" if number >= 100 else f"{number:.4g}"


def padded(values: Sequence[float], share: float = 0.06) -> tuple[float, float]:
    """The range of positive `values` with `share` of it more on either side, on a log axis."""
    low, high = math.log2(min(values)), math.log2(max(values))
    more = max(share * (high - low), 0.15)
    return 2 ** (low - more), 2 ** (high + more)


def log2_axis(panel: "Axes", values: Sequence[float]) -> None:
    """Makes the x-axis of `panel` logarithmic, over `values`, with ticks that are plain numbers."""
    low, high = padded(values)
    most = int(1 + 5 * panel.figure.get_figwidth() / COLUMN / panel.get_gridspec().ncols)
    panel.set_xscale("log", base=2)
    panel.set_xlim(low, high)
    ticks = log2_ticks(low, high, most)
    panel.set_xticks(ticks, [plain(tick) for tick in ticks])
    panel.minorticks_off()


def in_unit(budget: str, values: Sequence[float]) -> tuple[str, float]:
    """The axis title of a budget, and what its values are divided by: the unit is one that suits the largest."""
    if budget not in BUDGETS:
        raise ValueError(f"budget={budget!r} is not known; choose one of {', '.join(BUDGETS)}")
    if budget != "kv_bytes_peak":
        title = BUDGETS[budget].removesuffix(" (tokens)")
        return (f"{title} (million tokens)", 1e6) if max(values) >= 2**21 else (BUDGETS[budget], 1)
    unit, size = next(((name, size) for name, size in _UNITS if max(values) >= size), _UNITS[-1])
    return f"{BUDGETS[budget]} ({unit})", size


def save_figure(figure: "Figure", path: Path) -> list[Path]:
    """Writes `path`.png (300 dots an inch) and `path`.svg, the same bytes each time; returns their paths."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_name(f"{path.name}.{suffix}") for suffix in ("png", "svg")]
    with paper():
        figure.savefig(files[0], dpi=300, metadata={"Software": None})
        figure.savefig(files[1], metadata={"Date": None})
    return files
