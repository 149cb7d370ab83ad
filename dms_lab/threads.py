"""How many threads torch computes with on a CPU: what was asked for, else as many as cores that nobody else is using.

A thread that shares its core with another program makes all threads wait for it at every operation: two beside one busy
neighbour on two cores were slower than one alone. What the last digits of a sum are depends on the number of threads.
"""

import functools
import logging
import os
import time
from pathlib import Path

_log = logging.getLogger(__name__)
_STAT = Path("/proc/stat")
_SECONDS = 0.3


def set_threads(asked: int | None) -> int:
    """Sets torch's threads for operations and returns how many; with None it chooses, and says so where it takes fewer.

    Chosen are torch's own where OMP_NUM_THREADS is set, where this process may use only a part of the cores (Slurm or a
    container has shared them out), or beside a GPU. Else every core but those that are busy while this process waits a
    moment; that is looked at once a process.
    """
    import torch

    usual = _usual()
    number = asked or _chosen(usual)
    torch.set_num_threads(number)
    return number


@functools.cache
def _usual() -> int:
    """What torch takes by itself."""
    import torch

    return torch.get_num_threads()


@functools.cache
def _chosen(usual: int) -> int:
    import torch

    cores = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    if "OMP_NUM_THREADS" in os.environ or allowed < cores or torch.cuda.is_available():
        return usual
    busy = busy_cores()
    free = max(1, min(usual, cores - round(busy)))
    if free < usual:
        _log.warning(
            "threads=%d: %.1f of %d cores are busy with other programs, and a thread on a busy core slows all down; "
            "threads=%d takes them all the same",
            *(free, busy, cores, usual),
        )
    return free


def busy_cores() -> float:
    """Cores that other programs use, over a moment in which this process sleeps; 0 where the system does not tell."""
    if not _STAT.is_file():
        return 0.0
    before = _ticks()
    time.sleep(_SECONDS)
    idle, total = (now - then for now, then in zip(_ticks(), before, strict=True))
    return (os.cpu_count() or 1) * (1 - idle / total) if total else 0.0


def _ticks() -> tuple[int, int]:
    """Ticks since the start of the machine in which a core was idle or waited for a disk, and all, summed over cores."""
    numbers = [int(word) for word in _STAT.read_text().partition("\n")[0].split()[1:9]]
    return numbers[3] + numbers[4], sum(numbers)
