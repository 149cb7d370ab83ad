"""Two processes train what one trains: same batches, same noise, same curve and weights, up to the order of sums.

Both are launched as a user would, by torchrun, or with the environment that srun gives; they meet by gloo on the CPU.
"""

import dataclasses
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launched import stop_that_notes
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dms_lab.config import DataConfig, validate
from dms_lab.training import run
from dms_lab.training.distributed import World, find_world, is_first_rank
from dms_lab.training.run import train

LAUNCHED = Path(__file__).with_name("launched.py")
QUICK = {"steps": 4, "log_every": 1, "accumulate": 2, "adapter_lr": 1e-3}
MIXED = {"trained": "all", "precision": "bf16-mixed", "accumulate": 4}
NEURON = {"predictor": "neuron", "trained": "all", "neuron_zeroing_steps": 2, "cr_family": (4.0,), "scale": 10.0}


@pytest.fixture(scope="module", autouse=True)
def clean_environment():
    """No launcher of the machine that the tests run on is heard."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith(("SLURM_", "MASTER_", "TORCHELASTIC_"))]:
            patch.delenv(name)
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def launch(folder, plan, srun=False):
    """Trains each (configurations, one a process or one for all; signal) of a plan by two processes; what they saw."""
    file = folder / "plan.pickle"
    file.write_bytes(pickle.dumps([(configs if isinstance(configs, list) else [configs], s) for configs, s in plan]))
    if srun:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = [
            subprocess.Popen([sys.executable, LAUNCHED, file], env=os.environ | step_environment(rank, port))
            for rank in range(2)
        ]
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    else:
        command = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
        subprocess.run([sys.executable, *command, LAUNCHED, file], check=True, timeout=300)
    return list(zip(*(json.loads(file.with_suffix(f".{rank}.json").read_text()) for rank in range(2)), strict=True))


def step_environment(rank, port=None, tasks=2, nodes=2):
    """What srun tells a task of a step: here, of one on each of two nodes."""
    found = {
        "SLURM_JOB_ID": 7,
        "SLURM_STEP_ID": 1,
        "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_STEP_NUM_NODES": nodes,
        "SLURM_STEP_NUM_TASKS": tasks,
        "SLURM_STEP_TASKS_PER_NODE": f"{tasks // nodes}(x{nodes})",
        "SLURM_NTASKS": tasks,
        "SLURM_PROCID": rank,
        "SLURM_NODEID": rank // (tasks // nodes),
        "SLURM_LOCALID": rank % (tasks // nodes),
    }
    if port is not None:
        found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in found.items()}


def rows(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "peak_memory_bytes")} for line in lines]


def assert_close(folder, wanted, tolerance=1e-5):
    """Curves and checkpoints agree. The tolerance is a hundredth of what a step of lr=1e-3 moves a weight by.

    Gradients of two processes are the same numbers, summed in another order; so is their norm, when weights are cut. That
    is 1e-7 of a gradient. AdamW hands it on to a weight as 1e-7 of a step, but the next steps amplify it: decisions are
    steep. A batch, a noise or a gradient of another process would move weights by whole steps.
    """
    for one, two in zip(rows(folder), rows(wanted), strict=True):
        assert list(one) == list(two)
        for name in two:
            values = torch.tensor(one[name]), torch.tensor(two[name])
            torch.testing.assert_close(*values, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    names = sorted(p.name for p in wanted.glob("checkpoints/cr*"))
    assert names == sorted(p.name for p in folder.glob("checkpoints/cr*")) != []
    for name in names:
        one, two = (load_file(place / "checkpoints" / name / "dms.safetensors") for place in (folder, wanted))
        assert one.keys() == two.keys()
        for key in two:
            weights = one[key], two[key]
            torch.testing.assert_close(*weights, atol=tolerance, rtol=0, msg=lambda text, key=key: f"{key}: {text}")


@pytest.fixture(scope="module")
def tied_folder(base_folder, tmp_path_factory):
    """The random model with one table for embeddings and output head."""
    folder = tmp_path_factory.mktemp("tied")
    shutil.copytree(base_folder, folder, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder)
    return folder


def cases(tied):
    """Name -> (changes of the configuration, of its model, strategy)."""
    return {
        "adapter_ddp": ({"accumulate": 4, "average": 0.5}, {}, "ddp"),
        "all_ddp": ({"trained": "all"}, {}, "auto"),
        "adapter_fsdp": ({"accumulate": 4, "clip": 0.01}, {"gradient_checkpointing": True}, "fsdp"),
        "all_fsdp": ({"trained": "all", "average": 0.5}, {"gradient_checkpointing": True}, "fsdp"),
        "lora_fsdp": ({"trained": "lora"}, {"dtype": "bfloat16"}, "fsdp"),  # the base in another precision than its LoRA
        "neuron_fsdp": (NEURON, {}, "fsdp"),
        "tied_fsdp": ({"trained": "all"}, {"path": str(tied)}, "fsdp"),
        # One step, up to the last digits of float32; what bfloat16 makes of these in the next ones has a test of its own.
        "mixed_fsdp": (MIXED | {"steps": 1}, {"gradient_checkpointing": True}, "fsdp"),
        "mixed_on_fsdp": (MIXED, {"gradient_checkpointing": True}, "fsdp"),
    }


@pytest.fixture(scope="module")
def trained(tied_folder, base_folder, tmp_path_factory, complete_config):
    """Every case, trained by two processes, and by one when it is asked for: (configuration of one, what both saw)."""
    folder = tmp_path_factory.mktemp("torchrun")
    configs = {}
    for name, (changes, model, strategy) in cases(tied_folder).items():
        config = complete_config(**QUICK | changes)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, **model), out=str(folder / name))
        configs[name] = dataclasses.replace(config, strategy=strategy, devices=2)
    seen = launch(folder, [(config, None) for config in configs.values()])
    return {name: (configs[name], both) for name, both in zip(configs, seen, strict=True)}


@pytest.mark.parametrize("name", [name for name in cases("") if name != "mixed_on_fsdp"])
def test_two_processes_give_the_curve_and_the_weights_of_one(trained, tmp_path, name):
    config, both = trained[name]
    assert [s["is_first"] for s in both] == [s["first_rank"] for s in both] == [True, False]
    assert all(s["finished"] for s in both)
    assert train(dataclasses.replace(config, devices=1, out=str(tmp_path / "one")), progress=False).finished
    assert_close(Path(config.out), tmp_path / "one")
    assert sorted(p.name for p in Path(config.out).iterdir()) == sorted(p.name for p in (tmp_path / "one").iterdir())


def test_fsdp_holds_half_of_student_and_teacher_in_each_process(trained, base_folder):
    whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(base_folder).parameters())
    for name, (config, both) in trained.items():
        for seen in both:
            assert seen["cut"] == (1 if name.endswith("_fsdp") else 0)
        if name in ("all_fsdp", "tied_fsdp"):
            num_predictor = 2 * (2 * 32 + 32)  # [K, hidden] and the norm of each layer
            num_tied = 32 * 1024 if name == "tied_fsdp" else 0
            assert [seen["held"] for seen in both] == [(2 * (whole - num_tied) + num_predictor) / 2] * 2
        assert config.devices == 2


def test_two_processes_in_mixed_precision_stay_nearer_to_one_than_bfloat16_is_to_float32(trained, tmp_path):
    """Weights that differ by 1e-8 after a step differ by 2^-8 in the next one, where bfloat16 rounds between them.

    AdamW moves a weight whose gradient is almost 0 by a whole step for it, so there is no bound for single weights: one
    process that sums its micro-batches in reverse ends as far off. Over all weights it is a 200th of the rounding itself.
    """
    config, _ = trained["mixed_on_fsdp"]
    folders = {"two": Path(config.out)}
    for precision in ("bf16-mixed", "32-true"):
        folders[precision] = tmp_path / precision
        alone = dataclasses.replace(config, devices=1, precision=precision, out=str(folders[precision]))
        assert train(alone, progress=False).finished
    weights = {name: load_file(place / "checkpoints" / "cr4" / "dms.safetensors") for name, place in folders.items()}

    def apart(one, two):
        return sum(float((x - weights[two][key]).abs().sum()) for key, x in weights[one].items())

    assert apart("two", "bf16-mixed") < 0.1 * apart("bf16-mixed", "32-true")


# -- stopped and resumed, refused --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def stopped(complete_config, tmp_path_factory):
    """What two processes of srun saw, and left in folders of these names, by what is done to them."""
    folder = tmp_path_factory.mktemp("srun")
    (folder / "one.py").write_text("x = 1\n" * 400)
    (folder / "two.py").write_text("x = 2\n" * 400)

    def config(name, **changes):
        values = QUICK | {"steps": 5, "accumulate": 4, "average": 0.5, "out": str(folder / name), "num_nodes": 2}
        return complete_config(**values | changes)

    cut = {"strategy": "fsdp", "trained": "all"}
    text = [config("text", data=DataConfig("text", str(folder / name))) for name in ("one.py", "two.py")]
    absent = dataclasses.replace(config("absent").model, path=str(folder / "nowhere"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "GracefulStop", stop_that_notes({}, (0, 3, signal.SIGTERM)))
        assert not train(config("grows", num_nodes=1, trained="all"), progress=False).finished
    plan = {
        "stopped": (config("again", **cut), (1, 2, signal.SIGTERM)),
        "resumed": (config("again", **cut), None),
        "finished": (config("again", **cut), None),
        "another": (config("again", **cut | {"seed": 1}), None),
        "shrinks": (config("shrinks", trained="all"), (0, 3, signal.SIGINT)),
        "grows": (config("grows", **cut), None),
        "requeued": (config("requeued"), (1, 2, signal.SIGUSR2)),
        "hurried": (config("hurried"), (1, 0, signal.SIGUSR2, 0.0)),
        "rows": (text, None),
        "weights": ([config("absent"), config("absent", model=absent)], None),
    }
    both = dict(zip(plan, launch(folder, list(plan.values()), srun=True), strict=True))
    whole = train(config("whole", num_nodes=1, trained="all"), progress=False)
    return folder, config, both, whole.folder


def test_a_signal_to_one_process_stops_both_at_one_step_and_both_go_on(stopped):
    folder, _, both, whole = stopped
    for seen in both["stopped"]:
        assert (seen["finished"], seen["stopped_by"], seen["started_at"], seen["ended_at"]) == (False, "SIGTERM", 0, 3)
    for seen in both["resumed"]:
        assert (seen["finished"], seen["started_at"], seen["ended_at"]) == (True, 3, 5)
        assert seen["file"] == "StraightFile"
        assert seen["kept"] == seen["moments"] > 0  # of what was loaded, the own part alone
    assert_close(folder / "again", whole)
    assert not (folder / "again" / "last.ckpt").exists()


def test_a_run_goes_on_with_fewer_or_more_processes_and_another_strategy(stopped):
    folder, config, both, whole = stopped
    assert [(seen["finished"], seen["stopped_by"]) for seen in both["shrinks"]] == [(False, "SIGINT")] * 2
    assert train(config("shrinks", trained="all", num_nodes=1), progress=False).finished
    assert_close(folder / "shrinks", whole)
    assert [(seen["finished"], seen["started_at"]) for seen in both["grows"]] == [(True, 4)] * 2
    assert_close(folder / "grows", whole)


def test_a_finished_run_is_finished_for_every_process(stopped):
    assert all(seen["finished"] and "started_at" not in seen for seen in stopped[2]["finished"])
    assert [seen["is_first"] for seen in stopped[2]["finished"]] == [True, False]


def test_the_signal_that_requeues_a_job_is_handed_on_when_all_is_saved(stopped):
    for seen in stopped[2]["requeued"]:
        assert (seen["finished"], seen["stopped_by"], seen["ended_at"], seen["handled"]) == (False, "SIGUSR2", 3, True)
    assert [seen["handled"] for seen in stopped[2]["stopped"]] == [None, None]


def test_a_step_that_cannot_end_in_time_is_left_by_both_after_one_micro_batch(stopped):
    folder, _, both, _ = stopped
    for seen in both["hurried"]:
        assert (seen["finished"], seen["stopped_by"], seen["ended_at"]) == (False, "SIGUSR2", 0)
        assert seen["handled"] is False  # called, with nothing saved
    assert not (folder / "hurried" / "last.ckpt").exists()


@pytest.mark.parametrize(
    ("name", "sentences"),
    [
        ("another", ["holds a run of another configuration"] * 2),
        ("rows", ["do not have the same training rows"] * 2),
        ("weights", ["no weights for model.path=", "(process 1 of 2)"]),
    ],
)
def test_what_is_wrong_in_one_process_ends_both_with_a_sentence(stopped, name, sentences):
    for seen in stopped[2][name]:
        assert any(sentence in seen["error"] for sentence in sentences)
    assert sentences[1] in stopped[2][name][0]["error"]


# -- one process -------------------------------------------------------------------------------------------------------
def test_alone_the_requeue_signal_is_handed_on_and_left_alone_where_nobody_listens(make_config, tmp_path, monkeypatch):
    called = []
    seen = {}
    monkeypatch.setattr(run, "GracefulStop", stop_that_notes(seen, (0, 2, signal.SIGUSR2)))
    before = signal.signal(signal.SIGUSR2, lambda *_: called.append((tmp_path / "run" / "last.ckpt").is_file()))
    try:
        outcome = train(make_config(), progress=False)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert (outcome.finished, outcome.stopped_by, seen["ended_at"], called) == (False, "SIGUSR2", 3, [True])

    class Asked(run.GracefulStop):
        def on_train_batch_end(self, *rest):
            called.append(signal.getsignal(signal.SIGUSR2))

    monkeypatch.setattr(run, "GracefulStop", Asked)
    monkeypatch.setattr(sys.modules["launched"], "RANK", -1)  # sends no signal
    assert train(make_config(), progress=False).finished
    assert set(called[1:]) == {signal.SIG_DFL}


def test_processes_that_nobody_launched_are_refused_with_the_lines_that_launch_them(make_config):
    with pytest.raises(ValueError, match="are 8 processes, and this one is alone") as error:
        train(make_config(devices=4, num_nodes=2, accumulate=8))
    assert "torchrun --nnodes 2" in str(error.value)
    assert "--nproc-per-node 4 -m dms_lab.train devices=4 num_nodes=2" in str(error.value)
    assert "srun --nodes 2 --ntasks-per-node 4 --kill-on-bad-exit=1 --wait=0 python -m dms_lab.train" in str(error.value)
    with pytest.raises(ValueError, match=r"torchrun --standalone --nproc-per-node 2 -m dms_lab.train devices=2"):
        find_world(make_config(devices=2))


def test_processes_that_the_configuration_does_not_ask_for_are_refused(make_config, monkeypatch):
    for name, value in step_environment(3, tasks=4, nodes=2).items():
        monkeypatch.setenv(name, value)
    world = find_world(make_config(devices=2, num_nodes=2))
    assert (world.rank, world.local_rank, world.node_rank, world.size, world.num_nodes) == (3, 1, 1, 4, 2)
    assert world.meeting_point == f"tcp://n1:{15000 + 7 + 97}"
    assert not is_first_rank()
    with pytest.raises(ValueError, match="srun launched 4 processes, but devices=1 and num_nodes=1 are 1"):
        train(make_config())
    with pytest.raises(ValueError, match="srun launched 2 processes on this node, but devices=4"):
        find_world(make_config(devices=4))
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "1,3")
    with pytest.raises(ValueError, match="srun launched 1,3 processes on the nodes of this step"):
        find_world(make_config(devices=2, num_nodes=2))
    for name, value in zip(("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"), "0022", strict=True):
        monkeypatch.setenv(name, value)  # torchrun inside a job
    monkeypatch.setenv("MASTER_ADDR", "n1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert find_world(make_config(devices=2)) == World(size=2, devices=2, launcher="torchrun")
    assert is_first_rank()


def test_a_batch_script_of_slurm_is_one_process_whatever_its_job_has(make_config, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_NNODES"):
        monkeypatch.setenv(name, "4")
    for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"):
        monkeypatch.setenv(name, "0")
    assert find_world(make_config()) == World()
    assert is_first_rank()
    with pytest.raises(ValueError, match="this one is alone"):
        find_world(make_config(devices=4))
    before = signal.getsignal(signal.SIGUSR1)
    trained = []

    class Asked(run.GracefulStop):
        def on_train_batch_end(self, *rest):
            trained.append(signal.getsignal(signal.SIGUSR1))

    monkeypatch.setattr(run, "GracefulStop", Asked)
    assert train(make_config(), progress=False).finished
    assert set(trained) == {before}  # Lightning requeues nothing


def test_a_step_that_cannot_be_shared_is_refused_before_anything_is_loaded(make_config):
    with pytest.raises(ValueError, match=r"accumulate=6 cannot be shared by 4 processes .* such as 8, .*: 1, 2, 3, 6$"):
        validate(make_config(accumulate=6, devices=2, num_nodes=2))
    validate(make_config(accumulate=8, devices=2, num_nodes=2))
