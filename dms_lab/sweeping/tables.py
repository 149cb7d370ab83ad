"""What the commands of a sweep print."""

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dms_lab.sweep_config import SweepConfig
from dms_lab.sweeping.state import STATES, PointState

_COLOURS = {
    "done": "green",
    "failed": "bold red",
    "running": "cyan",
    "evaluating": "cyan",
    "unknown": "yellow",
    "elsewhere": "yellow",
}
WIDTH = 140  # in a file or pipe


def console() -> Console:
    """Where tables go: as wide as the terminal, and wide enough for them in a file or pipe."""
    import sys

    return Console(width=None if sys.stdout.isatty() else WIDTH)


def print_states(sweep: SweepConfig, states: Sequence[PointState]) -> None:
    """A row a point, then why points failed, with the last lines of their logs, and how many stand where."""
    out = console()
    out.print(states_table(sweep, states))
    _print_reasons(out, states)
    count = Counter(state.state for state in states)
    out.print(", ".join(f"{count[name]} {name}" for name in STATES if count[name]) + f" of {len(states)} points")


def states_table(sweep: SweepConfig, states: Sequence[PointState]) -> Table:
    """A row a point."""
    table = Table("Point", "State", "Step", "CR", "Job", "Elapsed", "Differs in", title=sweep.question or sweep.name)
    common = set.intersection(*(set(state.point.overrides) for state in states))
    for state in states:
        step = f"{state.step or 0}/{state.steps}" if state.steps and state.state != "done" else ""
        cr = f"{state.cr:.2f}" if state.cr is not None and state.state != "done" else ""
        words = f"[{_COLOURS.get(state.state, 'default')}]{_words(state)}[/]"
        job = state.job.job_id if state.job and state.state != "done" else ""
        table.add_row(state.point.name, words, step, cr, job, state.elapsed, escape(_differing(state, common)))
    return table


def _print_reasons(out: Console, states: Sequence[PointState]) -> None:
    for state in states:
        if state.state in ("failed", "unknown"):
            out.print(f"[bold red]{state.state}[/] {state.point.name}: {escape(state.reason)}", highlight=False)
            for line in state.log:
                out.print(f"    {escape(line)}", highlight=False, style="dim")
            if state.log_path:
                out.print(f"    log: {state.log_path}", highlight=False, soft_wrap=True)


def _words(state: PointState) -> str:
    """The state in words: how often a job was requeued, and what one waits for."""
    times = f"requeued {state.restarts} time{'s' if state.restarts > 1 else ''}"
    if state.state == "requeued":
        return times
    if state.is_active and state.restarts:
        return f"{state.state} ({times})"
    if state.state in ("pending", "missing", "elsewhere") and state.reason not in ("", "None"):
        return escape(f"{state.state} ({state.reason})")
    return state.state


def _differing(state: PointState, common: set[str]) -> str:
    """The overrides that not every point has."""
    return " ".join(word for word in state.point.overrides if word not in common)
