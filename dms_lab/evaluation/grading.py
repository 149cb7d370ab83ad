"""Verdicts on chains, in the background while others are generated, kept in the store.

sample, max_tokens -> Cut (the chain as it would have been) -> verdict known? else graded by a thread -> store
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from dms_lab.evaluation.benchmarks import Benchmark, Graders, judge
from dms_lab.evaluation.sample import Key, Sample
from dms_lab.evaluation.scores import cut
from dms_lab.evaluation.store import SampleStore
from dms_lab.evaluation.verdict import Verdict


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
        self._known = {} if store is None or regrade else store.verdicts(task, run, self.version)
        self._pool = ThreadPoolExecutor(threads)
        self._open: dict[tuple[Key, int], tuple[Future, list[Callable[[Verdict], None]]]] = {}

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
        key = (sample.key, len(part.ids))
        if key in self._known:
            done(self._known[key])
        elif key in self._open:
            self._open[key][1].append(done)
        else:
            text = sample.text if len(part.ids) == sample.num_tokens else self.text_of(part.ids)
            job = (self.benchmark, self.graders, doc, text, part.truncated, think_end)
            self._open[key] = (self._pool.submit(judge, *job), [done])
        self.drain()

    def drain(self, wait: bool = False) -> None:
        """Takes in the verdicts that are there; all of them if `wait`, unless a grader raises."""
        error: BaseException | None = None
        for key, (future, waiting) in list(self._open.items()):
            if not (future.done() or (wait and error is None)):
                continue
            del self._open[key]
            if (raised := future.exception()) is not None:
                error = raised if error is None else error
                continue
            verdict = future.result()
            if self.store is not None:
                self.store.add_verdict(*key, self.version, verdict)
            self._known[key] = verdict
            for done in waiting:
                done(verdict)
        if error is not None:
            raise error
