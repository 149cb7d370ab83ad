"""A folder in which somebody works with `dms_lab.sweep` on the test cluster, and what a sweep without trouble gives."""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster import Cluster, wait_until
from processes import kill, tasks

# Six points that take seconds; `last.ckpt` is there after half of the steps (GracefulStop).
WINDOWS, SEEDS, FIRST_SAVE = (2, 4, 8), (0, 1), 50
POINT = (
    "model=tiny steps=100 context=64 cr=4 cr_family=[4] batch_size=1 threads=1 log_every=10 "
    "eval.num_problems=4 eval.length=96 eval.rivals=[streaming_llm] eval.held_out_tokens=256"
).split()
RESOURCES = {"cpus_per_task": 1, "mem_gb": 1, "gpus_per_node": 0, "array_parallelism": 2, "timeout_min": 10}
# What a row says about the model: the same however often its job was disturbed.
MEASURED = (
    "num_problems accuracy accuracy_low accuracy_high perplexity measured_cr kv_reads peak_tokens kv_bytes_peak".split()
)


def swept(windows: Sequence[int] = WINDOWS, seeds: Sequence[int] = SEEDS) -> list[str]:
    """The overrides of a sweep over windows and seeds."""
    return [*POINT, f"window={','.join(map(str, windows))}", f"seed={','.join(map(str, seeds))}"]


