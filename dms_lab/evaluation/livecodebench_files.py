"""LiveCodeBench's release files: found, streamed into parquet once, read by contest date; its encoded tests decoded.

Release n is the files test.jsonl, test2.jsonl, ... testn.jsonl together, 4.5 GB for all six. They are read directly: the
data set's loading script is refused by `datasets` 4 and later.
"""

import base64
import binascii
import hashlib
import json
import os
import pickletools
import re
import tempfile
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HUB_ID = "livecodebench/code_generation_lite"
REVISION = "0fe84c3912ea0c4d4a78037083943e8f0c4dd505"
RELEASES = {f"release_v{n}": ("test.jsonl", *(f"test{k}.jsonl" for k in range(2, n + 1))) for n in range(1, 7)}
COLUMNS = (
    "question_title",
    "question_content",
    "platform",
    "question_id",
    "contest_id",
    "contest_date",
    "starter_code",
    "difficulty",
    "public_test_cases",
    "private_test_cases",
    "metadata",
)
_SCHEMA_VERSION = 1
_ROWS_AT_A_TIME = 16  # a row has megabytes of tests
_MOST_BYTES = 1 << 30  # of the tests of one problem, decoded
_MOST_KEPT, _MOST_KEPT_CHARACTERS = 4, 256 << 20  # problems whose tests are kept decoded, and their tests together
_STRING_OPCODES = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP"}
_STRINGS = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}


@dataclass(frozen=True)
class CodeTest:
    """One test: what a program reads and should print, or a function's arguments and result as JSON."""

    input: str
    output: str
    testtype: str


def default_cache() -> Path:
    """The folder of the parquet files, beside the hub's own cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "dms_lab" / "livecodebench"


def tables(source: str | Path | None, revision: str, release: str, cache: Path) -> list[Path]:
    """The parquet files of a release, made if they are not in `cache`; raises `ValueError` where that cannot be."""
    if release not in RELEASES:
        raise ValueError(f"release={release!r} is unknown; choose one of {', '.join(RELEASES)}")
    if source is None:
        return [_table_of_hub(name, revision, cache) for name in RELEASES[release]]
    source = Path(source)
    if source.is_file():
        return [_table(source, _state(source), cache)]
    missing = [name for name in RELEASES[release] if not (source / name).is_file()]
    if missing:
        raise ValueError(
            f"{source} does not have all files of {release}: {', '.join(missing)} missing; choose an earlier release, or "
            f"give one file as source, or get them with `{_download_command(' '.join(missing), REVISION)}`"
        )
    return [_table(source / name, _state(source / name), cache) for name in RELEASES[release]]


def rows(tables: Iterable[Path], wanted: Callable[[str], bool]) -> Iterator[dict[str, str]]:
    """The rows whose `contest_date` is `wanted`, in order; the tests of other rows are hardly read."""
    import pyarrow.parquet as pq

    for table in tables:
        with pq.ParquetFile(table) as file:
            for group in range(file.num_row_groups):
                dates = file.read_row_group(group, columns=["contest_date"]).column(0).to_pylist()
                if any(map(wanted, dates)):
                    yield from (row for row in file.read_row_group(group).to_pylist() if wanted(row["contest_date"]))


def _state(path: Path) -> str:
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"


def _table_of_hub(name: str, revision: str, cache: Path) -> Path:
    """The table of a file on the hub; one of a commit that was made before needs the hub no more."""
    known = _place(name, revision, cache)
    if re.fullmatch("[0-9a-f]{40}", revision) and known.is_file():
        return known
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(HUB_ID, name, repo_type="dataset", revision=revision))
    except Exception as error:  # the client's own, the system's, its HTTP library's
        raise ValueError(
            f"{name} of {HUB_ID} is not on this machine and cannot be loaded ({type(error).__name__}): run "
            f"`{_download_command(name, revision)}` where there is a network, or give source=<the file, or a folder of all>"
        ) from error
    return _table(path, path.parent.name, cache)


def _download_command(names: str, revision: str) -> str:
    return f"hf download --repo-type dataset {HUB_ID} {names} --revision {revision}"


def _place(name: str, state: str, cache: Path) -> Path:
    key = hashlib.sha256(json.dumps([HUB_ID, name, state, _SCHEMA_VERSION]).encode()).hexdigest()[:16]
    return cache / f"{Path(name).stem}-{key}.parquet"


def _table(path: Path, state: str, cache: Path) -> Path:
    """The parquet file with the lines of `path`; it appears whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    place = _place(path.name, state, cache)
    if place.is_file():
        return place
    cache.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([(column, pa.large_string()) for column in COLUMNS])
    handle, unfinished = tempfile.mkstemp(dir=cache, prefix=place.stem, suffix=".unfinished")
    os.close(handle)
    try:
        with pq.ParquetWriter(unfinished, schema, compression="zstd") as writer:
            for batch in _batches(_lines(path)):
                writer.write_table(pa.Table.from_pylist(batch, schema), row_group_size=_ROWS_AT_A_TIME)
        os.replace(unfinished, place)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(unfinished)
    return place


