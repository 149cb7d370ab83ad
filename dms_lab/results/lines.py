"""Results as lines of JSON: appended whole, and not again what is there already; lines and tables read as one frame."""

import errno
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dms_lab.results.files import RESULTS, files_in
from dms_lab.results.schema import Result, checked, shared
from dms_lab.results.table import TABLE, table_rows, told

if TYPE_CHECKING:
    import pandas as pd


def append(path: Path, results: list[Result]) -> None:
    """Appends whole lines to `path`, each in one write, and waits until the disk has them.

    Where the disk is full, none of them is there afterwards, and `OSError` is raised. A last line that was cut off stays as
    it is, for `load` to name it; what is appended starts on a line of its own.
    """
    lines = [json.dumps(asdict(result)).encode() + b"\n" for result in results]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(-1, os.SEEK_END)
            if lines and file.read(1) != b"\n":
                lines[0] = b"\n" + lines[0]
        try:
            for line in lines:
                if file.write(line) < len(line):  # what is left of a disk takes a part, and says no error
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def append_new(path: Path, results: list[Result]) -> list[int]:
    """Appends the results that `path` does not have yet: the same but for the time it took and what computed it.

    For a run that was stopped after it had written, and is started again. A row that does not say what each problem scored
    (older versions did not) is the same as one that does, if all else is: remove the file to have it written anew. Returns
    the numbers of the lines, from 0, on which all of the results stand afterwards.
    """
    known: dict[str, list[tuple[int, list[float]]]] = {}
    number = -1
    if path.is_file() and path.stat().st_size:
        for number, (_, row) in enumerate(_rows(path)):
            known.setdefault(measurement(row), []).append((number, row["problem_scores"]))
    new, places = [], []
    for result in results:
        scores = result.problem_scores
        same = known.get(measurement(asdict(result)), [])
        place = next((at for at, old in same if not old or not scores or old == scores), None)
        if place is None:
            new.append(result)
            place = number + len(new)
        places.append(place)
    if new:
        append(path, new)
    return places


def measurement(row: dict[str, Any]) -> str:
    """A text that two rows share if they are the same measurement: all but time, what computed it, scores and variant.

    Nulls and NaN are one, and so are 16 and 16.0: pandas reads nulls beside numbers as NaN, and makes both floats.
    """
    passing = ("seconds", "versions", "git_revision", "schema_version", "problem_scores", "variant")
    return json.dumps({name: _plain(value) for name, value in sorted(row.items()) if name not in passing})


def _plain(value: object) -> object:
    if isinstance(value, float):
        return None if math.isnan(value) else value
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def load(*places: Path | str) -> "pd.DataFrame":
    """All results of files and folders as one frame, each file once; which files a folder has, `files_in` says.

    Raises `ValueError` with file and line for a row that is none, and if there is no result in a place.
    """
    import pandas as pd

    rows: list[dict] = []
    seen: set[Path] = set()
    for place in map(Path, places):
        files = files_in(place)
        found = [row for file in files if file.resolve() not in seen for _, row in _rows(file)]
        if not found and not any(file.resolve() in seen for file in files):
            raise ValueError(
                f"no results in {place}: run an evaluation first, or name a folder with a {RESULTS}, a {TABLE} or another "
                "table with their columns in it"
            )
        rows += found
        seen |= {file.resolve() for file in files}
    return pd.DataFrame(rows)


def _rows(file: Path) -> Iterator[tuple[str, dict]]:
    """Each row of a file, and where it stands."""
    if file.suffix == ".csv":
        yield from table_rows(file)
        return
    with told(file), file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            yield (where := f"{file}:{number}"), _parse(line, where)


def _parse(line: str, where: str) -> dict:
    try:
        row = json.loads(line, parse_float=shared)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not a JSON object ({error.msg}); remove the line to go on without it") from error
    return checked(row, where)
