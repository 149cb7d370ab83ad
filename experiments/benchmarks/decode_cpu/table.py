"""The measurements beside this file as Markdown: python table.py [measured.jsonl]

Times are the least and the median; a ratio is of medians of contestants that took turns. Of a case that was measured twice
the later one counts.
"""

import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

MEBI = 2**20


def load(path: Path) -> dict[str, list[dict]]:
    """The last line of every case, by kind of measurement."""
    latest = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        latest[tuple(row.get(k) for k in ("kind", "dtype", "contest", "name", "tokens", "batch"))] = row
    found: dict[str, list[dict]] = {}
    for row in latest.values():
        found.setdefault(row["kind"], []).append(row)
    return found


def print_table(title: str, head: str, rows: Iterable[list]) -> None:
    """A Markdown table; nothing without rows."""
    lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    if lines:
        print(f"\n{title}\n\n| {head} |\n" + "|---" * (head.count("|") + 1) + "|\n" + "\n".join(lines))


def spread(values: list[float], digits: int = 1) -> str:
    """Least and median."""
    return f"{min(values):.{digits}f} / {statistics.median(values):.{digits}f}"


def contests(rows: list[dict]) -> Iterable[tuple[dict, dict]]:
    """Each measured row with the one of its contest that ratios refer to, the contest's first."""
    for row in rows:
        place = {k: row[k] for k in ("dtype", "contest", "tokens", "batch")}
        first = place | {"name": row["contest"].split(",")[0]}
        yield row, next(r for r in rows if first.items() <= r.items())


def decode_rows(rows: list[dict]) -> Iterable[list]:
    """Times of a step and of its attention, tokens a second, and ratios to the contest's first."""
    for row, first in contests(rows):
        step, attend = (statistics.median(row[k]) for k in ("step_ms", "attend_ms"))
        ratios = [f"{statistics.median(first[k]) / v:.2f}" for k, v in (("attend_ms", attend), ("step_ms", step))]
        cells = [row["tokens"], row["batch"], row["name"], spread(row["attend_ms"]), spread(row["step_ms"])]
        yield [*cells, f"{1e3 * row['batch'] / step:.1f}", *ratios]


def bytes_rows(rows: list[dict]) -> Iterable[list]:
    """Bytes of every cache against its live slots, against `full`, and what the process grew by."""
    for row in rows:
        full = next(r for r in rows if r["name"] == "full" and all(r[k] == row[k] for k in ("tokens", "batch", "dtype")))
        held, grown, trimmed = (row[k] for k in ("held_bytes", "grown_bytes", "trimmed_bytes"))
        shares = [f"{held / row['ideal_bytes']:.3f}", f"1/{full['held_bytes'] / held:.2f}"]
        rest = [f"{grown / MEBI:.1f}", f"{trimmed / MEBI:.1f}", f"1/{full['trimmed_bytes'] / trimmed:.2f}"]
        yield [row["tokens"], row["batch"], row["name"], f"{held / MEBI:.1f}", *shares, *rest]


def prefill_rows(rows: list[dict]) -> Iterable[list]:
    """Seconds of a prompt, and the ratio to dense SDPA."""
    for row in rows:
        dense = next(r for r in rows if r["name"] == "hf" and r["tokens"] == row["tokens"] and r["dtype"] == row["dtype"])
        ratio = statistics.median(row["seconds"]) / statistics.median(dense["seconds"])
        yield [row["tokens"], row["name"], spread(row["seconds"], 2), f"{ratio:.2f}"]


def peak_rows(rows: list[dict]) -> Iterable[list]:
    """Peak memory of a prompt, and of it what the cache holds in the end."""
    for row in rows:
        sizes = [f"{row[k] / MEBI:.1f}" for k in ("peak_bytes", "held_bytes")]
        yield [row["tokens"], row["name"], *sizes, f"{row['seconds']:.1f}"]


def peer_rows(rows: list[dict]) -> Iterable[list]:
    """Tokens a second of decoding, and seconds of the prefill."""
    for row in rows:
        speeds = [run["tokens_per_second"] for run in row["runs"]]
        prefills = [run["prefill_seconds"] for run in row["runs"]]
        fast = f"{max(speeds):.1f} / {statistics.median(speeds):.1f}"
        yield [row["tokens"], row["budget"], row["name"], fast, spread(prefills, 2)]


def main() -> None:
    """Prints every table for which there are measurements."""
    found = load(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("measured.jsonl"))
    head = "context | batch | cache | attention ms | step ms | tokens/s | attention: first / this | step: first / this"
    cases = sorted({(r["dtype"], r["contest"]) for r in found.get("decode", [])}, reverse=True)
    for dtype, contest in cases:
        rows = [r for r in found["decode"] if (r["dtype"], r["contest"]) == (dtype, contest)]
        print_table(f"decode, {dtype}, in turns: {contest}", head, decode_rows(rows))
    head = "context | batch | cache | held MiB | held / ideal | of full | process grew MiB | after malloc_trim | of full"
    print_table("bytes", head, bytes_rows(found.get("memory", [])))
    print_table("prefill", "context | way | seconds | of dense SDPA", prefill_rows(found.get("prefill", [])))
    print_table("peak", "context | way | peak MiB | cache MiB at the end | seconds", peak_rows(found.get("peak", [])))
    head = "context | budget | cache | tokens/s, most / median | prefill s"
    print_table("kvpress", head, peer_rows(found.get("peer", [])))


if __name__ == "__main__":
    main()
