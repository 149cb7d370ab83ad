"""A job completes its point, whatever was done of it before, and ends as what became of it."""

import errno
import fcntl
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from sweep_cases import EVALUATION, TINY, FakeSlurm, finish, one_point, random_model, sweep_of

from dms_lab.evaluation import evaluated, suite
from dms_lab.sweeping import job, local, slurm, steps, supervisor
from dms_lab.sweeping.job import PointJob, is_locked, job_of, locked
from dms_lab.sweeping.points import expand
from dms_lab.sweeping.records import JobState, Submitted, append_jobs, last_jobs, load_jobs, submitting

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    return tmp_path


@pytest.fixture
def fake_slurm(working_folder, monkeypatch):
    return FakeSlurm(working_folder / "slurm", monkeypatch)


def rows_of(point):
    return [json.loads(line) for line in (Path(point.folder) / "results.jsonl").read_text().splitlines()]


def about(rows):
    return [(row["method"], row["task"], row["target_cr"]) for row in rows]


# -- one point ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(tmp_path_factory, base_folder):
    """A point whose evaluation was killed at the worst moments, and gone on with; and which methods were measured."""
    root = tmp_path_factory.mktemp("finished")
    measure, measured = suite.measure, []

    def killed_at_the_third(subject, asked):
        measured.append(asked.method)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return measure(subject, asked)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(suite, "measure", killed_at_the_third)
        point = one_point(*random_model(base_folder))
        with pytest.raises(KeyboardInterrupt):
            job_of(point, root)()
        assert not job_of(point, root).steps()[1].is_done()
        results = root / point.folder / "results.jsonl"
        lines = results.read_text().splitlines(keepends=True)
        # the last row was cut off, and the one before it is kept elsewhere but had not been written yet
        results.write_text("".join(lines[:-2]) + lines[-1][:40])
        job_of(point, root)()
    return root, point, measured


def test_a_job_trains_and_evaluates_once_also_where_it_was_killed_half_way(finished, monkeypatch):
    root, point, measured = finished
    monkeypatch.chdir(root)
    rows = rows_of(point)
    assert {method for method, _, _ in about(rows)} == {"full", "dms", "streaming_llm"}
    assert len(set(about(rows))) == len(rows) == 16
    assert measured == ["full", "dms", "dms", "dms", "streaming_llm"]  # what was measured before the kill is not again
    assert not (Path(point.folder) / evaluated.PART).exists()


def test_a_row_says_what_was_asked_beside_its_ratio(finished, monkeypatch):
    root, point, _ = finished
    monkeypatch.chdir(root)
    config, of_text = point.config, {"context": point.config.context, "data": "tiny"}
    of_tasks = {"length": config.eval.length}
    for row in rows_of(point):
        settings = dict(row["settings"])
        if row["method"] == "streaming_llm":
            assert settings.pop("live_tokens") >= 8
        assert settings == (of_text if row["task"] == "held_out_text" else of_tasks)


def test_a_point_that_is_done_is_left_as_it_is_without_torch(finished, working_folder):
    root, point, _ = finished
    before = {path: path.stat().st_mtime_ns for path in (root / point.folder).rglob("*")}
    job.write_job(working_folder / "job.json", job_of(point, root))
    code = "import sys; from dms_lab.sweeping.job import main; main(); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "job.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "is done already" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in (root / point.folder).rglob("*")} == before


def test_other_settings_of_the_evaluation_are_another_evaluation(working_folder):
    point = one_point(*TINY)
    finish(point)
    assert all(step.is_done() for step in job_of(point, working_folder).steps())
    other = one_point(*TINY, "eval.num_problems=3", then=[EVALUATION])
    assert other.hash == point.hash
    assert [step.is_done() for step in job_of(other, working_folder).steps()] == [True, False, False]
    workers = one_point(*TINY, "eval.workers=2")
    assert all(step.is_done() for step in job_of(workers, working_folder).steps())


