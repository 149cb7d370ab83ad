"""Compare results: ``python -m dms_lab.pareto experiments/<name>`` prints a table and writes figures and a report.

A place is a study's or a run's folder, one that holds several runs, a sweep's file, or a file of results. Written into it
(or into --out): pareto.csv, margins.csv, figures/*.png and *.svg, report.html.
"""

import argparse
import shlex
import sys
from pathlib import Path

BASELINE = "full"


def main(words: list[str] | None = None) -> int:
    """Runs the command; returns its exit status: 1, and one sentence, if words, results or files are wrong."""
    words = sys.argv[1:] if words is None else words
    asked = _parser().parse_args(words)
    try:
        _compare(asked, shlex.join(["python", "-m", "dms_lab.pareto", *words]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename} cannot be read or written: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m dms_lab.pareto", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    several = 'the baseline of margins (default: full); "method variant" where it has several'
    equal = "how much less accurate than the baseline counts as equal, in points (default: 0)"
    parser.add_argument("places", nargs="+", type=Path, metavar="place", help="folder or file of results, or of a sweep")
    parser.add_argument("--task", action="append", default=[], metavar="NAME", help="this task alone; again for more")
    parser.add_argument("--against", default=BASELINE, metavar="METHOD", help=several)
    parser.add_argument("--within", type=float, default=0.0, metavar="POINTS", help=equal)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where files go (default: the place)")
    parser.add_argument("--wandb", action="store_true", help="send the comparison and its runs to Weights & Biases")
    return parser


def _compare(asked: argparse.Namespace, command: str) -> None:
    out = _out(asked)
    from rich.markup import escape

    from dms_lab import html_report, tracking
    from dms_lab.html_report import analysis, content, sources, tables
    from dms_lab.terminal import console

    if asked.wandb and not tracking.has_results(asked.places):  # trainings alone
        _tell(tracking.rebuild(asked.places))
        return
    origin = sources.origin_of(asked.places)
    frame = analysis.select_tasks(sources.load(origin), asked.task)
    found = analysis.analyse(frame, asked.against, asked.within / 100)
    terminal = console()
    for table in content.summary(found):
        terminal.print(tables.to_rich(table))
    for notice in (*origin.notices, *content.notes(found)):
        terminal.print(f"note: {escape(notice)}", highlight=False)
    for warning in found.warnings:
        terminal.print(f"[bold red]warning:[/] {escape(warning)}", highlight=False)
    title = ", ".join(place.resolve().name for place in asked.places)
    paths = [*content.write_tables(found, out), *content.write_figures(found, origin, out / "figures")]
    paths.append(html_report.write(content.page_of(found, origin, title, command), out / "report.html"))
    terminal.print("\n".join(str(path) for path in paths if path.suffix != ".svg"), highlight=False, markup=False)
    if asked.wandb:
        compared = tracking.Comparison(found.points, found.margins, tuple(found.warnings), paths[-1])
        _tell(tracking.rebuild(asked.places, compared, out))


def _tell(runs: list) -> None:
    """Says where the W&B runs are, and how those that are kept offline are sent."""
    kept = sorted({str(run.place.parent / "offline-run-*") for run in runs if run.is_offline})
    if kept:
        print(f"W&B: {len(runs)} runs are kept offline; to send them: wandb sync {' '.join(kept)}")
    else:
        print(f"W&B has {len(runs)} runs: {' '.join(run.label.run_id for run in runs)}")


def _out(asked: argparse.Namespace) -> Path:
    """Where files go; raises `ValueError` if that is not clear."""
    if asked.out is not None:
        return asked.out
    if len(asked.places) > 1:
        raise ValueError("several places are compared: say with --out where the files of their comparison go")
    place = asked.places[0]
    return place if place.is_dir() else place.parent


if __name__ == "__main__":
    sys.exit(main())
