"""The commands of the README, run as a user runs them, on small data."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CI = (ROOT / ".ci" / "run").read_text()
SMALL = ["steps=3", "cr=4", "cr_family=[2,4]", "context=128", "window=8", "batch_size=2", "eval.num_problems=2"]
SMALL += ["eval.length=128", "eval.rivals=[streaming_llm]", "eval.held_out_tokens=256", "threads=1"]


def run(module, *words, cwd=None, code=0):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", f"dms_lab.{module}", *words], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def test_train_ends_with_the_evaluation_and_evaluate_repeats_it(tmp_path):
    text = run("train", *SMALL, "out=run", cwd=tmp_path)
    assert "Exact match" in text
    folder = tmp_path / "run"
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert {row["method"] for row in rows} == {"full", "dms", "streaming_llm"}
    assert {row["task"] for row in rows} == {"ledger", "road", "program", "held_out_text"}
    assert "evaluated dms at CR 2\n" in text  # what a log shows of the time that it takes
    figure = (folder / "pareto.png").read_bytes()
    assert "CR" in run("evaluate", "checkpoint=run/checkpoints/cr2", "num_problems=1", cwd=tmp_path)
    one = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()][len(rows) :]
    assert {(row["method"], row["target_cr"]) for row in one} == {("full", 1.0), ("dms", 2.0)}
    assert (folder / "pareto.png").read_bytes() == figure  # a trial of one problem takes the place of nothing
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("evaluate", "checkpoint=run", cwd=tmp_path)
    again = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    keys = ("method", "task", "target_cr", "accuracy", "perplexity", "kv_reads", "measured_cr")
    assert [[r[k] for k in keys] for r in again[: len(rows)]] == [[r[k] for k in keys] for r in again[len(rows) :]]


def test_a_run_is_evaluated_at_other_ratios_than_it_was_trained_for(tmp_path):
    run("train", *SMALL, "eval_after=false", "out=run", cwd=tmp_path)
    (tmp_path / "text.py").write_text(Path(subprocess.__file__).read_text()[:12000])
    run("evaluate", "checkpoint=run", "cr=2,3", "calibrate=text.py", cwd=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert {(row["method"], row["target_cr"]) for row in rows} == {("dms_dialled", 2.0), ("dms_dialled", 3.0)}
    thresholds = {row["target_cr"]: row["settings"]["threshold"] for row in rows}
    assert thresholds[3.0] < thresholds[2.0]
    assert "add cr=<ratio>" in run("evaluate", "checkpoint=run", "calibrate=text.py", cwd=tmp_path, code=1)


def test_real_text_goes_in_and_perplexity_at_each_ratio_comes_out(tmp_path, base_folder):
    source = Path(json.__file__).parent
    words = ["model=hf", f"model.path={base_folder}", "model.dtype=float32", "data=text", f"data.path={source}", "out=run"]
    text = run("train", *SMALL, *words, cwd=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert [(row["method"], row["target_cr"]) for row in rows] == [("full", 1.0), ("dms", 2.0), ("dms", 4.0)]
    assert all(row["perplexity"] > 1 and row["accuracy"] is None for row in rows)
    assert "held_out_text ppl" in text.replace("\n", " ") or "ppl" in text


def test_reasoning_traces_go_in_cleared_of_the_evaluation_set(tmp_path, base_folder):
    rows = [
        {"problem": f"What is {i} plus {i}?", "generations": [f"<think>\n{i} + {i}\n</think>\n{2 * i}"]}
        | {"correctness_math_verify": [True]}
        for i in range(60)
    ]
    (tmp_path / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "aime.jsonl").write_text(json.dumps({"problem": "What is 7 plus 7?"}) + "\n")
    words = ["model=hf", f"model.path={base_folder}", "model.dtype=float32", "data.path=math.jsonl", "out=run"]
    text = run("train", *SMALL, *words, "data.decontaminate=[aime.jsonl:problem]", cwd=tmp_path)
    assert "problems overlap with an evaluation set and were left out" in text
    rows = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert {row["task"] for row in rows} == {"held_out_text"}
    assert "error: data.decontaminate: nobody/nothing:problem cannot be read" in run(
        "train", *SMALL, *words, "data.decontaminate=[nobody/nothing:problem]", "out=other", cwd=tmp_path, code=1
    )


def test_a_bad_value_ends_with_one_sentence_and_no_folder(tmp_path):
    text = run("train", "cr=0.5", cwd=tmp_path, code=1)
    assert "error: cr=0.5 is not a compression ratio" in text
    assert "Traceback" not in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "word", "near"),
    [("train", "windw=3", "window"), ("evaluate", "checkpont=x", "checkpoint"), ("pretrain", "sed=3", "seed")],
)
def test_an_unknown_key_ends_with_the_valid_ones(tmp_path, module, word, near):
    text = run(module, word, cwd=tmp_path, code=1)
    assert f"did you mean {near}?" in text
    assert "Traceback" not in text


def test_preview_shows_documents_with_their_mask(tmp_path):
    text = run("preview", "context=128", "window=8", cwd=tmp_path)
    assert "row 0, document 0" in text
    assert "</think>" in text
    chats = [{"prompt": f"{i}+2?", "completion": "so many"} for i in range(3)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    text = run("preview", "data=jsonl", "data.path=chats.jsonl", cwd=tmp_path)
    assert "so many" in text


def test_pretraining_leaves_a_model_that_loads_as_any_other(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run("pretrain", "out=model", "num_tokens=2000", "long_tokens=1000", "batch_tokens=600", cwd=tmp_path)
    assert {"recipe.json", "pretrain.jsonl"} <= {p.name for p in (tmp_path / "model").iterdir()}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "model"))


README = [
    line.strip() for line in (ROOT / "README.md").read_text().splitlines() if re.match("    (make|python|lm-eval) ", line)
]
TESTS = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
RUN_BY = {
    "make demo": "CI",
    'make demo ARGS="seed=0"': "CI",
    "make test": "CI",
    "make bench": "test_a_benchmark_runs_in_a_process_of_its_own_and_is_held_against_the_committed_one",
    "make bench-compare": "test_a_benchmark_runs_in_a_process_of_its_own_and_is_held_against_the_committed_one",
    "make gpu-check": "test_without_a_gpu_the_check_says_so_and_nothing_is_timed",
    "python -m dms_lab.train model=qwen3_8b cr=8 window=256": "test_absent_weights_are_told_before_anything_runs",
    "python -m dms_lab.train model=tiny data=text data.path=<folder of sources>": (
        "test_real_text_goes_in_and_perplexity_at_each_ratio_comes_out"
    ),
    'python -m dms_lab.generate checkpoint=runs/<run>/checkpoints/cr8 prompt="What is 17 * 23?"': (
        "test_one_prompt_streams_and_ends_with_a_line_of_accounting"
    ),
    "python -m dms_lab.generate checkpoint=runs/<run>/checkpoints/cr8 prompts=<in.jsonl> out=<out.jsonl>": (
        "test_a_file_is_answered_and_the_same_command_goes_on"
    ),
    "python -m dms_lab.evaluate checkpoint=runs/<run>": "test_train_ends_with_the_evaluation_and_evaluate_repeats_it",
    "python -m dms_lab.evaluate tasks=list": "test_tasks_are_listed_with_sizes_licences_access_and_expected_scores",
    "python -m dms_lab.evaluate checkpoint=runs/<run> eval=reasoning": (
        "test_benchmarks_of_a_checkpoint_by_parts_and_then_the_results"
    ),
    (
        "python -m dms_lab.evaluate checkpoint=runs/<run> eval=reasoning eval.width=1,4,8 eval.max_tokens=8192,16384,32768"
    ): "test_benchmarks_of_a_checkpoint_by_parts_and_then_the_results",
    "python -m dms_lab.evaluate model=qwen_r1_7b policy=tova budget=4096 eval=reasoning tasks=dms_aime24": (
        "test_a_model_as_it_is_runs_under_an_untrained_rule"
    ),
    "python -m dms_lab.evaluate checkpoint=runs/<run> eval=reasoning shard=3/8": (
        "test_benchmarks_of_a_checkpoint_by_parts_and_then_the_results"
    ),
    (
        "lm-eval run --model dms --model_args checkpoint=runs/<run>/checkpoints/cr8 --tasks <folder>/dms_aime24.yaml "
        "--apply_chat_template"
    ): "test_lm_evals_own_command_knows_the_model_and_the_tasks",
    "python -m dms_lab.evaluate checkpoint=runs/<run> cr=3,6": (
        "test_a_run_is_evaluated_at_other_ratios_than_it_was_trained_for"
    ),
    'python -m dms_lab.generate checkpoint=runs/<run>/checkpoints/cr8 cr=6 prompt="What is 17 * 23?"': (
        "test_answers_come_at_another_ratio_than_was_trained_and_are_not_mixed"
    ),
    (
        "python -m dms_lab.train -m model=llama32_1b,qwen_r1_1_5b cr=8 window=64,256 cluster=slurm sweep=windows_1b"
    ): "test_a_job_asks_for_what_its_model_needs_swept_or_not",
    "python -m dms_lab.sweep submit experiments/windows --dry-run": (
        "test_the_plan_says_what_a_submission_would_cost_and_what_that_is_assumed_from"
    ),
    "python -m dms_lab.sweep submit experiments/windows": "test_completion_of_a_sweep_of_six_points",
    "python -m dms_lab.sweep status experiments/windows": ("test_status_shows_where_each_point_stands_and_why_one_failed"),
    "python -m dms_lab.sweep collect experiments/windows": (
        "test_collect_has_every_row_once_the_last_of_equals_and_names_what_is_missing"
    ),
    "python -m dms_lab.sweep cancel experiments/windows": (
        "test_cancel_ends_every_job_of_the_sweep_that_is_queued_or_runs_and_no_other"
    ),
    "python -m dms_lab.pareto experiments/windows": (
        "test_a_sweep_s_results_are_collected_first_and_its_variants_told_apart"
    ),
    "python -m dms_lab.train -m search=optuna trained=all steps=200 sweep=rates": (
        "test_a_search_outlives_a_failed_trial_and_goes_on_after_a_stop"
    ),
    "python -m dms_lab.preview data=jsonl data.path=<chats.jsonl>": "test_preview_shows_documents_with_their_mask",
    "python -m dms_lab.pretrain out=runs/tiny_model": "test_pretraining_leaves_a_model_that_loads_as_any_other",
}


@pytest.mark.parametrize("command", README)
def test_every_command_of_the_readme_is_run(command):
    command = command.split("  #")[0].strip()
    where = RUN_BY[command]
    assert f"def {where}(" in TESTS or re.search(rf"^{' '.join(command.split()[:2])}\b", CI, re.MULTILINE)


def test_absent_weights_are_told_before_anything_runs(tmp_path):
    text = run("train", "model=qwen3_8b", "cr=8", "window=256", cwd=tmp_path, code=1)
    assert "no weights for model.path=Qwen/Qwen3-8B" in text
    assert "hf download Qwen/Qwen3-8B" in text
    assert not list(tmp_path.iterdir())


def test_help_lists_the_settings_without_loading_torch(tmp_path):
    started = time.monotonic()
    text = run("train", "--help", cwd=tmp_path)
    assert "cr_family" in text
    probe = "import sys, dms_lab.train, dms_lab.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode == 0
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_a_folder_saved_by_transformers_goes_through_the_same_commands(tmp_path, base_folder, make_config, family):
    import dataclasses

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from dms_lab.checkpoint import load_checkpoint
    from dms_lab.config import ModelConfig
    from dms_lab.evaluation.report import evaluate_run
    from dms_lab.training.run import train

    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 3}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=len(tokenizer), **shape))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    config = make_config(model=ModelConfig(family, str(tmp_path / "base"), 96, 4, 1e-3, 1e-2, 2, "float32", False))
    config = dataclasses.replace(config, trained="all")
    outcome = train(config, progress=False)
    handle = load_checkpoint(outcome.checkpoint(4), AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    assert len(handle.predictors) == 2
    evaluate_run(config, outcome.folder)
    assert (outcome.folder / "results.jsonl").is_file()
