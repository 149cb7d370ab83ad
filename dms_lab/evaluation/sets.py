"""Where the benchmarks' rows come from: files of the hub, or local ones of the same columns.

name in SETS -> hub file at a pinned revision, or source=... -> rows, checked for their columns
"""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_from_disk

Row = dict[str, Any]


@dataclass(frozen=True)
class SetInfo:
    """A benchmark on the hub: where it lies, how large it is, under which licence as far as known here.

    `file` is the one file that is read, `revision` a commit; LiveCodeBench has a module of its own for its many files.
    """

    hub_id: str
    configuration: str | None
    split: str
    num_problems: int
    licence: str = "see page"
    gated: bool = False
    file: str | None = None
    revision: str = "main"

    @property
    def page(self) -> str:
        """Its page, with the terms to accept where it is gated."""
        return f"https://huggingface.co/datasets/{self.hub_id}"


SETS: dict[str, SetInfo] = {
    "aime24": SetInfo(
        "HuggingFaceH4/aime_2024",
        None,
        "train",
        30,
        file="data/train-00000-of-00001.parquet",
        revision="2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
    ),
    "aime25": SetInfo(
        "math-ai/aime25", None, "test", 30, file="test.jsonl", revision="563bb8404243c5f09de6ec262f2db674fe5bce9b"
    ),
    "math500": SetInfo(
        "HuggingFaceH4/MATH-500", None, "test", 500, file="test.jsonl", revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be"
    ),
    "gpqa_diamond": SetInfo(
        "Idavidrein/gpqa",
        "gpqa_diamond",
        "train",
        198,
        licence="CC-BY-4.0",
        gated=True,
        file="gpqa_diamond.csv",
        revision="633f5ee89ab8ad4522a9f850766b73f62147ffdd",
    ),
    # Releases are cumulative; 1055 is release_v6.
    "livecodebench": SetInfo(
        "livecodebench/code_generation_lite", None, "test", 1055, revision="0fe84c3912ea0c4d4a78037083943e8f0c4dd505"
    ),
}


def read_rows(name: str, columns: tuple[str, ...], source: str | None = None, revision: str | None = None) -> list[Row]:
    """The rows of a set in `SETS`, all of which have `columns`, from the hub's cache, the hub or `source`.

    `source` is a jsonl, parquet or csv file, a folder that `save_to_disk` wrote, or one with the set's file in it.
    Raises `ValueError` where it cannot be had, saying how to get it, or lacks a column, naming it.
    """
    info = SETS[name]
    path = _download(info, revision or info.revision) if source is None else Path(source).expanduser()
    rows = _read_folder(path, info) if path.is_dir() else _read_file(path)
    if not rows:
        raise ValueError(f"{path} has no rows, so there is nothing to evaluate {name} on")
    for number, row in enumerate(rows):
        missing = [column for column in columns if row.get(column) is None]
        if missing:
            raise ValueError(
                f"row {number} of {path} lacks the column {missing[0]!r}; {name} needs {', '.join(columns)} and finds "
                f"{', '.join(map(str, row))}"
            )
    return rows


def _download(info: SetInfo, revision: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(info.hub_id, info.file, repo_type="dataset", revision=revision))
    except Exception as error:  # the client raises its own, the system's and its HTTP library's
        terms = f"it is gated, so accept its terms on {info.page}, run `hf auth login` and then " if info.gated else "run "
        raise ValueError(
            f"{info.hub_id} cannot be loaded ({type(error).__name__}): {terms}"
            f"`hf download --repo-type dataset {info.hub_id} {info.file} --revision {revision}` where there is a network, "
            "or give source=<a jsonl, parquet or csv file, or a folder, with the same columns>"
        ) from error


def _read_folder(folder: Path, info: SetInfo) -> list[Row]:
    if any((folder / name).exists() for name in ("state.json", "dataset_dict.json")):
        found = load_from_disk(str(folder))
        if isinstance(found, DatasetDict):
            if info.split not in found:
                raise ValueError(f"{folder} has no split {info.split}, which {info.hub_id} has, but {', '.join(found)}")
            found = found[info.split]
        return found.to_list()
    files = [path for path in (folder / info.file, folder / Path(info.file).name) if path.is_file()]
    files = files or sorted(path for path in folder.rglob("*") if path.suffix in READERS)
    if not files:
        raise ValueError(f"{folder} has no data file; these can be read: {', '.join(READERS)}")
    if len(files) > 1 and files[0].name != Path(info.file).name:
        names = ", ".join(str(path.relative_to(folder)) for path in files[:5])
        raise ValueError(f"{folder} has {len(files)} data files ({names}); give source=<one of them>")
    return _read_file(files[0])


def _read_file(path: Path) -> list[Row]:
    if not path.is_file():
        raise ValueError(f"source={path} is neither a file nor a folder")
    if path.suffix not in READERS:
        raise ValueError(f"source={path} cannot be read: its suffix is none of {', '.join(READERS)}")
    try:
        return READERS[path.suffix](path)
    except (OSError, ValueError) as error:
        raise ValueError(f"source={path} cannot be read as {path.suffix[1:]}: {error}") from error


def _read_jsonl(path: Path) -> list[Row]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is no JSON object")
    return rows


def _read_parquet(path: Path) -> list[Row]:
    from pyarrow import parquet

    return parquet.read_table(path).to_pylist()


def _read_csv(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
