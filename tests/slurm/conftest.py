"""One Slurm for all tests of this folder, and for each a folder to work in."""

import os

import pytest
from cluster import cluster, why_not
from lab import Lab, Undisturbed


@pytest.fixture(scope="session")
def slurm():
    """A running cluster; the test is skipped where there can be none, unless DMS_LAB_REQUIRE_SLURM=1."""
    if reason := why_not():
        if os.environ.get("DMS_LAB_REQUIRE_SLURM") == "1":
            pytest.fail(f"DMS_LAB_REQUIRE_SLURM=1, but {reason}")
        pytest.skip(reason)
    with cluster() as running:
        yield running


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture
def lab(slurm, tmp_path):
    """A folder to sweep in. Afterwards no job is left, and the daemons that a test took away are there again."""
    yield Lab(slurm, tmp_path)
    slurm.mend()
