"""What an evaluation has measured so far, beside the results: a kill costs the method that was being measured, no more.

evaluation.part.jsonl   {"what": ...}, then one line a method and budget: its key, its rows, its mean live tokens
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dms_lab.evaluation.evaluated import PART
from dms_lab.evaluation.suite import Job
from dms_lab.results import Result

Measured = tuple[list[Result], float]


class Partial:
    """The measurements of one evaluation, `what`, in a folder. Those of another that was never finished are dropped."""

    def __init__(self, folder: Path, what: dict[str, Any]) -> None:
        self.path = folder / PART
        self._found: dict[str, Measured] = {}
        lines = list(_whole_lines(self.path))
        if lines and lines[0] == {"what": json.loads(json.dumps(what))}:
            for line in lines[1:]:
                self._found[line["job"]] = [Result(**row) for row in line["rows"]], line["live"]
        else:
            lines = [{"what": what}]
        temporary = self.path.with_suffix(".tmp")  # without a last line that was cut off
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        temporary.replace(self.path)

    def __contains__(self, job: Job) -> bool:
        return _key(job) in self._found

    def __getitem__(self, job: Job) -> Measured:
        return self._found[_key(job)]

    def add(self, job: Job, measured: Measured) -> None:
        """Keeps what was measured; it is on the disk afterwards."""
        rows, live = measured
        with self.path.open("a") as file:
            file.write(json.dumps({"job": _key(job), "rows": [asdict(row) for row in rows], "live": live}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._found[_key(job)] = measured

    def remove(self) -> None:
        """The evaluation is finished, and recorded elsewhere."""
        self.path.unlink(missing_ok=True)


def _key(job: Job) -> str:
    return json.dumps([job.method, job.target_cr, job.budget])


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file up to the first that is none."""
    for line in path.read_text().splitlines(keepends=True) if path.is_file() else ():
        if not line.endswith("\n"):
            return
        yield json.loads(line)
