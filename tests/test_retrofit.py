"""One retrofit serves every family of the structure, and leaves no trace when it is taken off."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dms_lab.cache.masked import MaskedCache
from dms_lab.policies import FullPolicy
from dms_lab.policies.dms import DmsConfig
from dms_lab.retrofit import PREDICTOR, Relaxation, retrofit

COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_local_experts": 4}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": MOE,
    "mistral": {"sliding_window": None},
    "phi3": {},
    "olmo2": {},
    "smollm3": {},
    "gemma2": {"sliding_window": 6},
    "gemma3_text": {"sliding_window": 6},
    "gpt_oss": MOE | {"sliding_window": 6},
}
TOKENS = 20


def build(family, seed=0, **extra):
    settings = {k: v for k, v in COMMON.items() if not (family in ("phi3",) and k == "head_dim")}
    config = AutoConfig.for_model(family, **(settings | FAMILIES.get(family, {}) | extra))
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def batch(padded=True):
    ids = torch.randint(3, 97, (2, TOKENS), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


def decide(handle, seed=0):
    """Predictors that evict about half of the tokens."""
    g = torch.Generator().manual_seed(seed)
    for predictor in handle.predictors.values():
        with torch.no_grad():
            predictor.weight.copy_(0.002 * torch.randn(predictor.weight.shape, generator=g))
        predictor.offset = 0.0
    return handle


@torch.no_grad()
def last_logits(model, **kwargs):
    return model(**batch(), **kwargs).logits[batch()["attention_mask"].bool()]


@pytest.mark.parametrize("family", FAMILIES)
def test_switched_off_and_detached_models_equal_the_original_to_the_bit(family):
    model = build(family)
    before = last_logits(model)
    names = set(model.state_dict())
    handle = decide(retrofit(model, DmsConfig(window=3)))
    assert any(PREDICTOR in name for name in model.state_dict())
    with handle.disabled():
        assert torch.equal(last_logits(model), before)
    assert not torch.equal(last_logits(model), before)
    handle.detach()
    assert torch.equal(last_logits(model), before)
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("decided_by", ["self", "next", "delayed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_step_by_step_over_the_masked_cache_equals_one_forward(family, decided_by):
    model = build(family)
    handle = decide(retrofit(model, DmsConfig(window=3, decided_by=decided_by)))
    whole = model(**batch()).logits
    cache = MaskedCache(handle.policy())
    ids, mask = batch()["input_ids"], batch()["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = model(**batch(), position_ids=positions).logits
    parts = []
    for start, stop in ((0, 9), (9, 13), *((i, i + 1) for i in range(13, TOKENS))):
        out = model(
            input_ids=ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop],
            past_key_values=cache,
        )
        parts.append(out.logits)
    real = mask.bool()
    error = (torch.cat(parts, 1) - whole)[real].abs().max()
    assert error < 2e-5, error


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_cache_and_a_window_beyond_the_end_equal_the_original(family):
    model = build(family)
    mask = batch()["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    before = last_logits(model, position_ids=positions)
    handle = decide(retrofit(model, DmsConfig(window=TOKENS)))
    torch.testing.assert_close(last_logits(model, position_ids=positions), before, rtol=1e-4, atol=1e-5)
    full = last_logits(model, position_ids=positions, past_key_values=MaskedCache(FullPolicy()))
    torch.testing.assert_close(full, before, rtol=1e-4, atol=1e-5)
    handle.detach()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_predictor_through_checkpointing(family):
    grads = []
    for checkpointing in (False, True):
        model = build(family)
        handle = decide(retrofit(model, DmsConfig(window=3)))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
        relaxation = Relaxation((0, 0, 0, 0))
        document = torch.tensor([[0] * 12 + [1] * 8, [2] * 17 + [-1] * 3])
        hidden = model.get_decoder()(
            input_ids=batch()["input_ids"],
            attention_mask=torch.ones_like(document),
            use_cache=False,
            dms=handle.soft(relaxation, document),
        ).last_hidden_state
        loss = hidden.square().mean() + sum(p.mean() for p in relaxation.evict_probability.values())
        loss.backward()
        grads.append([p.weight.grad for p in handle.predictors.values()])
        assert len(relaxation.evict_probability) == 2
    for plain, checkpointed in zip(*grads, strict=True):
        assert plain.abs().sum() > 0
        torch.testing.assert_close(plain, checkpointed)


def test_two_retrofitted_models_do_not_disturb_each_other():
    one, two = build("qwen3"), build("llama", seed=1)
    decide(retrofit(one, DmsConfig(window=3)))
    alone = last_logits(one)
    decide(retrofit(two, DmsConfig(window=1, decided_by="self")))
    last_logits(two)
    assert torch.equal(last_logits(one), alone)


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        (
            "deepseek_v3",
            {"kv_lora_rank": 8, "q_lora_rank": 8, "n_routed_experts": 4, "first_k_dense_replace": 2},
            "latent",
        ),
        ("mamba2", {"num_heads": 8, "n_groups": 1, "state_size": 8, "expand": 2}, "softmax attention|state-space"),
    ],
)
def test_models_without_ordinary_keys_are_refused_with_the_reason(family, settings, reason):
    model = build(family, **settings)
    with pytest.raises(ValueError, match=reason):
        retrofit(model, DmsConfig())


def test_a_second_retrofit_and_a_foreign_cache_are_refused():
    from transformers import DynamicCache

    model = build("llama")
    retrofit(model, DmsConfig(window=3))
    with pytest.raises(ValueError, match="already retrofitted"):
        retrofit(model, DmsConfig(window=3))
    cache = DynamicCache()
    with torch.no_grad():
        model.dms_retrofit.enabled = False
        model(**batch(), past_key_values=cache)
        model.dms_retrofit.enabled = True
        with pytest.raises(ValueError, match="MaskedCache"):
            model(input_ids=torch.tensor([[5], [6]]), past_key_values=cache)
