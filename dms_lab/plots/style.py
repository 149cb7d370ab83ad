"""One look a method, everywhere: a colour, a marker and a line that tell curves apart in colour and in grey."""

import colorsys
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

COLUMN, TEXT = 3.4, 6.9  # widths in inches of a column, and of the text of a page of two
INK = "#000000"  # of full attention; a dark page draws it light
PAPER = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.linewidth": 0.4,
    "grid.color": "#dddddd",
    "lines.linewidth": 1.2,
    "lines.markersize": 4.5,
    "errorbar.capsize": 1.5,
    "hatch.linewidth": 0.5,
    "svg.hashsalt": "dms_lab",  # ids in an SVG are the same each time
    "svg.fonttype": "path",
}

Marker = str | tuple[int, int, float]


@dataclass(frozen=True)
class Look:
    """How a curve is drawn: `marker` and `line` in matplotlib's words, `symbol` and `dash` the same in plotly's."""

    colour: str
    marker: Marker
    symbol: str
    name: str
    line: str | tuple = "-"
    dash: str = "solid"
    hatch: str = ""


_LINES = [
    ("-", "solid"),
    ((0, (5, 1.5)), "dash"),
    ((0, (1, 1.2)), "dot"),
    ((0, (5, 1.5, 1, 1.5)), "dashdot"),
    ((0, (2.5, 1)), "4px,2px"),
    ((0, (7, 1, 1, 1, 1, 1)), "10px,2px,2px,2px,2px,2px"),
]
_HATCHES = ["", "////", "....", "xxxx", "\\\\\\\\", "----"]


def _look(colour: str, marker: Marker, symbol: str, name: str, line: int = 0) -> Look:
    return Look(colour, marker, symbol, name, *_LINES[line], _HATCHES[line])


# Colours after Okabe & Ito (2008), which remain apart for colour-blind readers, as far as they go.
STYLE = {
    "full": _look(INK, "s", "square", "full attention"),
    "dms": _look("#0072b2", "o", "circle", "DMS"),
    "dms_immediate": _look("#56b4e9", "v", "triangle-down", "DMS, immediate eviction", 1),
    "dms_dialled": _look("#003f5c", "d", "diamond-tall", "DMS, dialled", 2),
    "streaming_llm_tuned": _look("#d55e00", "D", "diamond", "window, fine-tuned", 3),
    "streaming_llm": _look("#e69f00", "^", "triangle-up", "StreamingLLM", 1),
    "tova": _look("#009e73", "P", "cross", "TOVA", 2),
    "h2o": _look("#cc79a7", "X", "x", "H2O", 3),
    "keydiff": _look("#9467bd", (3, 1, 180), "star-triangle-down", "KeyDiff", 5),
    "random": _look("#999999", "*", "star", "random", 2),
    "quest": _look("#8c564b", "p", "pentagon", "Quest", 4),
    "offload": _look("#444444", "h", "hexagon", "offload", 5),
    "dmc": _look("#7b4173", (5, 0, 180), "triangle-nw", "DMC", 3),  # published only
    # Presses of kvpress, by their names without "kvpress/" and "Press"; what a press wraps stands in brackets.
    "kvpress/none": _look("#666666", (4, 1, 0), "star-diamond", "no press (kvpress)", 2),
    "kvpress/knorm": _look("#7a7a00", "<", "triangle-left", "Knorm (kvpress)", 1),
    "kvpress/keydiff": _look("#6a3d9a", ">", "triangle-right", "KeyDiff (kvpress)", 3),
    "kvpress/snapkv": _look("#c51b7d", "d", "diamond-tall", "SnapKV (kvpress)", 4),
    "kvpress/expectedattention": _look("#17a2b8", "H", "hexagon2", "ExpectedAttention (kvpress)", 2),
    "kvpress/kvzip": _look("#a50f15", (6, 1, 0), "hexagram", "KVzip (kvpress)", 5),
    "kvpress/kvcompose": _look("#35978f", (7, 1, 0), "hourglass", "KVCompose (kvpress)", 0),
    "kvpress/pyramidkv": _look("#b8860b", (3, 0, 20), "triangle-ne", "PyramidKV (kvpress)", 3),
    "kvpress/observedattention": _look("#dd3497", "8", "octagon", "ObservedAttention (kvpress)", 1),
    "kvpress/tova": _look("#41ae76", (4, 1, 45), "star-square", "TOVA (kvpress)", 4),
    "kvpress/streamingllm": _look("#b35806", (3, 0, 40), "triangle-se", "StreamingLLM (kvpress)", 5),
}
_OTHER_COLOURS = ["#4e79a7", "#a0522d", "#2f6f4f", "#b07aa1", "#8b008b", "#5a7d00", "#dc143c"]
_OTHER_MARKERS: list[tuple[Marker, str]] = [
    ("h", "hexagon"),
    ("8", "octagon"),
    ((4, 1, 0), "star-diamond"),
    ((6, 1, 0), "hexagram"),
    ((5, 1, 36), "star"),
    ((3, 0, 75), "triangle-sw"),
    ("d", "diamond-tall"),
    ((3, 1, 0), "star-triangle-up"),
]


