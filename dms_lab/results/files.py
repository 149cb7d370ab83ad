"""Which files of a folder are results: by their names, or, of tables, by their headers."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from dms_lab.results.table import TABLE, is_table

RESULTS = "results.jsonl"


def files_in(place: Path) -> list[Path]:
    """The files of results in `place`, which is one itself, or a folder; [] if there are none.

    Of a folder, those below it: each `results.jsonl` and `results.csv`, and each other `.csv` that has the header of a
    table of results, as `<name>.csv` of a second sweep (`pareto.csv` and `margins.csv`, which are made of results, have
    not). Where there are none of these: each `results*.jsonl` in the folder itself, as records of seeds are called. Raises
    `ValueError` for another `.csv` that cannot be read: it may be one of them.
    """
    if place.is_file():
        return [place]
    tables = [path for path in _files(place.rglob("*.csv")) if path.name == TABLE or is_table(path)]
    return sorted([*_files(place.rglob(RESULTS)), *tables]) or sorted(_files(place.glob("results*.jsonl")))


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    """Without folders of such a name, and links to nothing."""
    return (path for path in paths if path.is_file())
