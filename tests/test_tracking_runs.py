"""Real trainings and evaluations with `tracking=wandb`, read back from what W&B keeps offline."""

import csv
import shutil
from pathlib import Path

import pytest
from test_benchmark_runs import checkpoint  # noqa: F401  a fixture
from test_commands import run as command
from test_tracking import in_file, metrics, no_key  # noqa: F401  a fixture
from wandb_files import offline_runs

from dms_lab import results
from dms_lab.config import config_hash
from dms_lab.evaluation.report import evaluate_run
from dms_lab.training.run import train


@pytest.mark.slow
def test_a_training_and_its_evaluation_are_tracked(make_config, tmp_path):
    config = make_config(tracking="wandb", sweep="windows")
    outcome = train(config, progress=False)
    evaluate_run(config, outcome.folder)
    runs = offline_runs(tmp_path)
    assert {run.run.job_type for run in runs.values()} == {"train", "evaluate"}
    trained = runs.pop(config_hash(config))
    assert metrics(trained.history) == in_file(outcome.folder)
    assert "retention" in trained.history[-1]
    (evaluated,) = runs.values()
    assert evaluated.run.run_id.startswith(config_hash(config))
    assert evaluated.run.run_group == trained.run.run_group == "windows"
    frame = results.load(outcome.folder / results.RESULTS)
    assert [row["task"] for row in evaluated.table(evaluated.summary["results"])] == frame["task"].tolist()


@pytest.mark.slow
def test_benchmarks_are_tracked_with_chains_to_read(checkpoint, tmp_path):  # noqa: F811
    words = [f"checkpoint={checkpoint}", "eval=reasoning", "limit=3", "threads=1", "out=here", "eval.width=1,2"]
    words += ["tasks=dms_tiny_road,dms_tiny_ledger", "eval.temperature=0.8", "tracking=wandb"]
    command("evaluate", *words, cwd=tmp_path)
    (tracked,) = offline_runs(tmp_path).values()
    rows = tracked.table(tracked.summary["results"])
    assert len(rows) == 2 * 2 * 2
    samples = tracked.table(tracked.summary["samples"])
    assert {(row["task"], row["method"]) for row in samples} == {
        (f"dms_tiny_{family}", method) for family in ("road", "ledger") for method in ("full", "dms")
    }
    assert len(samples) == 4 * 3
    for row in samples:
        assert row["verdict"] in (0.0, 1.0)
        assert row["tokens"] > 0
        assert row["KV reads"] > 0
        assert len(row["prompt"]) > 20
        assert len(row["text"]) > 0
    assert any(row["verdict"] == 1.0 for row in samples if row["method"] == "full")
    before = (tmp_path / "here" / "examples.jsonl").read_text()
    command("evaluate", *words, cwd=tmp_path)
    assert (tmp_path / "here" / "examples.jsonl").read_text() == before


@pytest.mark.slow
def test_the_pareto_command_sends_a_comparison_and_what_it_is_of(tmp_path, monkeypatch, capsys):
    from dms_lab.html_report import content
    from dms_lab.pareto.__main__ import main

    monkeypatch.setattr(content, "write_figures", lambda *_: [])  # for papers, and slow
    study = Path(__file__).parent / "data" / "schema2"
    for seed in (0, 1):
        shutil.copy(study / f"results_seed{seed}.jsonl", tmp_path)
    assert main([str(tmp_path), "--wandb"]) == 0
    runs = offline_runs(tmp_path)
    told = f"W&B: {len(runs)} runs are kept offline; to send them: wandb sync {tmp_path}/wandb/offline-run-*"
    assert told in capsys.readouterr().out
    (compared,) = (run for run in runs.values() if run.run.job_type == "pareto")
    (report,) = (artifact for artifact in compared.artifacts if artifact.type == "report")
    assert Path(report.manifest.contents[0].local_path).read_bytes() == (tmp_path / "report.html").read_bytes()
    points = compared.table(compared.summary["points"])
    with (tmp_path / "pareto.csv").open(newline="") as file:
        assert [row["method"] for row in points] == [row["method"] for row in csv.DictReader(file)]
    evaluations = [run for run in runs.values() if run.run.job_type == "evaluate"]
    frame = results.load(tmp_path / "results_seed0.jsonl", tmp_path / "results_seed1.jsonl")
    assert sum(len(run.table(run.summary["results"])) for run in evaluations) == len(frame)