def test_results_that_lost_rows_are_not_taken_for_whole(working_folder):
    point = one_point(*TINY)
    folder = finish(point)
    evaluated.record(folder, job_of(point, working_folder).steps()[1].what, [0])
    (folder / "results.jsonl").write_text("")
    assert not job_of(point, working_folder).steps()[1].is_done()
    (folder / "evaluated.json").write_text('[["what another tool writes"], 3]')
    assert not job_of(point, working_folder).steps()[1].is_done()


def test_rows_that_are_not_those_that_were_evaluated_do_not_stand_for_them(working_folder):
    point = one_point(*TINY, then=[EVALUATION])
    folder = finish(point)
    _, own, then = job_of(point, working_folder).steps()
    row = (folder / "results.jsonl").read_text()
    (folder / "results.jsonl").write_text(row + row.replace("0.5", "0.25"))
    evaluated.record(folder, own.what, [1])
    evaluated.record(folder, then.what, [0, 1])  # one of its rows was there already
    assert own.is_done()
    assert then.is_done()
    (folder / "results.jsonl").write_text(row + row)  # removed, and measured by another command
    assert not own.is_done()
    assert not then.is_done()
    (folder / "results.jsonl").write_text(row.replace("0.5", "0.25"))
    assert own.is_done()  # whatever became of others
    assert not then.is_done()
    (folder / "results.jsonl").unlink()
    assert not own.is_done()
    plain = [{"what": own.what, "num_rows": 1}]  # as written before rows were told apart
    (folder / "evaluated.json").write_text(json.dumps(plain))
    assert not own.is_done()
    (folder / "results.jsonl").write_text(row)
    assert own.is_done()


def test_a_calibration_text_that_was_changed_is_another_evaluation(working_folder):
    text = working_folder / "mine.txt"
    text.write_text("x = 1\n")
    point = one_point(*TINY, then=[["cr=3", f"calibrate={text}"], ["cr=3"]])
    finish(point)
    made = job_of(point, working_folder)
    assert all(step.is_done() for step in made.steps())
    text.write_text("x = 2\n")
    assert [step.is_done() for step in made.steps()] == [True, True, False, True]
    text.write_text("x = 1\n")
    assert made.steps()[2].is_done()
    text.unlink()  # and the results copied elsewhere, say: what was done is done
    assert made.steps()[2].is_done()
    assert "calibrate_content" not in made.steps()[3].what  # what was recorded before there were contents


def test_a_folder_of_another_run_is_not_a_done_point(working_folder):
    point = one_point(*TINY, "out=runs/mine")
    finish(point)
    assert not job_of(one_point(*TINY, "out=runs/mine", "seed=5"), working_folder).steps()[0].is_done()


def test_a_point_that_the_code_has_made_another_is_not_run(working_folder):
    made = replace(job_of(one_point(*TINY), working_folder), hash="0" * 12)
    with pytest.raises(ValueError, match=r"submitted as 000000000000 and is [0-9a-f]{12} for the code as it is now"):
        made()


def test_benchmarks_of_a_run_wait_until_it_is_trained_and_those_of_a_checkpoint_do_not(working_folder, monkeypatch):
    from dms_lab.evaluation import reasoning

    asked = []
    monkeypatch.setattr(reasoning, "evaluate_benchmarks", lambda config: asked.append(config.checkpoint) or [])
    run = Path("runs/trains")
    (run / "checkpoints" / "cr2").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    whole, member = (
        one_point(*EVALUATION, f"checkpoint={place}", command="evaluate") for place in (run, run / "checkpoints" / "cr2")
    )
    with pytest.raises(ValueError, match=r"checkpoint=runs/trains is a run that is not trained to its end"):
        job_of(whole, working_folder)()
    assert not (Path(whole.folder) / "evaluated.json").exists()
    job_of(member, working_folder)()
    (run / "done.json").write_text("{}")
    job_of(whole, working_folder)()
    assert asked == ["runs/trains/checkpoints/cr2", "runs/trains"]


