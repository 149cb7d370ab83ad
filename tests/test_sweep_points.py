"""A sweep's points are those that Hydra would run, each once, and one that is wrong stops all of them."""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from dms_lab.config import config_hash, resolve
from dms_lab.sweep_config import build_sweep
from dms_lab.sweeping.composition import Composer, config_folder
from dms_lab.sweeping.evaluations import _NOT_HASHED, _NOT_HASHED_OF_EVAL, evaluation_hash, evaluation_of
from dms_lab.sweeping.points import expand
from dms_lab.sweeping.resources import load_cluster, resources_of, slurm_parameters

ROOT = Path(__file__).parent.parent
TASK = ["eval=reasoning", "tasks=dms_tiny_ledger"]


def points_of(*overrides, **more):
    return expand(sweep_of({"overrides": list(overrides)} | more))


def sweep_of(*parts, **more):
    return build_sweep({"parts": list(parts)} | more, "study", Path("experiments/study"))


# -- as Hydra would ----------------------------------------------------------------------------------------------------
APPLICATION = """
import sys, hydra
from omegaconf import OmegaConf
from dms_lab.config import config_hash, resolve

@hydra.main(version_base="1.3", config_path=sys.argv.pop(), config_name="train")
def main(cfg):
    print("point", config_hash(resolve(OmegaConf.to_container(cfg, resolve=True))))

main()
"""


def test_points_are_those_of_hydras_multirun_in_its_order(tmp_path):
    words = ["model=tiny,qwen3_0_6b", "cr=2,4", "window=range(4,13,4)", "decided_by=choice(self,next)", "data=tiny"]
    (tmp_path / "application.py").write_text(APPLICATION)
    command = [
        sys.executable,
        "application.py",
        "-m",
        *words,
        "hydra.sweep.dir=swept",
        "~hydra.callbacks.multirun",
        str(config_folder()),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("point ")]
    assert len(found) == 24
    assert [point.hash for point in points_of(*words)] == found


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train", []),
        ("train", ["cr=4", "lr=1e-3", "cr_family=[2,4]", "trained=all", "out='a b'", "threads=null", "betas=[0.5,0.9]"]),
        ("train", ["model=hf", "model.path=a/b", "model.dtype=float32", "data=text", "data.path=/x", "eval.rivals=[]"]),
        ("train", ["experiment=reference_recipe", "steps=7", "data.decontaminate=[a,b]"]),
        ("train", ["window=${steps}", "steps=5"]),
        ("train", ["+eval.more=1", "~lora_rank"]),
        ("train", ["cr=4", "cr=8", "model=qwen3_8b", "seed=3"]),
        ("evaluate", [*TASK, "model=tiny", "policy=tova", "budget=64", "eval.width=[1,4]"]),
        ("evaluate", ["checkpoint=runs/a", "cr=[2,3]"]),
    ],
)
def test_a_configuration_is_what_hydra_composes(command, words):
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        wanted, shorter = (
            OmegaConf.to_container(compose(command, overrides=some), resolve=True) for some in (words, words[:-1])
        )
    with Composer() as composer:  # what is kept of one call changes nothing for the next
        assert composer.compose(command, words) == wanted
        assert composer.compose(command, words[:-1]) == shorter
        assert composer.compose(command, words) == wanted


def test_a_composer_leaves_a_hydra_application_as_it_was():
    with initialize_config_dir(str(config_folder()), version_base="1.3", job_name="application"):
        before = GlobalHydra.instance().hydra
        points_of("cr=2,4")
        assert GlobalHydra.instance().hydra is before
        assert compose("train", overrides=["cr=2"]).cr == 2
    assert not GlobalHydra.instance().is_initialized()


def test_hundreds_of_points_take_seconds_and_no_torch():
    code = (
        "import sys, time; sys.path.insert(0, 'tests'); from test_sweep_points import points_of, TASK; began = time.time();"
        "points = points_of('model=tiny,qwen3_0_6b', 'cr=2,4,8', 'window=range(1,11)', 'seed=range(6)', then=[TASK]);"
        "assert len(points) == 360; sys.exit('torch' in sys.modules or time.time() - began > 20)"
    )
    began = time.monotonic()
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    assert time.monotonic() - began < 30


