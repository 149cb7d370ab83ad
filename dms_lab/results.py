"""Results as lines of JSON: one object per (method, task, budget), appended whole, read back strictly.

evaluation -> append -> results.jsonl of each run -> load -> one frame -> save_csv -> results.csv, which load reads as well
"""

import csv
import functools
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 3
RESULTS = "results.jsonl"
TABLE = "results.csv"


@dataclass(frozen=True)
class Result:
    """One measured point. Accuracy in [0, 1] with a 95 % interval; costs as in `accounting`; None where not measured.

    Of a benchmark: `width` chains answer a problem together within `max_tokens` each, and costs are theirs together
    (`kv_bytes_peak` as if all had their peaks at once); `accuracy` is the one of `metrics` (name -> value, low, high) that
    `headline` names; `num_samples` chains a problem were drawn for each of `sampling_seeds`. `settings`: what else decided
    them, as the prompts, the sampling, the data. `seconds`: the chains' own, added up. `target_cr` of a rule with a budget:
    (prompt + limit) / budget, 0 where neither is known. `problem_scores`: what each problem scored of the headline accuracy
    (mean over chains and sampling seeds), in the problems' order, [] where unknown. `variant`: how the run differs from
    others of its sweep, as "window=4"; "" outside of sweeps.
    """

    run_id: str
    model: str
    method: str
    task: str
    target_cr: float
    measured_cr: float | None
    window: int | None
    seed: int
    num_problems: int
    accuracy: float | None
    accuracy_low: float | None
    accuracy_high: float | None
    perplexity: float | None
    kv_reads: float | None
    peak_tokens: float | None
    kv_bytes_peak: float | None
    tokens_generated: int
    seconds: float
    config_hash: str
    width: int = 1
    max_tokens: int | None = None
    headline: str = "exact_match"
    metrics: dict[str, list[float]] = field(default_factory=dict)
    truncation_rate: float | None = None
    num_samples: int | None = None
    sampling_seeds: list[int] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    problem_scores: list[float] = field(default_factory=list)
    variant: str = ""
    versions: dict[str, str] = field(default_factory=lambda: versions())
    git_revision: str = field(default_factory=lambda: git_revision())
    schema_version: int = SCHEMA_VERSION


# What each version added, and what stands for it in rows of the versions before: 1 had no benchmarks.
_ADDED = {
    2: ("width", "max_tokens", "headline", "metrics", "truncation_rate", "num_samples", "sampling_seeds", "settings"),
    3: ("problem_scores", "variant"),
}
_FIRST = 1
_TYPES = get_type_hints(Result)
_WHOLE, _NUMBER = (int, int | None), (float, float | None)


