"""A command line of `dms_lab.evaluate` on benchmarks: what it comes to, and a sentence for everything that is wrong."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dms_lab.config import resolve
from dms_lab.evaluation_config import ReasoningConfig, evaluate_keys, resolve_evaluate, with_lists

ROOT = Path(__file__).parent.parent
CONF = ROOT / "conf"
SUBJECT = "checkpoint=runs/x"
AS_IT_IS = ["checkpoint=null", "model=tiny"]


def composed(*overrides, name="evaluate"):
    """The overrides as `dms_lab.evaluate` hands them to Hydra, composed."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose(name, with_lists(list(overrides))), resolve=True)


def build(*overrides):
    return resolve_evaluate(composed("eval=reasoning", SUBJECT, *overrides))


# -- what is right -----------------------------------------------------------------------------------------------------


def test_the_published_command_composes_to_the_three_benchmarks_of_the_paper():
    config = build()
    assert config.eval.tasks == ("dms_aime24", "dms_gpqa_diamond", "dms_livecodebench")
    assert (config.checkpoint, config.model, config.policy, config.budget) == ("runs/x", None, None, None)
    assert (config.shard, config.sandbox, config.regrade) == ((1, 1), "bubblewrap", False)
    assert (config.eval.width, config.eval.seeds, config.eval.num_samples) == ((1,), (0,), 1)


def test_nulls_of_the_file_stay_null():
    nulls = {name for name, value in dataclasses.asdict(build().eval).items() if value is None}
    assert nulls == set(
        "samples max_tokens temperature top_p top_k min_p errata lengths num_problems num_pages page_size "
        "seconds_per_problem".split()
    )


@pytest.mark.parametrize(
    ("overrides", "num_samples"),
    [
        (["eval.width=[1,4,8]"], 8),
        (["eval.width=[8,1]"], 8),
        (["eval.width=[1,8]", "eval.samples=8"], 8),
        (["eval.width=[1,8]", "eval.samples=16"], 16),
    ],
)
def test_as_many_chains_are_drawn_as_the_largest_width_unless_more_are_asked_for(overrides, num_samples):
    assert build(*overrides).eval.num_samples == num_samples


@pytest.mark.parametrize(
    ("word", "part"), [("null", (1, 1)), ("1/1", (1, 1)), ("1/8", (1, 8)), ("3/8", (3, 8)), ("12/12", (12, 12))]
)
def test_a_shard_is_a_part_and_how_many_there_are(word, part):
    assert build(f"shard={word}").shard == part


def test_a_model_as_it_is_runs_under_a_policy_with_a_budget_where_it_has_one():
    config = build(*AS_IT_IS, "policy=full")
    assert (config.model.name, config.policy, config.budget) == ("tiny", "full", None)
    config = build(*AS_IT_IS, "policy=tova", "budget=128", "sandbox=none", "i_trust_the_code=true")
    assert (config.policy, config.budget, config.sandbox) == ("tova", 128, "none")
    assert build("model=qwen3_8b").model.path == "Qwen/Qwen3-8B"  # in place of the checkpoint's own base


def test_tasks_of_the_top_stand_for_those_of_the_group():
    assert build("tasks=dms_math500").eval.tasks == ("dms_math500",)
    assert build("tasks=[dms_math500,arc_easy]").eval.tasks == ("dms_math500", "arc_easy")
    values = composed("eval=reasoning", SUBJECT) | {"tasks": "dms_vt"}  # without `with_lists`
    assert resolve_evaluate(values).eval.tasks == ("dms_vt",)


def test_dates_and_local_data_come_as_they_were_written():
    config = build(
        "eval.start=2024-10-01", "eval.sources=dms_aime24:/data/a.jsonl,dms_gpqa_diamond:b", "eval.max_tokens=8192,16384"
    )
    assert (config.eval.start, config.eval.end) == ("2024-10-01", "2025-01-31")
    assert config.eval.sources == ("dms_aime24:/data/a.jsonl", "dms_gpqa_diamond:b")
    assert config.eval.max_tokens == (8192, 16384)


