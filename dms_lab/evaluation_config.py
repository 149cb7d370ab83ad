"""What a run of `dms_lab.evaluate` on benchmarks is: its schemas and validation. No heavy imports, as in `config`."""

import dataclasses
import re
from dataclasses import dataclass
from datetime import date
from typing import Any

from dms_lab.config import CHOICES, ModelConfig, cluster_keys
from dms_lab.generation_config import base_config, check_subject
from dms_lab.typed_config import build

SANDBOXES = ("bubblewrap", "none")
_CHOICES = {
    "prompt_style": ("paper", "card"),
    "thinking": ("auto", "yes", "no"),
    "storage": ("model", "fp8", "int8"),
    "attention": ("auto", "torch", "triton", "flash_attn", "flashinfer"),
    "step": ("auto", "eager", "graph"),
    "headline": ("auto", "avg", "maj", "pass_at_k", "pass_all"),
}


@dataclass(frozen=True)
class ReasoningConfig:
    """The group `eval=reasoning`. Nulls of `max_tokens` and sampling are what the task's own file says.

    Every pair of a member of `width` (chains a problem) and one of `max_tokens` becomes a point; all come from one set of
    `samples` chains a problem (null: the largest width) for each of `seeds`. `sources` holds `<task>:<file or folder>`.
    """

    tasks: tuple[str, ...]
    samples: int | None
    width: tuple[int, ...]
    max_tokens: tuple[int, ...] | None
    seeds: tuple[int, ...]
    headline: str
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    prompt_style: str
    thinking: str
    chat: bool
    full: bool
    sources: tuple[str, ...]
    choices_seed: int
    release: str
    start: str
    end: str
    errata: str | None
    lengths: tuple[int, ...] | None
    num_problems: int | None
    places: int
    num_pages: int | None
    page_size: int | None
    storage: str
    prefill_chunk: int
    reserve: float
    deterministic: bool
    attention: str
    step: str
    graders: int
    seconds_per_test: float
    seconds_per_problem: float | None

    @property
    def num_samples(self) -> int:
        """Chains drawn for a problem and seed."""
        return self.samples or max(self.width)


@dataclass(frozen=True)
class EvaluateConfig:
    """A run of `dms_lab.evaluate` on benchmarks: what answers, which tasks, which part of them, where results go."""

    eval: ReasoningConfig
    model: ModelConfig | None
    checkpoint: str | None
    policy: str | None
    budget: int | None
    limit: int | None
    shard: tuple[int, int]
    out: str | None
    store: str | None
    sandbox: str
    i_trust_the_code: bool
    regrade: bool
    threads: int | None
    cr: tuple[float, ...] = ()
    calibrate: str | None = None
    tracking: str = "none"
    sweep: str | None = None


_TOP = (
    "cr",
    "calibrate",
    "checkpoint",
    "policy",
    "budget",
    "tasks",
    "limit",
    "shard",
    "out",
    "store",
    "sandbox",
    "i_trust_the_code",
    "regrade",
    "threads",
    "tracking",
)
LISTS = ("tasks", "cr", *(f"eval.{name}" for name in ("tasks", "width", "max_tokens", "seeds", "sources", "lengths")))


def evaluate_keys() -> tuple[str, ...]:
    """Every key of a command line of `dms_lab.evaluate`."""
    groups = (("eval", ReasoningConfig), ("model", ModelConfig))
    inner = (f"{group}.{f.name}" for group, schema in groups for f in dataclasses.fields(schema))
    return (*sorted((*_TOP, "num_problems", "eval", "model", "sweep", "cluster")), *inner, *cluster_keys())


def with_lists(words: list[str]) -> list[str]:
    """A command line whose list-valued keys may be written `key=1,4,8`, which Hydra keeps for sweeps (`-m`)."""
    if {"-m", "--multirun"} & set(words):
        return words
    found = []
    for word in words:
        key, _, value = word.partition("=")
        if key.lstrip("+") in LISTS and value and not value.startswith(("[", "'", '"')) and value not in ("null", "list"):
            word = f"{key}=[{value}]"
        found.append(word)
    return found


def ratios(value: Any) -> tuple[float, ...]:
    """The compression ratios to dial a checkpoint to, from one or a list of them; `ValueError` for another thing."""
    members = value if isinstance(value, list | tuple) else [value]
    for member in members:
        if isinstance(member, bool) or not isinstance(member, int | float) or not member >= 1:
            raise ValueError(f"cr={member!r} is not a compression ratio; it is full / kept, so use 1 or more, e.g. cr=3,6")
    return tuple(map(float, members))


def tracking_of(value: str) -> str:
    """`tracking=` as given, if there is such a choice; `ValueError` else."""
    if value not in CHOICES["tracking"]:
        raise ValueError(f"tracking={value!r} is not known; choose one of {', '.join(CHOICES['tracking'])}")
    return value