def versions() -> dict[str, str]:
    """Versions of what computed a result."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "lm_eval", "math_verify"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # the last two are extras
            continue
    return found


def git_revision() -> str:
    """The commit of the source tree, `+` appended if it is changed; `unknown` outside a checkout."""
    folder = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# -- writing -------------------------------------------------------------------------------------------------------------
def append(path: Path, results: list[Result]) -> None:
    """Appends whole lines to `path`, each in one write, and waits until the disk has them.

    A last line that was cut off stays as it is, for `load` to name it; what is appended starts on a line of its own.
    """
    lines = [json.dumps(asdict(result)).encode() + b"\n" for result in results]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if lines and file.read(1) != b"\n":
                lines[0] = b"\n" + lines[0]
        for line in lines:
            file.write(line)
        os.fsync(file.fileno())


def append_new(path: Path, results: list[Result]) -> None:
    """Appends the results that `path` does not have yet: the same but for the time it took and what computed it.

    For a run that was stopped after it had written, and is started again. A row that does not say what each problem scored
    (older versions did not) is the same as one that does, if all else is: remove the file to have it written anew.
    """
    known: dict[str, list[list[float]]] = {}
    if path.is_file() and path.stat().st_size:
        for _, row in _rows(path):
            known.setdefault(measurement(row), []).append(row["problem_scores"])
    new = []
    for result in results:
        scores = result.problem_scores
        same = known.get(measurement(asdict(result)), [])
        if not any(not old or not scores or old == scores for old in same):
            new.append(result)
    if new:
        append(path, new)


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


def append_result(path: Path, row: Result) -> None:
    """Appends one line to `path` and waits until the disk has it."""
    append(path, [row])


def save_csv(frame: "pd.DataFrame", path: Path) -> None:
    """Writes a frame of results to `path`, whole or not at all, so that `load` gives the same frame back.

    Numbers are written with all their digits, a null is an empty cell, lists and objects are JSON, and so are columns that
    results do not have by themselves. Raises `ValueError` for a row that is no result.
    """
    extra = [name for name in frame.columns if name not in _TYPES]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*_TYPES, *extra])
            for number, row in enumerate(frame.to_dict("records"), 1):
                writer.writerow(_cells(row, extra, f"row {number}"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _cells(row: dict, extra: list[str], where: str) -> list[str]:
    """The cells of a row of a frame."""
    row = _checked({name: _unframed(value, _TYPES.get(name)) for name, value in row.items()}, where)
    cells = {name: _cell(row.get(name), _TYPES.get(name)) for name in (*_TYPES, *extra)}
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
    return int(value) if kind in _WHOLE and value.is_integer() else value


def _cell(value: Any, kind: Any) -> str:
    if value is None:
        return ""
    if kind in _WHOLE:
        return repr(int(value))
    if kind in _NUMBER:
        return repr(float(value))
    return value if kind is str else json.dumps(value)


# -- reading -------------------------------------------------------------------------------------------------------------
def load(*places: Path | str) -> "pd.DataFrame":
    """All results below folders, or of files, as one frame: every `results.jsonl` and `results.csv`, each file once.

    Raises `ValueError` with file and line for a row that is none, and if there is no result in a place.
    """
    import pandas as pd

    rows: list[dict] = []
    seen: set[Path] = set()
    for place in map(Path, places):
        files = [place] if place.is_file() else sorted([*place.rglob(RESULTS), *place.rglob(TABLE)])
        found = [row for file in files if file.resolve() not in seen for _, row in _rows(file)]
        if not found and not any(file.resolve() in seen for file in files):
            raise ValueError(
                f"no results in {place}: run an evaluation first, or name a folder with a {RESULTS} or {TABLE} in it"
            )
        rows += found
        seen |= {file.resolve() for file in files}
    return pd.DataFrame(rows)


def _rows(file: Path) -> Iterator[tuple[str, dict]]:
    """Each row of a file, and where it stands."""
    with file.open(newline="", encoding="utf-8") as lines:
        if file.suffix == ".csv":
            yield from _csv_rows(file, csv.reader(lines, strict=True))
        else:
            for number, line in enumerate(lines, 1):
                yield (where := f"{file}:{number}"), _parse(line, where)


def _parse(line: str, where: str) -> dict:
    try:
        row = json.loads(line, parse_float=_shared)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not a JSON object ({error.msg}); remove the line to go on without it") from error
    return _checked(row, where)


_shared = functools.lru_cache(maxsize=65536)(float)  # scores are mostly the same few numbers: each is kept once


def _csv_rows(file: Path, reader: Any) -> Iterator[tuple[str, dict]]:
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
        yield where, _checked(row, where)


def _parsed(cell: str, name: str, where: str) -> Any:
    """What a cell holds, by the type of its column."""
    kind = _TYPES.get(name)
    if kind is str:
        return cell
    if not cell:
        return None
    try:
        if kind in _WHOLE:
            return int(cell)
        return _shared(cell) if kind in _NUMBER else json.loads(cell, parse_float=_shared)
    except ValueError as error:
        raise ValueError(f"{where} has {name}={cell!r}, which cannot be read ({error}); write the file anew") from error


def _checked(row: Any, where: str) -> dict:
    """The row in the schema's order, what its version lacks filled in, then its other columns that hold something.

    `ValueError` unless it has all else, each value of its type. NaN stands for null where null may stand.
    """
    found = row.get("schema_version") if isinstance(row, dict) else None
    if type(found) is not int or not _FIRST <= found <= SCHEMA_VERSION:
        raise ValueError(
            f"{where} has schema version {found!r}; this version of dms_lab reads {_FIRST} to {SCHEMA_VERSION}"
        )
    added = [name for since, names in _ADDED.items() if found < since for name in names]
    row = {name: _default(name) for name in added} | row
    missing = [name for name in _TYPES if name not in row]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; remove the line or measure it again")
    values = {name: _typed(row[name], kind) for name, kind in _TYPES.items()}
    wrong = next((name for name, value in values.items() if value is _WRONG), None)
    if wrong:
        raise ValueError(f"{where} has {wrong}={row[wrong]!r}, which should be {_WORDS[_TYPES[wrong]]}; remove the line")
    return values | {name: value for name, value in row.items() if name not in _TYPES and value is not None}


_WRONG = object()
_WORDS = {int: "a whole number", float: "a number", int | None: "a whole number or null", float | None: "a number or null"}
_WORDS |= {str: "text", list[float]: "a list of numbers", list[int]: "a list of whole numbers"}
_WORDS |= {dict[str, Any]: "an object", dict[str, str]: "an object", dict[str, list[float]]: "an object"}


def _typed(value: Any, kind: Any) -> Any:
    """The value, whole numbers as floats where floats belong; `_WRONG` if it is of another type."""
    if kind in (list[float], list[int]):
        items = [_typed(item, kind.__args__[0]) for item in value] if isinstance(value, list) else [_WRONG]
        return _WRONG if _WRONG in items else items
    if kind in (float | None, int | None):
        return None if value is None or value != value else _typed(value, kind.__args__[0])
    if kind is float and type(value) in (int, float):
        return float(value)
    return value if type(value) is (getattr(kind, "__origin__", None) or kind) else _WRONG


def _default(name: str) -> Any:
    found = Result.__dataclass_fields__[name]
    return found.default if found.default_factory is MISSING else found.default_factory()
