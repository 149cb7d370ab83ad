"""Sweeps by Hydra's multirun: checked before they start, none of their points takes another down, searches go on."""

import json
import logging
import os
import re
import runpy
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from sweep_cases import FakeSlurm

from dms_lab import train
from dms_lab.config import DataConfig
from dms_lab.multirun import tell_family
from dms_lab.sweep_config import build_sweep
from dms_lab.sweeping.asked import keep_sweep, read_asked, sweep_of
from dms_lab.sweeping.launcher import check_free, set_launcher
from dms_lab.sweeping.objectives import objectives
from dms_lab.sweeping.points import expand
from dms_lab.sweeping.records import load_jobs

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:.* found in sys.modules:RuntimeWarning")  # run here, for speed
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
PROBE = "import runpy, sys; sys.argv[0] = 'train'\ntry: runpy.run_module('dms_lab.train', run_name='__main__')\n"
PROBE += "finally: print('torch was imported:', 'torch' in sys.modules)"


@pytest.fixture(autouse=True)
def logging_restored():
    """Hydra replaces the handlers of the root logger in the process that it runs in."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def small(base_folder, tmp_path, monkeypatch):
    """Words of a run of a second on text, in an empty folder that is worked in; the text is in `good` and `other`."""
    monkeypatch.chdir(tmp_path)
    for name, source in (("good", "decoder.py"), ("other", "encoder.py")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.py").write_text((Path(json.__file__).parent / source).read_text())
    words = ["model=hf", f"model.path={base_folder}", "model.dtype=float32", "model.gradient_checkpointing=false"]
    words += ["steps=2", "cr=4", "cr_family=[4]", "context=64", "window=4", "batch_size=1", "eval.held_out_tokens=128"]
    return [*words, "threads=1", "data=text"]


def run(module, *words, code=0):
    """What a command prints, as its user runs it."""
    command = [sys.executable, "-m", f"dms_lab.{module}", *words]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture
def called(monkeypatch, capsys):
    """Calls a command in this process, which saves imports; what it prints, and its exit status."""

    def call(module, *words, code=1):
        monkeypatch.setattr(sys, "argv", [module, *words])
        status = 0
        try:
            runpy.run_module(f"dms_lab.{module}", run_name="__main__")
        except SystemExit as ended:
            status = ended.code or 0
        printed = capsys.readouterr()
        text = printed.out + printed.err + (status if isinstance(status, str) else "")
        assert (1 if isinstance(status, str) else status) == code, text
        return text

    return call


def multirun_config(*words, name="train"):
    """The configuration that Hydra composes before it knows the points of a multirun."""

    @contextmanager
    def composed():
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            yield GlobalHydra.instance().hydra.compose_config(name, ["hydra.mode=MULTIRUN", *words], RunMode.MULTIRUN)

    return composed()


# -- grids -------------------------------------------------------------------------------------------------------------
def test_one_bad_point_of_three_fails_alone_and_done_points_are_skipped_in_no_time(small, tmp_path):
    words = [*small, "data.path=good,missing,other", "sweep=paths"]
    text = run("train", "-m", *words, code=1)
    assert "1 of 3 points failed:\n  data.path=missing: data.path: no file found by the glob missing" in text
    assert "Traceback" not in text
    done = sorted(path.parent for path in tmp_path.glob("runs/*/done.json"))
    assert len(done) == 2
    assert all((folder / "evaluated.json").is_file() for folder in done)
    assert {json.loads((folder / "config.json").read_text())["sweep"] for folder in done} == {"paths"}
    file = yaml.safe_load((tmp_path / "experiments/paths/sweep.yaml").read_text())
    assert file["parts"] == [{"command": "train", "overrides": words[:-1]}]

    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/hf*/*")}
    started = time.monotonic()
    again = [word.replace("good,missing,other", "other,good") for word in words[:-1]]
    probe = [sys.executable, "-c", PROBE, "-m", *again]
    printed = subprocess.run(probe, env=ENVIRONMENT, capture_output=True, text=True).stdout
    assert time.monotonic() - started < 15  # a second and a half, where nothing else runs
    assert "torch was imported: False" in printed
    assert printed.count("is done already") == 2
    single = subprocess.run([sys.executable, "-c", PROBE, *small, "data.path=good"], env=ENVIRONMENT, capture_output=True)
    assert b"is done; python -m dms_lab.evaluate checkpoint=runs/hf" in single.stdout
    assert b"torch was imported: False" in single.stdout
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_sweep_file_of_other_points_is_not_overwritten(small, called, tmp_path):
    folder = tmp_path / "experiments" / "paths"
    folder.mkdir(parents=True)
    part = {"overrides": [*small, "data.path=good", "seed=0,1"]}
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"question": "Which?", "parts": [part]}))
    before = (folder / "sweep.yaml").read_text()
    text = called("train", "-m", *small, "data.path=good", "seed=1,2,3", "sweep=paths")
    assert "paths/sweep.yaml is another sweep: it has 2 points, this one 3, of which 1 are the same" in text
    part["then"] = [["eval=reasoning", "tasks=dms_tiny_ledger"]]
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"parts": [part]}))
    assert "which -m does not run; use python -m dms_lab.sweep submit experiments/paths" in called(
        "train", "-m", *small, "data.path=good", "seed=0,1", "sweep=paths"
    )
    (folder / "sweep.yaml").write_text(before)
    called("train", "-m", *small, "data.path=nothing_here,good", "seed=0,1", "sweep=paths")
    assert (folder / "sweep.yaml").read_text() == before
    assert not (tmp_path / "runs").exists()


def test_a_sweep_that_is_known_is_run_as_it_is(small, called, tmp_path):
    folder = tmp_path / "experiments" / "paths"
    folder.mkdir(parents=True)
    part = {"overrides": [*small, "seed=0,1", "data.path=missing"]}
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"question": "Which?", "parts": [part]}))
    before = (folder / "sweep.yaml").read_text()
    text = called("train", "-m", *small, "data.path=missing", "seed=1,0", "sweep=paths")
    assert "2 of 2 points failed:\n  seed=1: data.path: no file" in text
    assert (folder / "sweep.yaml").read_text() == before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["-m", "cr=4,0.5"], "error: .*cr=0.5 is not a compression ratio"),
        (["-m", "model=tiny,nope"], "error: .*Could not find 'model/nope'"),
        (["-m", "window=4", "out=x", "seed=0,1"], "would share the folder x"),
        (["-m", "sweep=a,b"], "sweep=a,b: sweep is said of all points together"),
        (["-m", "cluster=slurm,local"], "cluster is said of all points together"),
        (["-m", "sweep=../up"], "is no name of letters"),
        (["-m", "devices=2", "accumulate=2"], "a run of several processes cannot be a point .* cluster=slurm"),
        (["-m", "resume=false"], "starts anew each time"),
        (["cluster=slurm"], r"cluster=slurm is for sweeps; add -m"),
        (["search=optuna"], r"search=optuna is for sweeps; add -m"),
        (["-m", "cluster.partition=gpu"], "cluster.partition=gpu says what a job in Slurm gets; add cluster=slurm"),
        (
            ["-m", "cluster=slurm", "cluster.partitoin=gpu"],
            r"did you mean cluster.partition\?\); the valid keys are cluster",
        ),
        (["-m", "cluster=slurm", "cluster.timeout_min=2"], "signal_delay_s=180 leaves a job of timeout_min=2 no time"),
        (["-m", "cluster=slurm", "model=tiny,qwen3_8b"], "asks Slurm once, .* model=tiny needs .*timeout_min=120,"),
        (["-m", "search=optuna", "eval_after=false"], "a search compares what the evaluation of each run measures"),
        (["-m", "search=optuna", "hydra.sweeper.direction=[minimize]"], "two things are minimised"),
        (["-m", "search=optuna", "cr=0.5"], "cr=0.5 is not a compression ratio"),
    ],
)
def test_what_no_sweep_can_be_is_refused_before_anything_is_run(words, sentence, called, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")  # sbatch is there
    text = called("train", *words)
    assert re.search(sentence, text), text
    assert "Traceback" not in text
    assert not list(tmp_path.iterdir())


def test_slurm_is_missed_before_anything_is_run(called, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "sbatch, which is not installed here" in called("train", "-m", "cluster=slurm")
    monkeypatch.setattr("dms_lab.multirun.find_spec", lambda name: None)
    assert "cluster=slurm needs the extra slurm: pip install" in called("train", "-m", "cluster=slurm")


def test_a_signal_ends_the_whole_sweep(small, called, monkeypatch):
    from dms_lab.training.run import Outcome

    trained = []

    def stopped(config, progress=True, notice_seconds=0.0):
        trained.append(config.seed)
        return Outcome(Path("runs"), False, "SIGINT")

    monkeypatch.setattr("dms_lab.training.run.train", stopped)
    text = called("train", "-m", *small, "data.path=good", "seed=0,1", code=143)
    assert "stopped by SIGINT" in text
    assert trained == [0]


def test_a_run_that_a_job_of_a_sweep_is_at_is_not_begun_beside_it(small, called, tmp_path):
    from dms_lab.sweeping.job import locked

    [point] = expand(sweep_of("train", [*small, "data.path=good"], None))
    with locked(tmp_path / point.folder):
        assert f"another job works in {point.folder}" in called("train", *small, "data.path=good")
    assert [path.name for path in (tmp_path / point.folder).iterdir()] == ["run.lock"]


def test_evaluations_of_runs_that_are_not_there_fail_one_by_one(called, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = called("evaluate", "-m", "checkpoint=here,there")
    assert "2 of 2 points failed:\n  checkpoint=here: no config.json in here" in text
    assert "checkpoint=there: no config.json in there" in text
    text = called("evaluate", "-m", "checkpoint=here", "sweep=x")
    assert "needs eval=reasoning" in text
    text = called("evaluate", "-m", "eval=reasoning", "model=tiny", "policy=tova,full", "budget=8")
    assert "error: eval=reasoning model=tiny policy=full budget=8: budget=8 is for" in text


def test_points_that_differ_in_their_ratio_alone_are_told_of_the_family(capsys):
    tell_family(expand(sweep_of("train", ["cr=2,4,8", "window=4,8"], None)))
    assert "cr=8 cr_family=[2,4,8]" in capsys.readouterr().out
    tell_family(expand(sweep_of("train", ["cr=4", "window=4,8"], None)))
    tell_family(expand(sweep_of("train", ["cr=2,4", "method=streaming_llm", "trained=all"], None)))
    assert capsys.readouterr().out == ""


def test_an_installed_package_finds_its_groups_and_the_callback(tmp_path):
    """As in a wheel: conf/ lies in the package, and there is no checkout around it."""
    package = tmp_path / "site" / "dms_lab"
    package.mkdir(parents=True)
    for place in (ROOT / "dms_lab").iterdir():
        (package / place.name).symlink_to(place)
    (package / "conf").symlink_to(ROOT / "conf")
    command = [sys.executable, "-m", "dms_lab.train", "-m", "cluster=slurm", "cluster.partition=x", "cr=4,0.5"]
    environment = ENVIRONMENT | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert "error: cr=0.5: cr=0.5 is not a compression ratio" in done.stderr


# -- Slurm -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def submitted(monkeypatch, tmp_path):
    """What a multirun of these words would hand to sbatch, and how often a job may run out of time."""
    submitit = pytest.importorskip("submitit")
    executors = []

    def submit(*words, name="train"):
        monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda cls: 2))
        monkeypatch.setattr(submitit.AutoExecutor, "map_array", lambda self, *_: executors.append(self._executor) or [])
        monkeypatch.chdir(tmp_path)
        with multirun_config("cluster=slurm", *words, name=name) as config:
            asked = read_asked(config)
            set_launcher(config, asked.sweep, expand(asked.sweep))
            context = HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=None)
            launcher = Plugins.instance().instantiate_launcher(context, train.main, config)
            launcher.launch([["seed=0"]], 0)
        executor = executors.pop()
        lines = executor._make_submission_file_text("run", "id").splitlines()
        options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
        return options, executor.max_num_timeout, [line for line in lines if line.startswith("srun")]

    return submit


def test_jobs_of_hydras_launcher_are_in_the_sweeps_record_in_which_status_and_submit_look(tmp_path, monkeypatch, capsys):
    submitit = pytest.importorskip("submitit")
    from types import SimpleNamespace

    from dms_lab.sweep import main
    from dms_lab.sweeping.launcher import recorded

    monkeypatch.chdir(tmp_path)
    fake = FakeSlurm(tmp_path / "slurm", monkeypatch)
    jobs = [SimpleNamespace(job_id=f"7_{i}", paths=SimpleNamespace(stderr=f"7_{i}.err")) for i in range(2)]
    monkeypatch.setattr(submitit.AutoExecutor, "map_array", lambda self, *_: jobs)
    words = ["model=tiny", "seed=0,1", "cluster=slurm", "sweep=x"]
    with multirun_config(*words) as config:
        asked = read_asked(config)
    points = expand(asked.sweep)
    keep_sweep(asked.sweep, points)
    plain = submitit.AutoExecutor.map_array
    with recorded(asked, points):
        overrides = [["model=tiny", f"seed={seed}", "cluster=slurm", "sweep=x"] for seed in (0, 1)]
        assert submitit.AutoExecutor.map_array(None, print, overrides, ["dir"] * 2) == jobs
    assert submitit.AutoExecutor.map_array is plain
    noted = load_jobs(asked.sweep)
    assert [(job.job_id, job.hash) for job in noted] == [(f"7_{i}", point.hash) for i, point in enumerate(points)]

    fake.answer("squeue", "7_0 RUNNING 0 2:00 None\n7_1 PENDING 0 0:00 Priority\n")
    assert main(["status", "experiments/x"]) == 0
    assert "1 running, 1 pending of 2 points" in capsys.readouterr().out
    assert main(["submit", "experiments/x"]) == 0
    assert fake.calls("sbatch") == []
    with pytest.raises(ValueError, match=r"2 of 2 points are queued or running already, as tiny-.* \(job 7_0\)"):
        check_free(asked.sweep, points)
    assert main(["cancel", "experiments/x"]) == 0
    assert fake.calls("scancel") == [f"--name=dms-x --user={os.getuid()} 7_0 7_1"]

    fake.answer("squeue", "7_0 COMPLETED 0 2:00 None\n7_1 COMPLETED 0 2:00 None\n")
    (asked.sweep.records / "outcomes").mkdir()
    failure = {"overrides": list(points[1].overrides), "error": "no weights for a/b"}
    (asked.sweep.records / "outcomes" / "00001.json").write_text(json.dumps(failure))
    assert main(["status", "experiments/x"]) == 1
    assert f"failed {points[1].name}: no weights for a/b" in capsys.readouterr().out


def test_a_search_outlives_a_trial_that_cannot_be_run_and_a_record_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    submitit = pytest.importorskip("submitit")
    from types import SimpleNamespace

    from dms_lab.sweeping import launcher

    monkeypatch.chdir(tmp_path)
    jobs = [SimpleNamespace(job_id=f"7_{i}", paths=SimpleNamespace(stderr=f"7_{i}.err")) for i in range(2)]
    monkeypatch.setattr(submitit.AutoExecutor, "map_array", lambda self, *_: jobs)
    with multirun_config("model=tiny", "cluster=slurm", "sweep=x") as config:
        asked = read_asked(config)
    trials = [["model=tiny", f"window={window}", "cluster=slurm", "sweep=x"] for window in (10**9, 4)]
    [fine] = expand(sweep_of("train", ["model=tiny", "window=4"], "x"))
    with launcher.recorded(asked, []):
        assert submitit.AutoExecutor.map_array(None, print, trials, ["dir"] * 2) == jobs
        assert [(job.job_id, job.hash) for job in load_jobs(asked.sweep)] == [("7_1", fine.hash)]
        monkeypatch.setattr(launcher, "append_jobs", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
        assert submitit.AutoExecutor.map_array(None, print, trials, ["dir"] * 2) == jobs
    assert "the record of x cannot be written, and lacks jobs 7_1: no space left" in capsys.readouterr().err


def test_what_prepares_a_multirun_goes_into_the_pickle_of_each_of_its_jobs(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit")
    cloudpickle = pytest.importorskip("cloudpickle")
    from dms_lab.multirun import Multirun

    monkeypatch.chdir(tmp_path)
    FakeSlurm(tmp_path / "slurm", monkeypatch)
    plain, prepared = submitit.AutoExecutor.map_array, Multirun()
    with multirun_config("model=tiny", "seed=0,1", "cluster=slurm", "sweep=x") as config:
        prepared.on_multirun_start(config)
        try:
            assert submitit.AutoExecutor.map_array is not plain
            cloudpickle.dumps(prepared)
        finally:
            prepared.on_multirun_end(config)
    assert submitit.AutoExecutor.map_array is plain


def test_more_points_than_an_array_may_have_are_refused_before_hydra_submits_them(tmp_path, monkeypatch):
    from dms_lab.sweeping.launcher import check_length

    fake = FakeSlurm(tmp_path / "slurm", monkeypatch)
    points = expand(sweep_of("train", ["model=tiny", "seed=range(3)"], None))
    check_length(points)
    fake.answer("scontrol", "MaxArraySize            = 2\n")
    with pytest.raises(ValueError, match=r"submits 3 points as one array, of which this Slurm takes 2 \(MaxArraySize\)"):
        check_length(points)


def test_a_job_asks_for_what_its_model_needs_swept_or_not(submitted):
    tiny, _, _ = submitted("model=tiny", "seed=0,1")
    assert tiny | {"time": "120", "cpus-per-task": "1", "mem": "4GB", "nodes": "1", "ntasks-per-node": "1"} == tiny
    assert "gpus-per-node" not in tiny
    one, _, _ = submitted("model=llama32_1b", "sweep=x")
    two, _, _ = submitted("model=llama32_1b,qwen_r1_1_5b", "cr=2,4", "sweep=x")
    assert one == two
    assert (two["time"], two["gpus-per-node"]) == ("240", "1")
    large, _, _ = submitted("model=qwen_r1_32b")
    assert (large["mem"], large["time"]) == ("512GB", "1440")


def test_a_job_whose_time_ran_out_is_queued_again(submitted):
    options, times, _ = submitted("sweep=x", "model=llama32_1b")
    assert times >= 10
    assert options["signal"] == "USR2@180"
    assert int(options["time"]) * 60 > 2 * 180
    assert "requeue" in options
    assert options["job-name"] == "dms-x"
    assert "runs/sweeps/x/slurm/" in options["output"]


def test_a_job_has_a_process_for_each_device(submitted):
    options, _, srun = submitted("model=qwen3_8b", "devices=4", "num_nodes=2", "accumulate=8")
    assert (options["nodes"], options["ntasks-per-node"], options["gpus-per-node"]) == ("2", "4", "4")
    assert "--kill-on-bad-exit=1" in srun[0]


def test_the_command_line_comes_before_the_sizes(submitted):
    words = [
        "cluster.timeout_min=90",
        "cluster.partition=a100",
        "cluster.setup=[module load x]",
        "cluster.sizes.small.mem_gb=7",
    ]
    options, _, _ = submitted("model=llama32_1b", *words, "hydra.launcher.constraint=big", "hydra.launcher.cpus_per_task=3")
    assert (options["time"], options["partition"], options["constraint"]) == ("90", "a100", "big")
    assert (options["mem"], options["cpus-per-task"]) == ("7GB", "3")
    same = ["cluster.timeout_min=60", "cluster.mem_gb=8", "cluster.cpus_per_task=2", "cluster.gpus_per_node=1"]
    same += ["cluster.signal_delay_s=120"]
    options, _, _ = submitted("model=tiny,qwen3_8b", *same)
    assert (options["time"], options["mem"]) == ("60", "8GB")


def test_benchmarks_are_jobs_too(submitted):
    options, _, _ = submitted("eval=reasoning", "model=qwen3_8b", "policy=tova", "budget=512,1024", name="evaluate")
    assert options["mem"] == "128GB"


def test_hydra_asks_for_what_dms_lab_sweep_would(submitted):
    from dms_lab.sweeping.resources import load_cluster, resources_of, slurm_parameters

    sweep = build_sweep({"parts": [{"overrides": ["model=qwen3_8b"]}], "resources": {"qos": "long"}}, "x", Path("x"))
    [point] = expand(sweep)
    wanted = slurm_parameters(point, resources_of(point, sweep, load_cluster("slurm")), "dms-x")
    options, _, srun = submitted("model=qwen3_8b", "cluster.qos=long", "sweep=x")
    assert (options["qos"], options["time"]) == ("long", str(wanted["timeout_min"]))
    assert options["cpus-per-task"] == str(wanted["cpus_per_task"])
    assert all(word in srun[0] for word in wanted["slurm_srun_args"])


# -- searches ----------------------------------------------------------------------------------------------------------
def test_a_search_outlives_a_failed_trial_and_goes_on_after_a_stop(small, called, tmp_path):
    pytest.importorskip("optuna")
    words = ["-m", "search=optuna", *small, "trained=all", "sweep=rates", "data.path=choice(good,missing)"]
    text = called("train", *words, "hydra.sweeper.n_trials=2", "hydra.sweeper.sampler.seed=1")
    trials = json.loads((tmp_path / "runs/sweeps/rates/trials.json").read_text())
    assert {trial["state"]: trial["params"]["data.path"] for trial in trials} == {"COMPLETE": "good", "FAIL": "missing"}
    assert "1 of 2 points failed" in text
    assert all(
        1e-5 <= trial["params"]["lr"] <= 3e-3 and 0.1 <= trial["params"]["retention_weight"] <= 10 for trial in trials
    )
    [best] = json.loads((tmp_path / "experiments/rates/best_trials.json").read_text())
    assert best["perplexity"] > 1
    assert 0 < best["kept"] <= 1
    sweep = yaml.safe_load((tmp_path / "experiments/rates/sweep.yaml").read_text())
    [point] = expand(build_sweep(sweep, "rates", Path("experiments/rates")))
    assert (tmp_path / point.folder / "done.json").is_file()

    called("train", *words, "hydra.sweeper.n_trials=3", "hydra.sweeper.sampler.seed=1")
    more = json.loads((tmp_path / "runs/sweeps/rates/trials.json").read_text())
    assert more[:2] == trials
    assert len(more) == 3
    assert more[2]["params"] not in [trial["params"] for trial in trials]
    text = called("train", *words, "seed=3")
    assert "trials.json holds a search of" in text
    assert "give another sweep=" in text


def test_a_trial_that_was_at_work_is_asked_for_again(tmp_path):
    optuna = pytest.importorskip("optuna")
    from dms_lab.sweeping.trials import TrialFile

    def study():
        sampler = optuna.samplers.NSGAIISampler(seed=0, population_size=2)
        storage = TrialFile(tmp_path / "trials.json")
        return optuna.create_study(storage=storage, sampler=sampler, directions=["minimize", "minimize"])

    first = study()
    for value in (1.0, float("inf"), 2.0):
        trial = first.ask()
        lr = trial.suggest_float("lr", 1e-5, 1e-2, log=True)
        first.tell(trial, [value, lr])
    left = first.ask()
    lr = left.suggest_float("lr", 1e-5, 1e-2, log=True)
    first.ask()  # killed before it had parameters

    second = study()
    assert [trial.state.name for trial in second.trials] == ["COMPLETE", "FAIL", "COMPLETE", "WAITING"]
    for old, new in zip(first.trials[:3], second.trials[:3], strict=True):
        assert (old.params, old.values, old.system_attrs, old.distributions) == (
            new.params,
            new.values,
            new.system_attrs,
            new.distributions,
        )
    again = second.ask()
    assert again.number == left.number
    assert again.suggest_float("lr", 1e-5, 1e-2, log=True) == lr
    second.tell(again, [0.5, lr])
    assert second.best_trials[-1].values == [0.5, lr]


def test_of_several_processes_of_a_trial_the_first_alone_is_asked_for_what_was_measured(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from dms_lab import multirun
    from dms_lab.sweeping.job import PointJob

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PointJob, "__call__", lambda self: None)  # the others leave before there are results
    monkeypatch.setattr(multirun.HydraConfig, "get", lambda: SimpleNamespace(launcher={}))
    monkeypatch.setattr("dms_lab.sweeping.objectives.objectives", lambda config, folder: (0.5, 0.25))
    for name in ("SLURM_LOCALID", "SLURM_NODEID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES"):
        monkeypatch.setenv(name, "1")
    found = []
    for rank in "01":
        monkeypatch.setenv("SLURM_PROCID", rank)
        found.append(multirun._complete("train", ["model=tiny"], "x", is_searched=True))
    assert found == [(0.5, 0.25), None]


def test_a_trial_is_judged_at_its_full_ratio_by_what_was_measured(tmp_path, make_config):
    def row(method, task, cr, **values):
        empty = {"accuracy": None, "kv_reads": None, "perplexity": None, "measured_cr": None}
        return empty | {"method": method, "task": task, "target_cr": cr} | values

    rows = [row("full", task, 1.0, accuracy=1.0, kv_reads=100.0) for task in ("ledger", "road")]
    rows += [row("dms", task, 2.0, accuracy=1.0, kv_reads=90.0) for task in ("ledger", "road")]
    rows += [row("dms", "ledger", 4.0, accuracy=0.5, kv_reads=30.0), row("dms", "road", 4.0, accuracy=1.0, kv_reads=50.0)]
    rows += [row("tova", task, 4.0, accuracy=0.0, kv_reads=1.0) for task in ("ledger", "road")]
    rows += [row("dms", "held_out_text", 4.0, perplexity=12.0, measured_cr=3.2)]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert objectives(make_config(), tmp_path) == (0.25, 0.4)
    on_text = make_config(data=DataConfig("text", path="x"))
    assert objectives(on_text, tmp_path) == (12.0, 1 / 3.2)
    with pytest.raises(ValueError, match="has no finite perplexity to compare"):
        objectives(make_config(data=DataConfig("text", path="x"), cr=3.0), tmp_path)
