"""The dense reference and the training path reproduce cases made by a separate, slow statement of the method."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dms_lab import eviction
from dms_lab.attention import reference
from dms_lab.attention.soft import soft_attention

CASES = np.load(Path(__file__).parent / "data" / "attention_cases.npz", allow_pickle=False)
NAMES = sorted({name.split("/")[0] for name in CASES.files})


def load(case: str) -> dict:
    found = {k.split("/")[1]: CASES[k] for k in CASES.files if k.startswith(case + "/")}
    return {k: torch.from_numpy(v) if v.ndim else v.item() for k, v in found.items()}


def test_there_are_cases_of_every_deciding_token():
    assert {load(name)["decided_by"] for name in NAMES} == set(eviction.DECIDED_BY)


@pytest.mark.parametrize("name", NAMES)
def test_hard_decisions_give_the_golden_output(name):
    case = load(name)
    logits = eviction.govern(case["evict_logit"], case["decided_by"], case["window"], case["document"], -math.inf)
    seen = eviction.visible(logits > 0, case["window"], key_document=case["document"])
    output, _ = reference.attend(case["q"], case["k"], case["v"], seen, case["q"].shape[-1] ** -0.5)
    torch.testing.assert_close(output, case["hard_output"], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("name", NAMES)
def test_relaxed_decisions_give_the_golden_output_and_gradient(name, backend, monkeypatch):
    monkeypatch.setattr("dms_lab.attention.soft._CHUNK", 4)
    case = load(name)
    logit = case["evict_logit"].clone().requires_grad_()
    noisy = eviction.govern(logit + case["noise"], case["decided_by"], case["window"], case["document"], -math.inf)
    keep = eviction.log_keep(noisy, torch.zeros((), dtype=noisy.dtype), case["tau"])
    output = soft_attention(
        case["q"],
        case["k"],
        case["v"],
        keep,
        case["window"],
        case["document"],
        case["q"].shape[-1] ** -0.5,
        backend=backend,
    )
    torch.testing.assert_close(output, case["soft_output"], rtol=1e-9, atol=1e-9)
    (output * case["cotangent"]).sum().backward()
    torch.testing.assert_close(logit.grad, case["evict_logit_grad"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_triton_kernels_give_the_golden_output_and_gradient_in_float32(name):
    pytest.importorskip("triton", reason="the package triton is not installed: pip install dms_lab[gpu]")
    from dms_lab.attention.kernels.relaxed import INTERPRETED

    case = load(name)
    if not INTERPRETED:
        case = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in case.items()}
    logit = case["evict_logit"].clone().requires_grad_()
    noisy = eviction.govern(logit + case["noise"], case["decided_by"], case["window"], case["document"], -math.inf)
    keep = eviction.log_keep(noisy, torch.zeros((), dtype=noisy.dtype, device=noisy.device), case["tau"])
    q, k, v = (case[x].float() for x in "qkv")
    scaling = q.shape[-1] ** -0.5
    output = soft_attention(q, k, v, keep, case["window"], case["document"], scaling, backend="triton")
    torch.testing.assert_close(output.double(), case["soft_output"], rtol=1e-5, atol=1e-6)
    (output * case["cotangent"]).sum().backward()
    torch.testing.assert_close(logit.grad, case["evict_logit_grad"], rtol=1e-3, atol=1e-5)