@dataclass
class Lab:
    """One sweep in a folder of its own: `experiments/sweep` and `runs`."""

    cluster: Cluster
    folder: Path
    jobs: list[str] = field(default_factory=list)

    @property
    def sweep(self) -> Path:
        return self.folder / "experiments" / "sweep"

    def describe(self, *parts: Sequence[str], **resources: object) -> None:
        """`sweep.yaml` asks for the products of these parts' overrides, on the cluster."""
        self.sweep.mkdir(parents=True)
        described = [{"overrides": list(overrides)} for overrides in parts]
        values = {"parts": described, "cluster": "slurm", "resources": RESOURCES | resources}
        (self.sweep / "sweep.yaml").write_text(json.dumps(values))  # JSON is YAML

    @property
    def points(self) -> list:
        """The points, as the library derives them."""
        from dms_lab.sweep_config import load_sweep
        from dms_lab.sweeping.points import expand

        return expand(load_sweep(self.sweep))

    def run_of(self, point) -> Path:
        """The folder of a point's run."""
        return self.folder / point.folder

    # -- the command ---------------------------------------------------------------------------------------------------
    def start(self, *words: str, module: str = "sweep") -> subprocess.Popen:
        """`python -m dms_lab.<module> <words>` runs in the folder."""
        environment = self.cluster.environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
        return subprocess.Popen(
            [sys.executable, "-m", f"dms_lab.{module}", *words],
            cwd=self.folder,
            env=environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def call(self, *words: str, seconds: float = 300) -> tuple[int, str]:
        """The exit status of `dms_lab.sweep` with these words, and what it prints."""
        with self.start(*words) as process:
            said, _ = process.communicate(timeout=seconds)
            return process.returncode, said

    def ask(self, *words: str) -> str:
        """What a command prints that ends well."""
        code, said = self.call(*words)
        assert code == 0, f"{' '.join(words)} ended with {code}\n{said}"
        return said

    def submit(self, *words: str) -> list[tuple[Any, str]]:
        """The points that a submission of the sweep adds jobs for, each with the id of its job."""
        before = self.noted()
        self.ask("submit", str(self.sweep), *words)
        added = self.noted()[len(before) :]
        by_hash = {point.hash: point for point in self.points}
        self.jobs = [job.job_id for job in added]
        return [(by_hash[job.hash], job.job_id) for job in added]

    def noted(self) -> list[Any]:
        """Every job that the sweep's record has."""
        from dms_lab.sweep_config import load_sweep
        from dms_lab.sweeping.records import load_jobs

        with chdir(self.folder):
            return load_jobs(load_sweep(self.sweep))

    def status(self) -> str:
        """What `sweep status` shows: it ends with 1 where a point failed, and with 0 elsewhere."""
        code, said = self.call("status", str(self.sweep))
        assert (code, "failed" in said) in ((0, False), (1, True)), said
        return said

    # -- how it goes on ------------------------------------------------------------------------------------------------
    def halt(
        self, submitted: Sequence[tuple[Any, str]], after: str = "last.ckpt", seconds: float = 300
    ) -> dict[str, list[int]]:
        """Each of these jobs stands still since a file appeared in its run: the processes by the job, one a rank.

        That is in the midst of training `after` the first save, or between training and results (`done.json`).
        `kill(pids, signal.SIGCONT)` lets them go on; Slurm does so itself before a signal that they should hear.
        """
        halted: dict[str, list[int]] = {}

        def are_halted() -> bool:
            for point, job in submitted:
                if job not in halted and (self.run_of(point) / after).is_file():
                    halted[job] = tasks(self.cluster.conf, job)
                    kill(halted[job], signal.SIGSTOP)
                    assert halted[job], f"job {job} ended while it was to be halted"
            return len(halted) == len(submitted)

        wait_until(f"{after} is there for jobs {[job for _, job in submitted]}", are_halted, seconds, every=0.02)
        return halted

    def steps(self, point) -> list[tuple[int, float]]:
        """What its metrics hold: the steps, and how fast each was, by which one tells a step that was computed again."""
        lines = (self.run_of(point) / "metrics.jsonl").read_text().splitlines()
        return [(row["step"], row["tokens_per_second"]) for row in map(json.loads, lines)]

    def steps_until_save(self, submitted: Sequence[tuple[Any, str]]) -> list[list[tuple[int, float]]]:
        """As `steps`, of each point, up to its first save."""
        return [[row for row in self.steps(point) if row[0] <= FIRST_SAVE] for point, _ in submitted]

    def preempt(self) -> None:
        """A job of the partition with priority takes both nodes, for a second."""
        words = "-p high -N2 --exclusive -o /dev/null --wrap".split()
        self.cluster.run("sbatch", *words, "sleep 1", cwd=self.folder)

    def wait_for_requeue(self, seconds: float = 300) -> None:
        """Each job of the last submission has been queued again, once."""
        wait_until(
            "jobs are queued again", lambda: {self.cluster.restarts(job) for job in self.jobs} == {1}, seconds, every=0.5
        )

    def complete(self, seconds: float = 600) -> None:
        """All jobs of the last submission have completed."""
        assert self.cluster.wait_for_jobs(self.jobs, seconds) == dict.fromkeys(self.jobs, "COMPLETED")

    def collected(self) -> list[dict[str, object]]:
        """The rows of `results.csv`, after `sweep collect`."""
        import pandas as pd

        self.ask("collect", str(self.sweep))
        return pd.read_csv(self.sweep / "results.csv", keep_default_na=False, na_values=[""]).to_dict("records")


def key(row: dict) -> tuple:
    """What a row is about. Rules without training know nothing of the run beside which they were measured, but its seed and
    the tokens that it kept.
    """
    trained = row["config_hash"] if row["method"] == "dms" else ""
    settings = json.loads(row["settings"]) if isinstance(row["settings"], str) else row["settings"]
    return (trained, row["method"], row["task"], float(row["target_cr"]), int(row["seed"]), settings.get("live_tokens", 0))


def measured(row: dict) -> dict[str, float | None]:
    """What a row says, for a comparison: nothing for what was not measured."""
    return {name: None if row[name] is None or row[name] != row[name] else float(row[name]) for name in MEASURED}


class Undisturbed:
    """The rows of points that nobody disturbs: trained and evaluated by this one process, each once a session."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows: dict[str, list[dict]] = {}

    def rows(self, points: Sequence) -> list[dict]:
        """The rows of all points."""
        return [row for point in points for row in self._of(point)]

    def _of(self, point) -> list[dict]:
        if point.hash not in self._rows:
            import torch

            from dms_lab.evaluation.report import evaluate_run
            from dms_lab.training.run import train

            torch.set_num_threads(1)
            with chdir(self.folder):
                config = replace(point.config, devices=1, num_nodes=1)
                outcome = train(config, progress=False)
                evaluate_run(config, outcome.folder)
                lines = (outcome.folder / "results.jsonl").read_text().splitlines()
            self._rows[point.hash] = [json.loads(line) for line in lines]
        return self._rows[point.hash]


def assert_undisturbed(lab: Lab, undisturbed: Undisturbed, points: Sequence | None = None) -> None:
    """`results.csv` holds each point once, with what it has where nothing happens to it."""
    points = lab.points if points is None else points
    found = lab.collected()
    wanted = {key(row): measured(row) for row in undisturbed.rows(points)}
    keys = [key(row) for row in found]
    assert sorted(keys) == sorted(wanted), "a point is missing, or present twice"
    for row in found:
        assert measured(row) == wanted[key(row)], key(row)
