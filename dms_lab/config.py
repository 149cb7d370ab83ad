"""What a run is: schemas, validation and the hash that names a run. No heavy imports: `--help` stays quick.

    conf/*.yaml + command line -> Hydra -> resolve(cfg) -> TrainConfig (plain, frozen, complete) -> build and call

Nulls stand for "the model's default". Every error is raised here, before anything is loaded.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from dms_lab.typed_config import build, config_digest, deciding, typed

CHOICES = {
    "method": ("dms", "streaming_llm"),
    "predictor": ("adapter", "neuron"),
    "granularity": ("head", "layer"),
    "decided_by": ("self", "next", "delayed"),
    "trained": ("adapter", "lora", "all"),
    "count": ("live", "decisions"),
    "retention": ("one_sided", "two_sided"),
    "kl_direction": ("forward", "reverse"),
    "attention": ("auto", "reference", "chunked", "flex", "triton"),
    "precision": ("auto", "bf16-mixed", "32-true"),
    "tracking": ("none", "wandb"),
    "strategy": ("auto", "ddp", "fsdp"),
    "data.kind": ("tiny", "text", "jsonl", "openr1_math"),
    "model.dtype": ("float32", "bfloat16", "float16"),
}
RIVALS = ("streaming_llm", "tova", "h2o", "keydiff", "random", "quest")


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
    """Where training text comes from. `path` is a file, folder or glob for `text` and `jsonl`, a hub id or folder else.

    `decontaminate` names evaluation sets (`documents.evaluation_texts`) whose problems `openr1_math` is cleared of.
    """

    kind: str
    path: str | None = None
    extensions: tuple[str, ...] = (".py", ".txt", ".md")
    max_bad_lines: int = 20
    limit: int | None = None
    decontaminate: tuple[str, ...] = ()


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation at the end of training. `num_problems` a family; `rivals` at the budget that DMS was measured at.

    `workers` processes of one thread measure at a time; with a GPU, one.
    """

    num_problems: int = 64
    length: int = 512
    batch_size: int = 32
    rivals: tuple[str, ...] = RIVALS
    held_out_tokens: int = 16384
    workers: int = 1


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
    lora_rank: int
    lora_alpha: float
    count: str
    retention: str
    retention_weight: float
    kl_direction: str
    lr: float
    adapter_lr: float
    warmup_steps: int
    decay: float
    average: float
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
    sweep: str | None = None
    devices: int = 1
    num_nodes: int = 1
    strategy: str = "auto"
    compile: bool = False
    keep_attention: bool = True
    precision: str = "auto"


# These change where a run goes or how it is watched, not what comes out of it.
_NOT_HASHED = {"out", "tracking", "eval_after", "resume", "threads", "log_every", "eval", "sweep"}
_NOT_HASHED |= {"devices", "num_nodes", "strategy", "compile", "keep_attention"}
_HASHED_UNLESS = {"precision": "auto"}  # the same run as before there was a choice
_GROUPS = {"model": ModelConfig, "data": DataConfig, "eval": EvalConfig}


# -- keys ----------------------------------------------------------------------------------------------------------------
def valid_keys() -> tuple[str, ...]:
    """Every key of a training command line: top-level ones, then `group.key`."""
    top = {f.name for f in dataclasses.fields(TrainConfig)} | {"steps_per_cr", "experiment", "search", "cluster"}
    inner = (f"{g}.{f.name}" for g, schema in _GROUPS.items() for f in dataclasses.fields(schema))
    return (*sorted(top), *inner, *cluster_keys())


def cluster_keys() -> tuple[str, ...]:
    """What a command line may say of the jobs of a sweep, `cluster.partition` and the like."""
    from dms_lab.sweep_config import RESOURCE_KEYS

    return tuple(f"cluster.{name}" for name in RESOURCE_KEYS)


