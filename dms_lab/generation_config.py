"""What a run of `dms_lab.generate` is: its schema and validation. No heavy imports, as in `config`."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from dms_lab.config import RIVALS, ModelConfig
from dms_lab.typed_config import build

POLICIES = ("full", *RIVALS)


@dataclass(frozen=True)
class GenerateConfig:
    """A run of `dms_lab.generate`: what answers, what is asked, how tokens are chosen, what memory there is."""

    model: ModelConfig | None
    checkpoint: str | None
    policy: str | None
    budget: int | None
    cr: float | None
    calibrate: str | None
    prompt: str | None
    prompts: str | None
    out: str | None
    chat: bool
    chains: int
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...]
    stop_after: str | None
    seed: int
    places: int
    num_pages: int | None
    page_size: int | None
    storage: str
    prefill_chunk: int
    reserve: float
    deterministic: bool
    attention: str
    step: str
    threads: int | None


def generate_keys() -> tuple[str, ...]:
    """Every key of a command line of `dms_lab.generate`."""
    own = sorted(f.name for f in dataclasses.fields(GenerateConfig))
    return (*own, *(f"model.{f.name}" for f in dataclasses.fields(ModelConfig)))


def base_config(model: dict[str, Any] | None) -> ModelConfig | None:
    """A composed model group as a configuration; None without one."""
    if model is not None and model.get("path") in (None, "???"):
        raise ValueError("model.path is not given; use model=hf model.path=<hub id or local folder>")
    return None if model is None else build(ModelConfig, model, "model.")


def check_subject(model: object, checkpoint: str | None, policy: str | None, budget: int | None) -> None:
    """Raises `ValueError` unless a checkpoint is given, or a model with a policy and the budget that it needs."""
    if checkpoint is None and (model is None or policy is None):
        raise ValueError(
            "give checkpoint=<folder of a checkpoint>, or model=<name> policy=<rule> for a model as it is, "
            f"with a policy of {', '.join(POLICIES)}"
        )
    if policy is not None and policy not in POLICIES:
        raise ValueError(f"policy={policy!r} is not known; choose one of {', '.join(POLICIES)}")
    if checkpoint is not None and policy is not None:
        raise ValueError(f"policy={policy} is for a model without a checkpoint; leave one of the two out")
    if policy in RIVALS and budget is None:
        raise ValueError(f"policy={policy} needs budget=<live tokens per KV head>")
    if policy not in RIVALS and budget is not None:
        raise ValueError(f"budget={budget} is for {', '.join(RIVALS)}; nothing else has one")


def resolve_generate(cfg: dict[str, Any]) -> GenerateConfig:
    """A complete configuration of a generation from a composed one; `ValueError` for the first thing that is wrong."""
    values = {key: value for key, value in cfg.items() if key != "data"}
    config = build(GenerateConfig, values | {"model": base_config(values.pop("model", None))}, "")
    check_subject(config.model, config.checkpoint, config.policy, config.budget)
    if config.cr is not None and config.checkpoint is None:
        raise ValueError(f"cr={config.cr:g} moves the threshold of a checkpoint's decisions; give checkpoint=<its folder>")
    if config.calibrate is not None and config.cr is None:
        raise ValueError(f"calibrate={config.calibrate} is the text that cr= is reached on; add cr=<ratio>")
    if (config.prompt is None) == (config.prompts is None):
        raise ValueError('give either prompt="a text" or prompts=<a JSONL file>')
    if (config.prompts is None) != (config.out is None):
        raise ValueError("prompts=<a JSONL file> needs out=<a JSONL file> for the answers, and out= is for nothing else")
    for name in ("chains", "threads"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    return config
