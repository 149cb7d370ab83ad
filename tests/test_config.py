"""Every shipped configuration composes, and every bad value gets its sentence before anything is loaded."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dms_lab import config as configuration
from dms_lab.config import config_hash, resolve, run_folder, valid_keys
from dms_lab.typed_config import check_overrides

ROOT = Path(__file__).parent.parent
CONF = ROOT / "conf"
MODELS = sorted(p.stem for p in (CONF / "model").glob("*.yaml"))
EXPERIMENTS = sorted(p.stem for p in (CONF / "experiment").glob("*.yaml"))


def values(*overrides, name="train"):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = OmegaConf.to_container(compose(name, list(overrides)), resolve=True)
    composed.pop("controls", None)
    return composed


def build(*overrides, name="train"):
    return resolve(values(*overrides, name=name))


@pytest.mark.parametrize("model", MODELS)
def test_every_model_composes_with_a_reachable_default(model):
    extra = ["model.path=somewhere"] if model == "hf" else []
    config = build(f"model={model}", *extra)
    assert config.model.name == model
    assert config.context > config.cr * config.window
    assert config.cr_family == (2.0, 4.0, 8.0)
    assert config.data.kind == ("tiny" if model == "tiny" else "openr1_math")


def test_the_command_line_has_the_last_word_over_the_data_of_a_model():
    assert build("model=qwen3_8b", "data=text", "data.path=x").data.kind == "text"
    assert build("data=jsonl", "data.path=x", "model=llama32_1b").data.kind == "jsonl"


def test_the_issue_s_models_and_published_recipes_are_all_there():
    assert set(MODELS) == set(
        "tiny llama32_1b llama32_3b qwen_r1_1_5b qwen_r1_7b qwen_r1_32b qwen3_0_6b qwen3_1_7b qwen3_4b qwen3_8b hf".split()
    )
    assert {e.removeprefix("paper_") for e in EXPERIMENTS} == {
        *("llama32_1b", "qwen_r1_1_5b", "qwen_r1_7b", "qwen_r1_32b", "qwen3_8b"),
        *("reference_recipe", "tiny_recipe"),
    }


# Lancucki et al. 2025, Table 3: sequences a step, context, window, learning rate.
TABLE_3 = {
    "llama32_1b": (1024, 4096, 256, 1e-5),
    "qwen_r1_1_5b": (1024, 8192, 256, 1e-5),
    "qwen_r1_7b": (1024, 8192, 256, 3e-5),
    "qwen_r1_32b": (1024, 8192, 256, 3e-5),
    "qwen3_8b": (256, 32768, 512, 3e-5),
}


@pytest.mark.parametrize("model", TABLE_3)
def test_a_paper_recipe_has_the_numbers_of_the_paper_s_table(model):
    config = build(f"experiment=paper_{model}")
    assert config.model.name == model
    assert (config.batch_size * config.accumulate, config.context, config.window, config.lr) == TABLE_3[model]
    assert (config.predictor, config.neuron_index, config.trained, config.count) == ("neuron", 0, "all", "decisions")
    assert config.data.kind == "openr1_math"
    assert config.retention == "one_sided"


def test_a_paper_recipe_raises_cr_by_one_in_100_steps_once_the_neuron_has_faded():
    from dms_lab.eviction import cr_at

    for model in TABLE_3:
        config = build(f"experiment=paper_{model}")
        at = [cr_at(s, config.cr, config.steps, config.ramp, config.neuron_zeroing_steps) for s in (0, 2000, 2100, 2700)]
        assert at == pytest.approx([1, 1, 2, 8])
        assert config.cr_family == (2.0, 3.0, 4.0, 6.0, 8.0)


def test_the_reference_recipe_reaches_8_at_step_238_and_16_at_step_510():
    from dms_lab.eviction import cr_at

    config = build("experiment=reference_recipe")
    at = [cr_at(step, config.cr, config.steps, config.ramp) for step in (0, 34, 238, 510, 544)]
    assert at == pytest.approx([1, 2, 8, 16, 16])
    assert (config.model.name, config.window, config.kl_direction, config.seed) == ("qwen3_8b", 513, "reverse", 42)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_command_line_has_the_last_word_over_an_experiment(experiment):
    config = build(
        f"experiment={experiment}", "model=qwen3_0_6b", "window=128", "cr=4", "steps=3000", "lr=1e-4", "model.dtype=float32"
    )
    assert (config.model.name, config.window, config.cr, config.lr) == ("qwen3_0_6b", 128, 4.0, 1e-4)


@pytest.mark.parametrize("name", sorted(p.stem for p in CONF.glob("*.yaml")))
def test_every_command_s_configuration_composes(name):
    composed = values(*(["checkpoint=x"] if name == "evaluate" else []), name=name)
    if "model" in composed:
        resolve(composed)


@pytest.mark.parametrize("data", ["tiny", "openr1_math", "jsonl data.path=x", "text data.path=x"])
def test_every_data_source_composes(data):
    build(*f"data={data}".split())


def test_the_published_command_composes():
    config = build("model=qwen3_8b", "cr=8", "window=256", "steps=300", "seed=3")
    assert (config.model.path, config.cr, config.window, config.steps) == ("Qwen/Qwen3-8B", 8.0, 256, 300)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["cr=0.5"], "cr=0.5 is not a compression ratio"),
        (["cr=inf"], "cr=inf must be a finite number"),
        (["cr=four"], "cr='four' must be a finite number"),
        (["cr_family=[0.5,4]"], "holds a member below 1"),
        (["cr_family=4"], "cr_family=4 must be a list"),
        (["window=0"], "window=0 must be at least 1"),
        (["window=2.5"], "window=2.5 must be a whole number"),
        (["window=wide"], "window='wide' must be a whole number"),
        (["window=true"], "window=True must be a whole number"),
        (["window=99999"], "beyond the context of 512"),
        (["window=200"], r"needs T > cr \* window"),
        (["window=64"], r"needs T > cr \* window, here 512 > 512"),
        (["predictor=mlp"], "choose one of adapter, neuron"),
        (["decided_by=previous"], "choose one of self, next, delayed"),
        (["attention=sdpa"], "choose one of auto, reference, chunked, flex, triton"),
        (["model.dtype=int8"], "choose one of float32, bfloat16, float16"),
        (["data=text"], "needs data.path"),
        (["data=text", "data.path=7"], "data.path=7 must be text"),
        (["model=hf"], "use model=hf model.path="),
        (["method=streaming_llm"], "add trained=all or trained=lora"),
        (["method=streaming_llm", "trained=all", "num_sinks=64"], "num_sinks=64 leaves no window"),
        (["predictor=neuron"], "add trained=all"),
        (["predictor=neuron", "trained=all", "granularity=layer"], "decides per KV head"),
        (["predictor=neuron", "trained=all", "steps=2000", "neuron_zeroing_steps=2000"], "leave nothing of steps=2000"),
        (["model=qwen3_8b", "trained=all"], "trained=all with model.dtype=bfloat16"),
        (["precision=bf16-mixed"], "with trained=adapter the frozen base computes in its own precision"),
        (["precision=bf16"], "precision='bf16' is not known; choose one of auto, bf16-mixed, 32-true"),
        (["trained=lora", "lora_rank=0"], "lora_rank=0 must be at least 1"),
        (["eval.rivals=[snapkv]"], "choose from streaming_llm, tova, h2o, keydiff, random"),
        (["eval.num_problems=0"], "eval.num_problems=0 must be at least 1"),
        (["ramp=0"], "ramp=0"),
        (["ramp=null"], "ramp=None must be a finite number"),
        (["steps_per_cr=0"], "steps_per_cr=0 must be above 0"),
        (["tau=0"], "tau=0.0 must be above 0"),
        (["lr=-1"], "lr=-1.0 must be above 0"),
        (["betas=[0.9]"], "must be a list of 2"),
        (["betas=[0.9,1.0]"], r"must lie in \[0, 1\)"),
        (["average=1"], "average=1 is the share"),
        (["decay=2"], "decay=2 is the share of steps"),
        (["seed=-1"], "seed=-1 must not be negative"),
        (["threads=0"], "threads=0 must be at least 1"),
        (["+model.windw=3"], r"unknown key 'model.windw' \(did you mean model.window\?\); the valid keys are"),
        (["+windw=3"], r"unknown key 'windw' \(did you mean window\?\); the valid keys are"),
    ],
)
def test_a_bad_value_is_refused_with_what_would_work(overrides, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(*overrides)


def test_a_missing_key_is_named():
    with pytest.raises(ValueError, match="missing key 'tau'"):
        resolve({key: value for key, value in values().items() if key != "tau"})


def test_a_misspelt_key_on_the_command_line_gets_the_nearest_and_all_valid_ones():
    with pytest.raises(ValueError, match=r"unknown key 'windw' \(did you mean window\?\)") as error:
        check_overrides(["model=tiny", "windw=3"], valid_keys())
    assert all(key in str(error.value) for key in valid_keys())
    with pytest.raises(ValueError, match=r"'data\.pth'"):
        check_overrides(["data.pth=x"], valid_keys())


def test_what_hydra_understands_is_left_to_hydra():
    check_overrides(
        ["model=tiny", "eval.length=128", "++cr=4", "hydra.run.dir=x", "experiment=y", "--help", "-m"], valid_keys()
    )
    check_overrides(["cluster.sizes.cpu.mem_gb=2", "cluster.size_of.hf=small", "sizes.x=1"], [*valid_keys(), "sizes.*"])
    for word in ("sizes.x=1", "cluster.partitions.x=1", "cluster.sizes=1"):
        with pytest.raises(ValueError, match=f"unknown key '{word[:-2]}'"):
            check_overrides([word], valid_keys())
    check_overrides(["controls=[]"], ["controls"])
    with pytest.raises(ValueError, match="unknown key 'controls'"):
        check_overrides(["controls=[]"], valid_keys())


def test_every_valid_key_can_be_overridden():
    composed = OmegaConf.create(values("cluster=slurm"))
    for key in set(valid_keys()) - {"experiment", "search"}:
        assert OmegaConf.select(composed, key.removesuffix(".*"), default="absent") != "absent", key


def test_the_choices_are_those_of_the_code():
    from dms_lab import eviction, policies
    from dms_lab.attention import soft

    choices = configuration.CHOICES
    assert (choices["decided_by"], choices["granularity"]) == (eviction.DECIDED_BY, eviction.GRANULARITIES)
    assert (choices["count"], choices["attention"]) == (eviction.COUNTS, soft.BACKENDS)
    assert tuple(policies.HEURISTICS) == configuration.RIVALS


def test_the_hash_follows_what_decides_the_weights_and_nothing_else():
    base = config_hash(build())
    assert config_hash(build()) == base
    assert config_hash(build("out=elsewhere", "threads=1", "eval_after=false", "eval.num_problems=3")) == base
    assert len({base, config_hash(build("seed=1")), config_hash(build("window=8")), config_hash(build("lr=1"))}) == 4


def test_precision_is_hashed_where_it_is_chosen_and_runs_from_before_keep_their_names():
    from dms_lab.config import is_mixed

    low, wide, auto = (build("trained=all", f"precision={name}") for name in ("bf16-mixed", "32-true", "auto"))
    before = {key: value for key, value in dataclasses.asdict(auto).items() if key not in ("precision", "keep_attention")}
    assert config_hash(auto) == config_hash(before)
    assert len({config_hash(x) for x in (low, wide, auto)}) == 3
    assert [is_mixed(x, on_gpu) for x in (low, wide, auto) for on_gpu in (False, True)] == [1, 1, 0, 0, 0, 1]
    assert not is_mixed(build("trained=lora"), on_gpu=True)


def test_what_is_not_set_is_hashed_as_such():
    assert config_hash({"cr": 8, "lr": None}) != config_hash({"cr": 8})


def test_a_number_s_spelling_does_not_change_the_hash():
    assert config_hash(build("cr=8", "scale=100", "steps=1e2")) == config_hash(build("cr=8.0", "scale=100.0", "steps=100"))


def test_a_resolved_configuration_survives_json():
    import json

    config = build("model=qwen3_8b", "cr=6")
    again = resolve(json.loads(json.dumps(dataclasses.asdict(config))) | {"steps_per_cr": 1})
    assert again == config
    assert run_folder(again) == f"runs/qwen3_8b-cr6-w512-{config_hash(config)}"


def test_steps_follow_from_the_target_unless_given():
    assert build("cr=8", "steps_per_cr=100", "ramp=1").steps == 700
    assert build("cr=8", "steps_per_cr=34", "ramp=0.8").steps == 298
    assert build("cr=8", "steps=5").steps == 5
    neuron = ["predictor=neuron", "trained=all", "neuron_zeroing_steps=50"]
    assert build("cr=8", "steps_per_cr=100", "ramp=1", *neuron).steps == 750


def test_the_family_ends_at_the_target():
    assert build("method=streaming_llm", "trained=all").cr_family == (8.0,)  # one window, one budget
    assert build("cr=6").cr_family == (2.0, 4.0, 6.0)
    assert build("cr=2").cr_family == (2.0,)


def test_reading_a_configuration_loads_no_torch():
    code = "import sys, dms_lab.config; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'lightning')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
