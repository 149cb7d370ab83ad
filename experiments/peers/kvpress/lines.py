"""From answered prompts to lines of results: dms_lab's definitions and format, written with the standard library alone.

    Answered, one a prompt -> usage (sums and means) -> one line a task, as `dms_lab.results.Result` has it

This environment cannot hold dms_lab (another transformers), so its definitions stand here a second time, and
`tests/test_peers.py` compares the two. Beside them, each line has the `live_*` fields: what a press hides without freeing
it is subtracted there, and only there.
"""

import hashlib
import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

SCHEMA_VERSION = 3
PACKAGES = ("torch", "transformers", "kvpress")


@dataclass(frozen=True)
class Counts:
    """Slots of one request in tokens, mean over layers and KV heads: read while decoding, at most, at the end."""

    kv_reads: float
    peak_tokens: float
    end_tokens: float


@dataclass(frozen=True)
class Answered:
    """One answered prompt. `held` counts what the cache's tensors have room for, `live` leaves out what is masked.

    `num_tokens` are its logical tokens: the prompt and what was generated, except the last token, which no forward read.
    """

    task: str
    right: bool | None
    num_tokens: int
    num_generated: int
    held: Counts
    live: Counts
    kv_bytes_peak: int
    seconds: float


@dataclass(frozen=True)
class Label:
    """What stands in every line of one run. Without a `target_cr`, the measured one takes its place.

    `settings` say what else was asked: the length of the problems, the tokens that a press had to keep.
    """

    model: str
    method: str
    target_cr: float | None
    seed: int
    config_hash: str
    settings: dict = field(default_factory=dict)


def usage(answers: Sequence[Answered]) -> dict:
    """Costs of `answers` as in `dms_lab.accounting`: means over requests, measured CR as the ratio of the sums."""
    count = len(answers)
    tokens = sum(a.num_tokens for a in answers)

    def mean(kind: str, name: str) -> float:
        return sum(getattr(getattr(a, kind), name) for a in answers) / count

    return {
        "measured_cr": tokens / count / max(mean("held", "end_tokens"), 1e-9),
        "kv_reads": mean("held", "kv_reads"),
        "peak_tokens": mean("held", "peak_tokens"),
        "kv_bytes_peak": sum(a.kv_bytes_peak for a in answers) / count,
        "tokens_generated": sum(a.num_generated for a in answers),
        "live_measured_cr": tokens / count / max(mean("live", "end_tokens"), 1e-9),
        "live_kv_reads": mean("live", "kv_reads"),
        "live_peak_tokens": mean("live", "peak_tokens"),
    }


def result_lines(label: Label, answers: Sequence[Answered]) -> list[dict]:
    """One object a task, in the order in which tasks first come: `dms_lab.results.Result` of schema version 1."""
    return [_result(label, task, [a for a in answers if a.task == task]) for task in dict.fromkeys(a.task for a in answers)]


def _result(label: Label, task: str, answers: list[Answered]) -> dict:
    costs, judged = usage(answers), [a.right for a in answers if a.right is not None]
    low, high = wilson_interval(sum(judged), len(judged)) if judged else (None, None)
    return {
        "run_id": f"kvpress-{label.config_hash}",
        "model": label.model,
        "method": label.method,
        "task": task,
        "target_cr": costs["measured_cr"] if label.target_cr is None else label.target_cr,
        "window": None,
        "seed": label.seed,
        "num_problems": len(answers),
        "accuracy": sum(judged) / len(judged) if judged else None,
        "accuracy_low": low,
        "accuracy_high": high,
        "perplexity": None,
        **costs,
        "seconds": sum(a.seconds for a in answers),
        "config_hash": label.config_hash,
        "width": 1,
        "max_tokens": None,
        "headline": "exact_match",
        "metrics": {},
        "truncation_rate": None,
        "num_samples": None,
        "sampling_seeds": [],
        "settings": label.settings,
        "problem_scores": [float(right) for right in judged] if len(judged) == len(answers) else [],
        "variant": "",
        "versions": versions(),
        "git_revision": git_revision(),
        "schema_version": SCHEMA_VERSION,
    }


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927), as `dms_lab.pareto.wilson_interval`."""
    share = successes / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    low = 0.0 if successes == 0 else max(0.0, middle - half)
    high = 1.0 if successes == trials else min(1.0, middle + half)
    return low, high


def is_right(text: str, finished: bool, answer: str, after: str | None, end: str) -> bool:
    """Whether a finished `text` is the answer; with `after`, what stands behind its first occurrence must be."""
    found, closed = text, True
    if after:
        _, closed, found = text.partition(after)
    return bool(closed) and finished and found.removesuffix(end) == answer


def config_hash(values: dict) -> str:
    """Twelve hex digits that name a set of settings."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def versions() -> dict[str, str]:
    """Versions of what computed a line."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def git_revision() -> str:
    """The commit of the source tree, `+` appended if it is changed; `unknown` outside a checkout."""

    def git(*words: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def append(path: Path, rows: Sequence[dict]) -> None:
    """Appends whole lines to `path` in one write, and waits until the disk has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
        os.fsync(file.fileno())
