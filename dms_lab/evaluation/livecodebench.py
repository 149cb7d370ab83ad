"""LiveCodeBench code generation: its release files, and the verdict on a program.

    test*.jsonl (hub or local) -> parquet cache -> problems in a window of contest dates
    answer -> last fenced block -> sandbox, test after test -> compared out here -> Verdict

Where the official checker (LiveCodeBench, lcb_runner/evaluation/testing_util.py) and this one differ: a program runs as
`__main__` with a real stdin and stdout, in a process of its own for each test, and not as the body of a function whose
stdin is a mock; a function is called on a fresh `Solution` for each test, which has to be made within the time of the test;
what the official guard takes away (`quit`, `resource`, `os.getcwd` and more) is there; memory and output have limits; a
result of a kind of its own equals nothing, whatever its `__eq__` says.
"""

import json
import re
from collections.abc import Iterator
from datetime import date
from decimal import Decimal, InvalidOperation
from functools import partial
from pathlib import Path
from typing import Any

from dms_lab.evaluation import livecodebench_files as files
from dms_lab.evaluation.sandbox import SandboxLimits, TestOutcome, run_tests
from dms_lab.evaluation.verdict import Verdict

# ERRATA.md of LiveCodeBench's repository, by its names: question ids at AtCoder, slugs of titles at LeetCode.
ERRATA = {
    **dict.fromkeys(
        "abc311_c abc326_d abc327_b abc333_e abc343_a abc343_e abc362_c arc185_c find-words-containing-character "
        "find-the-peaks generate-binary-strings-without-adjacent-zeros".split(),
        "several outputs are right, one is accepted",
    ),
    **dict.fromkeys(["abc337_e", "abc355_e"], "interactive"),
    **dict.fromkeys(["abc350_c", "apply-operations-to-make-string-empty", "arc189_a"], "a test is wrong"),
    "most-frequent-ids": "a test breaks the problem's constraints",
}
_WHY = {"timeout": "time limit", "memory": "memory limit", "output": "output limit"}


def problems(
    source: str | Path | None = None,
    revision: str = files.REVISION,
    release: str = "release_v6",
    start: str | None = "2024-08-01",
    end: str | None = "2025-01-31",
    errata: str | Path | None = None,
    cache: str | Path | None = None,
) -> Iterator[dict[str, str]]:
    """The problems whose contest was on a day from `start` to `end`, both included, as flat dicts of strings.

    Keys: id, title, question, starter_code, fn_name (empty for a program that reads stdin), platform, difficulty,
    contest_date, public_tests, private_tests (still encoded: `tests_of` decodes them). `source` is a local release file, or
    a folder of them, instead of the hub. The default release is the last although release_v5 is described as reaching
    January 2025: file 6 holds contests of that month, too. `errata` leaves out problems: "official" the `ERRATA`, else a
    file of question ids, one a line, or JSON lines with `question_id`. `cache` is the folder of the parquet files.
    Raises `ValueError` for arguments that are wrong, files that cannot be had and lines that are not problems.
    """
    first, last = (None if day is None else _day(name, day) for name, day in (("start", start), ("end", end)))
    if first and last and first > last:
        raise ValueError(f"start={start} is after end={end}")
    dropped = _dropped(errata)
    tables = files.tables(source, revision, release, files.default_cache() if cache is None else Path(cache))
    return (
        _document(row)
        for row in files.rows(tables, partial(_is_within, first, last))
        if not {row["question_id"], _slug(row["question_title"])} & dropped
    )


def _day(name: str, text: str) -> date:
    try:
        return date.fromisoformat(str(text))
    except ValueError:
        raise ValueError(f"{name}={text!r} is no day; write it as 2024-08-01") from None


def _is_within(first: date | None, last: date | None, contest_date: str) -> bool:
    day = date.fromisoformat(contest_date[:10])
    return (first is None or first <= day) and (last is None or day <= last)


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _dropped(errata: str | Path | None) -> set[str]:
    if errata is None:
        return set()
    if str(errata) == "official":
        return set(ERRATA)
    if not Path(errata).is_file():
        raise ValueError(f'errata={str(errata)!r} is no file; give a file of question ids, or "official"')
    lines = [line.strip() for line in Path(errata).read_text().splitlines() if line.strip()]
    return {str(json.loads(line)["question_id"]) if line.startswith("{") else line for line in lines}