# -- from a composed configuration to a complete one -------------------------------------------------------------------
def resolve(cfg: dict[str, Any]) -> TrainConfig:
    """A complete configuration from a composed one (a plain dict), nulls filled from the model; validated.

    `steps=null` becomes `neuron_zeroing_steps + steps_per_cr * (cr - 1) / ramp`; members of `cr_family` above `cr` are
    dropped, `cr` is added. Raises `ValueError` with one full sentence for the first thing that is wrong.
    """
    values = {key: value for key, value in cfg.items() if key != "cluster"}  # where it runs, not what
    if values.get("model", {}).get("path") in (None, "???"):
        raise ValueError("model.path is not given; use model=hf model.path=<hub id or local folder>")
    if {"tasks", "width"} <= set(values["eval"]):
        raise ValueError(
            "eval=reasoning is for dms_lab.evaluate: leave it out here, and once the run is trained call python -m "
            "dms_lab.evaluate checkpoint=<a run's folder> eval=reasoning"
        )
    groups = {name: build(schema, values.pop(name), f"{name}.") for name, schema in _GROUPS.items()}
    for name in ("window", "lr", "adapter_lr", "batch_size", "context"):
        if values.get(name) is None:
            values[name] = getattr(groups["model"], name)
    cr, ramp = (typed(name, values.get(name), float) for name in ("cr", "ramp"))
    steps_per_cr = typed("steps_per_cr", values.pop("steps_per_cr"), float)
    if cr < 1:
        raise ValueError(f"cr={cr:g} is not a compression ratio; it is full / kept, so use 1 or more, e.g. 8")
    if not 0 < ramp <= 1:
        raise ValueError(f"ramp={ramp:g} is the share of steps over which cr rises; use above 0, at most 1")
    if steps_per_cr <= 0:
        raise ValueError(f"steps_per_cr={steps_per_cr:g} must be above 0; the paper takes 100, the reference 34")
    if values.get("steps") is None:
        zeroing = typed("neuron_zeroing_steps", values.get("neuron_zeroing_steps"), int)
        values["steps"] = max(1, zeroing + round(steps_per_cr * (cr - 1) / ramp))
    family = typed("cr_family", values["cr_family"], tuple[float, ...])
    if any(member < 1 for member in family):
        raise ValueError(f"cr_family={list(family)} holds a member below 1; each is a compression ratio, full / kept")
    if values.get("method") == "streaming_llm":  # its window is that of `cr`, whatever the schedule passes on the way
        family = ()
    values["cr_family"] = sorted({member for member in family if 1 < member < cr} | {cr})
    config = build(TrainConfig, values | groups, "")
    validate(config)
    return config


def validate(config: TrainConfig) -> None:
    """Raises `ValueError` for the first setting that cannot be run."""
    _check_choices(config)
    _check_ranges(config)
    _check_window(config)
    if config.method == "streaming_llm" and config.trained == "adapter":
        raise ValueError("method=streaming_llm has no predictor to train; add trained=all or trained=lora")
    if config.trained == "all" and config.model.dtype != "float32":
        raise ValueError(
            f"trained=all with model.dtype={config.model.dtype}: a step of lr={config.lr:g} on a weight of that precision "
            "is rounded away; add model.dtype=float32, or train less with trained=adapter or trained=lora"
        )
    if config.trained != "all" and config.precision == "bf16-mixed":
        raise ValueError(
            f"precision=bf16-mixed is for trained=all, whose weights are float32; with trained={config.trained} the frozen "
            "base computes in its own precision and what is trained in float32: leave precision out, add "
            "model.dtype=bfloat16"
        )
    if config.predictor == "neuron":
        _check_neuron(config)
    _check_processes(config)
    if config.data.kind in ("text", "jsonl") and not config.data.path:
        raise ValueError(f"data={config.data.kind} needs data.path=<file, folder or glob>")
    if config.data.decontaminate and config.data.kind != "openr1_math":
        raise ValueError(f"data.decontaminate is for data=openr1_math; data={config.data.kind} has no problems to compare")


