"""A model with what a cache policy needs attached, as an evaluation takes it."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dms_lab import models
from dms_lab.attachment import Retrofit, retrofit
from dms_lab.cache.policy import Policy
from dms_lab.checkpoint import file_hashes, fingerprint, load_checkpoint, read_metadata
from dms_lab.config import ModelConfig
from dms_lab.evaluation.report import base_of
from dms_lab.generation_config import check_subject
from dms_lab.policies import HEURISTICS, FullPolicy
from dms_lab.structure import num_kv_heads


@dataclass(frozen=True)
class Attached:
    """A model with what a policy needs attached. `identity` is what of it decides the tokens."""

    handle: Retrofit
    make_policy: Callable[[], Policy]
    tokenizer: PreTrainedTokenizerBase
    identity: dict[str, Any]

    @property
    def num_heads(self) -> int:
        """KV heads of all layers."""
        return sum(num_kv_heads(attention) for attention in self.handle.attentions)

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> "Attached":
        """A retrofitted model as it is in memory, under the policy that it was retrofitted with."""
        handle = getattr(model, "dms_retrofit", None)
        if handle is None or handle.config is None:
            raise ValueError("this model has no policy of its own; call dms_lab.retrofit(model, config) or load_checkpoint")
        digest = hashlib.sha256()
        for _, predictor in sorted(handle.predictors.items()):
            for parameter in predictor.parameters():
                digest.update(parameter.detach().float().cpu().numpy().tobytes())
        identity = {"weights": fingerprint(model), "predictors": digest.hexdigest(), "policy": asdict(handle.config)}
        return cls(handle, handle.policy, tokenizer, identity | {"dtype": str(model.dtype)})


def attach(
    pretrained: str | None,
    checkpoint: str | None,
    policy: str | None,
    budget: int | None,
    dtype: str | None = None,
    device: str | None = None,
) -> Attached:
    """A checkpoint on its base, or a model as it is under a policy; `ValueError` for what does not go together."""
    check_subject(pretrained, checkpoint, policy, budget)
    if checkpoint is not None and pretrained is not None:
        raise ValueError(
            f"pretrained={pretrained} and checkpoint={checkpoint}: give one of them; a checkpoint names its base"
        )
    config = ModelConfig(pretrained, pretrained, 0, 0, 0.0, 0.0, 1) if pretrained else base_of(Path(checkpoint))
    config = config if dtype is None else replace(config, dtype=dtype)
    tokenizer = models.load_tokenizer(config)
    if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
        device = models.default_device()  # lm-eval's command says cuda:0 where nobody asked for it
    model = models.load_base(config, device)
    if checkpoint is not None:
        handle = load_checkpoint(Path(checkpoint), model)
        return Attached(handle, handle.policy, tokenizer, identity_of(handle, Path(checkpoint)))
    make_policy = FullPolicy if policy == "full" else partial(HEURISTICS[policy], budget)
    handle = retrofit(model, None)
    return Attached(handle, make_policy, tokenizer, identity_of(handle, None, policy, budget))


def identity_of(
    handle: Retrofit, checkpoint: Path | None, policy: str | None = None, budget: int | None = None
) -> dict[str, Any]:
    """What of a model under a policy decides the tokens: its weights, their dtype, the checkpoint's bytes, the rule.

    Not its name: the same weights by another path are the same model, and other weights at the same path are another.
    """
    files = {} if checkpoint is None else file_hashes(checkpoint)
    weights = {"weights": fingerprint(handle.model), "dtype": str(handle.model.dtype)}
    is_dialled = checkpoint is not None and handle.config.offset != read_metadata(checkpoint).policy["offset"]
    offset = {"offset": handle.config.offset} if is_dialled else {}
    return weights | {"policy": policy, "budget": budget} | files | offset
