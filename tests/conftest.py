"""Small models and runs that the project makes itself."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():  # read when Triton is imported: its kernels then run on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")

from transformers import AutoConfig, AutoModelForCausalLM

from dms_lab.config import DataConfig, EvalConfig, ModelConfig, TrainConfig
from dms_lab.tiny.tokenizer import train_tokenizer


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """A random two-layer Qwen3 with a real BPE tokenizer, saved as a user would save it."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer(["def f(x):\n    return x + 1\n"] * 20)
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=3,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def make_config(complete_config, tmp_path):
    """A complete configuration of a run that takes a second, with a folder of the test's own."""
    return lambda **changes: complete_config(**({"out": str(tmp_path / "run")} | changes))


@pytest.fixture(scope="session")
def complete_config(base_folder):
    """A complete configuration of a run that takes a second."""

    def make(**changes):
        model = ModelConfig("random", str(base_folder), 96, 4, 1e-3, 1e-2, 2, "float32", False)
        values = {
            "model": model,
            "data": DataConfig("tiny"),
            "eval": EvalConfig(2, 96, 2, ("streaming_llm",), 256),
            "cr": 4.0,
            "cr_family": (2.0, 4.0),
            "window": 4,
            "steps": 6,
            "seed": 0,
            "method": "dms",
            "predictor": "adapter",
            "granularity": "head",
            "decided_by": "next",
            "scale": 100.0,
            "offset": 5.0,
            "neuron_index": -1,
            "neuron_zeroing_steps": 0,
            "num_sinks": 4,
            "tau": 0.1,
            "trained": "adapter",
            "lora_rank": 4,
            "lora_alpha": 8.0,
            "count": "live",
            "retention": "one_sided",
            "retention_weight": 1.0,
            "kl_direction": "forward",
            "lr": 1e-3,
            "adapter_lr": 1e-2,
            "warmup_steps": 0,
            "decay": 0.0,
            "average": 0.0,
            "weight_decay": 0.0,
            "betas": (0.9, 0.95),
            "clip": 1.0,
            "ramp": 0.8,
            "batch_size": 2,
            "accumulate": 1,
            "context": 96,
            "attention": "auto",
            "log_every": 2,
        }
        return TrainConfig(**(values | changes))

    return make


@pytest.fixture(scope="session")
def bubblewrap():
    """Skips, with the reason, where programs cannot be run in a sandbox, unless one is required."""
    from dms_lab.evaluation.sandbox import check_sandbox

    try:
        check_sandbox()
    except ValueError as error:
        if os.environ.get("DMS_LAB_REQUIRE_SANDBOX") == "1":
            raise
        pytest.skip(str(error))
