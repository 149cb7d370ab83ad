"""A retrofit as a folder: `dms.json` says what it is, `dms.safetensors` holds what was trained.

    dms.json          schema version, policy, conventions, base model (id, config hash, weight fingerprint), provenance
    dms.safetensors   the predictors alone, or every weight when the base was trained too

A folder is written under a temporary name beside its place and renamed, so a reader sees all of it or none of it.
"""

import hashlib
import json
import os
import shutil
import uuid
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from dms_lab.attachment import Retrofit, retrofit
from dms_lab.attention_function import PREDICTOR
from dms_lab.policies.dms import DmsConfig
from dms_lab.sharding import gathered, is_first_process

SCHEMA_VERSION = 1
METADATA, WEIGHTS = "dms.json", "dms.safetensors"
TRAINED = ("adapter", "lora", "all")
CONVENTIONS = {
    "visibility": "query i sees key j iff j <= i and (not evict[j] or i - j < window)",
    "evict": "evict_logit > 0",
    "compression_ratio": "full / kept",
}
# What the shape of the base depends on; other entries of a config (dtype, cache settings, versions) may differ.
_SHAPE_KEYS = (
    "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "head_dim sliding_window layer_types rope_theta rope_parameters tie_word_embeddings"
).split()


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the reason."""


@dataclass(frozen=True)
class Metadata:
    """The content of `dms.json`."""

    policy: dict[str, Any]
    trained: str
    base_model: str
    base_config_hash: str
    base_fingerprint: str
    provenance: dict[str, Any] = field(default_factory=dict)
    conventions: dict[str, str] = field(default_factory=lambda: dict(CONVENTIONS))
    schema_version: int = SCHEMA_VERSION


def file_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a checkpoint, by name: what it is, wherever it lies."""
    hashes = {}
    for name in (METADATA, WEIGHTS):
        with (folder / name).open("rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def base_config_hash(model: PreTrainedModel) -> str:
    """12 hex digits over what decides the shapes of a base model."""
    config = model.config.get_text_config().to_dict()
    text = json.dumps({key: config.get(key) for key in _SHAPE_KEYS}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def fingerprint(model: PreTrainedModel) -> str:
    """12 hex digits over the first values of every base weight, rounded to bfloat16: equal in bfloat16 and float32.

    Of weights stored in bfloat16, float16 loses the smallest; another fingerprint is the consequence.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if PREDICTOR not in name:
            head = parameter.detach().flatten()[:64].to(torch.bfloat16).float().cpu()
            digest.update(name.encode() + head.numpy().tobytes())
    return digest.hexdigest()[:12]


def trained_parameters(model: PreTrainedModel, trained: str) -> dict[str, torch.nn.Parameter]:
    """The parameters that a recipe trains and a checkpoint holds, by name."""
    if trained not in TRAINED:
        raise ValueError(f"trained={trained!r} is not known; choose one of {', '.join(TRAINED)}")
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if trained == "all" or PREDICTOR in name or (trained == "lora" and ".lora_" in name)
    }


def save_checkpoint(
    folder: Path, handle: Retrofit, trained: str, base_model: str, base_fingerprint: str, provenance: dict[str, Any]
) -> Path:
    """Writes a checkpoint folder, replacing an older one of the same name; returns the folder.

    `base_fingerprint` is that of the weights before training. Of several processes that train together all call this, and
    the first writes. Raises `OSError` if the disk refuses; the old folder is then still there.
    """
    folder = Path(folder)
    model = handle.model
    tensors = gathered(trained_parameters(model, trained))
    if not is_first_process():
        return folder
    metadata = Metadata(
        policy=asdict(handle.config),
        trained=trained,
        base_model=str(base_model),
        base_config_hash=base_config_hash(model),
        base_fingerprint=base_fingerprint,
        provenance=provenance,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp"
    temporary.mkdir()
    try:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / WEIGHTS, metadata={"format": "pt"}
        )
        text = json.dumps(asdict(metadata), indent=2, sort_keys=True, default=str) + "\n"
        (temporary / METADATA).write_text(text)
        _replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _replace(temporary: Path, folder: Path) -> None:
    """Puts `temporary` in the place of `folder`; directories cannot be swapped in one call, so the old one steps aside."""
    old = None
    if folder.exists():
        old = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.old"
        os.rename(folder, old)
    try:
        os.rename(temporary, folder)
    except OSError:
        if old is not None:
            os.rename(old, folder)
        raise
    if old is not None:
        shutil.rmtree(old)


def read_metadata(folder: Path) -> Metadata:
    """The metadata of a checkpoint folder; raises `CheckpointError` for a missing, foreign or unreadable one."""
    path = Path(folder) / METADATA
    if not path.is_file():
        members = sorted(str(place.parent) for place in Path(folder).glob(f"checkpoints/*/{METADATA}"))
        hint = f"; this run has {', '.join(members)}" if members else ""
        raise CheckpointError(f"no {METADATA} in {folder}: a checkpoint is a folder with {METADATA} and {WEIGHTS}{hint}")
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); the checkpoint is damaged, copy it again") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise CheckpointError(f"{path} has schema version {version!r}; this version of dms_lab reads {SCHEMA_VERSION}")
    known = {f.name for f in fields(Metadata)}
    if set(content) != known:
        raise CheckpointError(
            f"{path} has missing or unknown entries: {', '.join(sorted(set(content) ^ known))}; it is damaged or foreign"
        )
    return Metadata(**content)


def load_checkpoint(folder: Path, model: PreTrainedModel) -> Retrofit:
    """Retrofits `model`, the base of the checkpoint, in place and returns the handle.

    Raises `CheckpointError` if the folder is not a checkpoint, was made for another base, or holds other tensors than
    its metadata promises. The model is left as it was in that case.
    """
    folder = Path(folder)
    metadata = read_metadata(folder)
    _check_base(folder, metadata, model)
    tensors = _read_tensors(folder)
    handle = retrofit(model, DmsConfig(**metadata.policy))
    wanted = trained_parameters(model, metadata.trained)
    wrong = set(tensors) ^ set(wanted) or {n for n, t in tensors.items() if t.shape != wanted[n].shape}
    if wrong:
        handle.detach()
        raise CheckpointError(
            f"{folder / WEIGHTS} does not fit its metadata: {len(wrong)} tensors missing, unknown or of another shape, "
            f"for example {min(wrong)}"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            wanted[name].copy_(tensor)
    return handle


def _check_base(folder: Path, metadata: Metadata, model: PreTrainedModel) -> None:
    found = base_config_hash(model)
    if found != metadata.base_config_hash:
        raise CheckpointError(
            f"{folder} was made for {metadata.base_model} (config hash {metadata.base_config_hash}), but this model has "
            f"config hash {found}: load {metadata.base_model} instead"
        )
    if metadata.trained != "all" and (found := fingerprint(model)) != metadata.base_fingerprint:
        raise CheckpointError(
            f"{folder} holds predictors for the weights of {metadata.base_model} (fingerprint "
            f"{metadata.base_fingerprint}); this model has the same shape but other weights (fingerprint {found}), or was "
            "loaded in float16: use the same weights in float32 or bfloat16"
        )


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        pickles = [p.name for p in folder.iterdir() if p.suffix in {".pt", ".bin", ".pth", ".pkl", ".ckpt"}]
        hint = f"; {', '.join(pickles)} is a pickle, which is never loaded" if pickles else ""
        raise CheckpointError(f"no {WEIGHTS} in {folder}{hint}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file ({error}); copy it again") from error
