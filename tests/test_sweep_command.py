"""The command over sweeps, as a user meets it: what it prints, what it submits, and what it ends with."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from sweep_cases import EVALUATION, TINY, FakeSlurm, finish, one_point, row_of, write_sweep

from dms_lab import results
from dms_lab.evaluation import evaluated
from dms_lab.sweep import main
from dms_lab.sweep_config import load_sweep
from dms_lab.sweeping import cost, local, supervisor
from dms_lab.sweeping.job import job_of as the_job_of
from dms_lab.sweeping.job import locked
from dms_lab.sweeping.points import expand
from dms_lab.sweeping.records import Submitted, append_jobs, load_jobs
from dms_lab.sweeping.shapes import num_trained, shape_of

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def fake_slurm(working_folder, monkeypatch):
    return FakeSlurm(working_folder / "slurm", monkeypatch)


def points_of(folder):
    return expand(load_sweep(folder))


def note(folder, point, job_id, cluster="slurm"):
    sweep = load_sweep(folder)
    log = sweep.records / "slurm" / f"{job_id}_0_log.err"
    log.parent.mkdir(parents=True, exist_ok=True)
    append_jobs(sweep, [Submitted(job_id, cluster, point.hash, point.folder, time.time(), str(log))])
    return log


# -- submit ------------------------------------------------------------------------------------------------------------
def test_help_says_what_there_is_without_torch(working_folder):
    code = "import sys; from dms_lab.sweep import main\n"
    code += "try: main(['--help'])\nexcept SystemExit: sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert "submit|status|collect|cancel" in done.stdout


def test_a_point_that_is_wrong_refuses_the_whole_sweep_before_anything_starts(working_folder, capsys):
    folder = write_sweep(
        [*TINY, "seed=0,1"], {"overrides": TINY, "then": [["eval=reasoning", "tasks=dms_tiny_ledger", "limt=2"]]}
    )
    for command in ("submit", "status", "collect", "cancel"):
        assert main([command, str(folder)]) == 1
    told = capsys.readouterr()
    assert told.err.count("unknown key 'limt' (did you mean limit?)") == 4
    assert told.out == ""
    assert not Path("runs").exists()


def test_what_is_done_or_queued_or_running_is_not_submitted_again(fake_slurm, capsys):
    folder = write_sweep([*TINY, "seed=range(4)"], cluster="slurm")
    points = points_of(folder)
    finish(points[0])
    note(folder, points[1], "5")
    note(folder, points[2], "6")
    fake_slurm.answer("squeue", "5 PENDING 0 0:00 Priority\n6 RUNNING 0 1:00 None\n")
    assert main(["submit", str(folder)]) == 0
    assert "1 of 4 points submitted, 1 done, 2 queued or running already" in capsys.readouterr().out
    assert [job.hash for job in load_jobs(load_sweep(folder))][2:] == [points[3].hash]
    fake_slurm.answer("squeue", "5 PENDING 0 0:00 Priority\n6 RUNNING 0 1:00 None\n7 PENDING 0 0:00 Priority\n")
    assert main(["submit", str(folder)]) == 0
    assert len(fake_slurm.calls("sbatch")) == 1


def test_a_job_that_ended_before_its_point_was_done_is_submitted_again(fake_slurm):
    folder = write_sweep([*TINY, "seed=range(2)"], cluster="slurm")
    for point, job_id in zip(points_of(folder), ("5", "6"), strict=True):
        note(folder, point, job_id)
    fake_slurm.answer("sacct", "5|TIMEOUT|01:00:00|None\n6|CANCELLED by 0|00:00:00|None\n")
    assert main(["submit", str(folder)]) == 0
    assert [job.job_id for job in load_jobs(load_sweep(folder))] == ["5", "6", "7_0", "7_1"]


def test_a_point_that_another_works_at_is_not_submitted_whatever_became_of_its_own_job(fake_slurm, capsys):
    folder = write_sweep([*TINY, "seed=range(2)"], cluster="slurm")
    first, second = points_of(folder)
    note(folder, first, "5")
    fake_slurm.answer("sacct", "5|FAILED|01:00:00|None\n")
    with locked(Path(first.folder)), locked(Path(second.folder)):
        assert main(["submit", str(folder)]) == 0
        assert "0 of 2 points submitted, 0 done, 2 queued or running already" in capsys.readouterr().out
    assert main(["submit", str(folder)]) == 0
    assert "2 of 2 points submitted" in capsys.readouterr().out


def test_who_waits_asks_a_queue_that_fails_again(fake_slurm, capsys, monkeypatch):
    folder = write_sweep(TINY, cluster="slurm")
    [point] = points_of(folder)
    note(folder, point, "5")
    told = iter([("no controller", 1), ("5 RUNNING 0 1:00 None\n", 0), ("no controller", 1), ("no controller", 1), ("", 0)])

    def answer_next(seconds):
        if (answer := next(told, None)) is not None:
            fake_slurm.answer("squeue", *answer)
            if answer == ("", 0):
                finish(point)

    monkeypatch.setattr(
        "dms_lab.sweep.time", SimpleNamespace(sleep=answer_next, monotonic=time.monotonic, process_time=time.process_time)
    )
    fake_slurm.answer("squeue", "5 RUNNING 0 1:00 None\n")
    assert main(["submit", str(folder), "--wait"]) == 0
    printed = capsys.readouterr()
    assert printed.err.count("squeue failed: no controller; it is asked again until it answers") == 2
    assert "1 done of 1 points" in printed.out
    monkeypatch.setattr("dms_lab.sweep._PATIENCE_SECONDS", -1.0)
    (Path(point.folder) / "done.json").unlink()
    fake_slurm.answer("squeue", "no controller", code=1)
    assert main(["submit", str(folder), "--wait"]) == 1


def test_what_another_machine_was_given_is_left_to_it_unless_that_is_lost(working_folder, capsys, monkeypatch):
    folder = write_sweep([*TINY, "seed=range(2)"])
    sweep, [first, second] = load_sweep(folder), points_of(folder)
    log = str(sweep.records / "local" / "b" / "0000.log")
    append_jobs(sweep, [Submitted("b-0", "local", first.hash, first.folder, 1.0, log, 1, 1, "elsewhere")])
    given = []
    monkeypatch.setattr(local, "submit", lambda sweep, points: given.append([point.hash for point in points]))
    assert main(["submit", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "1 of 2 points submitted" in text
    assert "1 points are left to elsewhere, where they were submitted" in text
    assert main(["status", str(folder)]) == 0
    assert "elsewhere (submitted on elsewhere, ask there)" in capsys.readouterr().out
    assert main(["cancel", str(folder)]) == 0
    assert "jobs that were submitted on elsewhere are cancelled there" in capsys.readouterr().err
    assert main(["submit", str(folder), "--take-over"]) == 0
    assert given == [[second.hash], [first.hash, second.hash]]


def test_a_queue_that_cannot_be_asked_submits_nothing(fake_slurm, capsys):
    folder = write_sweep(TINY, cluster="slurm")
    note(folder, points_of(folder)[0], "5")
    fake_slurm.answer("squeue", "no controller", code=1)
    assert main(["submit", str(folder)]) == 1
    assert "error: squeue failed: no controller" in capsys.readouterr().err
    assert fake_slurm.calls("sbatch") == []


def test_a_sweep_that_is_done_is_submitted_again_in_a_second_or_two(working_folder, capsys):
    folder = write_sweep({"overrides": [*TINY, "seed=range(40)"], "then": [EVALUATION]})
    for point in points_of(folder):
        finish(point)
    began = time.process_time()
    assert main(["submit", str(folder)]) == 0
    assert time.process_time() - began < 4
    assert "0 of 40 points submitted, 40 done" in capsys.readouterr().out
    assert load_jobs(load_sweep(folder)) == []


def test_the_command_line_has_the_last_word_on_resources(fake_slurm):
    folder = write_sweep(TINY, resources={"timeout_min": 9})
    assert main(["submit", str(folder), "cluster=slurm", "resources.timeout_min=60", "resources.partition=gpu"]) == 0
    script = next(Path("runs/sweeps/study/slurm").glob("*.sh")).read_text()
    assert "--time=60" in script
    assert "--partition=gpu" in script


# -- the plan ----------------------------------------------------------------------------------------------------------
def test_the_plan_says_what_a_submission_would_cost_and_what_that_is_assumed_from(working_folder, capsys):
    folder = write_sweep(
        ["experiment=paper_qwen3_8b", "seed=range(3)"],
        {"overrides": ["model=qwen3_8b", "trained=lora", "seed=0,1"], "then": [EVALUATION]},
        [*TINY, "seed=0,1"],
        {"overrides": ["model=qwen_r1_7b", "policy=tova", "budget=2048,4096", *EVALUATION], "command": "evaluate"},
        cluster="slurm",
    )
    finish(points_of(folder)[-3])
    assert main(["submit", str(folder), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "9 points, 1 done, 0 queued or running, 8 to submit" in text
    tokens = 3 * 2700 * 256 * 32768
    row = next(line for line in text.splitlines() if "qwen3_8b" in line and "all" in line)
    assert f"{tokens / 1e6:,.1f} M" in row
    assert f"{tokens / (100 * 256 * 32768 / 270):,.2f}" in row  # 270 H100 hours for 100 steps, Table 3
    row = next(line for line in text.splitlines() if "qwen3_8b" in line and "lora" in line)
    assert f"{2 * 298 * 32768 * 1 / 1240 / 3600:,.2f}" in row
    assert "at 1,240 tokens a second of an H100 for Qwen3-8B" in " ".join(text.split())
    assert "jobs: 7 in Slurm, each timeout_min=720" in text
    assert "jobs: 1 in Slurm, each timeout_min=120" in text
    assert not Path("runs/sweeps").exists()


def test_the_plan_says_what_memory_runs_take_and_that_one_gpu_evaluates(working_folder, capsys):
    words = ["experiment=paper_qwen3_8b", "devices=8", "strategy=fsdp"]
    folder = write_sweep([*words, "seed=0,1"], cluster="slurm")
    assert main(["submit", str(folder), "--dry-run"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "up to 98.3 GB a run more (last.ckpt)" in text
    assert "memory of a node, to load and to save: up to 130.3 GB a run" in text
    assert "mem_gb=128" in text
    assert "evaluation: one process on one GPU" in text
    assert "it holds all weights, up to 32.8 GB" in text


def test_the_plan_says_which_runs_would_not_fit_their_gpu_and_refuses_none(working_folder, capsys):
    large = ["model=qwen3_8b", "eval_after=false"]
    folder = write_sweep(large, [*large, "trained=all", "model.dtype=float32"], TINY, cluster="slurm")
    assert main(["submit", str(folder), "--dry-run"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "at the peak of a step, qwen3_8b trained=adapter, 1 x 32,768 tokens: 35.3 GB (16.4 GB of it weights" in text
    assert "warning: qwen3_8b trained=all, 1 x 32,768 tokens would not fit the 80 GB of gpu_memory_gb" in text
    assert text.count("warning") == 1
    assert "tiny trained" not in text
    assert main(["submit", str(folder), "resources.gpu_memory_gb=180", "--dry-run"]) == 0
    assert "warning" not in capsys.readouterr().out


def test_hours_are_those_that_the_sweep_itself_has_measured_where_it_has(working_folder, capsys):
    folder = write_sweep([*TINY, "seed=0,1"])
    [first, _] = points_of(folder)
    Path(first.folder).mkdir(parents=True)
    rows = [
        {"step": step, "cr_hard": 1.5, "tokens_per_second": rate} for step, rate in ((1, 100.0), (2, 300.0), (3, 200.0))
    ]
    (Path(first.folder) / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"cut')
    assert main(["submit", str(folder), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "measured in this sweep" in text
    assert f"{2 * 3 * 2 * 128 / 200 / 3600:,.2f}" in text
    assert "jobs: 2 on this machine, 1 at a time" in text


def test_steps_that_were_trained_cost_nothing_more(working_folder):
    from dms_lab.sweeping.state import point_states

    folder = write_sweep([*TINY, "seed=0,1"])
    points = points_of(folder)
    Path(points[0].folder).mkdir(parents=True)
    row = {"step": points[0].config.steps - 1, "cr_hard": 1.5, "tokens_per_second": 100.0}
    (Path(points[0].folder) / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    [planned] = cost.costs(point_states(load_sweep(folder), points))
    whole = cost.tokens_of(points[1].config)
    assert planned.tokens == whole + whole // points[0].config.steps


def test_a_checkpoint_takes_what_the_plan_says_of_it(base_folder):
    from dms_lab.checkpoint import trained_parameters
    from dms_lab.training.run import build_module

    for trained in ("adapter", "lora", "all"):
        words = [
            "model=hf",
            f"model.path={base_folder}",
            "model.dtype=float32",
            f"trained={trained}",
            "data=tiny",
            *TINY[1:],
        ]
        config = one_point(*words).config
        module, _ = build_module(config)
        held = sum(p.numel() for p in trained_parameters(module.model, trained).values())
        assert num_trained(config, shape_of(config.model)) == pytest.approx(held, rel=0.02)


def test_sizes_are_known_for_every_shipped_model_and_guessed_from_a_name():
    for file in (ROOT / "conf" / "model").glob("*.yaml"):
        if file.stem != "hf":
            assert shape_of(one_point(f"model={file.stem}").config.model) is not None
    assert shape_of(one_point("model=hf", "model.path=some/Model-13B-Chat").config.model).num_parameters == 13e9
    assert shape_of(one_point("model=hf", "model.path=some/model").config.model) is None
    assert shape_of(one_point("model=tiny").config.model).num_parameters == pytest.approx(1.05e6, rel=0.01)
    assert cost.tokens_of(one_point(*TINY, "accumulate=3").config) == 3 * 2 * 3 * 128


# -- status ------------------------------------------------------------------------------------------------------------
def test_status_shows_where_each_point_stands_and_why_one_failed(fake_slurm, capsys):
    folder = write_sweep([*TINY, "seed=range(9)"], question="Does it?", cluster="slurm")
    points = points_of(folder)
    finish(points[0])
    logs = {number: note(folder, points[number], str(number)) for number in range(1, 8)}
    Path(points[1].folder).mkdir(parents=True)
    (Path(points[1].folder) / "metrics.jsonl").write_text(json.dumps({"step": 2, "cr_hard": 1.25}) + "\n")
    (finish(points[2]) / "evaluated.json").unlink()
    fake_slurm.answer(
        "squeue", "1 RUNNING 0 2:00 None\n2 RUNNING 1 3:00 None\n3 PENDING 0 0:00 Priority\n4 PENDING 2 0:00 BeginTime\n"
    )
    fake_slurm.answer("sacct", "5|FAILED|00:01:00|None\n6|OUT_OF_MEMORY|00:01:00|None\n7|CANCELLED by 0|00:00:00|None\n")
    logs[5].write_text("Traceback\n" + "\n".join(f"line {i}" for i in range(30)) + "\nValueError: no weights for a/b\n")
    assert main(["status", str(folder)]) == 1
    text = capsys.readouterr().out
    rows = {line.split()[1]: line for line in text.splitlines() if line.startswith("│")}
    shown = [rows[point.name] for point in points]
    words = [
        "done",
        "running",
        "evaluating",
        "pending (Priority)",
        "requeued 2 times",
        "failed",
        "failed",
        "stopped",
        "missing",
    ]
    assert all(word in row for word, row in zip(words, shown, strict=True))
    assert re.search(r"2/3 +│ 1\.25 ", shown[1])
    assert "requeued 1 time" in shown[2]
    assert "seed=3" in shown[3]
    assert "cr=4" not in shown[3]  # all have that
    assert f"{points[5].name}: FAILED: ValueError: no weights for a/b" in text
    assert "line 29" in text
    assert "line 3\n" not in text
    assert f"{points[6].name}: OUT_OF_MEMORY: no log was written" in text
    assert "1 done, 1 evaluating, 1 running, 1 pending, 1 requeued, 2 failed, 1 stopped, 1 missing of 9 points" in text
    assert main(["status", str(folder), "--json"]) == 1
    plain = json.loads(capsys.readouterr().out)
    assert [state["state"] for state in plain] == [word.split()[0] for word in words]
    assert (plain[1]["step"], plain[1]["steps"], plain[1]["cr"]) == (2, 3, 1.25)
    assert plain[5]["log_lines"][-1] == "ValueError: no weights for a/b"


def test_status_without_accounting_says_what_cannot_be_known_and_takes_what_jobs_left(fake_slurm, capsys):
    folder = write_sweep([*TINY, "seed=range(2)"], cluster="slurm")
    points = points_of(folder)
    logs = [note(folder, point, str(number)) for number, point in enumerate(points)]
    fake_slurm.answer("sacct", "Slurm accounting storage is disabled", code=1)
    error = ("error", "Traceback\nRuntimeError: it broke\n")
    Path(str(logs[0]).replace("_log.err", "_result.pkl")).write_bytes(pickle.dumps(error))
    assert main(["status", str(folder)]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert f"failed {points[0].name}: FAILED: accounting has no answer" in text
    assert "RuntimeError: it broke" in text
    assert (
        f"unknown {points[1].name}: accounting has no answer (sacct failed: Slurm accounting storage is disabled)" in text
    )


def test_of_several_processes_the_one_that_failed_says_why(fake_slurm, capsys):
    folder = write_sweep([*TINY, "devices=2", "accumulate=2"], cluster="slurm")
    log = note(folder, points_of(folder)[0], "5")
    log.write_text("waiting for the other\nsrun: error: n1: task 0: Killed\n")
    fake_slurm.answer("sacct", "5|FAILED|00:01:00|None\n")
    assert main(["status", str(folder)]) == 1
    assert "FAILED: waiting for the other" in capsys.readouterr().out
    log.with_name("5_1_log.err").write_text("Traceback\nOSError: no space\n")
    log.with_name("5_1_result.pkl").write_bytes(pickle.dumps(("error", "Traceback\nOSError: no space\n")))
    assert main(["status", str(folder)]) == 1
    text = capsys.readouterr().out
    assert "FAILED: OSError: no space" in text
    assert "waiting for the other" not in text
    assert "5_1_log.err" in text


def test_status_tells_of_points_that_failed_in_a_multirun(working_folder, capsys):
    folder = write_sweep([*TINY, "seed=0,1"])
    points = points_of(folder)
    outcomes = load_sweep(folder).records / "outcomes"
    outcomes.mkdir(parents=True)
    for number, (point, error) in enumerate(zip(points, (None, "no weights for a/b"), strict=True)):
        (outcomes / f"{number:05d}.json").write_text(json.dumps({"overrides": list(point.overrides), "error": error}))
    assert main(["status", str(folder)]) == 1
    assert f"failed {points[1].name}: no weights for a/b" in capsys.readouterr().out


def test_status_of_what_was_never_submitted_asks_no_queue(working_folder, capsys):
    folder = write_sweep(TINY, cluster="slurm")
    assert main(["status", str(folder)]) == 0
    assert "1 missing of 1 points" in capsys.readouterr().out


# -- collect -----------------------------------------------------------------------------------------------------------
def test_collect_has_every_row_once_the_last_of_equals_and_names_what_is_missing(working_folder, capsys):
    folder = write_sweep([*TINY, "window=4,8", "seed=0,1"])
    points = points_of(folder)
    for point in points[:3]:
        full = row_of(point, method="full", target_cr=1.0, window=None)
        rival = row_of(point, method="streaming_llm", window=None, peak_tokens=float(point.config.window))
        finish(point, row_of(point), full, rival)
    finish(points[0], row_of(points[0], accuracy=0.75), row_of(points[0], width=4))  # evaluated once more
    assert main(["collect", str(folder)]) == 0
    told = capsys.readouterr()
    assert f"missing: {points[3].name}" in told.err
    frame = results.load(folder / "results.csv")
    trained = frame[frame.method == "dms"]
    assert list(trained.variant) == ["window=4", "window=4", "window=4", "window=8"]
    assert list(trained.accuracy) == [0.75, 0.5, 0.5, 0.5]
    assert list(trained.width) == [1, 4, 1, 1]
    assert sorted(zip(frame.method, frame.seed, frame.variant, strict=True))[4:] == [
        *(("full", seed, "") for seed in (0, 1)),
        *(("streaming_llm", seed, "") for seed in (0, 1)),
    ]
    before = (folder / "results.csv").read_bytes()
    assert main(["collect", str(folder)]) == 0
    assert (folder / "results.csv").read_bytes() == before
    assert main(["collect", str(folder), "--strict"]) == 1
    finish(points[3])
    assert main(["collect", str(folder), "--strict"]) == 0


def test_collect_keeps_the_rows_of_points_whose_runs_are_no_longer_here(working_folder, capsys):
    folder = write_sweep([*TINY, "seed=0,1,2"])
    first, second, _ = points_of(folder)
    finish(first, row_of(first), row_of(first, method="full", target_cr=1.0, window=None, accuracy=0.25))
    assert main(["collect", str(folder)]) == 0
    shutil.rmtree(first.folder)
    finish(second, row_of(second, accuracy=0.75), row_of(second, method="full", target_cr=1.0, window=None, seed=0))
    capsys.readouterr()
    assert main(["collect", str(folder), "--strict"]) == 1
    told = capsys.readouterr()
    assert "3 rows of 2 points" in told.out
    assert "1 of these points have no finished run here" in told.err
    assert told.err.count("missing:") == 1
    frame = results.load(folder / "results.csv")
    assert list(zip(frame.method, frame.seed, frame.accuracy, strict=True)) == [
        ("dms", 0, 0.5),
        ("full", 0, 0.5),  # measured anew
        ("dms", 1, 0.75),
    ]


def test_collect_takes_of_a_run_s_folder_what_this_sweep_asked_for(working_folder):
    folder = write_sweep({"overrides": TINY, "then": [["cr=[3]"]]})
    (point,) = points_of(folder)
    finish(point, *(row_of(point, target_cr=float(cr)) for cr in (1, 2, 3, 4, 5)))
    _, own, dialled = the_job_of(point, Path()).steps()
    evaluated.record(own.folder, own.what, [0, 2])
    evaluated.record(own.folder, dialled.what, [2, 3])
    evaluated.record(own.folder, dialled.what | {"cr": [6.0]}, [4])  # of another sweep
    assert main(["collect", str(folder)]) == 0
    assert list(results.load(folder / "results.csv")["target_cr"]) == [1.0, 3.0, 4.0]


def test_collect_of_nothing_is_told_and_writes_nothing(working_folder, capsys):
    folder = write_sweep(TINY)
    assert main(["collect", str(folder)]) == 1
    assert "error: no point of study is done yet" in capsys.readouterr().err
    assert not (folder / "results.csv").exists()


# -- cancel ------------------------------------------------------------------------------------------------------------
def test_cancel_ends_every_job_of_the_sweep_that_is_queued_or_runs_and_no_other(fake_slurm, capsys):
    folder = write_sweep([*TINY, "seed=0,1"], cluster="slurm")
    first, second = points_of(folder)
    for point, job_id in ((first, "4"), (first, "5"), (second, "6")):
        note(folder, point, job_id)
    fake_slurm.answer("squeue", "4 RUNNING 0 2:00 None\n5 PENDING 0 0:00 Priority\n9 RUNNING 0 9:00 None\n")
    assert main(["cancel", str(folder)]) == 0
    assert "2 jobs cancelled" in capsys.readouterr().out
    assert fake_slurm.calls("scancel") == [f"--name=dms-study --user={os.getuid()} 4 5"]


# -- for real, on this machine -----------------------------------------------------------------------------------------
def run(*words, folder, code=0):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dms_lab.sweep", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def measured(folder):
    """What a sweep's results say, by what each row is about."""
    frame = results.load(folder / "experiments" / "study" / "results.csv")
    keys = ("model", "method", "task", "target_cr", "seed", "variant")
    values = ("accuracy", "perplexity", "measured_cr", "kv_reads", "peak_tokens", "problem_scores")
    found = {
        (*(row[k] for k in keys), row["settings"].get("live_tokens")): [str(row[v]) for v in values]
        for row in frame.to_dict("records")
    }
    assert len(found) == len(frame)
    return found


