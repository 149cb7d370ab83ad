"""Every shipped configuration composes, and every bad value gets its sentence before anything is loaded."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dms_lab.config import config_hash, resolve

CONF = Path(__file__).parent.parent / "conf"
MODELS = sorted(p.stem for p in (CONF / "model").glob("*.yaml"))
EXPERIMENTS = sorted(p.stem for p in (CONF / "experiment").glob("*.yaml"))


def build(*overrides, name="train"):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        values = OmegaConf.to_container(compose(name, list(overrides)), resolve=True)
    values.pop("controls", None)
    return resolve(values)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_composes_with_a_reachable_default(model):
    extra = ["model.path=somewhere"] if model == "hf" else []
    config = build(f"model={model}", *extra)
    assert config.context > config.cr * config.window
    assert config.cr_family == (2.0, 4.0, 8.0)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes(experiment):
    build(f"+experiment={experiment}" if "experiment" not in experiment else experiment)


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
        (["window=0"], "window=0 must be at least 1"),
        (["window=99999"], "beyond the context of 512"),
        (["window=200"], r"needs T > cr \* window"),
        (["predictor=mlp"], "choose one of adapter, neuron"),
        (["decided_by=previous"], "choose one of self, next, delayed"),
        (["data=text"], "needs data.path"),
        (["method=streaming_llm"], "add trained=all"),
        (["predictor=neuron"], "add trained=all"),
        (["ramp=0"], "ramp=0"),
        (["+model.windw=3"], "unknown key model.'windw'; the valid keys are"),
        (["+windw=3"], "unknown key 'windw'; the valid keys are"),
    ],
)
def test_a_bad_value_is_refused_with_what_would_work(overrides, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(*overrides)


def test_the_hash_follows_what_decides_the_weights_and_nothing_else():
    base = config_hash(build())
    assert config_hash(build()) == base
    assert config_hash(build("out=elsewhere", "threads=1", "eval_after=false")) == base
    assert len({base, config_hash(build("seed=1")), config_hash(build("window=8")), config_hash(build("lr=1"))}) == 4


def test_the_family_ends_at_the_target():
    assert build("cr=6").cr_family == (2.0, 4.0, 6.0)
    assert build("cr=2").cr_family == (2.0,)
