"""How far an evaluation is: problems done, tokens a second, running accuracy with its interval, truncation, time left.

On a terminal a line that is drawn over; in a log (Slurm, a pipe) a line a minute.
"""

import sys
import time
from collections.abc import Iterable

from rich.progress import BarColumn, Progress, TextColumn

from dms_lab import pareto, terminal

_SECONDS_BETWEEN_LINES = 60.0


class Meter:
    """Counts the chains of one task as they end and are graded, and shows the state. Use as a context manager."""

    def __init__(self, task: str, problems: Iterable[str], tokens_per_chain: int) -> None:
        self.task = task
        self._left: dict[str, int] = {}
        for problem in problems:
            self._left[problem] = self._left.get(problem, 0) + 1
        self._num_problems, self._num_chains = len(self._left), sum(self._left.values())
        self._scores: dict[str, list[float]] = {}
        self._done = self._truncated = 0
        self._tokens, self._chains_here, self._most = 0, 0, tokens_per_chain
        self._started = self._said = time.monotonic()
        self._is_terminal = sys.stdout.isatty()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
        self._bar = Progress(*columns, console=terminal.console(), transient=True, disable=not self._is_terminal)
        self._row = self._bar.add_task(task, total=self._num_chains, state="")

    def __enter__(self) -> "Meter":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def token(self) -> None:
        """One token was generated; tokens a second are of this sitting."""
        self._tokens += 1
        if self._tokens % 256 == 0:
            self._show()

    def chain(self, problem: str, truncated: bool, is_new: bool) -> None:
        """A chain ended (`is_new`) or was in the store already."""
        self._left[problem] -= 1
        self._done += 1
        self._truncated += truncated
        self._chains_here += is_new
        self._bar.update(self._row, completed=self._done)
        self._show()

    def graded(self, problem: str, score: float) -> None:
        """A chain of `problem` has a verdict."""
        self._scores.setdefault(problem, []).append(score)

    def state(self) -> str:
        """The state as one line."""
        finished = sum(left == 0 for left in self._left.values())
        parts = [f"{finished}/{self._num_problems} problems", f"{self._done}/{self._num_chains} chains"]
        if self._tokens:
            parts.append(f"{self._tokens / max(1e-9, time.monotonic() - self._started):.0f} tokens/s")
        if self._scores:
            means = [sum(found) / len(found) for found in self._scores.values()]
            low, high = pareto.wilson_interval(sum(means), len(means))  # of parts, too: no narrower than it is
            parts.append(f"{100 * sum(means) / len(means):.1f} % [{100 * low:.0f}-{100 * high:.0f}]")
        if self._done:
            parts.append(f"{100 * self._truncated / self._done:.0f} % truncated")
        return ", ".join(parts)

    def _line(self) -> str:
        """The state, and how long the rest takes at the rate of the chains that were generated in this sitting."""
        if not self._chains_here:
            return self.state()
        seconds = (time.monotonic() - self._started) / self._chains_here * (self._num_chains - self._done)
        return f"{self.state()}, {seconds / 60:.0f} min left"

    def _show(self) -> None:
        if self._is_terminal:
            self._bar.update(self._row, state=self._line())
        elif time.monotonic() - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            print(f"{self.task}: {self._line()}", flush=True)