def test_what_stops_a_training_fails_the_job_and_the_evaluation_waits(working_folder, base_folder, monkeypatch):
    from dms_lab.training import run

    point = one_point(*random_model(base_folder))
    monkeypatch.setattr(run, "train", lambda config, **_: run.Outcome(Path(point.folder), False, "SIGTERM"))
    with pytest.raises(steps.StoppedError, match="stopped by SIGTERM; the next job for runs/hf-cr4"):
        job_of(point, working_folder)()
    assert not (Path(point.folder) / "results.jsonl").exists()


def test_of_several_processes_the_first_alone_locks_and_evaluates(working_folder, monkeypatch):
    done = []
    monkeypatch.setattr(steps.Training, "run", lambda self: done.append("trained"))
    monkeypatch.setattr(steps.OwnEvaluation, "run", lambda self: done.append("evaluated"))
    monkeypatch.setenv("SLURM_PROCID", "1")
    point = one_point(*TINY)
    job_of(point, working_folder)()
    assert done == ["trained"]
    assert not Path(point.folder).exists()
    monkeypatch.setenv("SLURM_PROCID", "0")
    job_of(point, working_folder)()
    assert done == ["trained", "trained", "evaluated"]


def test_torchrun_within_a_job_of_slurm_says_which_process_this_is(monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("RANK", "3")
    assert job._rank() == 3


def test_several_processes_meet_in_their_training_whatever_one_of_them_sees_done(working_folder, monkeypatch):
    done = []
    monkeypatch.setattr(steps.Training, "run", lambda self: done.append("trained"))
    monkeypatch.setattr(steps.OwnEvaluation, "run", lambda self: done.append("evaluated"))
    point = one_point(*TINY, "devices=2", "accumulate=2")
    finish(point)  # while the first waited for its lock, or between the looks of two processes
    for rank in "01":
        monkeypatch.setenv("SLURM_PROCID", rank)
        job_of(point, working_folder)()
    assert done == ["trained", "trained"]


def test_of_several_processes_the_first_alone_says_that_the_job_was_stopped(working_folder, monkeypatch):
    def stop(self):
        raise steps.StoppedError("stopped by SIGUSR2")

    monkeypatch.setattr(steps.Training, "run", stop)
    monkeypatch.setenv("SLURM_PROCID", "1")
    point = one_point(*TINY)
    job_of(point, working_folder)()
    monkeypatch.setenv("SLURM_PROCID", "0")
    with pytest.raises(steps.StoppedError):
        job_of(point, working_folder)()


SHOWN = "JobId=7 JobState=RUNNING\n   PreemptEligibleTime=2024-01-01T00:00:00 PreemptTime={}\n"


@pytest.mark.parametrize(
    ("stopped_by", "since", "comes_back"),
    [("SIGTERM", "2024-01-01T00:01:00", True), ("SIGTERM", "None", False), ("SIGINT", "2024-01-01T00:01:00", False)],
)
def test_a_job_that_was_preempted_and_ends_by_itself_is_queued_again(
    working_folder, base_folder, monkeypatch, fake_slurm, stopped_by, since, comes_back
):
    from dms_lab.training import run

    point = one_point(*random_model(base_folder))
    monkeypatch.setattr(run, "train", lambda config, **_: run.Outcome(Path(point.folder), False, stopped_by))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    fake_slurm.answer("scontrol", SHOWN.format(since))
    called = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: called.append(number))  # submitit's ends the process
    try:
        with pytest.raises(steps.StoppedError):
            job_of(point, working_folder)()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert called == ([signal.SIGUSR2] if comes_back else [])


def test_a_job_that_is_queued_again_is_the_same_job(working_folder):
    from submitit.core.utils import DelayedSubmission

    made = job_of(one_point(*TINY, then=[EVALUATION]), working_folder)
    DelayedSubmission(made)._checkpoint_function().dump(working_folder / "job.pkl")
    again = DelayedSubmission.load(working_folder / "job.pkl")
    assert again.function == made
    assert again.args == ()
    assert (working_folder / "job.pkl").stat().st_size < 20_000


