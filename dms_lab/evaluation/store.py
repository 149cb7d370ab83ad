"""Samples that outlive the job that drew them: chains with text, ids and trace, and what graders said about them.

    engine -> SampleStore.add -> <writer>.sqlite, one shard a job, append-only -> samples() of all shards, merged -> scores

A sample is on disk when `add` returns; a job that is killed at any moment loses the one it was writing and nothing else.
A shard is plain SQL: tables `samples` (columns as in `sample`), `verdicts` and `meta`.
"""

import fcntl
import os
import re
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from dms_lab.evaluation.sample import BULK, SCALARS, Key, Sample, Summary, from_row, now, to_row
from dms_lab.evaluation.verdict import Verdict

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Key", "Sample", "SampleStore", "Summary", "merge", "now"]
SCHEMA_VERSION = 1
_BUSY_SECONDS = 60.0
_MERGED = "merged"
_TYPES = {str: "TEXT", int: "INTEGER", float: "REAL"}
# What is large comes last, so that the rest is read without it.
_SAMPLE = {f.name: _TYPES[f.type] for f in fields(Summary)} | {name: "TEXT" if name == "text" else "BLOB" for name in BULK}
_VERDICT = (*Key._fields, "max_tokens", "grader", "score", "answer", "note", "created")
_SCHEMA = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    f"CREATE TABLE samples ({', '.join(f'{name} {kind} NOT NULL' for name, kind in _SAMPLE.items())})",
    "CREATE INDEX samples_by_key ON samples (task, run, problem, chain, prompt_hash)",
    "CREATE TABLE verdicts (task TEXT NOT NULL, problem TEXT NOT NULL, chain INTEGER NOT NULL, run TEXT NOT NULL, "
    "prompt_hash TEXT NOT NULL, max_tokens INTEGER NOT NULL, grader TEXT NOT NULL, score REAL NOT NULL, answer TEXT, "
    "note TEXT NOT NULL, created TEXT NOT NULL)",
    "CREATE INDEX verdicts_by_key ON verdicts (task, run, grader, problem, chain)",
    f"INSERT INTO meta VALUES ('schema_version', '{SCHEMA_VERSION}')",
)


