"""Which files of a folder are results: by their names, or, of tables, by their headers."""

from pathlib import Path

from dms_lab.results.table import TABLE, is_table

RESULTS = "results.jsonl"


def files_in(place: Path) -> list[Path]:
    """The files of results in `place`, which is one itself, or a folder; [] if there are none.

    Of a folder, those below it: each `results.jsonl` and `results.csv`, and each other `.csv` that has the header of a
    table of results, as `<name>.csv` of a second sweep (`pareto.csv` and `margins.csv`, which are made of results, have
    not). Where there are none of these: each `results*.jsonl` in the folder itself, as records of seeds are called.
    """
    if place.is_file():
        return [place]
    tables = [path for path in place.rglob("*.csv") if path.name == TABLE or is_table(path)]
    return sorted([*place.rglob(RESULTS), *tables]) or sorted(place.glob("results*.jsonl"))
