"""Results as lines of JSON: one object per (method, task, budget), appended whole, read back strictly."""

import json
import math
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 2
_READS = (1, 2)  # 1 had no benchmarks: what it lacks has a default
RESULTS = "results.jsonl"


@dataclass(frozen=True)
class Result:
    """One measured point. Accuracy in [0, 1] with a 95 % interval; costs as in `accounting`; None where not measured.

    Of a benchmark: `width` chains answer a problem together within `max_tokens` each, and costs are theirs together
    (`kv_bytes_peak` as if all had their peaks at once); `accuracy` is the one of `metrics` (name -> value, low, high) that
    `headline` names; `num_samples` chains a problem were drawn for each of `sampling_seeds`. `settings`: what else decided
    them, as the prompts, the sampling, the data. `seconds`: the chains' own, added up. `target_cr` of a rule with a budget:
    (prompt + limit) / budget, 0 where neither is known.
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
    versions: dict[str, str] = field(default_factory=lambda: versions())
    git_revision: str = field(default_factory=lambda: git_revision())
    schema_version: int = SCHEMA_VERSION


_NEW = {"width": 1, "max_tokens": None, "headline": "exact_match", "metrics": {}, "truncation_rate": None}
_NEW |= {"num_samples": None, "sampling_seeds": [], "settings": {}}


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

    For a run that was stopped after it had written, and is started again.
    """
    known = [_what(row) for row in load(path).to_dict("records")] if path.is_file() and path.stat().st_size else []
    new = [result for result in results if _what(asdict(result)) not in known]
    if new:
        append(path, new)


def _what(row: dict) -> str:
    passing = ("seconds", "versions", "git_revision", "schema_version")
    return json.dumps({name: _plain(value) for name, value in sorted(row.items()) if name not in passing})


def _plain(value: object) -> object:
    """A value as JSON has it: pandas reads nulls beside numbers as NaN, and whole numbers beside nulls as fractions."""
    if isinstance(value, float):
        return None if math.isnan(value) else value
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def append_result(path: Path, row: Result) -> None:
    """Appends one line to `path` and waits until the disk has it."""
    append(path, [row])


def load(place: Path) -> "pd.DataFrame":
    """All results below a folder, or of one file, as a frame; raises `ValueError` with file and line for a bad one."""
    import pandas as pd

    place = Path(place)
    files = [place] if place.is_file() else sorted(place.rglob(RESULTS))
    rows = []
    for file in files:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            rows.append(_parse(line, f"{file}:{number}"))
    if not rows:
        raise ValueError(f"no results in {place}: run an evaluation first, or name a folder with a {RESULTS} in it")
    return pd.DataFrame(rows)


def _parse(line: str, where: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not a JSON object ({error.msg}); remove the line to go on without it") from error
    found = row.get("schema_version") if isinstance(row, dict) else None
    if found not in _READS:
        raise ValueError(f"{where} has schema version {found!r}; this version of dms_lab reads {_READS[0]} to {_READS[-1]}")
    if found < SCHEMA_VERSION:
        row = _NEW | row
    missing = [f.name for f in fields(Result) if f.name not in row]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; remove the line or measure it again")
    return row
