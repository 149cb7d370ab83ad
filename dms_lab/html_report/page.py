"""A page of tables and figures as one self-contained HTML file: no network, readable on a phone, in the dark, on paper.

All text is escaped by the template; figures are plotly's, its script is in the file once.
"""

import json
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True)
class Cell:
    """What a cell shows, and what its column is sorted by: a number, a text, or nothing (then it stays below)."""

    text: str
    value: float | str | None = None


@dataclass(frozen=True)
class Table:
    """Rows under named columns; columns in `numeric` stand to the right."""

    caption: str
    columns: list[str]
    rows: list[list[Cell]]
    numeric: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Key:
    """An entry of a legend that figures share: the name of their traces' group, and what is drawn beside it.

    `path` is an SVG path around 0, 0, about one unit wide, filled; `dash` an SVG dash pattern of the line.
    """

    name: str
    colour: str
    path: str = ""
    dash: str = ""
    width: float = 2.0


@dataclass(frozen=True)
class Plot:
    """A figure with its title and what it says to who cannot see it."""

    title: str
    description: str
    figure: "Figure"


@dataclass(frozen=True)
class Details:
    """Preformatted text behind its title."""

    title: str
    text: str


@dataclass(frozen=True)
class Section:
    """A heading, a paragraph or more, then figures under one legend, tables and texts behind titles."""

    title: str
    paragraphs: list[str] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    details: list[Details] = field(default_factory=list)


@dataclass(frozen=True)
class Page:
    """A report: its title, what was asked, warnings on top, sections, and the command that makes it again."""

    title: str
    lead: str
    warnings: list[str]
    sections: list[Section]
    command: str


def render(page: Page) -> str:
    """The page as HTML."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    here = files("dms_lab.html_report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((here / "page.html").read_text(encoding="utf-8"))
    figures = [plot.figure for section in page.sections for plot in section.plots]
    return template.render(
        page=page,
        css=Markup((here / "page.css").read_text(encoding="utf-8")),
        script=Markup((here / "page.js").read_text(encoding="utf-8")),
        plotly=Markup(get_plotlyjs()) if figures else "",
        figures=Markup(_json([json.loads(figure.to_json()) for figure in figures])),
    )


def write(page: Page, path: Path) -> Path:
    """Writes the page; returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(page), encoding="utf-8")
    return path


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
