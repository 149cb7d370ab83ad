"""Hydra's multirun on a real Slurm: `python -m dms_lab.train -m ... cluster=slurm`."""

import subprocess
import sys

import pytest
from cluster import wait_until
from lab import RESOURCES, Lab, Undisturbed, assert_undisturbed, swept

pytestmark = pytest.mark.slurm


def test_a_multirun_waits_for_preempted_jobs_and_tells_of_the_point_that_failed(lab: Lab, undisturbed: Undisturbed):
    asked = [f"cluster.{key}={value}" for key, value in (RESOURCES | {"array_parallelism": 3}).items()]
    words = [*swept(windows=(2,), seeds=(0, 1)), "model.path=embedded,/nowhere/at/all"]
    environment = lab.cluster.environment | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "dms_lab.train", "-m", "cluster=slurm", "sweep=sweep", *asked, *words]
    with (lab.folder / "printed").open("w+") as printed:
        multirun = subprocess.Popen(command, cwd=lab.folder, env=environment, stdout=printed, stderr=printed)
        try:
            wait_until("jobs are queued", lambda: len(jobs_of(lab)) == 4 and lab.sweep.is_dir(), 60)
            submitted = dict(zip(jobs_of(lab), lab.points, strict=True))  # in their order, as Hydra numbers them
            fine = [(point, job) for job, point in submitted.items() if point.config.model.path == "embedded"]
            noted = {job.job_id: job.hash for job in lab.noted()}  # where `sweep status` looks
            assert noted == {job: point.hash for job, point in submitted.items()}
            lab.jobs = [job for _, job in fine]
            lab.halt(fine)
            lab.preempt()
            lab.wait_for_requeue()
            assert multirun.wait(240) == 1
        finally:
            multirun.kill()
        printed.seek(0)
        text = printed.read()
    assert "2 of 4 points failed:" in text
    assert "seed=0 model.path=/nowhere/at/all: no weights for model.path=/nowhere/at/all" in text
    assert "Traceback" not in text
    assert_undisturbed(lab, undisturbed, [point for point, _ in fine])


def jobs_of(lab: Lab) -> list[str]:
    """The ids of the sweep's jobs in the queue, those that ended too."""
    lines = lab.cluster.run("squeue", "-h", "-r", "--states=all", "--name=dms-sweep", "-o", "%i").split()
    return sorted(lines, key=lambda job: int(job.partition("_")[2] or 0))