# -- what a point is ---------------------------------------------------------------------------------------------------
def test_a_point_is_the_run_that_the_train_command_makes_of_the_same_words():
    [point] = points_of("model=tiny", "cr=4", "seed=2", "window=8")
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        words = ["model=tiny", "cr=4", "seed=2", "window=8"]
        config = resolve(OmegaConf.to_container(compose("train", overrides=words), resolve=True))
    assert point.hash == config_hash(config)
    assert point.folder == f"runs/tiny-cr4-w8-{point.hash}"
    assert point.config.sweep == "study"


def test_points_that_are_one_run_are_one_point_with_the_evaluations_of_both():
    sweep = sweep_of(
        {"overrides": ["cr=4,8", "seed=0"], "then": [TASK]},
        {"overrides": ["cr=4", "seed=0,1"], "then": [TASK, [*TASK, "limit=3"]]},
    )
    points = expand(sweep)
    assert [(p.config.cr, p.config.seed, len(p.then)) for p in points] == [(4, 0, 2), (8, 0, 1), (4, 1, 2)]


def test_one_run_with_two_evaluations_at_its_end_is_refused():
    with pytest.raises(ValueError, match=r"eval.num_problems=8 .* are one run, since eval.\* does not decide"):
        points_of("eval.num_problems=8,16")


@pytest.mark.parametrize("word", ["eval_after=false", "devices=2", "threads=1", "tracking=wandb"])
def test_one_run_that_is_asked_for_in_two_ways_is_refused(word):
    words = ["model=tiny", "accumulate=2"]
    with pytest.raises(ValueError, match=rf"are one run, since {word.partition('=')[0]} does not decide what comes"):
        expand(sweep_of({"overrides": words}, {"overrides": [*words, word]}))
    assert len(expand(sweep_of({"overrides": [*words, word]}, {"overrides": [*words, word], "then": [TASK]}))) == 1


def test_points_in_one_folder_are_refused():
    with pytest.raises(ValueError, match="would share the folder runs/mine"):
        points_of("out=runs/mine", "seed=0,1")


def test_a_variant_is_what_differs_within_the_sweep_but_for_what_has_a_column():
    points = points_of("model=tiny", "window=4,16", "cr=8", "seed=0,1", "steps=9", "decided_by=next,delayed")
    assert {point.variant for point in points} == {
        f"decided_by={by} window={window}" for by in ("next", "delayed") for window in (4, 16)
    }
    sweep = sweep_of({"overrides": ["window=4"]}, {"overrides": ["trained=all", "window=4", "threads=1"]})
    assert [point.variant for point in expand(sweep)] == ["", "trained=all"]


def test_families_that_share_a_ratio_are_told_apart_by_the_one_that_they_were_trained_to():
    variants = [point.variant for point in points_of("model=tiny", "cr=4,8", "window=4,16")]
    assert variants == ["cr=4 window=4", "cr=4 window=16", "cr=8 window=4", "cr=8 window=16"]
    assert [point.variant for point in points_of("model=tiny", "cr=4,8", "cr_family=[]")] == ["", ""]
    window = points_of("model=tiny", "method=streaming_llm", "trained=all", "cr=4,8")  # no family: one ratio a training
    assert [point.variant for point in window] == ["", ""]


def test_an_evaluation_is_a_point_in_a_folder_of_its_own():
    points = points_of("model=tiny", "policy=tova,h2o", "budget=64,128", *TASK, command="evaluate")
    assert len({point.hash for point in points}) == len({point.folder for point in points}) == 4
    assert re.fullmatch(r"runs/evaluate-tiny-tova-64-[0-9a-f]{12}", points[0].folder)
    assert points[0].config.out == points[0].folder
    assert points[0].variant == ""
    [same] = points_of("model=tiny", "policy=tova", "budget=64", *TASK, "threads=3", "eval.places=2", command="evaluate")
    assert same.hash == points[0].hash
    [other] = points_of("model=tiny", "policy=tova", "budget=64", *TASK, "eval.temperature=1", command="evaluate")
    assert other.hash != points[0].hash