def _batches(found: Iterator[dict[str, str]]) -> Iterator[list[dict[str, str]]]:
    batch: list[dict[str, str]] = []
    for row in found:
        batch.append(row)
        if len(batch) == _ROWS_AT_A_TIME:
            yield batch
            batch = []
    if batch:
        yield batch


def _lines(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _checked(line, f"line {number} of {path}")


def _checked(line: str, place: str) -> dict[str, str]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is no JSON: {error}") from None
    wrong = [name for name in COLUMNS if not isinstance(row, dict) or not isinstance(row.get(name), str)]
    if wrong:
        raise ValueError(f"{place} is no problem of {HUB_ID}: {', '.join(wrong)} must be there, and text")
    if not re.match(r"\d{4}-\d{2}-\d{2}", row["contest_date"]):
        raise ValueError(f"{place} has contest_date={row['contest_date']!r}, which does not begin with a day as 2024-08-01")
    return {name: row[name] for name in COLUMNS}


def tests_of(public: str, private: str, name: str) -> tuple[tuple[CodeTest, ...], int]:
    """All tests of a problem, the public ones first, and how many those are; raises `ValueError` if they cannot be read.

    Those of the last few problems are kept, as many answers to a problem are graded one after the other; threads may share
    them, and wait for each other to decode.
    """
    key = tuple(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in (public, private))
    with _KEPT_LOCK:
        if key in _KEPT:
            _KEPT.move_to_end(key)
        else:
            _KEPT[key] = _decoded_tests(public, private, name)
            while len(_KEPT) > 1 and (len(_KEPT) > _MOST_KEPT or _num_kept_characters() > _MOST_KEPT_CHARACTERS):
                _KEPT.popitem(last=False)
        return _KEPT[key]


_KEPT: OrderedDict[tuple[bytes, ...], tuple[tuple[CodeTest, ...], int]] = OrderedDict()
_KEPT_LOCK = threading.Lock()


def _num_kept_characters() -> int:
    return sum(len(test.input) + len(test.output) for tests, _ in _KEPT.values() for test in tests)


def _decoded_tests(public: str, private: str, name: str) -> tuple[tuple[CodeTest, ...], int]:
    try:
        first, others = _tests(json.loads(public)), _tests(json.loads(decoded(private)))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the tests of problem {name} cannot be read: {error!r}") from error
    if not first and not others:
        raise ValueError(f"problem {name} has no tests, so that nothing can be said about a program")
    return (*first, *others), len(first)


def _tests(found: Any) -> list[CodeTest]:
    return [CodeTest(test["input"], test["output"], test["testtype"]) for test in found]


def decoded(text: str, most_bytes: int = _MOST_BYTES) -> str:
    """The JSON of private tests, plain or as base64 of a zlib stream of a pickled string.

    Nothing is unpickled: the one string is read off the pickle's opcodes. Raises `ValueError` for any other pickle, and for
    more than `most_bytes`.
    """
    if text.lstrip().startswith("["):
        return text
    try:
        stream = zlib.decompressobj()
        data = stream.decompress(base64.b64decode(text), most_bytes + 1)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"private tests are neither JSON nor base64 of a zlib stream: {error}") from None
    if len(data) > most_bytes or not stream.eof:
        raise ValueError(f"private tests are cut off, or have more than {most_bytes} bytes")
    strings = []
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in _STRINGS:
            strings.append(argument)
        elif opcode.name not in _STRING_OPCODES:
            raise ValueError(f"private tests are a pickle with {opcode.name}, where a single string was expected")
    if len(strings) != 1:
        raise ValueError(f"private tests are a pickle of {len(strings)} strings, where a single one was expected")
    return strings[0]
