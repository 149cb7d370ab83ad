"""A run of the benchmarks against the committed one: python -m experiments.benchmarks.compare <folder> [--tolerance 1.3]

    <folder>/<name>/results.json, and the one beside the benchmark -> ratios to the dense contestant within each run
      -> a table of what changed; exit status 1 where a ratio grew beyond the tolerance, or a case is no more

Seconds of two runs are never compared: the machines, or their neighbours, differ. A ratio of times is held against one of
the same hardware, threads and dtype, which it depends on; one of bytes against one of the same dtype.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from experiments.benchmarks import harness

HERE = Path(__file__).parent
SETTINGS = ("hardware", "threads", "dtype")


class Change(NamedTuple):
    """A contestant's ratio to the dense one of its case, in the committed run and in the new one; None where it is not."""

    benchmark: str
    case: str
    name: str
    before: float | None
    now: float | None
    is_race: bool = True
    is_alike: bool = True

    def verdict(self, tolerance: float) -> str:
        """What is to be said of it: "" if nothing is. Only a race under the same settings can become worse or better."""
        if self.now is None:
            return "gone"
        if self.before is None:
            return "new"
        if self.before / tolerance <= self.now <= tolerance * self.before:
            return ""
        if not self.is_alike:
            return "not comparable"
        if not self.is_race:
            return "differs"
        return "worse" if self.now > self.before else "better"


def changes(committed: Path, new: Path) -> Iterator[Change]:
    """Every contestant of every benchmark that the folder `new` has results of, in the order of the committed ones."""
    for path in sorted(new.glob(f"*/{harness.RESULTS}")):
        name = path.parent.name
        old = committed / name / harness.RESULTS
        about, rows = harness.read(path)
        about_old, rows_old = harness.read(old) if old.is_file() else (about, [])
        before, now = harness.ratios(rows_old), harness.ratios(rows)
        known = {(row.case, row.name): row for row in [*rows_old, *rows]}
        for place in dict.fromkeys([*before, *now]):
            decided_by = ("dtype",) if known[place].unit == "byte" else SETTINGS
            is_alike = all(about.get(key) == about_old.get(key) for key in decided_by)
            yield Change(name, *place, before.get(place), now.get(place), known[place].is_race, is_alike)


def differences(committed: Path, new: Path) -> Iterator[str]:
    """What else is not alike in the two runs: settings, without which times are not comparable, and versions."""
    for path in sorted(new.glob(f"*/{harness.RESULTS}")):
        old = committed / path.parent.name / harness.RESULTS
        if not old.is_file():
            continue
        before, now = (harness.read(p)[0] for p in (old, path))
        for key in SETTINGS:
            if before.get(key) != now.get(key):
                yield f"{path.parent.name}: {key} was {before.get(key)!r} and is {now.get(key)!r}"
        for package, version in before["versions"].items():
            if now["versions"].get(package) != version:
                yield f"{path.parent.name}: {package} was {version} and is {now['versions'].get(package)}"


def main(words: list[str] | None = None) -> int:
    """Prints the table; 1 if something is worse or gone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the new run, as run.py --folder wrote it")
    parser.add_argument("--committed", type=Path, default=HERE)
    parser.add_argument("--tolerance", type=float, default=1.3, help="what a ratio may change by on a shared machine")
    args = parser.parse_args(words)
    found = list(changes(args.committed, args.folder))
    if not found:
        parser.error(
            f"{args.folder} has no <name>/{harness.RESULTS}; make them: python -m experiments.benchmarks.run --folder"
        )

    def shown(ratio: float | None) -> str:
        return "-" if ratio is None else f"{ratio:.3g}"

    verdicts = [change.verdict(args.tolerance) for change in found]
    cells = [(c.benchmark, c.case, c.name, shown(c.before), shown(c.now), v) for c, v in zip(found, verdicts, strict=True)]
    print(harness.table(("benchmark", "case", "contestant", "of dense, committed", "now", ""), cells))
    for line in differences(args.committed, args.folder):
        print(line)
    bad = sum(verdict in ("worse", "gone") for verdict in verdicts)
    print(f"{len(found)} ratios, {bad} of them worse by more than a factor of {args.tolerance:g}, or gone")
    if others := verdicts.count("not comparable"):
        print(
            f"{others} more are not comparable: run an older revision on this machine (experiments.benchmarks.run --folder "
            "<folder>), and give its folder as --committed"
        )
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