def resolve_evaluate(cfg: dict[str, Any]) -> EvaluateConfig:
    """A complete configuration of a benchmark run from a composed one; `ValueError` for the first thing that is wrong."""
    values = {key: value for key, value in cfg.items() if key not in ("data", "num_problems", "cluster")}
    if cfg.get("num_problems") is not None:
        raise ValueError(
            "num_problems= is for a run's own evaluation; with eval=reasoning use limit=<problems of each task>"
        )
    group = dict(values.pop("eval"))
    if "batch_size" in group:
        raise ValueError("eval=default is the evaluation at the end of training; benchmarks are eval=reasoning")
    if (tasks := values.pop("tasks", None)) is not None:
        group["tasks"] = tasks if isinstance(tasks, list) else [tasks]
    reasoning = build(ReasoningConfig, group, "eval.")
    if (asked := values.pop("cr", None)) is not None:
        values["cr"] = ratios(asked)
        if values.get("checkpoint") is None:
            raise ValueError("cr= moves the threshold of a trained checkpoint; give checkpoint=<a run, or one in it>")
    elif values.get("calibrate") is not None:
        raise ValueError(f"calibrate={values['calibrate']} is the text that cr= is reached on; add cr=<ratio>")
    values |= {"eval": reasoning, "model": base_config(values.get("model")), "shard": _shard(values.get("shard"))}
    config = build(EvaluateConfig, values, "")
    check_subject(config.model, config.checkpoint, config.policy, config.budget)
    tracking_of(config.tracking)
    _check_reasoning(reasoning)
    if config.sandbox not in SANDBOXES:
        raise ValueError(f"sandbox={config.sandbox!r} is not known; choose one of {', '.join(SANDBOXES)}")
    if config.sandbox == "none" and not config.i_trust_the_code:
        raise ValueError(
            "sandbox=none runs programs that a model wrote on this machine, with your rights; leave it out to run them "
            "under bubblewrap, or add i_trust_the_code=true if nothing here can be harmed"
        )
    for name in ("budget", "limit", "threads"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    return config


def _shard(value: Any) -> tuple[int, int]:
    """`3/8`: the third of eight parts, counted from 1."""
    if value is None:
        return 1, 1
    found = re.fullmatch(r"(\d+)/(\d+)", str(value))
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"shard={value!r} must name a part as shard=3/8, the third of eight; parts count from 1")
    return int(found[1]), int(found[2])


def _check_reasoning(config: ReasoningConfig) -> None:
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            raise ValueError(f"eval.{name}={getattr(config, name)!r} is not known; choose one of {', '.join(choices)}")
    for name in ("tasks", "width", "seeds"):
        if not getattr(config, name):
            raise ValueError(f"eval.{name} is empty; give at least one")
    for name in ("width", "max_tokens", "seeds", "lengths", "tasks"):
        members = getattr(config, name) or ()
        if len(set(members)) < len(members):
            raise ValueError(f"eval.{name}={list(members)} names one twice")
        if name in ("width", "max_tokens", "lengths") and any(member < 1 for member in members):
            raise ValueError(f"eval.{name}={list(members)} holds a member below 1")
    _check_generation(config)
    for name in ("samples", "places", "graders", "num_problems", "num_pages", "page_size", "prefill_chunk"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ValueError(f"eval.{name}={getattr(config, name)} must be at least 1")
    if config.num_samples < max(config.width):
        raise ValueError(
            f"eval.samples={config.samples} chains cannot make eval.width={max(config.width)}; draw at least as many"
        )
    for name in ("seconds_per_test", "seconds_per_problem"):
        if getattr(config, name) is not None and getattr(config, name) <= 0:
            raise ValueError(f"eval.{name}={getattr(config, name):g} must be above 0")
    for entry in config.sources:
        task, _, place = entry.partition(":")
        if not (task and place):
            raise ValueError(f"eval.sources holds {entry!r}; name a task's local data as <task>:<file or folder>")
        if task not in config.tasks:
            raise ValueError(f"eval.sources holds data of {task}, which is none of the tasks {', '.join(config.tasks)}")


# name -> (lowest, highest) that may be given; sampling as in `sampling.SamplingConfig`
_RANGES = {"temperature": (0, None), "top_p": (0, 1), "top_k": (0, None), "min_p": (0, 1), "reserve": (0, 0.99)}


def _check_generation(config: ReasoningConfig) -> None:
    for name, (low, high) in _RANGES.items():
        value = getattr(config, name)
        if value is not None and (value < low or (high is not None and value > high) or (name == "top_p" and value == 0)):
            bounds = f"at least {low}" if high is None else f"from {low} to {high}"
            raise ValueError(f"eval.{name}={value:g} is out of range; it must be {bounds}")
    for name in ("start", "end"):
        try:
            date.fromisoformat(getattr(config, name))
        except ValueError as error:
            raise ValueError(f"eval.{name}={getattr(config, name)!r} is no date; write one as 2024-08-01") from error