# -- two jobs at once --------------------------------------------------------------------------------------------------
def test_a_second_job_does_not_work_in_a_folder_until_the_first_is_dead(working_folder):
    code = "import sys, time; from pathlib import Path; from dms_lab.sweeping.job import locked\n"
    code += "with locked(Path('runs/a')): print('locked', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "locked\n"
        assert is_locked(Path("runs/a"))
        with pytest.raises(ValueError, match=rf'another job works in runs/a \(.*"pid": {first.pid}'):
            locked(Path("runs/a"), patience_seconds=0.2).__enter__()
        first.kill()
        first.wait()
        with locked(Path("runs/a"), patience_seconds=0.2):
            assert is_locked(Path("runs/a"))
    assert not is_locked(Path("runs/a"))
    assert not is_locked(Path("runs/b"))


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_told_of(working_folder, monkeypatch, number):
    def refuse(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    said = rf"runs/a/run.lock cannot be locked \({os.strerror(number)}\).*Lustre the mount option flock"
    with pytest.raises(ValueError, match=said), locked(Path("runs/a")):
        pass
    with pytest.raises(ValueError, match=said):
        is_locked(Path("runs/a"))
    with pytest.raises(ValueError, match=r"submit\.lock cannot be locked"), submitting(sweep_of(TINY)):
        pass


def test_two_that_ask_for_a_lock_do_not_see_each_other(working_folder):
    with locked(Path("runs/a")):
        pass
    with Path("runs/a/run.lock").open() as asking:
        fcntl.flock(asking, fcntl.LOCK_SH | fcntl.LOCK_NB)
        assert not is_locked(Path("runs/a"))


def test_two_commands_do_not_submit_at_once(working_folder):
    sweep = sweep_of(TINY)
    with submitting(sweep), pytest.raises(ValueError, match="another command is submitting study"), submitting(sweep):
        pass
    with submitting(sweep):
        pass


def test_a_record_of_jobs_that_a_kill_cut_off_is_read_without_its_last_line(working_folder):
    sweep = sweep_of(TINY)
    first, second = (Submitted(name, "slurm", "h", "runs/a", 1.0, "log") for name in ("1", "2"))
    append_jobs(sweep, [first])
    append_jobs(sweep, [second])
    assert load_jobs(sweep) == [first, second]
    assert last_jobs(sweep) == {"h": second}
    path = sweep.records / "jobs.jsonl"
    path.write_text(path.read_text()[:-9])
    assert load_jobs(sweep) == [first]
    append_jobs(sweep, [second])
    assert load_jobs(sweep) == [first, second]


# -- Slurm -------------------------------------------------------------------------------------------------------------
def test_points_are_submitted_as_an_array_that_asks_for_their_resources(working_folder, fake_slurm):
    more = {"partition": "gpu", "account": "me", "timeout_min": 30, "array_parallelism": 3, "setup": ["module load cuda"]}
    sweep = sweep_of([*TINY, "seed=0,1"], cluster="slurm", resources=more | {"additional_parameters": {"nice": 5}})
    points = expand(sweep)
    jobs = slurm.submit(sweep, points)
    assert [(j.job_id, j.hash, j.folder) for j in jobs] == [(f"7_{i}", p.hash, p.folder) for i, p in enumerate(points)]
    assert load_jobs(sweep) == jobs
    script = (sweep.records / "slurm" / "7_submission.sh").read_text()
    for line in (
        "--array=0-1%2",
        "--partition=gpu",
        "--account=me",
        "--time=30",
        "--signal=USR2@180",
        "--requeue",
        "--nice=5",
    ):
        assert f"#SBATCH {line}\n" in script
    assert "#SBATCH --job-name=dms-study\n" in script
    assert "--gpus-per-node" not in script
    assert "\nmodule load cuda\n" in script
    assert script.rstrip().splitlines()[-1].startswith("srun ")  # its exit status is the job's
    for submitted, point in zip(jobs, points, strict=True):
        delayed = pickle.loads((sweep.records / "slurm" / f"{submitted.job_id}_submitted.pkl").read_bytes())
        assert delayed.function == job_of(point, working_folder)
        assert (delayed._timeout_min, delayed._timeout_countdown) == (30, 100)


def test_points_of_other_needs_are_other_arrays(fake_slurm):
    sweep = sweep_of(TINY, ["model=qwen3_0_6b", "seed=0,1"], cluster="slurm")
    slurm.submit(sweep, expand(sweep))
    assert len(fake_slurm.calls("sbatch")) == 2


def test_what_slurm_does_not_take_is_told(fake_slurm):
    fake_slurm.answer("sbatch", "", code=1)
    sweep = sweep_of(TINY, cluster="slurm")
    with pytest.raises(ValueError, match="Slurm took no job"):
        slurm.submit(sweep, expand(sweep))
    assert load_jobs(sweep) == []


def test_long_arrays_are_submitted_as_several_and_a_refusal_says_what_was_taken(fake_slurm):
    fake_slurm.answer("scontrol", "MaxArraySize            = 2\nMaxJobCount             = 10000\n")
    sweep = sweep_of([*TINY, "seed=range(5)"], cluster="slurm")
    slurm.submit(sweep, expand(sweep))
    assert len(fake_slurm.calls("sbatch")) == 3
    assert [job.job_id for job in load_jobs(sweep)] == ["7_0", "7_1", "7_0", "7_1", "7"]
    once = "#!/bin/sh\ntest -e taken && { echo 'sbatch: error: QOSMaxSubmitJobPerUserLimit' >&2; exit 1; }\n"
    (fake_slurm.folder / "sbatch").write_text(f"{once}touch taken\necho Submitted batch job 9\n")
    other = sweep_of([*TINY, "seed=range(5)"], name="other", cluster="slurm")
    with pytest.raises(ValueError, match=r"took 2 of 5 jobs, which are queued, .*QOSMaxSubmitJobPerUserLimit; the same"):
        slurm.submit(other, expand(other))
    assert [job.job_id for job in load_jobs(other)] == ["9_0", "9_1"]


def noted(*ids):
    return [Submitted(job_id, "slurm", f"hash{job_id}", "runs/a", 1.0, f"slurm/{job_id}_0_log.err") for job_id in ids]


def test_states_are_the_queues_and_for_what_has_ended_those_of_accounting(fake_slurm):
    fake_slurm.answer(
        "squeue", "7_0  RUNNING 1 2:03 None\n7_1 PENDING 0 0:00 Nodes required for job are DOWN\n8 PENDING 2 0:00 x\n"
    )
    lines = ["7_0|RUNNING|00:01:00|None", "7_2|PREEMPTED|00:00:10|None", "7_2|TIMEOUT|00:30:00|TimeLimit"]
    lines += ["7_[3-4%2]|CANCELLED by 0|00:00:00|None", "7_[6,8-9]|CANCELLED by 0|00:00:00|None"]
    fake_slurm.answer("sacct", "\n".join(lines) + "\n")
    found = slurm.job_states(sweep_of(TINY), noted("7_0", "7_1", "7_2", "7_4", "7_9", "7_5"))
    assert found == {
        "7_0": JobState("RUNNING", 1, "2:03", "None"),
        "7_1": JobState("PENDING", 0, "0:00", "Nodes required for job are DOWN"),
        "7_2": JobState("TIMEOUT", 1, "00:30:00", "TimeLimit"),
        "7_4": JobState("CANCELLED", 0, "00:00:00", "None"),
        "7_9": JobState("CANCELLED", 0, "00:00:00", "None"),
        "7_5": JobState(""),
    }
    assert found["7_0"].is_active
    assert found["7_1"].is_queued
    assert not found["7_2"].is_active
    assert "--name=dms-study" in fake_slurm.calls("squeue")[0]
    assert "--jobs=7 " in fake_slurm.calls("sacct")[0]


def test_a_job_that_has_left_the_queue_is_not_at_work_whatever_accounting_says(fake_slurm):
    fake_slurm.answer("squeue", "7_0 RUNNING 0 2:03 None\n")
    fake_slurm.answer("sacct", "7_0|RUNNING|00:01:00|None\n7_1|RUNNING|00:01:00|None\n7_2|PENDING|00:00:00|None\n")
    found = slurm.job_states(sweep_of(TINY), noted("7_0", "7_1", "7_2"))
    assert [found[job].is_active for job in ("7_0", "7_1", "7_2")] == [True, False, False]
    assert found["7_1"].reason == "accounting has it as RUNNING, but it has left the queue: it ended, or was lost"


def test_a_job_that_was_cancelled_is_not_at_work_while_it_is_cleared_away_and_one_that_comes_back_is(fake_slurm):
    fake_slurm.answer("squeue", "".join(f"7_{i} COMPLETING 0 2:03 None\n" for i in range(3)))
    fake_slurm.answer("sacct", "7_0|CANCELLED by 0|00:01:00|None\n7_1|REQUEUED|00:01:00|None\n7_2|RUNNING|00:01:00|None\n")
    found = slurm.job_states(sweep_of(TINY), noted("7_0", "7_1", "7_2"))
    assert [found[job].is_active for job in ("7_0", "7_1", "7_2")] == [False, True, True]
    assert found["7_0"].state == "CANCELLED"


def test_without_accounting_what_the_queue_does_not_say_is_not_known(fake_slurm):
    fake_slurm.answer("squeue", "7_0 COMPLETING 0 2:03 None\n7_1 FAILED 0 0:02 NonZeroExitCode\n")
    fake_slurm.answer("sacct", "", code=1)
    found = slurm.job_states(sweep_of(TINY), noted("7_0", "7_1", "7_2"))
    assert (found["7_0"].is_active, found["7_1"].state, found["7_2"].state) == (True, "FAILED", "")
    assert found["7_2"].reason.startswith("accounting has no answer (sacct failed")


def test_a_queue_that_does_not_answer_is_told_rather_than_taken_for_empty(fake_slurm):
    fake_slurm.answer("squeue", "slurm_load_jobs error: Unable to contact slurm controller", code=1)
    with pytest.raises(ValueError, match=r"squeue failed: .*Unable to contact slurm controller"):
        slurm.job_states(sweep_of(TINY), noted("7_0"))


def test_only_jobs_of_this_sweep_and_user_are_cancelled(fake_slurm):
    slurm.cancel(sweep_of(TINY), noted("7_1", "7_0"))
    assert fake_slurm.calls("scancel") == [f"--name=dms-study --user={os.getuid()} 7_0 7_1"]
    slurm.cancel(sweep_of(TINY), [])
    assert len(fake_slurm.calls("scancel")) == 1


# -- this machine ------------------------------------------------------------------------------------------------------
@pytest.fixture
def batch(working_folder):
    folder = working_folder / "local" / "batch"
    folder.mkdir(parents=True)
    return folder


def supervised(batch, *programs, workers=2):
    """A supervisor whose jobs are short shell programs, in a process of its own."""
    for index, program in enumerate(programs):
        described = {"root": ".", "command": "train", "hash": "", "composed": {"program": program}}
        (batch / f"{index:04d}.json").write_text(json.dumps(described))
    code = "import json, sys; from pathlib import Path; from dms_lab.sweeping import supervisor\n"
    code += "supervisor.command_of = lambda spec: ['sh', '-c', json.loads(spec.read_text())['composed']['program']]\n"
    code += f"supervisor.Supervisor(Path({str(batch)!r}), {workers}).run()"
    return subprocess.Popen([sys.executable, "-c", code], start_new_session=True)


def of_batch(batch, process, number):
    owner = {"pid": process.pid, "pid_started": supervisor.started_at(process.pid), "host": os.uname().nodename}
    return [
        Submitted(f"b-{i}", "local", f"h{i}", "runs/a", 1.0, str(batch / f"{i:04d}.log"), **owner) for i in range(number)
    ]


def states(jobs):
    return [state.state for state in local.job_states(sweep_of(TINY), jobs).values()]


def wait_until(is_true, seconds=20):
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_so_many_jobs_as_workers_run_at_a_time_and_each_ends_as_it_does(batch):
    run = "echo + >> {0}/at_work; sleep 0.2; echo - >> {0}/at_work; {1}"
    programs = [run.format(batch, end) for end in ("true", "echo no; exit 3", "kill -9 $$", "true", "exit 143")]
    process = supervised(batch, *programs)
    jobs = of_batch(batch, process, 5)
    assert states(jobs)[4] == "PENDING"
    assert process.wait() == 0
    assert states(jobs) == ["COMPLETED", "FAILED", "FAILED", "COMPLETED", "CANCELLED"]
    assert local.job_states(None, jobs)["b-2"].reason == "killed by SIGKILL"
    assert (batch / "0001.log").read_text() == "no\n"
    at_work, most = 0, 0
    for mark in (batch / "at_work").read_text().split():
        at_work += 1 if mark == "+" else -1
        most = max(most, at_work)
    assert most == 2


def test_two_submissions_together_run_no_more_than_one(working_folder, batch):
    other = batch.parent / "other"
    other.mkdir()
    run = f"echo + >> {batch}/at_work; sleep 0.2; echo - >> {batch}/at_work"
    processes = [supervised(folder, run, run, workers=1) for folder in (batch, other)]
    assert [process.wait() for process in processes] == [0, 0]
    assert (batch / "at_work").read_text().split() == ["+", "-"] * 4


def test_a_cancelled_submission_stops_what_runs_once_and_starts_no_more(batch):
    trap = (
        f"trap 'echo told >> {batch}/told; sleep 0.3; exit 1' TERM; echo > {batch}/begun; while true; do sleep 0.05; done"
    )
    process = supervised(batch, trap, "true", workers=1)
    jobs = of_batch(batch, process, 2)
    wait_until(lambda: (batch / "begun").exists())
    process.send_signal(signal.SIGSTOP)
    local.cancel(None, jobs)  # the supervisor tells them: a second signal would end a job before it has saved
    time.sleep(0.3)
    assert not (batch / "told").exists()
    process.send_signal(signal.SIGCONT)
    assert process.wait() == 0
    assert (batch / "told").read_text() == "told\n"
    assert states(jobs) == ["CANCELLED", "CANCELLED"]


def test_jobs_of_a_supervisor_that_was_killed_go_on_and_those_that_waited_are_stopped(batch):
    process = supervised(batch, f"echo $$ > {batch}/begun; sleep 30", "true", workers=1)
    jobs = of_batch(batch, process, 2)
    wait_until(lambda: (batch / "begun").exists() and (batch / "begun").read_text().strip())
    process.kill()
    process.wait()
    assert states(jobs) == ["RUNNING", "CANCELLED"]
    second = supervised(batch.parent / "batch", "true", workers=1)  # its place is taken as long as the job runs
    time.sleep(0.5)
    assert second.poll() is None
    second.kill()
    local.cancel(None, jobs)
    pid = int((batch / "begun").read_text())
    wait_until(lambda: not supervisor.is_alive(pid, supervisor.started_at(pid)))
    assert states(jobs)[0] == ""


def test_a_number_that_another_process_has_now_is_not_the_job():
    assert supervisor.is_alive(os.getpid(), supervisor.started_at(os.getpid()))
    assert not supervisor.is_alive(os.getpid(), supervisor.started_at(os.getpid()) - 1)
    assert not supervisor.is_alive(None, None)


def test_jobs_submitted_on_another_machine_are_not_known_here():
    [job] = of_batch(Path("/nowhere"), subprocess.Popen(["true"]), 1)
    found = local.job_states(None, [replace(job, host="elsewhere")])["b-0"]
    assert (found.is_elsewhere, found.is_active, found.reason) == (True, False, "submitted on elsewhere, ask there")


def test_a_run_of_several_devices_is_started_by_torchrun_and_one_of_several_nodes_is_refused(batch, monkeypatch):
    spec = batch / "0000.json"
    for devices, launcher in ((1, []), (2, ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"])):
        spec.write_text(json.dumps({"composed": {"devices": devices}}))
        assert supervisor.command_of(spec) == [sys.executable, *launcher, "-m", "dms_lab.sweeping.job", str(spec)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert supervisor.environment_of(spec, 1, 2)["CUDA_VISIBLE_DEVICES"] == "4,6"
    spec.write_text(json.dumps({"composed": {}}))
    assert [supervisor.environment_of(spec, place, 3)["CUDA_VISIBLE_DEVICES"] for place in range(3)] == ["4", "6", "4"]
    spec.write_text(json.dumps({"composed": {"devices": 2}}))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert [supervisor.environment_of(spec, place, 2)["CUDA_VISIBLE_DEVICES"] for place in (0, 1)] == ["0,1", "2,3"]
    sweep = sweep_of([*TINY, "num_nodes=2", "accumulate=2"])
    with pytest.raises(ValueError, match="num_nodes=2 needs cluster=slurm"):
        local.submit(sweep, expand(sweep))


def test_points_at_a_time_take_the_machines_gpus_in_turn(batch, monkeypatch):
    spec = batch / "0000.json"
    spec.write_text(json.dumps({"composed": {}}))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    program = batch / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{batch}{os.pathsep}{os.environ['PATH']}")

    def given(places):
        return [supervisor.environment_of(spec, place, 3).get("CUDA_VISIBLE_DEVICES") for place in places]

    program.write_text(
        "#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-aa-0)'\necho 'GPU 1: NVIDIA H100 (UUID: GPU-bb-1)'\n"
    )
    program.chmod(0o755)
    assert given(range(3)) == ["GPU-aa-0", "GPU-bb-1", "GPU-aa-0"]
    program.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: GPU-aa-0)'\necho '  MIG 1g Device 0: (UUID: MIG-c)'\n")
    assert given([0]) == [None]  # one is the only one
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert given([0]) == [""]  # none, as somebody said
    program.unlink()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert given([1]) == [None]


@pytest.mark.parametrize(("does", "told"), [("exit 9", "non-zero exit status 9"), ("exec sleep 30", "timed out after 1.0")])
def test_a_driver_that_does_not_answer_is_told_and_the_points_start_all_the_same(batch, monkeypatch, capsys, does, told):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{batch}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(supervisor, "_SECONDS", 1.0)
    (batch / "nvidia-smi").write_text(f"#!/bin/sh\necho 'GPU 0: A (UUID: GPU-aa-0)'\n{does}\n")
    (batch / "nvidia-smi").chmod(0o755)
    assert supervisor.visible_gpus(None) == []
    said = capsys.readouterr().err
    assert "points are not spread over them" in said
    assert told in said


def test_a_job_that_is_told_to_stop_ends_with_the_status_of_that(working_folder, monkeypatch):
    def stop(self):
        raise steps.StoppedError("stopped by SIGTERM")

    monkeypatch.setattr(PointJob, "__call__", stop)
    job.write_job(working_folder / "job.json", job_of(one_point(*TINY), working_folder))
    monkeypatch.setattr(sys, "argv", ["job", "job.json"])
    with pytest.raises(SystemExit) as ended:
        job.main()
    assert ended.value.code == 128 + signal.SIGTERM
