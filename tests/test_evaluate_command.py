"""`python -m dms_lab.evaluate` on benchmarks and lm-eval's own command, as a user types them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from test_benchmark_runs import checkpoint  # noqa: F401  a fixture
from test_commands import ROOT, run

from dms_lab import evaluate
from dms_lab.evaluation.benchmarks import BENCHMARKS, TASKS
from dms_lab.sweeping.composition import Composer

SMALL = ["eval=reasoning", "limit=2", "threads=1"]


def test_tasks_are_listed_with_sizes_licences_access_and_expected_scores(tmp_path):
    text = run("evaluate", "tasks=list", cwd=tmp_path)
    flat = "".join(text.split())
    for name in BENCHMARKS:
        assert name in flat
    assert "198" in flat
    assert "gated" in flat
    assert "CC-BY-4.0" in flat
    assert "97.4" in flat  # what Qwen3-8B should score on MATH-500
    assert not list(tmp_path.iterdir())


def test_benchmarks_of_a_checkpoint_by_parts_and_then_the_results(checkpoint, tmp_path):  # noqa: F811
    words = [f"checkpoint={checkpoint}", *SMALL, "tasks=dms_tiny_road,dms_tiny_ledger", "out=here", "eval.width=1,2"]
    words.append("eval.temperature=0.8")
    text = run("evaluate", *words, "shard=1/2", cwd=tmp_path)
    assert "part 1 of 2 is in here/samples" in text
    text = run("evaluate", *words, "eval.max_tokens=40,96", cwd=tmp_path)
    assert "truncated" in text
    rows = [json.loads(line) for line in (tmp_path / "here" / "results.jsonl").read_text().splitlines()]
    assert {(row["method"], row["task"], row["width"], row["max_tokens"]) for row in rows} == {
        (method, f"dms_tiny_{family}", width, limit)
        for method in ("full", "dms")
        for family in ("road", "ledger")
        for width in (1, 2)
        for limit in (40, 96)
    }
    assert (tmp_path / "here" / "pareto-dms_tiny_road.png").is_file()


def test_a_model_as_it_is_runs_under_an_untrained_rule(tmp_path):
    words = ["model=tiny", "policy=tova", "budget=64", *SMALL, "tasks=dms_tiny_road", "eval.full=false", "out=here"]
    run("evaluate", *words, "eval.max_tokens=64", cwd=tmp_path)
    (row,) = [json.loads(line) for line in (tmp_path / "here" / "results.jsonl").read_text().splitlines()]
    assert row["method"] == "tova"
    assert row["measured_cr"] == pytest.approx(row["target_cr"], rel=0.2)
    assert row["target_cr"] > 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give checkpoint=<a run's folder, or one checkpoint in it>, or eval=reasoning"),
        (["checkpoint=x", "eval=reasoning", "sandbox=none"], "add i_trust_the_code=true"),
        (["model=tiny", "policy=full", "eval=reasoning", "tasks=dms_aime42"], "there is no task 'dms_aime42'"),
    ],
)
def test_what_cannot_be_run_is_told(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    with Composer() as composer, pytest.raises(ValueError, match=re.escape(message)):
        evaluate.run(OmegaConf.create(composer.compose("evaluate", words)))
    assert not list(tmp_path.iterdir())


def test_no_problems_are_refused_before_anything_is_loaded(tmp_path):
    text = run("evaluate", "checkpoint=nowhere", "num_problems=0", cwd=tmp_path, code=1)
    assert text.strip() == "error: num_problems=0 must be a whole number, at least 1"


def test_an_error_is_one_sentence(tmp_path):
    text = run("evaluate", "checkpoint=nowhere", "eval=reasoning", cwd=tmp_path, code=1)
    assert text.strip().splitlines()[-1].startswith("error: no checkpoint in nowhere")
    assert "Traceback" not in text


def harness(command, *words, cwd):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *words], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_lm_evals_own_command_knows_the_model_and_the_tasks(checkpoint, tmp_path):  # noqa: F811
    words = ["run", "--model", "dms", "--model_args", f"checkpoint={checkpoint},samples={tmp_path / 'samples'}"]
    words += ["--include_path", str(TASKS), "--apply_chat_template", "--limit", "2"]
    by_path = harness(
        [str(Path(sys.executable).parent / "lm-eval")], *words, "--tasks", str(TASKS / "dms_tiny_road.yaml"), cwd=tmp_path
    )
    assert "|dms_tiny_road|" in by_path.replace(" ", "")
    assert "|truncated|" in by_path.replace(" ", "")
    by_name = harness([sys.executable, "-m", "dms_lab.harness"], *words, "--tasks", "dms_tiny_road", cwd=tmp_path)
    assert [line for line in by_name.splitlines() if line.startswith("|")] == [
        line for line in by_path.splitlines() if line.startswith("|")
    ]
