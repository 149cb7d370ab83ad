"""Where two of the figures come from: python causes.py

scratch  gathering and attending to rows of different length, the same bytes in all: what a scratch beyond the L3 costs
faults   processor time of the program and of the system, and page faults, in a decode step
"""

import gc
import os
import resource
import time

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.nn.functional as F
from contest import WIDTH, Contestant, make_models

NUM_PAGES, PAGE_SIZE = 32768, 32  # 1 GiB of keys and values
STEPS = 8


def scratch() -> None:
    """GB/s of copying pages of one row into a scratch, of attending to it there, and of both."""
    key, value = (torch.randn(NUM_PAGES, PAGE_SIZE, WIDTH) for _ in range(2))
    for num_slots in (2048, 4096, 8192, 16384, 24576, 32768, 65536) * 2:
        pages = num_slots // PAGE_SIZE
        rows = torch.arange(NUM_PAGES // pages * pages).split(pages)
        gather, attend = _seconds(key, value, rows)
        gigabytes = len(rows) * num_slots * 2 * WIDTH * 4 / 1e9
        speeds = " | ".join(f"{gigabytes / s:.1f}" for s in (gather, attend, gather + attend))
        print(f"| {num_slots} | {num_slots * 2 * WIDTH * 4 // 2**20} | {speeds} |", flush=True)


def _seconds(key: torch.Tensor, value: torch.Tensor, rows: tuple[torch.Tensor, ...]) -> tuple[float, float]:
    """Seconds of gathering and of attending."""
    room = [torch.empty(len(rows[0]), PAGE_SIZE, WIDTH) for _ in range(2)]
    query, times = torch.randn(1, 1, 2, WIDTH), [0.0, 0.0]
    for pages in rows:
        started = time.perf_counter()
        torch.index_select(key, 0, pages, out=room[0])
        torch.index_select(value, 0, pages, out=room[1])
        gathered = time.perf_counter()
        F.scaled_dot_product_attention(query, *(x.view(1, 1, -1, WIDTH) for x in room))
        times = [times[0] + gathered - started, times[1] + time.perf_counter() - gathered]
    return times[0], times[1]


def faults() -> None:
    """Milliseconds and page faults of a step."""
    models = make_models(torch.float32)
    for num_tokens, batch in ((1024, 1), (1024, 8), (16384, 1)):
        for name in ("hf", "full", "dms"):
            rival = Contestant(name, models, num_tokens, batch)
            rival.step(), rival.step()
            before = resource.getrusage(resource.RUSAGE_SELF)
            for _ in range(STEPS):
                rival.step()
            after = resource.getrusage(resource.RUSAGE_SELF)
            user, system, minor = (
                (getattr(after, n) - getattr(before, n)) / STEPS for n in ("ru_utime", "ru_stime", "ru_minflt")
            )
            print(f"| {num_tokens} | {batch} | {name} | {1e3 * user:.1f} | {1e3 * system:.1f} | {minor:.0f} |", flush=True)
            del rival
            gc.collect()


if __name__ == "__main__":
    torch.set_num_threads(1)
    scratch()
    gc.collect()
    faults()
