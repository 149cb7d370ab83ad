"""The studies under experiments/ are sweeps that can be run as they stand."""

from pathlib import Path

import pytest

from dms_lab.sweep_config import load_sweep
from dms_lab.sweeping.points import expand

ROOT = Path(__file__).parent.parent
SWEEPS = sorted((ROOT / "experiments").glob("*/*.yaml"))
STUDIES = ("windows", "data_efficiency", "hyper_scaling", "extrapolation", "dial", "rivals")


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_point_of_a_study_is_one_that_can_be_run(path):
    sweep = load_sweep(path)
    points = expand(sweep)
    assert sweep.question
    seeds = {point.config.seed for point in points if point.command == "train"}
    assert seeds == {0, 1, 2}


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_has_a_grid_for_two_cores_and_one_for_a_bigger_machine(name):
    small, full = (load_sweep(ROOT / "experiments" / name / f"{which}.yaml") for which in ("sweep", "full"))
    assert {point.config.model.name for point in expand(small)} == {"tiny"}
    assert "tiny" not in {point.config.model.name for point in expand(full)}
    assert full.cluster == "slurm"
