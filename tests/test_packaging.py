"""What is installed: the wheel carries its configuration, known-bad versions are out, the tested set is pinned."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONSTRAINTS = [line for line in (ROOT / "conf" / "constraints.txt").read_text().splitlines() if line.strip()]
PINNED = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in CONSTRAINTS if "==" in line}


def requirements(*extras):
    project = PROJECT["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


def test_the_wheel_carries_the_configuration_where_the_commands_look_for_it():
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {"conf": "dms_lab/conf"}
    assert wheel["packages"] == ["dms_lab"]
    assert '"conf"' in (ROOT / "dms_lab" / "train.py").read_text()
    assert (ROOT / "conf" / "train.yaml").is_file()


def test_no_shipped_file_is_hidden_from_the_wheel_by_gitignore():
    """Hatchling leaves out what git ignores."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    wanted = [p for p in (ROOT / "conf").rglob("*.yaml")] + list((ROOT / "dms_lab" / "tiny" / "model").glob("*"))
    names = "\n".join(str(p.relative_to(ROOT)) for p in wanted)
    found = subprocess.run(["git", "check-ignore", "--stdin"], input=names, cwd=ROOT, capture_output=True, text=True)
    assert len(wanted) > 20
    assert found.stdout == ""


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_the_malicious_lightning_versions_cannot_be_installed(version):
    (lightning,) = [r for r in requirements() if r.name == "lightning"]
    assert version not in lightning.specifier
    assert PINNED["lightning"] in lightning.specifier


def test_every_requirement_is_pinned_to_a_version_that_it_allows():
    for requirement in requirements("eval", "slurm", "dev"):
        pinned = PINNED.get(canonicalize_name(requirement.name))
        assert pinned is not None, requirement
        assert requirement.specifier.contains(pinned, prereleases=True), (requirement, pinned)


def test_the_pinned_set_names_versions_of_registries_alone():
    for line in CONSTRAINTS:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), line
    assert "dms-lab" not in PINNED
    assert PINNED["antlr4-python3-runtime"].startswith("4.9.")  # Hydra's, which lm-eval[math] would replace


def test_python_3_11_suffices():
    assert PROJECT["project"]["requires-python"] == ">=3.11"


def test_make_alone_prints_one_line_for_each_target():
    text = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    shown = {line.split()[0] for line in text.splitlines()}
    assert {"setup", "demo", "test", "check", "clean"} <= shown
    assert all(len(line.split()) > 2 for line in text.splitlines())


def test_ci_runs_check_test_and_demo_in_that_order():
    text = (ROOT / ".ci" / "run").read_text()
    assert re.findall(r"^make (\w+)", text, re.MULTILINE) == ["check", "test", "demo"]
    assert "set -euo pipefail" in text
