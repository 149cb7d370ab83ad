"""What a result is: the schema, what each version of it added, and the check that a row must pass."""

import functools
import platform
import subprocess
from dataclasses import MISSING, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_type_hints

SCHEMA_VERSION = 3


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
TYPES = get_type_hints(Result)
WHOLE, NUMBER = (int, int | None), (float, float | None)


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


def checked(row: Any, where: str) -> dict:
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
    missing = [name for name in TYPES if name not in row]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}; remove the line or measure it again")
    values = {name: _typed(row[name], kind) for name, kind in TYPES.items()}
    wrong = next((name for name, value in values.items() if value is _WRONG), None)
    if wrong:
        raise ValueError(f"{where} has {wrong}={row[wrong]!r}, which should be {_WORDS[TYPES[wrong]]}; remove the line")
    return values | {name: value for name, value in row.items() if name not in TYPES and value is not None}


_WRONG = object()
_WORDS = {int: "a whole number", float: "a number", int | None: "a whole number or null", float | None: "a number or null"}
_WORDS |= {str: "text", list[float]: "a list of numbers", list[int]: "a list of whole numbers"}
_WORDS |= {dict[str, Any]: "an object", dict[str, str]: "an object", dict[str, list[float]]: "an object"}


shared = functools.lru_cache(maxsize=65536)(float)  # scores are mostly the same few numbers: each is kept once


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
