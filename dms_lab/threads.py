"""How many threads torch computes with on a CPU: what was asked for, else as many as cores that nobody else is using.

A thread that shares its core with another program makes all threads wait for it at every operation: two beside one busy
neighbour on two cores were slower than one alone. What the last digits of a sum are depends on the number of threads.
"""

import logging
import os

_log = logging.getLogger(__name__)


def set_threads(asked: int | None) -> int:
    """Sets torch's threads for operations and returns how many; with None it chooses, and says so where it takes fewer.

    Chosen are torch's own where OMP_NUM_THREADS is set, or where this process may use only a part of the cores: then
    somebody (Slurm, a container) has shared them out. Else every core but those that the load of the last minute fills.
    """
    import torch

    number = asked or _chosen(torch.get_num_threads())
    torch.set_num_threads(number)
    return number


def _chosen(usual: int) -> int:
    cores = os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    if "OMP_NUM_THREADS" in os.environ or allowed < cores:
        return usual
    busy = os.getloadavg()[0]
    free = max(1, min(usual, cores - round(busy)))
    if free < usual:
        _log.warning(
            "threads=%d: %.1f of %d cores are busy with other programs, and a thread on a busy core slows all down; "
            "threads=%d takes them all the same",
            *(free, busy, cores, usual),
        )
    return free
