"""Published numbers are read as printed, under the project's names, and travel with the package."""

import math
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest

from dms_lab import published
from dms_lab.evaluation.benchmarks import BENCHMARKS

ROOT = Path(__file__).parent.parent
KEY = ["task", "model", "method", "compression_ratio"]


def test_scores_are_shares_under_the_projects_names():
    frame = published.scores()
    assert len(frame) == 144 + 14 + 60
    assert list(frame.columns) == [*KEY, "window", "width", "max_tokens", "accuracy", "source"]
    assert frame["accuracy"].between(0, 1).all()
    assert not frame.duplicated(KEY).any()
    assert frame["source"].str.contains("Lancucki et al. 2025.*Table").all()
    assert set(published.TASKS.values()) <= set(BENCHMARKS)
    assert set(published.TASKS.values()) <= set(frame["task"])
    models = {path.stem for path in (ROOT / "conf" / "model").glob("*.yaml")}
    assert set(published.MODELS.values()) <= models
    assert set(frame["model"]) == set(published.MODELS.values())


@pytest.mark.parametrize("name", ["qwen3_8b", "Qwen3-8B"])
def test_a_model_has_its_own_rows_by_either_name(name):
    frame = published.scores(name).set_index(["task", "method"])
    assert len(frame) == 14
    row = frame.loc["dms_gpqa_diamond", "dms"]
    assert (row["accuracy"], row["compression_ratio"], row["window"], row["width"]) == (0.576, 8.0, 512, None)
    assert frame.loc["dms_aime24", "full"]["accuracy"] == 0.75
    assert "MMLU-Pro" in frame.index.get_level_values("task")


def test_a_row_by_hand_of_each_file():
    frame = published.scores("qwen_r1_7b").set_index(["task", "method", "compression_ratio"])
    row = frame.loc["dms_aime24", "quest", 4.0]
    assert (row["accuracy"], row["width"], row["max_tokens"], row["window"]) == (0.555, 1, 32768, None)
    assert frame.loc["dms_livecodebench", "full", 1.0]["max_tokens"] == 16384
    frame = published.scores("llama32_1b").set_index(["task", "method", "compression_ratio"])
    assert frame.loc["GSM8K", "full", 1.0]["accuracy"] == 0.47
    assert frame.loc["VT-8k", "dms", 4.0]["window"] == 16
    assert published.scores("tiny").empty


def test_margins_are_differences_of_shares_and_missing_where_budgets_do_not_meet():
    frame = published.margins().set_index(["budget", "task", "model", "method", "against"])
    assert len(frame) == 84
    assert frame.loc["kv_reads", "dms_aime24", "qwen_r1_7b", "dms", "full"]["margin"] == 0.15
    assert frame.loc["peak_tokens", "dms_livecodebench", "qwen_r1_32b", "dms", "full"]["margin"] == 0.167
    assert math.isnan(frame.loc["kv_reads", "dms_gpqa_diamond", "qwen_r1_7b", "dms", "quest"]["margin"])
    assert set(published.margins("qwen_r1_1_5b")["model"]) == {"qwen_r1_1_5b"}


def test_the_cost_of_a_retrofit():
    frame = published.retrofit_costs()
    assert len(frame) == 6
    (row,) = published.retrofit_costs("qwen3_8b").to_dict("records")
    assert (row["batch_size_sequences"], row["context_tokens"], row["window_tokens"]) == (256, 32768, 512)
    assert (row["steps"], row["learning_rate"], row["h100_hours"]) == (100, 3e-5, 270.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("57.6", "57,6"), r"qwen3_8b.csv:3 has 8 cells where the header has 7"),
        (("57.6", ""), "qwen3_8b.csv:3 has an empty cell where a percent belongs"),
        (("57.6", "most"), "qwen3_8b.csv:3 has 'most' where a percent belongs"),
        (("dms,8,512,57.6", "dms,8,1.5,57.6"), "qwen3_8b.csv:3 has '1.5' where a count belongs"),
        (("task,", "name,"), "qwen3_8b.csv:1 is not the header task,model,method"),
    ],
)
def test_a_file_that_was_changed_is_told_with_its_line(tmp_path, monkeypatch, change, message):
    for path in files("dms_lab.published").iterdir():
        if path.name.endswith(".csv"):
            (tmp_path / path.name).write_text(path.read_text())
    path = tmp_path / "scores_qwen3_8b.csv"
    path.write_text(path.read_text().replace(*change, 1))
    monkeypatch.setattr(published, "files", lambda _: tmp_path)
    with pytest.raises(ValueError, match=message):
        published.scores()


def test_every_file_is_read_and_none_is_hidden_from_the_wheel():
    """They lie in the package and are found as its resources; hatchling leaves out what git ignores."""
    names = {path.name for path in files("dms_lab.published").iterdir() if path.name.endswith(".csv")}
    assert names == set(published._FILES)
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    lines = "\n".join(f"dms_lab/published/{name}" for name in names)
    found = subprocess.run(["git", "check-ignore", "--stdin"], input=lines, cwd=ROOT, capture_output=True, text=True)
    assert found.stdout == ""
    tracked = subprocess.run(["git", "ls-files", "dms_lab/published"], cwd=ROOT, capture_output=True, text=True)
    assert set(lines.splitlines()) <= set(tracked.stdout.split())
