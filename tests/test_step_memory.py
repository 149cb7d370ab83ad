"""The predicted peak of a training step against the bytes of tensors that are alive in the step itself.

Large models run on fake tensors, which have shapes and no memory. There attention is a stand-in that keeps what the GPU's
kernels keep: inputs, output, log-sum-exp. The embedded model is measured as it is.
"""

import dataclasses

import pytest
import torch
from live_bytes import LiveBytes
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoConfig, AutoModelForCausalLM

from dms_lab import attention_function, distillation
from dms_lab.attachment import retrofit
from dms_lab.attention.kept import once
from dms_lab.config import ModelConfig, is_mixed
from dms_lab.sweeping import step_memory
from dms_lab.sweeping.shapes import shape_of
from dms_lab.training import module, run
from dms_lab.training.module import Objective, Optimizer, RetrofitModule

QWEN = {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128}
LLAMA = {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
FAMILIES = {"Qwen/Qwen3-8B": ("qwen3", QWEN, False), "meta-llama/Llama-3.2-1B-Instruct": ("llama", LLAMA, True)}


class Kernel(torch.autograd.Function):
    """What a fused attention keeps and makes, and nothing of what it computes."""

    @staticmethod
    def forward(ctx, query, key, value, log_keep, kept):
        output, lse = once(
            kept,
            lambda: (
                torch.empty_like(query, memory_format=torch.contiguous_format),
                query.new_empty(query.shape[:3], dtype=torch.float32),
            ),
        )
        ctx.save_for_backward(query, key, value, log_keep, output, lse)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        *inputs, _, lse = ctx.saved_tensors
        delta = torch.empty_like(lse)  # noqa: F841
        found = (None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
        return *found, None


@pytest.fixture
def fake(monkeypatch):
    """Steps of models that have no weights: what they hold at most, beyond and with what is kept, in bytes."""

    def attend(query, key, value, log_keep, *_, kept=None, **__):
        wide = None if log_keep is None else log_keep.expand(key.shape[:3]).contiguous()
        return Kernel.apply(query, key, value, wide, kept)

    def copied(*_):
        raise AssertionError("a copy of a weak reference to a storage is one release too many: do not copy fake tensors")

    monkeypatch.setattr(StorageWeakRef, "__deepcopy__", copied, raising=False)
    monkeypatch.setattr(attention_function, "soft_attention", attend)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_, **__: self)  # fake parameters cannot be moved
    monkeypatch.setattr(module, "_real_tokens", lambda document: torch.empty(document.numel() - 1, dtype=torch.long))
    monkeypatch.setattr(RetrofitModule, "_target", lambda *_: 0.5)

    def peak(config, num_layers):
        family, sizes, tied = FAMILIES[config.model.path]
        sizes = sizes | {"num_hidden_layers": num_layers, "num_attention_heads": 32, "num_key_value_heads": 8}

        def build():
            shape = AutoConfig.for_model(family, tie_word_embeddings=tied, **sizes)
            return AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, config.model.dtype)).eval()

        with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
            # The teacher is built as well, not copied: a copy of a fake tensor copies its mode with the weak references to
            # storages in there, which are then released twice, and the interpreter ends in a crash somewhere later.
            model, teacher = build(), build() if config.trained == "all" else None
            handle = retrofit(model, run.policy_config(config))
            if config.model.gradient_checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            is_kept = config.model.gradient_checkpointing and config.keep_attention and config.attention == "triton"
            is_low = is_mixed(config, on_gpu=True)
            objective = Objective(8, 100, measure_every=10, keep_attention=is_kept, mixed=is_low)
            made = RetrofitModule(handle, teacher, config.trained, objective, Optimizer())
            return step_peak(made, config, live)

    return peak