def test_what_follows_a_training_is_asked_of_its_run():
    [point] = points_of("cr=4", then=[[*TASK, "eval.width=1,4"], ["cr=3,6", "num_problems=4"]])
    benchmarks, dialled = (evaluation.config for evaluation in point.then)
    assert (benchmarks.checkpoint, benchmarks.eval.width, benchmarks.sweep) == (point.folder, (1, 4), "study")
    assert (dialled.checkpoint, dialled.cr, dialled.num_problems) == (point.folder, (3.0, 6.0), 4)


# -- what is wrong is told before anything runs ------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"overrides": ["windw=3"]}, "parts[0]: unknown key 'windw' (did you mean window?)"),
        ({"overrides": ["cr=4,0.5"]}, "parts[0], cr=0.5: cr=0.5 is not a compression ratio"),
        (
            {"overrides": ["cr=4", "window=1,4,999"], "name": "wide"},
            "wide, cr=4 window=999: window=999 is beyond the context",
        ),
        ({"overrides": ["seed=range("]}, "parts[0]: "),
        ({"overrides": ["lr=interval(0,1)"]}, "does not support sweep type"),
        ({"overrides": ["model=nobody"]}, "Could not find 'model/nobody'"),
        ({"overrides": ["model=hf"]}, "parts[0], model=hf: "),
        ({"overrides": ["cluster=slurm"]}, "cluster=slurm is said of a whole sweep"),
        ({"overrides": ["sweep=a"]}, "sweep=a is said of a whole sweep"),
        ({"overrides": ["resume=false"]}, "resume=false starts anew each time that a job is queued again"),
        (
            {"overrides": ["cr=4"], "then": [["eval=reasoning", "task=a"]]},
            "then [eval=reasoning, task=a]: unknown key 'task'",
        ),
        ({"overrides": ["cr=4"], "then": [["limit=3"]]}, "an evaluation of a sweep is eval=reasoning with its tasks"),
        ({"overrides": ["cr=4"], "then": [["cr=2", "limit=3"]]}, "limit=3 is for benchmarks; add eval=reasoning"),
        ({"overrides": ["cr=4"], "then": [[*TASK, "out=a"]]}, "out=a: the run and its folder are given already"),
        ({"overrides": ["cr=4"], "then": [[*TASK, "eval.width=0"]]}, "eval.width=[0] holds a member below 1"),
        ({"overrides": ["cr=4"], "then": [[*TASK, "shard=1/2"]]}, "shard= leaves results to another run"),
        ({"overrides": ["policy=tova", "model=tiny", *TASK], "command": "evaluate"}, "policy=tova needs budget="),
        ({"overrides": ["model=tiny"], "command": "evaluate"}, "needs eval=reasoning"),
    ],
)
def test_a_point_that_is_wrong_is_told_by_its_part_and_its_words(part, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        expand(sweep_of(part))


# -- what its job asks for ---------------------------------------------------------------------------------------------
def test_a_job_asks_for_what_suits_the_model_but_for_what_the_sweep_says():
    cluster = {"timeout_min": 720, "mem_gb": 64, "gpus_per_node": 1, "cpus_per_task": 8, "signal_delay_s": 60}
    cluster |= {"sizes": {"small": {"mem_gb": 32}, "cpu": {"gpus_per_node": 0}}, "size_of": {"qwen3_0_6b": "small"}}
    cluster["size_of"]["tiny"] = "cpu"
    tiny, small, large = (points_of(f"model={name}")[0] for name in ("tiny", "qwen3_0_6b", "qwen3_8b"))
    plain = sweep_of({"overrides": []}, resources={})
    assert [resources_of(p, plain, cluster).mem_gb for p in (tiny, small, large)] == [64, 32, 64]
    assert [resources_of(p, plain, cluster).gpus_per_node for p in (tiny, small, large)] == [0, 1, 1]
    own = sweep_of({"overrides": []}, resources={"mem_gb": 8, "sizes": {"small": {"timeout_min": 9}}})
    found = [resources_of(p, own, cluster) for p in (tiny, small, large)]
    assert [(r.mem_gb, r.timeout_min) for r in found] == [(8, 720), (8, 9), (8, 720)]


def test_nodes_of_a_job_that_are_not_those_of_its_run_are_refused():
    sweep = sweep_of({"overrides": []}, resources={"nodes": 2})
    [one], [two] = points_of("model=tiny"), points_of("num_nodes=2", "accumulate=2")
    with pytest.raises(ValueError, match=r"model=tiny: nodes=2 of the job are not the 1 of the run"):
        slurm_parameters(one, resources_of(one, sweep, {}), "name")
    assert slurm_parameters(two, resources_of(two, sweep, {}), "name")["nodes"] == 2


def test_evaluations_from_before_there_was_a_choice_of_steps_keep_their_hash():
    with Composer() as composer:
        asked, of_graph = (
            evaluation_of(composer, [*TASK, "model=tiny", "policy=full", *words], "study").config
            for words in ([], ["eval.step=graph", "eval.attention=triton"])
        )
    plain = {key: value for key, value in asdict(asked).items() if key not in _NOT_HASHED}
    plain["eval"] = {k: v for k, v in plain["eval"].items() if k not in _NOT_HASHED_OF_EVAL | {"step"}}
    assert plain["eval"]["lengths"] is None
    assert evaluation_hash(asked) == hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:12]
    eager = replace(of_graph, eval=replace(of_graph.eval, step="eager"))
    assert len({evaluation_hash(config) for config in (asked, of_graph, eager)}) == 3


