"""Results as a table: a frame written as CSV, and read back as it was."""

import csv
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dms_lab.results.schema import NUMBER, TYPES, WHOLE, checked, shared

if TYPE_CHECKING:
    import pandas as pd

TABLE = "results.csv"


def save_csv(frame: "pd.DataFrame", path: Path) -> None:
    """Writes a frame of results to `path`, whole or not at all, so that `load` gives the same frame back.

    Numbers are written with all their digits, a null is an empty cell, lists and objects are JSON, and so are columns that
    results do not have by themselves. Raises `ValueError` for a row that is no result.
    """
    extra = [name for name in frame.columns if name not in TYPES]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*TYPES, *extra])
            for number, row in enumerate(frame.to_dict("records"), 1):
                writer.writerow(_cells(row, extra, f"row {number}"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _cells(row: dict, extra: list[str], where: str) -> list[str]:
    """The cells of a row of a frame."""
    row = checked({name: _unframed(value, TYPES.get(name)) for name, value in row.items()}, where)
    cells = {name: _cell(row.get(name), TYPES.get(name)) for name in (*TYPES, *extra)}
    for name, cell in cells.items():
        if "\r" in cell:  # the writer would not quote it
            raise ValueError(f"{where} has {name}={cell!r}, with a carriage return; name it otherwise")
    return list(cells.values())


def _unframed(value: Any, kind: Any) -> Any:
    """A value as it was before it stood in a frame: pandas makes floats of whole numbers beside nulls, and NaN of nulls."""
    if not isinstance(value, float) or kind is float:
        return value
    if math.isnan(value):
        return None
    return int(value) if kind in WHOLE and value.is_integer() else value


def _cell(value: Any, kind: Any) -> str:
    if value is None:
        return ""
    if kind in WHOLE:
        return repr(int(value))
    if kind in NUMBER:
        return repr(float(value))
    return value if kind is str else json.dumps(value)


def is_table(file: Path) -> bool:
    """Whether a CSV file has the header of a table of results, whatever its name; `ValueError` if it cannot be read."""
    with told(file), file.open(newline="", encoding="utf-8", errors="replace") as lines:
        first = lines.readline(_LONGEST_HEADER)
    return {"schema_version", "run_id", "method", "task"} <= set(next(csv.reader([first]), []))


_LONGEST_HEADER = 65536  # characters; no table of results has more


@contextmanager
def told(file: Path) -> Iterator[None]:
    """Inside, what keeps the system from reading `file` is a `ValueError` that names it."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}); make it readable, or move it elsewhere") from error


def table_rows(file: Path) -> Iterator[tuple[str, dict]]:
    """Each row of a table, and where it stands; `ValueError` for a line that is wrong."""
    csv.field_size_limit(2**31 - 1)  # the scores of many problems are a long cell
    with told(file), file.open(newline="", encoding="utf-8") as lines:
        yield from _read(file, csv.reader(lines, strict=True))


def _read(file: Path, reader: Any) -> Iterator[tuple[str, dict]]:
    """The rows under a header."""
    header: list[str] | None = None
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{file}:{reader.line_num} is no line of a CSV file ({error}); write the file anew") from error
        where = f"{file}:{reader.line_num}"
        if header is None:
            header = cells
            if len(set(header)) < len(header) or "schema_version" not in header:
                raise ValueError(
                    f"{where} is not the header of a file of results: it needs schema_version, every name once"
                )
            continue
        if len(cells) != len(header):
            raise ValueError(f"{where} has {len(cells)} cells where the header has {len(header)}; write the file anew")
        row = {name: _parsed(cell, name, where) for name, cell in zip(header, cells, strict=True)}
        yield where, checked(row, where)


def _parsed(cell: str, name: str, where: str) -> Any:
    """What a cell holds, by the type of its column."""
    kind = TYPES.get(name)
    if kind is str:
        return cell
    if not cell:
        return None
    try:
        if kind in WHOLE:
            return int(cell)
        return shared(cell) if kind in NUMBER else json.loads(cell, parse_float=shared)
    except ValueError as error:
        raise ValueError(f"{where} has {name}={cell!r}, which cannot be read ({error}); write the file anew") from error
