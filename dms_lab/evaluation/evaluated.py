"""What was evaluated in a folder and stands in its `results.jsonl`: `evaluated.json`, read without torch."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dms_lab.config import DataConfig, TrainConfig
from dms_lab.training.text_files import content_hash, text_files

EVALUATED = "evaluated.json"
PART = "evaluation.part.jsonl"  # of `partial`: what an evaluation has measured that is not finished
_RESULTS = "results.jsonl"  # as in `results`


def own_evaluation(config: TrainConfig) -> dict[str, Any]:
    """What the evaluation at the end of a run is asked; how many processes measured does not count."""
    return {"eval": {key: value for key, value in asdict(config.eval).items() if key != "workers"}}


def dialled_evaluation(config: TrainConfig, ratios: Sequence[float], text: str | None) -> dict[str, Any]:
    """What an own evaluation at other ratios is asked; `text` names what it was calibrated on, whose content counts."""
    asked = own_evaluation(config) | {"cr": list(ratios), "calibrate": text}
    return asked if text is None else asked | {"calibrate_content": _content(text)}


def _content(text: str) -> str | None:
    """What is in the files that calibrate= names; None if they are gone, where what was recorded counts as it is."""
    extensions = (".jsonl",) if text.endswith(".jsonl") else DataConfig("text").extensions
    try:
        return content_hash(text_files(text, extensions))
    except ValueError:
        return None


def is_recorded(folder: Path, what: dict[str, Any]) -> bool:
    """Whether `what` was evaluated to its end here, and the results still have its rows.

    Of records without digests of the rows it is their number, over all that was evaluated, that must be there.
    """
    mine = _entry(folder, what)
    if mine is None:
        return False
    if "rows" in mine:
        return set(mine["rows"]) <= set(digests(folder))
    return num_rows(folder) >= sum(entry["num_rows"] for entry in _entries(folder))


def rows_of(folder: Path, what: dict[str, Any]) -> set[str]:
    """The digests of the rows of `what`; of all rows where its record, an older one, does not have them."""
    mine = _entry(folder, what)
    return set() if mine is None else set(mine.get("rows", digests(folder)))


def record(folder: Path, what: dict[str, Any], lines: Iterable[int]) -> None:
    """Notes that `what` was evaluated to its end, and that its rows stand on these lines, from 0; whole or not at all."""
    entries = [entry for entry in _entries(folder) if entry["what"] != _plain(what)]
    there = digests(folder)
    rows = [there[line] for line in lines]
    entry = {"what": _plain(what), "num_rows": len(rows), "rows": rows}
    temporary = (folder / EVALUATED).with_suffix(".tmp")
    temporary.write_text(json.dumps([*entries, entry], indent=1) + "\n")
    temporary.replace(folder / EVALUATED)


def num_rows(folder: Path) -> int:
    """Lines of the results in a folder; 0 before there are any."""
    path = folder / _RESULTS
    return len(path.read_bytes().splitlines()) if path.is_file() else 0


def digests(folder: Path) -> list[str]:
    """What tells the rows of the results from each other, in their order."""
    path = folder / _RESULTS
    lines = path.read_bytes().splitlines() if path.is_file() else []
    return [hashlib.sha256(line).hexdigest()[:12] for line in lines]


def drop_cut_off_line(folder: Path) -> None:
    """Removes a last line of the results that a kill or a full disk cut off; what it was to say is measured again."""
    path = folder / _RESULTS
    if not path.is_file() or (content := path.read_bytes()).endswith(b"\n") or not content:
        return
    with path.open("r+b") as file:
        file.truncate(content.rfind(b"\n") + 1)


def _entry(folder: Path, what: dict[str, Any]) -> dict[str, Any] | None:
    wanted = _plain(what)
    unknown = {"calibrate_content"} if wanted.get("calibrate_content", "") is None else set()

    def compared(known: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in known.items() if name not in unknown}

    return next((entry for entry in _entries(folder) if compared(entry["what"]) == compared(wanted)), None)


def _entries(folder: Path) -> list[dict[str, Any]]:
    """The entries of a record; none of one that something else has written."""
    try:
        entries = json.loads((folder / EVALUATED).read_text())
    except (OSError, json.JSONDecodeError):
        return []
    is_ours = isinstance(entries, list) and all(isinstance(e, dict) and {"what", "num_rows"} <= set(e) for e in entries)
    return entries if is_ours else []


def _plain(what: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(what))