def _document(row: dict[str, str]) -> dict[str, str]:
    return {
        "id": row["question_id"],
        "title": row["question_title"],
        "question": row["question_content"],
        "starter_code": row["starter_code"],
        "fn_name": json.loads(row["metadata"] or "{}").get("func_name") or "",
        "platform": row["platform"],
        "difficulty": row["difficulty"],
        "contest_date": row["contest_date"],
        "public_tests": row["public_test_cases"],
        "private_tests": row["private_test_cases"],
    }


def extract_code(answer_text: str) -> str | None:
    """The last fenced block, without its fences; None if there is none, or the last one was not closed, or it is blank.

    As the official extractor, any line with ``` is a fence; but one that names a language opens a block wherever it stands.
    """
    lines, opened, block = answer_text.split("\n"), None, None
    for number, line in enumerate(lines):
        if line.count("```") % 2 == 0:
            continue  # none, or code within a line
        if opened is None or re.fullmatch(r"\s*```\s*[A-Za-z][\w+#.-]*\s*", line):
            opened, block = number, None
        else:
            block, opened = "\n".join(lines[opened + 1 : number]), None
    return block if block and block.strip() else None


def grade(doc: dict[str, Any], answer_text: str, limits: SandboxLimits, sandbox: str = "bubblewrap") -> Verdict:
    """1 iff the program in the answer passes all public and private tests of `doc`; the note has the first failure.

    Tests after that are not run. Raises `SandboxError` where the sandbox failed, `ValueError` for unreadable tests.
    """
    code = extract_code(answer_text)
    if code is None:
        return Verdict(0.0, note="no code")
    tests, num_public = files.tests_of(doc["public_tests"], doc["private_tests"], doc["id"])
    failures: list[str] = []

    def go_on(index: int, outcome: TestOutcome) -> bool:
        why = why_wrong(outcome, tests[index].output, bool(doc["fn_name"]))
        if why:
            kind = "public" if index < num_public else "private"
            failures.append(f"test {index + 1} of {len(tests)} ({kind}): {why}")
        return not why

    outcomes = run_tests(code, [test.input for test in tests], limits, sandbox, doc["fn_name"], go_on)
    if not failures and outcomes[-1].status != "ok":
        go_on(len(outcomes) - 1, outcomes[-1])  # the sandbox ended, and nobody was asked
    if failures:
        return Verdict(0.0, note=failures[0])
    assert len(outcomes) == len(tests)
    return Verdict(1.0)


def why_wrong(outcome: TestOutcome, expected: str, is_function: bool) -> str:
    """Why a test is not passed, in a few words; empty if it is."""
    if outcome.status != "ok":
        return ": ".join(part for part in (_WHY.get(outcome.status, "crash"), outcome.note) if part)
    equal = same_value if is_function else same_lines
    return "" if equal(outcome.output, expected) else "wrong answer"


def same_lines(printed: str, expected: str) -> bool:
    """Whether both have equally many lines, each equal as text, or as a list of decimals; outer white space is nothing."""
    ours, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (printed, expected))
    return len(ours) == len(theirs) and all(a == b or _same_numbers(a, b) for a, b in zip(ours, theirs, strict=True))


def _same_numbers(a: str, b: str) -> bool:
    try:
        return [Decimal(word) for word in a.split()] == [Decimal(word) for word in b.split()]
    except InvalidOperation:
        return False


def same_value(returned: str, expected: str) -> bool:
    """Whether two JSON texts are equal as Python values: 1 == 1.0 == true."""
    try:
        return _value(returned) == _value(expected)
    except (ValueError, RecursionError):
        return False


def _value(text: str) -> Any:
    # A NaN of its own each time: lists are equal where they hold the same object, and no NaN equals another.
    return json.loads(
        text, parse_int=lambda digits: int(digits) if len(digits) < 4000 else Decimal(digits), parse_constant=float
    )