def wait_for(is_true, seconds=240):
    end = time.monotonic() + seconds
    while not (found := is_true()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def job_of(point):
    """The process that works on a point, as the supervisor has noted it."""
    jobs = [job for job in load_jobs(load_sweep("experiments/study")) if job.hash == point.hash]
    return supervisor.read_note(Path(jobs[-1].log)) if jobs else None


@pytest.mark.slow
def test_a_sweep_with_a_failing_point_and_a_killed_one_ends_as_one_that_nobody_disturbed(working_folder, monkeypatch):
    words = [*(word for word in TINY if not word.startswith("steps=")), "steps=120", "log_every=10", "window=4,8"]
    parts = ({"overrides": words, "then": [EVALUATION]},)
    for name in ("undisturbed", "disturbed"):
        (working_folder / name).mkdir()
        monkeypatch.chdir(working_folder / name)
        write_sweep(*parts, workers=2)
    text = run("submit", "experiments/study", "--wait", folder=working_folder / "undisturbed")
    assert "2 done of 2 points" in text
    run("collect", "experiments/study", "--strict", folder=working_folder / "undisturbed")

    first, second = points_of("experiments/study")
    began = time.monotonic()
    run("submit", "experiments/study", folder=working_folder / "disturbed")
    assert time.monotonic() - began < 30  # returns at once; the jobs outlive it
    wait_for((Path(first.folder) / "last.ckpt").is_file)
    os.kill(job_of(first).pid, signal.SIGKILL)
    wait_for(lambda: job_of(first).code is not None)
    text = run("status", "experiments/study", folder=working_folder / "disturbed", code=1)
    assert f"failed {first.name}: FAILED: killed by SIGKILL" in " ".join(text.split())
    wait_for((Path(second.folder) / "last.ckpt").is_file)
    run("cancel", "experiments/study", folder=working_folder / "disturbed")
    wait_for(lambda: job_of(second).code is not None)
    assert "stopped" in run("status", "experiments/study", folder=working_folder / "disturbed", code=1)
    text = run("submit", "experiments/study", "--wait", folder=working_folder / "disturbed")
    assert "2 of 2 points submitted" in text
    run("collect", "experiments/study", "--strict", folder=working_folder / "disturbed")
    assert measured(working_folder / "disturbed") == measured(working_folder / "undisturbed")
    steps = [json.loads(line)["step"] for line in (Path(first.folder) / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(10, 121, 10))


@pytest.mark.slow
def test_a_point_that_fails_is_shown_with_the_end_of_its_log_and_the_others_end(working_folder):
    write_sweep(TINY, [*TINY, "model.path=/nowhere/at/all"], workers=2)
    text = run("submit", "experiments/study", "--wait", folder=working_folder, code=1)
    assert "1 done, 1 failed of 2 points" in text
    assert "FAILED: error: no weights for model.path=/nowhere/at/all" in " ".join(text.split())
    assert "missing: tiny-cr4-w8" in run("collect", "experiments/study", folder=working_folder)
    jobs = [job for job in load_jobs(load_sweep("experiments/study")) if job.cluster == "local"]
    wait_for(lambda: {s.state for s in local.job_states(None, jobs).values()} == {"COMPLETED", "FAILED"})
