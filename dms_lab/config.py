"""What a run is: schemas, validation and the hash that names a run. No heavy imports: `--help` stays quick.

    conf/*.yaml + command line -> Hydra -> resolve(cfg) -> TrainConfig (plain, frozen, complete) -> build and call

Nulls stand for "the model's default". Every error is raised here, before anything is loaded.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any

CHOICES = {
    "method": ("dms", "streaming_llm"),
    "predictor": ("adapter", "neuron"),
    "granularity": ("head", "layer"),
    "decided_by": ("self", "next", "delayed"),
    "trained": ("adapter", "all"),
    "count": ("live", "decisions"),
    "kl_direction": ("forward", "reverse"),
    "attention": ("auto", "reference", "chunked", "flex"),
    "tracking": ("none", "wandb"),
    "data.kind": ("tiny", "text", "jsonl", "openr1_math"),
    "model.dtype": ("float32", "bfloat16", "float16"),
}


@dataclass(frozen=True)
class ModelConfig:
    """A base model and the defaults that suit it. `context` and `window` in tokens."""

    name: str
    path: str
    context: int
    window: int
    lr: float
    adapter_lr: float
    batch_size: int
    dtype: str = "bfloat16"
    gradient_checkpointing: bool = True


@dataclass(frozen=True)
class DataConfig:
    """Where training text comes from. `path` is a file, folder or glob for `text` and `jsonl`, a hub id or folder else."""

    kind: str
    path: str | None = None
    extensions: tuple[str, ...] = (".py", ".txt", ".md")
    max_bad_lines: int = 20
    limit: int | None = None


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation at the end of training. `num_problems` a family; `rivals` at the budget that DMS was measured at."""

    num_problems: int = 64
    length: int = 512
    batch_size: int = 32
    rivals: tuple[str, ...] = ("streaming_llm", "tova", "h2o", "random")
    held_out_tokens: int = 16384


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a retrofit, and where it goes."""

    model: ModelConfig
    data: DataConfig
    eval: EvalConfig
    cr: float
    cr_family: tuple[float, ...]
    window: int
    steps: int
    seed: int
    method: str
    predictor: str
    granularity: str
    decided_by: str
    scale: float
    offset: float
    neuron_index: int
    neuron_zeroing_steps: int
    num_sinks: int
    tau: float
    trained: str
    count: str
    retention_weight: float
    kl_direction: str
    lr: float
    adapter_lr: float
    warmup_steps: int
    weight_decay: float
    betas: tuple[float, float]
    clip: float
    ramp: float
    batch_size: int
    accumulate: int
    context: int
    attention: str
    out: str | None = None
    tracking: str = "none"
    eval_after: bool = True
    resume: bool = True
    threads: int | None = None
    log_every: int = 10


# These change where a run goes or how it is watched, not what comes out of it.
_NOT_HASHED = {"out", "tracking", "eval_after", "resume", "threads", "log_every", "eval"}


def _build(schema: type, values: dict[str, Any], where: str) -> Any:
    """`schema` from plain values, lists made tuples; unknown keys are refused with the valid ones."""
    known = {f.name: f for f in dataclasses.fields(schema)}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"unknown key {where}{unknown[0]!r}; the valid keys are {', '.join(sorted(known))}")
    missing = sorted(
        name
        for name, f in known.items()
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    )
    if missing:
        raise ValueError(f"missing key {where}{missing[0]!r}")
    return schema(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def resolve(cfg: dict[str, Any]) -> TrainConfig:
    """A complete configuration from a composed one (a plain dict), nulls filled from the model; validated.

    Raises `ValueError` with one full sentence for the first thing that is wrong.
    """
    values = dict(cfg)
    model = _build(ModelConfig, values.pop("model"), "model.")
    data = _build(DataConfig, values.pop("data"), "data.")
    evaluation = _build(EvalConfig, values.pop("eval"), "eval.")
    if not isinstance(values.get("cr"), (int, float)) or values["cr"] < 1:
        raise ValueError(f"cr={values.get('cr')} is not a compression ratio; it is full / kept, so use 1 or more, e.g. 8")
    values["cr"] = float(values["cr"])
    if not 0 < values["ramp"] <= 1:
        raise ValueError(f"ramp={values['ramp']} is the share of steps over which cr rises; use above 0, at most 1")
    for name in ("window", "lr", "adapter_lr", "batch_size", "context"):
        if values.get(name) is None:
            values[name] = getattr(model, name)
    steps_per_cr = values.pop("steps_per_cr")
    if values.get("steps") is None:
        values["steps"] = max(1, round(steps_per_cr * (values["cr"] - 1) / values["ramp"]))
    family = sorted({float(c) for c in values["cr_family"] if 1 < c < values["cr"]} | {values["cr"]})
    values["cr_family"] = family
    config = _build(TrainConfig, values | {"model": model, "data": data, "eval": evaluation}, "")
    validate(config)
    return config


def validate(config: TrainConfig) -> None:
    """Raises `ValueError` for the first setting that cannot be run."""
    for name, choices in CHOICES.items():
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part)
        if value not in choices:
            raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(choices)}")
    for name in ("window", "steps", "batch_size", "accumulate", "context", "log_every"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} must be at least 1")
    if config.window > config.context:
        raise ValueError(
            f"window={config.window} is beyond the context of {config.context} tokens, so nothing would ever be evicted; "
            f"use a window below context / cr = {config.context / config.cr:.0f}"
        )
    if config.count == "live" and config.cr > 1 and config.context <= config.cr * config.window:
        raise ValueError(
            f"cr={config.cr:g} cannot be reached at context={config.context} with window={config.window}: it needs "
            f"T > cr * window, here {config.context} > {config.cr * config.window:g}; lower cr or window, or raise context"
        )
    if config.method == "streaming_llm" and config.trained != "all":
        raise ValueError("method=streaming_llm has no predictor to train; add trained=all")
    if config.predictor == "neuron" and config.trained != "all":
        raise ValueError("predictor=neuron has no parameters of its own; add trained=all")
    if config.data.kind in ("text", "jsonl") and not config.data.path:
        raise ValueError(f"data={config.data.kind} needs data.path=<file, folder or glob>")


def config_hash(config: TrainConfig) -> str:
    """12 hex digits over everything that decides the trained weights."""
    plain = dataclasses.asdict(config)
    kept = {key: value for key, value in plain.items() if key not in _NOT_HASHED}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def run_folder(config: TrainConfig) -> str:
    """The folder of a run: `out` if given, else derived from the configuration, so the same run finds its own files."""
    return config.out or f"runs/{config.model.name}-cr{config.cr:g}-w{config.window}-{config_hash(config)}"
