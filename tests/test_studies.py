"""The studies under experiments/ are sweeps that can be run as they stand."""

import shutil
import sys
from pathlib import Path

import pytest

from dms_lab import results
from dms_lab.plots import save_figure
from dms_lab.sweep_config import load_sweep
from dms_lab.sweeping.points import expand
from experiments.data_efficiency import figure as data_efficiency
from experiments.extrapolation import lengths, positions
from experiments.rivals import untrained

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


# -- figures of studies that are drawn by scripts of their own ---------------------------------------------------------
@pytest.fixture
def drawn_in(tmp_path, monkeypatch):
    """Calls a script's main with its figures, and only these, going to an empty folder; returns it."""

    def call(script, *words):
        monkeypatch.setattr(sys, "argv", [script.__file__, *words])
        monkeypatch.setattr(script, "save_figure", lambda figure, path: save_figure(figure, tmp_path / path.name))
        script.main()
        return sorted(path.name for path in tmp_path.iterdir())

    return call


def rows_of(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def test_lengths_prints_the_table_that_its_readme_shows(drawn_in, capsys):
    assert drawn_in(lengths) == ["lengths.png", "lengths.svg"]
    printed = rows_of(capsys.readouterr().out)
    readme = (ROOT / "experiments/extrapolation/README.md").read_text().splitlines()
    assert len(printed) > 20
    assert set(printed) <= set(readme)


def test_positions_are_drawn_again_from_what_was_measured(drawn_in, capsys):
    assert drawn_in(positions, "--draw") == ["positions.png", "positions.svg"]
    assert "measured_cr" in capsys.readouterr().out


def test_the_settings_of_data_efficiency_are_compared_at_equal_steps(drawn_in):
    assert drawn_in(data_efficiency) == ["accuracy.png", "accuracy.svg"]
    variants = set(data_efficiency.points()["variant"])
    settings = {name for name in map(data_efficiency.setting_of, variants) if name}
    assert {"as the recipe", "kl_direction=reverse", "trained=adapter", "predictor=neuron"} < settings
    steps = {steps for steps in map(data_efficiency.steps_of, variants) if steps}
    assert {data_efficiency.STEPS, data_efficiency.RECIPE} < steps


# -- a rule that came after a sweep was collected ----------------------------------------------------------------------
def test_a_later_rule_gets_the_budgets_of_the_others_and_replaces_its_own_rows_alone(tmp_path, monkeypatch):
    for name in ("sweep.yaml", "results.csv"):
        shutil.copy(untrained.FOLDER / name, tmp_path / name)
    before = results.load(tmp_path / "results.csv")

    def as_tova(run, job):
        """What TOVA got of that run at that ratio and budget, as the rows of the rule."""
        mine = before[(before["method"] == "tova") & (before["run_id"] == run) & (before["target_cr"] == job.target_cr)]
        found = [results.Result(**row | {"method": job.method}) for row in mine.to_dict("records")]
        return [row for row in found if row.settings["live_tokens"] == job.budget], 0.0

    monkeypatch.setattr(untrained, "FOLDER", tmp_path)
    monkeypatch.setattr(untrained, "subject_of", lambda config, folder, checkpoints: folder.name)
    monkeypatch.setattr(untrained, "measure", as_tova)
    monkeypatch.setattr(sys, "argv", ["untrained.py", "keydiff"])
    untrained.main()
    after = results.load(tmp_path / "results.csv")
    rows = {name: after[after["method"] == name].drop(columns="method").to_dict("records") for name in ("tova", "keydiff")}
    assert len(rows["tova"]) == 24  # three seeds, two ratios, three families and the text
    assert str(rows["keydiff"]) == str(rows["tova"])
    others = [frame[frame["method"] != "keydiff"].to_dict("records") for frame in (before, after)]
    assert str(others[0]) == str(others[1])
    monkeypatch.setattr(sys, "argv", ["untrained.py", "snapkv"])
    with pytest.raises(SystemExit, match="'snapkv' is no untrained rule; choose one of streaming_llm, tova"):
        untrained.main()
