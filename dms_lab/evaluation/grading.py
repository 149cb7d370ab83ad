"""Verdicts on chains, in the background while others are generated, kept in the store.

    sample, cut at L tokens -> what it says by then -> verdict known? else graded by a thread -> store

A verdict is known by the chain, the cut and the grader: its version, and a hash of what the answer was compared with and of
where it was looked for, so that a corrected answer key or another way of thinking is graded anew.
"""

import hashlib
import json
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from dms_lab.evaluation.benchmarks import Benchmark, Graders, judge
from dms_lab.evaluation.sample import Key, Sample
from dms_lab.evaluation.scores import cut
from dms_lab.evaluation.store import SampleStore
from dms_lab.evaluation.verdict import Verdict

_Name = tuple[Key, int, str]  # chain, tokens of the cut, grader

_MOST_OPEN = 512  # answers that wait for a grader; more of them would fill the memory
_GRADED = ("answer", "public_tests", "private_tests", "fn_name")  # of a problem: what answers are compared with


class Grading:
    """Grades chains of one task and run. Use as a context manager: leaving it waits for every verdict.

    Verdicts that the store has are not made again unless `regrade`. Callbacks run, and the store is written, in the
    thread that calls `put` and `drain`. What a grader raises is raised there, too; verdicts made by then are kept.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        graders: Graders,
        text_of: Callable[[Sequence[int]], str],
        store: SampleStore | None,
        task: str,
        run: str,
        threads: int = 2,
        regrade: bool = False,
    ) -> None:
        self.benchmark, self.graders, self.text_of, self.store = benchmark, graders, text_of, store
        self.version = f"{benchmark.kind}-{benchmark.version}"
        if benchmark.runs_code:
            self.version += f"-{graders.identity}"
        self._known = {} if store is None or regrade else store.graded(task, run)
        self._graders: dict[tuple[str, str | None], str] = {}
        self._pool = ThreadPoolExecutor(threads)
        self._open: dict[_Name, tuple[Future, list[Callable[[Verdict], None]]]] = {}
        self._done: queue.SimpleQueue[_Name] = queue.SimpleQueue()

    def __enter__(self) -> "Grading":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            return
        try:
            self.drain(wait=True)
        finally:
            self._pool.shutdown(cancel_futures=True)

    def put(
        self,
        sample: Sample,
        max_tokens: int,
        doc: dict[str, Any],
        think_end: str | None,
        done: Callable[[Verdict], None],
    ) -> None:
        """Has a chain graded as it stands after `max_tokens`; `done` gets its verdict, at once if it is known."""
        part = cut(sample, max_tokens)
        name = (sample.key, len(part.ids), self.grader_of(sample.problem, doc, think_end))
        if name in self._known:
            done(self._known[name])
        elif name in self._open:
            self._open[name][1].append(done)
        else:
            while len(self._open) >= _MOST_OPEN:
                self._take(wait=True)
            text = sample.text if len(part.ids) == sample.num_tokens else self.text_of(part.ids)
            future = self._pool.submit(judge, self.benchmark, self.graders, doc, text, part.truncated, think_end)
            self._open[name] = (future, [done])
            future.add_done_callback(lambda _: self._done.put(name))
        self.drain()

    def grader_of(self, problem: str, doc: dict[str, Any], think_end: str | None) -> str:
        """What stands for the grader of a problem in the store."""
        if (problem, think_end) not in self._graders:
            compared = [think_end, *(doc.get(name) for name in _GRADED)]
            digest = hashlib.sha256(json.dumps(compared, default=str).encode()).hexdigest()[:12]
            self._graders[problem, think_end] = f"{self.version}-{digest}"
        return self._graders[problem, think_end]

    def drain(self, wait: bool = False) -> None:
        """Takes in the verdicts that are there; all of them if `wait`, unless a grader raises."""
        while self._take(wait) and wait:
            pass

    def _take(self, wait: bool) -> bool:
        """Takes in what is done, after waiting for one if asked to; False if there was nothing."""
        names = []
        while len(names) < len(self._open):
            try:
                names.append(self._done.get(block=wait and not names))
            except queue.Empty:
                break
        made, error = [], None
        for name in names:
            future, waiting = self._open.pop(name)
            if (raised := future.exception()) is not None:
                error = error or raised
            else:
                made.append((name, future.result(), waiting))
        if self.store is not None and made:
            self.store.add_verdicts((*name, verdict) for name, verdict, _ in made)
        for name, verdict, waiting in made:
            self._known[name] = verdict
            for done in waiting:
                done(verdict)
        if error is not None:
            raise error
        return bool(names)