def test_an_evaluation_of_a_checkpoint_asks_for_what_its_model_needs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cluster, plain = load_cluster("slurm"), sweep_of({"overrides": []})
    (tmp_path / "runs/a/checkpoints/cr4").mkdir(parents=True)
    places = ("runs/a", "runs/a/checkpoints/cr4", "runs/b")
    points = [points_of(*TASK, f"checkpoint={place}", command="evaluate")[0] for place in places]
    (tmp_path / "runs/a/config.json").write_text('{"model": {"name": "qwen3_8b"}}')
    assert [resources_of(point, plain, cluster).mem_gb for point in points] == [128, 128, 64]


def test_the_shipped_resources_are_valid_for_every_shipped_model():
    cluster = load_cluster("slurm")
    for file in (config_folder() / "model").glob("*.yaml"):
        path = ["model.path=a/b"] if file.stem == "hf" else []
        [point] = points_of(f"model={file.stem}", *path)
        assert file.stem in cluster["size_of"] or file.stem == "hf"
        assert resources_of(point, sweep_of({"overrides": []}), cluster).timeout_min > 0


def test_a_training_gets_the_memory_that_it_takes_to_load_and_to_save_it_unless_the_sweep_says_less():
    cluster, plain = load_cluster("slurm"), sweep_of({"overrides": []})
    words = ["devices=8", "accumulate=8", "trained=all", "strategy=fsdp", "model=qwen3_8b", "model.dtype=float32"]
    all_weights, averaged, adapter, whole = (
        resources_of(points_of(*some)[0], plain, cluster).mem_gb
        for some in (words, [*words, "average=0.9"], ["model=qwen3_8b"], [*words, "strategy=ddp"])
    )
    assert adapter == all_weights == 128  # weights and two moments take 122
    assert averaged == math.ceil((8.19e9 * 4 * 4 + 8 * 4e9) / 2**30)  # the first process gathers all that is saved
    assert whole == math.ceil((8.19e9 * 2 * 4 + 4e9) * 8 / 2**30)  # each process loads model and teacher
    own = sweep_of({"overrides": []}, resources={"mem_gb": 100})
    assert resources_of(points_of(*words)[0], own, cluster).mem_gb == 100
    assert resources_of(points_of("model=tiny")[0], plain, cluster).mem_gb == 4  # on a CPU, which was measured


def test_several_devices_are_several_tasks_of_a_node_which_end_together():
    sweep = sweep_of({"overrides": []}, resources={"gpus_per_node": 1, "cpus_per_task": 3})
    [point] = points_of("devices=4", "num_nodes=2", "accumulate=8")
    found = slurm_parameters(point, resources_of(point, sweep, {}), "name")
    assert (found["nodes"], found["tasks_per_node"], found["gpus_per_node"]) == (2, 4, 4)
    assert found["slurm_srun_args"] == ["--cpus-per-task=3", "--kill-on-bad-exit=1", "--wait=0"]
    assert found["slurm_additional_parameters"] == {"requeue": True}