# -- what is wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["num_problems=5"], r"num_problems= is for a run's own evaluation; with eval=reasoning use limit="),
        (["model=hf"], r"model\.path is not given; use model=hf model\.path="),
        (["+windw=3"], r"unknown key 'windw'"),
        (["+eval.widht=3"], r"unknown key 'eval\.widht' \(did you mean eval\.width\?\); the valid keys are .*eval\.tasks"),
        (["model=tiny", "+model.pth=x"], r"unknown key 'model\.pth' \(did you mean model\.path\?\)"),
        (["~eval.reserve"], r"missing key 'eval\.reserve'"),
        (["~regrade"], r"missing key 'regrade'"),
        # types
        (["eval.samples=many"], "eval.samples='many' must be a whole number"),
        (["eval.temperature=nan"], "eval.temperature=nan must be a finite number"),
        (["eval.chat=maybe"], "eval.chat='maybe' must be true or false"),
        (["eval.release=6"], "eval.release=6 must be text, a number quoted"),
        (["eval.width=[1,two]"], "eval.width='two' must be a whole number"),
        (["eval.width=null"], r"eval.width=None must be a list, e.g. eval.width=\[...\]"),
        (["limit=few"], "limit='few' must be a whole number"),
        # shards
        (["shard=3"], "shard=3 must name a part as shard=3/8, the third of eight; parts count from 1"),
        (["shard=0/8"], "shard='0/8' must name a part"),
        (["shard=9/8"], "shard='9/8' must name a part"),
        (["shard=1/0"], "shard='1/0' must name a part"),
        (["shard=1/2/3"], "shard='1/2/3' must name a part"),
        (["shard=a/b"], "shard='a/b' must name a part"),
        # what answers
        (["checkpoint=null"], "give checkpoint=<folder of a checkpoint>, or model=<name> policy=<rule> .* full, .*quest"),
        ([*AS_IT_IS], "give checkpoint="),
        (["checkpoint=null", "policy=full"], "give checkpoint="),
        (["model=tiny", "policy=full"], "policy=full is for a model without a checkpoint; leave one of the two out"),
        ([*AS_IT_IS, "policy=snapkv"], "policy='snapkv' is not known; choose one of full, streaming_llm"),
        ([*AS_IT_IS, "policy=tova"], "policy=tova needs budget="),
        ([*AS_IT_IS, "policy=full", "budget=64"], "budget=64 is for"),
        (["budget=64"], "budget=64 is for"),
        ([*AS_IT_IS, "policy=tova", "budget=0"], "budget=0 must be at least 1"),
        # the group
        (["eval.prompt_style=long"], "eval.prompt_style='long' is not known; choose one of paper, card"),
        (["eval.thinking=maybe"], "eval.thinking='maybe' is not known; choose one of auto, yes, no"),
        (["eval.headline=best"], "eval.headline='best' is not known; choose one of auto, avg, maj, pass_at_k, pass_all"),
        (["eval.tasks=[]"], "eval.tasks is empty; give at least one"),
        (["tasks=[]"], "eval.tasks is empty"),
        (["eval.width=[]"], "eval.width is empty"),
        (["eval.seeds=[]"], "eval.seeds is empty"),
        (["tasks=dms_vt,dms_vt"], r"eval.tasks=\['dms_vt', 'dms_vt'\] names one twice"),
        (["eval.width=4,4"], r"eval.width=\[4, 4\] names one twice"),
        (["eval.max_tokens=64,64.0"], r"eval.max_tokens=\[64, 64\] names one twice"),
        (["eval.seeds=0,1,0"], r"eval.seeds=\[0, 1, 0\] names one twice"),
        (["eval.lengths=4096,4096"], r"eval.lengths=\[4096, 4096\] names one twice"),
        (["eval.width=0,1"], r"eval.width=\[0, 1\] holds a member below 1"),
        (["eval.max_tokens=-1"], r"eval.max_tokens=\[-1\] holds a member below 1"),
        (["eval.lengths=0"], r"eval.lengths=\[0\] holds a member below 1"),
        (["eval.samples=0"], "eval.samples=0 must be at least 1"),
        (["eval.prefill_chunk=0"], "eval.prefill_chunk=0 must be at least 1"),
        (["eval.temperature=-1"], "eval.temperature=-1 is out of range; it must be at least 0"),
        (["eval.top_p=0"], "eval.top_p=0 is out of range; it must be from 0 to 1"),
        (["eval.min_p=2"], "eval.min_p=2 is out of range"),
        (["eval.reserve=1"], "eval.reserve=1 is out of range"),
        (["eval.storage=int4"], "eval.storage='int4' is not known; choose one of model, fp8, int8"),
        (
            ["eval.attention=flash"],
            "eval.attention='flash' is not known; choose one of auto, torch, triton, flash_attn",
        ),
        (["eval.step=fast"], "eval.step='fast' is not known; choose one of auto, eager, graph"),
        (["eval.start='August 2024'"], "eval.start='August 2024' is no date; write one as 2024-08-01"),
        (["eval.sources=dms_math500:b"], "eval.sources holds data of dms_math500, which is none of the tasks"),
        (["eval.places=0"], "eval.places=0 must be at least 1"),
        (["eval.graders=0"], "eval.graders=0 must be at least 1"),
        (["eval.num_problems=0"], "eval.num_problems=0 must be at least 1"),
        (["eval.width=1,8", "eval.samples=7"], "eval.samples=7 chains cannot make eval.width=8; draw at least as many"),
        (["eval.seconds_per_test=0"], "eval.seconds_per_test=0 must be above 0"),
        (["eval.seconds_per_problem=-1.5"], "eval.seconds_per_problem=-1.5 must be above 0"),
        (
            ["eval.sources=dms_aime24"],
            "eval.sources holds 'dms_aime24'; name a task's local data as <task>:<file or folder>",
        ),
        (["eval.sources=':a.jsonl'"], "eval.sources=':a.jsonl' must be a list"),
        (["eval.sources=[':a.jsonl']"], "eval.sources holds ':a.jsonl'"),
        (["eval.sources=['dms_aime24:']"], "eval.sources holds 'dms_aime24:'"),
        # where
        (["sandbox=docker"], "sandbox='docker' is not known; choose one of bubblewrap, none"),
        (["sandbox=none"], "sandbox=none runs programs that a model wrote .* add i_trust_the_code=true"),
        (["limit=0"], "limit=0 must be at least 1"),
        (["threads=0"], "threads=0 must be at least 1"),
    ],
)
def test_a_bad_value_is_refused_with_what_would_work(overrides, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(*overrides)


def test_training_refuses_the_group_of_benchmarks_and_says_which_command_it_is_for():
    with pytest.raises(ValueError, match=r"eval=reasoning is for dms_lab\.evaluate: .*checkpoint=<a run's folder>"):
        resolve(composed("eval=reasoning", name="train"))
    with pytest.raises(ValueError, match=r"unknown key 'eval\.width'"):
        resolve(composed("+eval.width=4", name="train"))


# -- keys --------------------------------------------------------------------------------------------------------------


def test_every_key_of_the_group_has_a_line_in_its_file_and_the_other_way_round():
    lines = yaml.safe_load((CONF / "eval" / "reasoning.yaml").read_text())
    assert list(lines) == [f.name for f in dataclasses.fields(ReasoningConfig)]


def test_the_valid_keys_are_those_that_compose():
    values = OmegaConf.create(composed("eval=reasoning", "model=tiny", "cluster=slurm", SUBJECT))
    for key in evaluate_keys():
        assert OmegaConf.select(values, key.removesuffix(".*"), default="absent") != "absent", key
    lines = yaml.safe_load((CONF / "evaluate.yaml").read_text())
    keys = {key for key in evaluate_keys() if "." not in key}
    assert set(lines) - {"defaults", "hydra"} | {"eval", "model", "cluster"} == keys


@pytest.mark.parametrize(
    ("word", "becomes"),
    [
        ("eval.width=1,4,8", "eval.width=[1,4,8]"),
        ("eval.width=4", "eval.width=[4]"),
        ("tasks=a,b", "tasks=[a,b]"),
        ("tasks=a", "tasks=[a]"),
        ("eval.tasks=a,b", "eval.tasks=[a,b]"),
        ("eval.max_tokens=8192,16384", "eval.max_tokens=[8192,16384]"),
        ("++eval.seeds=0,1", "++eval.seeds=[0,1]"),
        ("eval.lengths=4096", "eval.lengths=[4096]"),
        ("eval.sources=t:a/b.jsonl", "eval.sources=[t:a/b.jsonl]"),
    ],
)
def test_a_list_may_be_written_with_commas_alone(word, becomes):
    assert with_lists(["evaluate.py", word, "limit=3"]) == ["evaluate.py", becomes, "limit=3"]


@pytest.mark.parametrize(
    "word",
    [
        *("eval.width=[1,4]", "tasks=['a,b']", "tasks='a,b'", 'tasks="a,b"', "tasks=list", "tasks=null", "tasks="),
        *("eval.max_tokens=null", "checkpoint=a,b", "eval.places=1,2", "--help", "-cn=a,b", "tasks"),
    ],
)
def test_what_is_quoted_bracketed_null_or_no_list_is_left_alone(word):
    assert with_lists([word]) == [word]


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_the_commas_of_a_sweep_are_left_to_hydra(flag):
    words = ["evaluate.py", flag, "eval.width=1,4", "tasks=a,b"]
    assert with_lists(words) == words


def test_reading_the_configuration_loads_neither_torch_nor_lm_eval():
    code = (
        "import sys, dms_lab.evaluation_config; sys.exit(any(m in sys.modules for m in ('torch', 'lm_eval', 'datasets')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