class SampleStore:
    """The samples in a folder, of all its shards; `writer` names the shard that this one appends to, None only reads.

    One live process writes a shard; that lasts until `close`, or until the process and what it forked are gone. To be used
    in the thread and process that opened it. Raises `ValueError` for a shard that another one writes, a file that SQLite
    cannot read, and a shard of another schema version. Reading waits for a writer's short transactions, and the other way
    round, up to a minute.
    """

    def __init__(self, folder: Path | str, writer: str | None = None):
        self.folder = Path(folder)
        self._connections: dict[Path, sqlite3.Connection] = {}
        self._shard: Path | None = None
        self._lock: int | None = None
        if writer is None:
            if not self.folder.is_dir():
                raise ValueError(f"no sample store in {self.folder}: there is no such folder; give one that a writer made")
            return
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", writer):
            raise ValueError(f"writer={writer!r} must be a plain file name, as shard-3-of-8")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._shard = self.folder / f"{writer}.sqlite"
        self._lock = _locked(self.folder / f"{writer}.lock")
        try:
            self._create()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "SampleStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets the shard go to the next writer."""
        while self._connections:
            self._connections.popitem()[1].close()
        if self._lock is not None:
            os.close(self._lock)
        self._lock = self._shard = None

    # -- writing -----------------------------------------------------------------------------------------------------

    def add(self, sample: Sample) -> None:
        """The sample is on disk, in this writer's shard."""
        row = to_row(sample)
        with self._transaction() as shard:
            shard.execute(_insert("samples", SCALARS + BULK), row)

    def add_verdict(self, sample_key: Key, max_tokens: int, grader: str, verdict: Verdict) -> None:
        """The verdict of `grader` (name, version) on a chain cut at `max_tokens` is on disk, and stands for older ones."""
        self.add_verdicts([(sample_key, max_tokens, grader, verdict)])

    def add_verdicts(self, found: Iterable[tuple[Key, int, str, Verdict]]) -> None:
        """The same for many, all or none of them, in one wait for the disk."""
        rows = [(*key, cut, grader, v.score, v.answer, v.note, now()) for key, cut, grader, v in found]
        with self._transaction() as shard:
            shard.executemany(_insert("verdicts", _VERDICT), rows)

    # -- reading -----------------------------------------------------------------------------------------------------

    def summaries(self, task: str | None = None, run: str | None = None) -> list[Summary]:
        """The samples of a task and run (None: of all), without text, ids and trace: what a resumed job looks at."""
        return [summary for summary, _, _ in self._winners(task=task, run=run)]

    def samples(self, task: str, run: str) -> Iterator[Sample]:
        """The samples of a task and run, by problem, chain and prompt, one a key: they are read one by one.

        Of several with the same key one serves: a chain that ended by itself before one that was cut, then the one with
        more tokens among cut ones, then the earliest.
        """
        for summary, path, row in self._winners(task=task, run=run):
            bulk = self._bulk(path, row)
            with _named(path):
                sample = from_row(summary, bulk)
            yield sample

    def verdicts(self, task: str, run: str, grader: str) -> dict[tuple[Key, int], Verdict]:
        """The newest verdict of `grader` by (key, max_tokens of the cut); see `graded`."""
        return {(key, cut): verdict for (key, cut, by), verdict in self.graded(task, run).items() if by == grader}

    def graded(self, task: str, run: str) -> dict[tuple[Key, int, str], Verdict]:
        """The newest verdict by (key, max_tokens of the cut, grader).

        One that is older than the sample is left out: the chain was drawn again since, and may say something else.
        """
        found = self._newest_verdicts(task=task, run=run)
        drawn = {summary.key: summary.created for summary in self.summaries(task, run)}
        return {name: Verdict(*row[:3]) for name, row in found.items() if row[3] >= drawn.get(name[0], "")}

    def to_frame(self) -> "pd.DataFrame":
        """Every sample of the folder, a row each, without text, ids and trace, with its newest verdict by any grader.

        `score`, `answer` and `note` are of the whole chain; they are missing where it was not graded.
        """
        import pandas as pd

        newest: dict[tuple[Key, int], tuple] = {}
        for (key, cut, _), row in self._newest_verdicts().items():
            if row[3] >= newest.get((key, cut), ("", "", "", ""))[3]:
                newest[key, cut] = row
        rows = []
        for summary in self.summaries():
            row = newest.get((summary.key, summary.num_tokens))
            found = row if row is not None and row[3] >= summary.created else (None,) * 4
            rows.append(vars(summary) | dict(zip(("score", "answer", "note"), found[:3], strict=True)))
        return pd.DataFrame(rows, columns=[*SCALARS, "score", "answer", "note"])

    # -- shards ------------------------------------------------------------------------------------------------------

    def _create(self) -> None:
        """Makes the writer's shard, unless it is there."""
        with _named(self._shard):
            shard = sqlite3.connect(self._shard, timeout=_BUSY_SECONDS, isolation_level=None)
            self._connections[self._shard] = shard
            # No WAL: its shared memory does not work over a network. Truncation is waited for, a deletion is not.
            shard.execute("PRAGMA journal_mode=TRUNCATE")
            shard.execute("PRAGMA synchronous=FULL")
        with self._transaction():
            if not _is_ready(shard, self._shard):
                for statement in _SCHEMA:
                    shard.execute(statement)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """The writer's shard; what is done to it is done whole, and on disk, when the block ends."""
        if self._shard is None:
            raise ValueError(f"the sample store in {self.folder} is open for reading only, or closed; give writer=<a name>")
        shard = self._connections[self._shard]
        with _named(self._shard):
            shard.execute("BEGIN IMMEDIATE")
            try:
                yield shard
                shard.execute("COMMIT")
            except BaseException:
                if shard.in_transaction:
                    shard.execute("ROLLBACK")
                raise

    def _open(self, path: Path) -> sqlite3.Connection | None:
        """A connection to a shard; None while its writer has yet to make it."""
        if path not in self._connections:
            # Not mode=ro: the first to look at a shard whose writer was killed rolls back what that one left half done.
            shard = sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", _BUSY_SECONDS, isolation_level=None, uri=True)
            try:
                shard.execute("PRAGMA query_only=ON")
                if not _is_ready(shard, path):
                    shard.close()
                    return None
            except BaseException:
                shard.close()
                raise
            self._connections[path] = shard
        return self._connections[path]

    def _select(self, table: str, columns: str, **where: object) -> Iterator[tuple[Path, list[tuple]]]:
        """The rows of each shard in which the columns in `where` have these values; None stands for any."""
        given = {name: value for name, value in where.items() if value is not None}
        condition = " AND ".join(f"{name} = ?" for name in given) or "1"
        for path in sorted(self.folder.glob("*.sqlite")):
            with _named(path):
                shard = self._open(path)
                query = f"SELECT {columns} FROM {table} WHERE {condition} ORDER BY rowid"
                rows = [] if shard is None else shard.execute(query, tuple(given.values())).fetchall()
            yield path, rows

    def _winners(self, **where: object) -> list[tuple[Summary, Path, int]]:
        """The samples that serve, one a key, sorted by key, with their shards and rows in them."""
        best: dict[Key, tuple[Summary, Path, int]] = {}
        for path, rows in self._select("samples", f"rowid, {', '.join(SCALARS)}", **where):
            for row, *values in rows:
                summary = Summary(*values)
                there = best.get(summary.key)
                if there is None or _rank(summary) < _rank(there[0]):
                    best[summary.key] = (summary, path, row)
        return [best[key] for key in sorted(best)]

    def _newest_verdicts(self, **where: object) -> dict[tuple[Key, int, str], tuple]:
        """(score, answer, note, created) by key, cut and grader."""
        newest: dict[tuple[Key, int, str], tuple] = {}
        for _, rows in self._select("verdicts", ", ".join(_VERDICT), **where):
            for *key, cut, grader, score, answer, note, created in rows:
                name = (Key(*key), cut, grader)
                if name not in newest or created >= newest[name][3]:
                    newest[name] = (score, answer, note, created)
        return newest

    def _bulk(self, path: Path, row: int) -> tuple:
        """The columns of a sample that are not small, as they are on disk."""
        with _named(path):
            return self._open(path).execute(f"SELECT {', '.join(BULK)} FROM samples WHERE rowid = ?", (row,)).fetchone()


