"""Several retrofits at a time, a process of one thread each: small models gain nothing from a second thread.

configs -> processes -> metrics.jsonl of each run -> one bar a run
SIGINT, SIGTERM -> SIGTERM to the processes, which save and stop; the same call goes on from there
"""

import json
import multiprocessing
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dms_lab.config import TrainConfig, run_folder
from dms_lab.training.run import DONE, Outcome, train


def train_all(configs: dict[str, TrainConfig], workers: int) -> dict[str, Outcome]:
    """Trains every run that is not finished, `workers` at a time; returns the outcomes by name.

    After a signal the runs that were under way have saved their state, and those that had not begun did not. Raises
    `ValueError` if a run failed; the others are ended first.
    """
    context = multiprocessing.get_context("spawn")
    waiting = [name for name, config in configs.items() if not (config.resume and _is_done(config))]
    running: dict[str, BaseProcess] = {}
    failed: list[str] = []
    with _bars(configs) as show, _signals_for(running) as received:
        while waiting or running:
            while waiting and len(running) < workers:
                name = waiting.pop(0)
                running[name] = context.Process(target=_train, args=(configs[name],), name=name)
                running[name].start()
            time.sleep(0.2)
            show()
            for name, process in list(running.items()):
                if not process.is_alive():
                    del running[name]
                    if process.exitcode and not received and not failed:
                        failed.append(name)
                        _stop(running)
            if received or failed:
                waiting.clear()
    if failed:
        raise ValueError(f"the run {failed[0]} failed; its error stands above")
    stopped_by = signal.Signals(received[0]).name if received else None
    return {name: _outcome(config, stopped_by) for name, config in configs.items()}


def _train(config: TrainConfig) -> None:
    """What a process does: one run, whose error is printed as one sentence."""
    from dms_lab.terminal import quiet

    quiet(trains=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent's SIGTERM is what counts
    try:
        train(replace(config, threads=1), progress=False)
    except ValueError as error:
        sys.exit(f"error: {error}")


def _is_done(config: TrainConfig) -> bool:
    return (Path(run_folder(config)) / DONE).is_file()


def _outcome(config: TrainConfig, stopped_by: str | None) -> Outcome:
    finished = _is_done(config)
    return Outcome(Path(run_folder(config)), finished, None if finished else stopped_by)


def _stop(running: dict[str, BaseProcess]) -> None:
    """Tells every run to save and stop; one that has nothing to save yet just ends."""
    for process in running.values():
        process.terminate()


@contextmanager
def _signals_for(running: dict[str, BaseProcess]) -> Iterator[list[int]]:
    """Inside, the first SIGINT or SIGTERM is noted in the list that is yielded, and stops the processes."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if not received:
            received.append(number)
            _stop(running)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _bars(configs: dict[str, TrainConfig]) -> Iterator[Any]:
    """A bar a run; the function that is yielded brings them up to what the runs have logged."""
    columns = (
        TextColumn("{task.description:20}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}  CR {task.fields[cr]:.2f} of {task.fields[target]:.2f}"),
        TextColumn("KL {task.fields[kl]:.4f}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as progress:
        tasks = {
            name: progress.add_task(name, total=config.steps, cr=1, target=1, kl=0) for name, config in configs.items()
        }

        def show() -> None:
            for name, config in configs.items():
                row = _last_row(Path(run_folder(config)) / "metrics.jsonl")
                if row is not None:
                    fields = {"cr": row["cr_hard"], "target": row["target_cr"], "kl": row["kl"]}
                    progress.update(tasks[name], completed=row["step"], **fields)

        yield show
        show()


def _last_row(path: Path) -> dict[str, Any] | None:
    """The last whole line of a metrics file; None before there is one."""
    if not path.is_file():
        return None
    whole, _, _ = path.read_text().rpartition("\n")
    return json.loads(whole.splitlines()[-1]) if whole else None
