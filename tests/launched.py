"""What the processes of test_distributed.py run: ``python launched.py plan.pickle``, one training after another.

Each leaves `plan.<rank>.json`: what it saw of each training. A signal of a plan is (rank, step, number), and how many
seconds before the end of its job it comes, if that matters.
"""

import json
import os
import pickle
import signal
import sys
from pathlib import Path

import torch

from dms_lab.sharding import is_cut, piece
from dms_lab.terminal import quiet
from dms_lab.training import run
from dms_lab.training.distributed import is_first_rank
from dms_lab.training.stopping import GracefulStop

RANK = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def stop_that_notes(seen, signalled):
    """A `GracefulStop` that sends this process `signalled` = (rank, step, number), and notes what it saw."""

    class Noted(GracefulStop):
        def on_train_start(self, trainer, module):
            super().on_train_start(trainer, module)
            parameters = list(module.parameters())
            seen["started_at"] = trainer.global_step
            seen["held"] = sum(piece(p).numel() for p in parameters)
            seen["file"] = type(trainer.strategy.checkpoint_io).__name__
            moments = [m for state in trainer.optimizers[0].state.values() for m in state.values() if m.dim()]
            seen["moments"] = sum(piece(m).numel() for m in moments)
            seen["kept"] = sum(piece(m).untyped_storage().nbytes() // m.element_size() for m in moments)
            seen["cut"] = sum(is_cut(p) for p in parameters) / len(parameters)

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if signalled and signalled[:2] == (RANK, trainer.global_step) and not self.stopped_by:
                os.kill(os.getpid(), signalled[2])

        def on_train_batch_end(self, trainer, module, *rest):
            super().on_train_batch_end(trainer, module, *rest)
            seen["ended_at"] = trainer.global_step

    return Noted


def main(plan):
    quiet(trains=True)
    torch.set_num_threads(1)
    found = []
    for configs, signalled in pickle.loads(plan.read_bytes()):
        signalled, late = signalled and signalled[:3], signalled and signalled[3:]
        seen = {"handled": None}
        config = configs[RANK % len(configs)]

        def handler(number, frame, seen=seen, config=config):
            seen["handled"] = (Path(config.out) / "last.ckpt").is_file() and not torch.distributed.is_initialized()

        signal.signal(signal.SIGUSR2, handler)
        run.GracefulStop = stop_that_notes(seen, signalled)
        try:
            outcome = run.train(config, progress=False, **({"notice_seconds": late[0]} if late else {}))
            seen |= {name: getattr(outcome, name) for name in ("finished", "stopped_by", "is_first")}
        except ValueError as error:
            seen["error"] = str(error)
        found.append(seen | {"first_rank": is_first_rank()})
    plan.with_suffix(f".{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