def merge(folders: Sequence[Path | str], into: Path | str) -> int:
    """The folder `into` has what every folder in `folders` has, and no sample twice; returns how many it lacked.

    They go to a shard of their own, `merged.sqlite`. Only the samples that serve are copied, and the newest verdicts.
    """
    added = 0
    with SampleStore(into, _MERGED) as target:
        best = {summary.key: summary for summary in target.summaries()}
        judged = target._newest_verdicts()
        for folder in folders:
            with SampleStore(folder) as source:
                for summary, path, row in source._winners():
                    there = best.get(summary.key)
                    if there is not None and _rank(there) <= _rank(summary):
                        continue
                    values = [getattr(summary, name) for name in SCALARS] + [*source._bulk(path, row)]
                    with target._transaction() as shard:
                        shard.execute(_insert("samples", SCALARS + BULK), values)
                    best[summary.key] = summary
                    added += 1
                newer = {n: v for n, v in source._newest_verdicts().items() if n not in judged or judged[n][3] < v[3]}
                with target._transaction() as shard:
                    rows = [(*key, cut, grader, *values) for (key, cut, grader), values in newer.items()]
                    shard.executemany(_insert("verdicts", _VERDICT), rows)
                judged |= newer
    return added


def _rank(sample: Summary) -> tuple:
    """Sorts the samples of a chain, the one that serves first."""
    is_cut = sample.finish_reason == "length"
    return is_cut, -sample.num_tokens if is_cut else 0, datetime.fromisoformat(sample.created)


def _insert(table: str, columns: Sequence[str]) -> str:
    return f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"


def _is_ready(shard: sqlite3.Connection, path: Path) -> bool:
    """Whether the tables are there. Raises `ValueError` if there are others, or of another version."""
    tables = {name for (name,) in shard.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if not tables:
        return False
    version = None
    if "meta" in tables:
        with suppress(sqlite3.OperationalError):
            version = shard.execute("SELECT value FROM meta WHERE name = 'schema_version'").fetchone()
    if version != (str(SCHEMA_VERSION),):
        found = "no sample store" if version is None else f"a sample store of version {version[0]}"
        raise ValueError(
            f"{path} is {found}, and this program reads version {SCHEMA_VERSION}: give another folder, or read it with the "
            "program that made it"
        )
    return True


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """SQLite's errors become `ValueError`s that name the file."""
    try:
        yield
    except (sqlite3.Error, zlib.error) as error:
        if getattr(error, "sqlite_errorname", "").startswith("SQLITE_BUSY"):
            raise ValueError(f"{path} was locked by others for {_BUSY_SECONDS:g} seconds; try again") from error
        raise ValueError(
            f"SQLite cannot use {path}: {error}. If the file is damaged, move it out of the folder: what was in it is "
            "generated again"
        ) from error


def _locked(path: Path) -> int:
    """A descriptor that holds the lock on `path` until it is closed, by the kernel at the latest."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise ValueError(
            f"another process writes the shard {path.stem} of {path.parent}, and one at a time can: wait until it ends, or "
            "give another writer name"
        ) from error
    except OSError as error:
        os.close(lock)
        raise ValueError(f"{path} cannot be locked ({error}); choose a folder on a file system that has locks") from error
    return lock
