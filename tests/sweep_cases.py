"""Sweeps for the tests: points that take seconds, points that look done, and a Slurm of shell scripts."""

import json
import os
import stat
from pathlib import Path

from dms_lab.evaluation.evaluated import num_rows, record
from dms_lab.results import Result, append
from dms_lab.sweep_config import build_sweep
from dms_lab.sweeping.job import job_of
from dms_lab.sweeping.points import expand

TINY = "model=tiny steps=3 cr=4 cr_family=[2,4] context=128 window=8 batch_size=2 threads=1".split()
TINY += "eval.num_problems=2 eval.length=128 eval.rivals=[streaming_llm] eval.held_out_tokens=256".split()
EVALUATION = ["eval=reasoning", "tasks=dms_tiny_ledger", "limit=2", "eval.full=false"]


def random_model(base_folder):
    """Overrides of a run of a second on the tests' random model."""
    words = f"model=hf model.path={base_folder} model.dtype=float32 model.gradient_checkpointing=false data=tiny steps=4"
    words += " cr=4 cr_family=[2,4] context=96 window=4 batch_size=2 lr=1e-3 adapter_lr=1e-2 threads=1 log_every=1"
    words += " eval.num_problems=1 eval.length=96 eval.rivals=[streaming_llm] eval.held_out_tokens=128"
    return words.split()


def sweep_of(*parts, name="study", **more):
    """A sweep in `experiments/<name>`, as its file would describe it; parts are lists of overrides or mappings."""
    parts = [part if isinstance(part, dict) else {"overrides": part} for part in parts]
    return build_sweep({"parts": parts} | more, name, Path("experiments") / name)


def write_sweep(*parts, name="study", **more):
    """The same as a file below the working directory; returns the sweep's folder."""
    sweep = sweep_of(*parts, name=name, **more)
    sweep.folder.mkdir(parents=True)
    parts = [{"overrides": list(p.overrides), "then": [list(t) for t in p.then], "command": p.command} for p in sweep.parts]
    (sweep.folder / "sweep.yaml").write_text(json.dumps({"parts": parts} | more))  # JSON is YAML
    return sweep.folder


def row_of(point, **changes):
    """A row of results of a point."""
    values = {"run_id": point.name, "model": "tiny", "method": "dms", "task": "ledger", "target_cr": 4.0}
    values |= {
        "measured_cr": 3.5,
        "window": 8,
        "seed": point.config.seed,
        "num_problems": 2,
        "accuracy": 0.5,
        "accuracy_low": 0.1,
    }
    values |= {"accuracy_high": 0.9, "perplexity": None, "kv_reads": 10.0, "peak_tokens": 5.0, "kv_bytes_peak": 9.0}
    values |= {"tokens_generated": 7, "seconds": 1.0, "config_hash": point.hash, "versions": {}, "git_revision": "x"}
    return Result(**values | changes)


def finish(point, *rows):
    """All of a point stands in its folder, as far as files say."""
    folder = Path(point.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({}))
    (folder / "done.json").write_text(json.dumps({"config_hash": point.hash}))
    append(folder / "results.jsonl", list(rows) or [row_of(point)])
    for step in job_of(point, Path()).steps()[1:]:
        record(folder, step.what, range(num_rows(folder)))
    return folder


class FakeSlurm:
    """sbatch, squeue, sacct, scancel, scontrol and srun that answer from files, and note how they were called."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        folder.mkdir()
        for name in ("sbatch", "squeue", "sacct", "scancel", "srun", "scontrol"):
            self.answer(name, "")
            script = folder / name
            script.write_text(
                f'#!/bin/sh\ncd {folder}\necho "$@" >> {name}.calls\ncat {name}.out\nexit $(cat {name}.code)\n'
            )
            script.chmod(script.stat().st_mode | stat.S_IXUSR)
        self.answer("sbatch", "Submitted batch job 7\n")
        self.answer("scontrol", "MaxArraySize            = 1001\n")
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def answer(self, name, text, code=0):
        (self.folder / f"{name}.out").write_text(text)
        (self.folder / f"{name}.code").write_text(str(code))

    def calls(self, name):
        path = self.folder / f"{name}.calls"
        return path.read_text().splitlines() if path.is_file() else []


def one_point(*overrides, **part):
    """The only point of a sweep of these overrides."""
    [point] = expand(sweep_of({"overrides": list(overrides)} | part))
    return point
