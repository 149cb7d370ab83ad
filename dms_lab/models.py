"""Base models by name: the embedded one, a local folder or a hub id, with its tokenizer."""

import os
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dms_lab.config import ModelConfig

EMBEDDED = Path(__file__).parent / "tiny" / "model"


def resolve_path(path: str) -> str:
    """What `from_pretrained` is given; raises `ValueError` if weights are absent and cannot be downloaded.

    ``embedded`` is the model in the package. A hub id must be in the local cache when the hub is offline.
    """
    if path == "embedded":
        return str(EMBEDDED)
    if Path(path).expanduser().is_dir():
        return str(Path(path).expanduser())
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(path, "config.json")
    except HFValidationError:
        cached = None
    if not isinstance(cached, str) and _offline():
        raise ValueError(
            f"no weights for model.path={path}: it is no local folder, and the cache {constants.HF_HUB_CACHE} has no copy "
            f"while the hub is offline. Run `hf download {path}` where there is a network, or give "
            "model=hf model.path=<folder>; model=tiny needs no weights"
        )
    return path


def _offline() -> bool:
    """Whether the hub cannot be reached: by its own switch, or because its name does not resolve."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}:
        return True
    import socket
    from urllib.parse import urlparse

    from huggingface_hub import constants

    try:
        socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        return True
    return False


def load_base(config: ModelConfig, device: str | None = None) -> PreTrainedModel:
    """The unchanged model in evaluation mode, in the configured dtype; `ValueError` if its files cannot be had."""
    try:
        model = AutoModelForCausalLM.from_pretrained(resolve_path(config.path), dtype=getattr(torch, config.dtype))
    except OSError as error:
        raise ValueError(f"model.path={config.path} cannot be loaded: {error}") from error
    if device is not None:
        model = model.to(device)
    return model.eval()


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model; `ValueError` if its files cannot be had (a gated repository, say)."""
    try:
        return AutoTokenizer.from_pretrained(resolve_path(config.path))
    except OSError as error:
        raise ValueError(f"model.path={config.path} has no tokenizer that can be loaded: {error}") from error


def default_device() -> str:
    """`cuda` where there is one, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"