def step_peak(made, config, live):
    """The peak of a step after the first, whose optimizer has made its moments."""
    made.on_fit_start()
    optimizer = made.configure_optimizers()["optimizer"]
    size = (config.batch_size, config.context)
    batch = {name: torch.zeros(size, dtype=torch.long) for name in ("ids", "document", "position_ids")}
    for step in range(2):
        for micro_batch in range(config.accumulate):
            live.peak = live.now
            made.loss(batch, step, micro_batch).backward()
        if step == 0:
            optimizer.step()
            optimizer.zero_grad()
    return live.peak


CASES = {
    "adapter": ("Qwen/Qwen3-8B", 1, 32768, "bfloat16", {"trained": "adapter"}),
    "attention kept": ("Qwen/Qwen3-8B", 1, 32768, "bfloat16", {"trained": "adapter", "attention": "triton"}),
    "lora": ("Qwen/Qwen3-8B", 1, 8192, "bfloat16", {"trained": "lora"}),
    "all": ("meta-llama/Llama-3.2-1B-Instruct", 4, 4096, "float32", {"trained": "all", "precision": "32-true"}),
    "mixed": ("meta-llama/Llama-3.2-1B-Instruct", 4, 4096, "float32", {"trained": "all"}),
    "mixed, attention kept": (
        *("Qwen/Qwen3-8B", 1, 16384, "float32"),
        {"trained": "all", "attention": "triton", "accumulate": 2},
    ),
    "all, two micro-batches": (
        *("meta-llama/Llama-3.2-1B-Instruct", 4, 4096, "float32"),
        {"trained": "all", "accumulate": 2, "precision": "32-true"},
    ),
    "1B adapter": ("meta-llama/Llama-3.2-1B-Instruct", 4, 4096, "bfloat16", {"trained": "adapter"}),
    "no checkpointing": ("meta-llama/Llama-3.2-1B-Instruct", 1, 4096, "bfloat16", {"trained": "adapter"}),
    "all of an untied model": ("Qwen/Qwen3-8B", 1, 8192, "float32", {"trained": "all", "precision": "32-true"}),
    "mixed, untied": ("Qwen/Qwen3-8B", 1, 8192, "float32", {"trained": "all"}),
    "mixed, no checkpointing": ("meta-llama/Llama-3.2-1B-Instruct", 1, 4096, "float32", {"trained": "all"}),
}


def case(make_config, name):
    path, batch_size, context, dtype, changes = CASES[name]
    model = ModelConfig("large", path, context, 256, 1e-5, 1e-4, batch_size, dtype, not name.endswith("no checkpointing"))
    return make_config(model=model, batch_size=batch_size, context=context, window=256, **changes)


FAST = ("adapter", "attention kept", "all", "mixed")


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES])
@pytest.mark.parametrize("num_layers", [2, pytest.param(None, marks=pytest.mark.slow)])
def test_the_predicted_peak_of_a_large_model_is_that_of_its_step(make_config, fake, name, num_layers):
    config = case(make_config, name)
    shape = shape_of(config.model)
    if num_layers is not None:
        fewer = shape.num_parameters - (shape.num_layers - num_layers) * shape.layer_parameters
        shape = dataclasses.replace(shape, num_parameters=fewer, num_layers=num_layers)
    found, predicted = fake(config, shape.num_layers), step_memory.step_memory(config, shape)
    assert predicted.peak == pytest.approx(found, rel=0.1)


def test_the_predicted_peak_of_the_embedded_model_is_that_of_its_step(make_config):
    changes = {"batch_size": 4, "context": 512, "window": 16, "trained": "all", "precision": "32-true", "log_every": 10}
    model = ModelConfig("tiny", "embedded", 512, 16, 1e-3, 1e-3, 4, "float32", False)
    config = make_config(model=model, **changes)
    with LiveBytes() as live:
        made, _ = run.build_module(config)
        assert step_memory.CHUNK_TOKENS == distillation.CHUNK_TOKENS == made.objective.chunk_tokens
        found = step_peak(made, config, live)
    predicted = step_memory.step_memory(config, shape_of(config.model)).peak
    assert predicted == pytest.approx(found, rel=0.1), f"{predicted / found - 1:+.1%}"
