"""What the benchmarks share: contestants that take turns, rows of what was measured, and the file they are kept in.

    take_turns  seconds of each contestant, turn by turn, in one process
    Row         one contestant of one case, and the contestant of the same case that its ratio refers to
    write       results.json: rows, hardware, versions, revision; `compare.py` holds one against another

A machine is shared and its clock moves, so what is compared between two runs is a ratio within each: of a turn's value to
that of the dense contestant in the same turn, the median over the turns.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from dms_lab.results import git_revision, versions

ROOT = Path(__file__).resolve().parents[2]
RESULTS = "results.json"


@dataclass(frozen=True)
class Row:
    """What a contestant was measured at in each turn of a case, in seconds or bytes; `dense` is whom it is held against.

    `is_race`: a larger ratio to `dense` is a worse one. Not so of a share of a whole, and of an interpreter's time.
    """

    case: str
    name: str
    values: Sequence[float]
    dense: str
    unit: str = "s"
    is_race: bool = True
    notes: dict[str, Any] = field(default_factory=dict)


# -- time --------------------------------------------------------------------------------------------------------------
def take_turns(
    contestants: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of a call of each contestant in each of `rounds` turns, after `warm_up` turns that are not counted."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(-warm_up, rounds):
        for name, run in contestants.items():
            taken = seconds(run, device)
            if turn >= 0:
                found[name].append(taken)
    return found


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, to the end of what it has started on the device.

    On a CPU with one thread, of the processor: what others do meanwhile on the same core is not counted.
    """
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record()
        run()
        marks[1].record()
        torch.cuda.synchronize(device)
        return marks[0].elapsed_time(marks[1]) / 1e3
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    started = clock()
    run()
    return clock() - started


# -- ratios ------------------------------------------------------------------------------------------------------------
def ratios(rows: Iterable[Row]) -> dict[tuple[str, str], float]:
    """By case and name, what a contestant takes of its dense one: the median over turns; the dense ones are left out.

    Where the two had not the same number of turns (what is counted and not timed has one), it is of their medians.
    """
    known = {(row.case, row.name): row for row in rows}
    return {place: _ratio(row, known[row.case, row.dense]) for place, row in known.items() if row.name != row.dense}


def _ratio(row: Row, dense: Row) -> float:
    if len(row.values) == len(dense.values):
        return statistics.median(a / b for a, b in zip(row.values, dense.values, strict=True))
    return statistics.median(row.values) / statistics.median(dense.values)


# -- files -------------------------------------------------------------------------------------------------------------
def write(path: Path, rows: Sequence[Row], device: torch.device, **more: Any) -> None:
    """Writes the rows with machine, versions and revision, whole or not at all."""
    found = {"hardware": hardware(device), "threads": torch.get_num_threads(), "versions": versions()}
    found |= {"git_revision": git_revision(), **more, "rows": [asdict(row) for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.replace(path)


def read(path: Path) -> tuple[dict, list[Row]]:
    """What `write` wrote: everything beside the rows, and the rows."""
    found = json.loads(path.read_text())
    return found, [Row(**row) for row in found.pop("rows")]


def hardware(device: torch.device) -> str:
    """The GPU by its own name, or the processor and how many of its cores this machine has."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


# -- commands and tables -------------------------------------------------------------------------------------------------
def parser(description: str, folder: Path) -> argparse.ArgumentParser:
    """A benchmark's command: --short, --device, --out (beside the script if it is the short form, else asked for)."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--short", action="store_true", help="the form that `make bench` runs: small sizes, seconds in all")
    made.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument(
        "--out", type=Path, help=f"default: with --short {folder.name}/{RESULTS}, else {folder.name}/full.json"
    )
    made.set_defaults(folder=folder)
    return made


def out(args: argparse.Namespace) -> Path:
    """Where the results of a benchmark's command go."""
    return args.out or args.folder / (RESULTS if args.short else "full.json")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