def _at(config: TrainConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _check_choices(config: TrainConfig) -> None:
    for name, choices in CHOICES.items():
        if _at(config, name) not in choices:
            raise ValueError(f"{name}={_at(config, name)!r} is not known; choose one of {', '.join(choices)}")
    for name in config.eval.rivals:
        if name not in RIVALS:
            raise ValueError(f"eval.rivals holds {name!r}, which is not known; choose from {', '.join(RIVALS)}")


def _check_ranges(config: TrainConfig) -> None:
    for name in (
        *("window", "steps", "batch_size", "accumulate", "context", "log_every", "threads", "data.limit", "lora_rank"),
        *("devices", "num_nodes"),
        *("eval.num_problems", "eval.length", "eval.batch_size", "eval.workers"),
    ):
        value = _at(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    for name in ("seed", "num_sinks", "neuron_zeroing_steps", "warmup_steps", "weight_decay", "retention_weight"):
        if _at(config, name) < 0:
            raise ValueError(f"{name}={_at(config, name)} must not be negative")
    for name in ("tau", "scale", "lr", "adapter_lr", "clip", "lora_alpha"):
        if _at(config, name) <= 0:
            raise ValueError(f"{name}={_at(config, name)} must be above 0")
    if not 0 <= config.average < 1:
        raise ValueError(f"average={config.average:g} is the share of the old average kept in a step; use 0 to below 1")
    if not 0 <= config.decay <= 1:
        raise ValueError(f"decay={config.decay:g} is the share of steps over which the rates fall to 0; use 0 to 1")
    if not all(0 <= beta < 1 for beta in config.betas):
        raise ValueError(f"betas={list(config.betas)} must lie in [0, 1); the published recipes use [0.9, 0.95]")


def _check_window(config: TrainConfig) -> None:
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
    budget = round(config.context / config.cr)
    if config.method == "streaming_llm" and budget <= config.num_sinks:
        raise ValueError(
            f"num_sinks={config.num_sinks} leaves no window: cr={config.cr:g} keeps {budget} of {config.context} tokens; "
            "lower num_sinks or cr, or raise context"
        )


def _check_neuron(config: TrainConfig) -> None:
    if config.trained != "all":
        raise ValueError("predictor=neuron has no parameters of its own; add trained=all")
    if config.granularity != "head":
        raise ValueError("predictor=neuron decides per KV head; use granularity=head or predictor=adapter")
    if config.neuron_zeroing_steps >= config.steps:
        raise ValueError(
            f"neuron_zeroing_steps={config.neuron_zeroing_steps} leave nothing of steps={config.steps}: eviction is "
            "learned after the neuron has faded; raise steps or lower neuron_zeroing_steps"
        )


def num_processes(config: TrainConfig) -> int:
    """Processes that train one run together, each on a device."""
    return config.devices * config.num_nodes


def is_mixed(config: TrainConfig, on_gpu: bool) -> bool:
    """Whether products are computed in bfloat16 of weights in float32: by default where all are trained on a GPU."""
    return config.trained == "all" and (config.precision == "bf16-mixed" or (config.precision == "auto" and on_gpu))


def _check_processes(config: TrainConfig) -> None:
    size, given = num_processes(config), config.accumulate
    if given % size:
        divisors = ", ".join(str(n) for n in range(1, given + 1) if given % n == 0)
        raise ValueError(
            f"accumulate={given} cannot be shared by {size} processes (devices={config.devices}, "
            f"num_nodes={config.num_nodes}): it counts the micro-batches of a step over all of them; use a multiple of "
            f"{size}, such as {-(-given // size) * size}, or so many processes that it is one: {divisors}"
        )


# -- names -------------------------------------------------------------------------------------------------------------
def config_hash(config: TrainConfig | dict[str, Any]) -> str:
    """12 hex digits over everything that decides the trained weights, of a configuration or of its plain form."""
    plain = config if isinstance(config, dict) else dataclasses.asdict(config)
    return config_digest(deciding(plain, _NOT_HASHED, _HASHED_UNLESS))


def run_folder(config: TrainConfig) -> str:
    """The folder of a run: `out` if given, else derived from the configuration, so the same run finds its own files."""
    return config.out or f"runs/{config.model.name}-cr{config.cr:g}-w{config.window}-{config_hash(config)}"