def display_name(method: str) -> str:
    """What figures and tables call a method; its own name if it has no style."""
    return looks_of_methods([method])[method].name


def sorting_key(method: str) -> tuple[int, str]:
    """Where a method stands in tables and legends: as in `STYLE`, unknown ones last and by name."""
    known = _known(method)
    return (list(STYLE).index(known) if known else len(STYLE), method)


def looks_of_methods(methods: Iterable[str]) -> dict[str, Look]:
    """The look of each method, in the order of `STYLE`; a method without one gets a look that no other here has."""
    found: dict[str, Look] = {}
    taken: set[int] = set()
    for method in sorted(set(methods), key=sorting_key):
        known = _known(method)
        if known is not None:
            found[method] = _wrapped(STYLE[known], method)
            continue
        # From the name, so that a method looks alike in all figures, whatever else is in them.
        place = zlib.crc32(method.encode())
        while place % _NUM_OTHERS in taken and len(taken) < _NUM_OTHERS:
            place += 1
        taken.add(place % _NUM_OTHERS)
        place %= _NUM_OTHERS
        marker, symbol = _OTHER_MARKERS[place % len(_OTHER_MARKERS)]
        found[method] = _look(_OTHER_COLOURS[place % len(_OTHER_COLOURS)], marker, symbol, method, place % len(_LINES))
    return found


_OUTER_LINES = {"Decoding": 1, "PrefillDecoding": 0, "AdaKV": 2}
_NUM_OTHERS = len(_OTHER_COLOURS) * len(_OTHER_MARKERS)  # without a common factor: every pair comes once


def _known(method: str) -> str | None:
    """The key of `STYLE` for a method; presses are also found without "kvpress/", and by what they wrap."""
    if method in STYLE:
        return method
    inner = re.sub(r"press\b", "", method.removeprefix("kvpress/").lower()).replace("_", "")
    inner = re.sub(r".*\((\w*)\).*", r"\1", inner)
    return f"kvpress/{inner}" if f"kvpress/{inner}" in STYLE else None


def _wrapped(look: Look, method: str) -> Look:
    """A press within another: the inner one's colour and marker, the line and the name of the outer one as well."""
    outer = re.fullmatch(r"kvpress/(\w+?)(?:Press)?\((.*)\)", method)
    if outer is None:
        return look
    place = _OUTER_LINES.get(outer[1], zlib.crc32(outer[1].encode()) % len(_LINES))
    name = f"{outer[1]}: {look.name}"
    return replace(look, name=name, line=_LINES[place][0], dash=_LINES[place][1], hatch=_HATCHES[place])


Curve = tuple[str, str]  # method and variant


def looks(frame: "pd.DataFrame") -> dict[Curve, Look]:
    """The look of each (method, variant) of `frame`, in the order of legends.

    Variants of one method share its colour, from dark to light, and the first six its marker; lines and hatches tell them
    apart. From the seventh on, where lines begin again, each six have another marker. Their names hold the settings in
    which they differ.
    """
    variants: dict[str, set[str]] = {}
    for row in frame[[name for name in ("method", "variant") if name in frame]].drop_duplicates().to_dict("records"):
        variants.setdefault(row["method"], set()).add(row.get("variant", ""))
    found = {}
    for method, look in looks_of_methods(variants).items():
        several = sorted(variants[method], key=natural)
        common = set.intersection(*(set(variant.split()) for variant in several))
        for place, variant in enumerate(several):
            settings = ", ".join(word for word in variant.split() if word not in common)
            found[method, variant] = look if len(several) == 1 else _shaded(look, settings, place, len(several))
    return found


def natural(text: str) -> list[tuple[int, float, str]]:
    """A key that sorts "window=4" before "window=16"."""
    parts = re.split(r"(\d+(?:\.\d+)?)", text)
    return [(1, float(part), "") if place % 2 else (0, 0.0, part) for place, part in enumerate(parts)]


def _shaded(look: Look, settings: str, place: int, num: int) -> Look:
    red, green, blue = (int(look.colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    middle = min(max(lightness, 0.35), 0.55)
    lightness = middle + 0.44 * (place / (num - 1) - 0.5)
    colour = "#" + "".join(f"{round(255 * x):02x}" for x in colorsys.hls_to_rgb(hue, lightness, saturation))
    times, place = divmod(place, len(_LINES))
    line, dash = _LINES[place]
    shapes = [(look.marker, look.symbol), *(shape for shape in _OTHER_MARKERS if shape[0] != look.marker)]
    marker, symbol = shapes[times % len(shapes)]
    name = f"{look.name} ({settings})" if settings else look.name
    return Look(colour, marker, symbol, name, line, dash, _HATCHES[place] + times * "oo")
