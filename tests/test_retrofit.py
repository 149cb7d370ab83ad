"""One retrofit serves every family of the structure, and leaves no trace when it is taken off."""

import math

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import dms_lab
from dms_lab.attachment import retrofit
from dms_lab.attention_function import PREDICTOR, Relaxation
from dms_lab.cache.masked import MaskedCache
from dms_lab.policies import FullPolicy
from dms_lab.policies.dms import DmsConfig

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
        if handle.config.predictor == "adapter":
            with torch.no_grad():
                predictor.weight.copy_(0.002 * torch.randn(predictor.weight.shape, generator=g))
        predictor.offset = 0.0
    for name, parameter in handle.model.named_parameters():
        if ".lora_B" in name:
            parameter.data.normal_(0.0, 0.1, generator=g)
    return handle


@torch.no_grad()
def last_logits(model, **kwargs):
    return model(**batch(), **kwargs).logits[batch()["attention_mask"].bool()]


WAYS = {"adapter": {}, "neuron": {"predictor": "neuron"}, "lora": {"lora_rank": 2}}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_switched_off_and_detached_models_equal_the_original_to_the_bit(family, way):
    model = build(family)
    before = last_logits(model)
    names = set(model.state_dict())
    handle = decide(retrofit(model, DmsConfig(window=3, **WAYS[way])))
    assert len(handle.predictors) == 2
    with handle.disabled():
        assert torch.equal(last_logits(model), before)
    assert not torch.equal(last_logits(model), before)
    handle.detach()
    assert torch.equal(last_logits(model), before)
    assert set(model.state_dict()) == names


@pytest.mark.parametrize(
    ("decided_by", "way"),
    [("self", "adapter"), ("next", "adapter"), ("delayed", "adapter"), ("next", "neuron"), ("next", "lora")],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_step_by_step_over_the_masked_cache_equals_one_forward(family, decided_by, way):
    model = build(family)
    handle = decide(retrofit(model, DmsConfig(window=3, decided_by=decided_by, **WAYS[way])))
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
        relaxation = Relaxation((0, 0, 0))
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


def as_queries(output):
    """[B, T, H, D] of what a query norm or projection gives; Gemma-3's norm has the heads before the tokens."""
    if output.ndim == 4 and output.shape[1] == 4:
        return output.transpose(1, 2)
    flat = output.reshape(*output.shape[:2], -1)
    return flat[..., :32].reshape(*flat.shape[:2], 4, 8)


def raw_queries(model):
    """Outputs of the modules that hold the queries before RoPE, [B, T, H, D] a layer, filled by the next forward."""
    found = []

    def note(module, args, output):
        found.append(as_queries(output))

    for layer in model.get_decoder().layers:
        attention = layer.self_attn
        source = getattr(attention, "q_norm", None) or getattr(attention, "q_proj", None) or attention.qkv_proj
        source.register_forward_hook(note)
    return found


@pytest.mark.parametrize("index", [0, -1])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_neuron_predictor_reads_its_element_and_attention_goes_without_it(family, index):
    """Against the original model, its queries zeroed by other means: before RoPE at their source, after RoPE on arrival."""
    model, twin = build(family), build(family)
    found = raw_queries(twin)  # registered first, so it sees the element before it is zeroed
    for layer in twin.get_decoder().layers:
        attention = layer.self_attn
        source = getattr(attention, "q_norm", None) or getattr(attention, "q_proj", None) or attention.qkv_proj

        def zero(module, args, output):
            output = output.clone()
            as_queries(output)[:, :, ::2, index] = 0.0  # a view: the first head of each group
            return output

        source.register_forward_hook(zero)
    original = twin.config._attn_implementation
    inner = ALL_ATTENTION_FUNCTIONS.get(original)

    def probe(module, query, *args, **kwargs):
        query = query.clone()
        query[:, ::2, :, index] = 0.0
        if inner is None:
            import sys

            return sys.modules[type(module).__module__].eager_attention_forward(module, query, *args, **kwargs)
        return inner(module, query, *args, **kwargs)

    AttentionInterface.register("zeroing_probe", probe)
    AttentionMaskInterface.register("zeroing_probe", ALL_MASK_ATTENTION_FUNCTIONS[original])
    twin.set_attn_implementation("zeroing_probe")
    positions = (batch()["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    expected = last_logits(twin, position_ids=positions)

    config = DmsConfig(window=TOKENS, predictor="neuron", neuron_index=index, scale=3.0, offset=0.5)
    handle = retrofit(model, config)  # nothing is old enough to go
    torch.testing.assert_close(last_logits(model, position_ids=positions), expected, rtol=1e-4, atol=1e-5)
    cache = MaskedCache(handle.policy())
    last_logits(model, position_ids=positions, past_key_values=cache)
    real = batch()["attention_mask"].bool()[:, None].expand(-1, 2, -1)
    for layer, query in zip(cache.layers, found, strict=True):
        wanted = 3.0 * query[:, :, ::2, index].transpose(1, 2) - 0.5
        torch.testing.assert_close(layer.state.evict_logit[real], wanted[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cleared_neuron_decides_to_keep_everything(family):
    handle = retrofit(build(family), DmsConfig(window=3, predictor="neuron"))
    with torch.no_grad():
        handle.model(**batch(), past_key_values=(before := MaskedCache(handle.policy())))
        handle.clear_neuron()
        handle.model(**batch(), past_key_values=(after := MaskedCache(handle.policy())))
    assert any((layer.state.evict_logit != -5).any() for layer in before.layers)
    assert all((layer.state.evict_logit == -5).all() for layer in after.layers)


def test_gemma3_s_queries_are_told_apart_where_there_are_as_many_tokens_as_heads():
    model = build("gemma3_text")
    handle = retrofit(model, DmsConfig(window=1, predictor="neuron", decided_by="self"))
    ids = batch(padded=False)["input_ids"][:, :5]
    with torch.no_grad():
        whole = model(input_ids=ids, past_key_values=(five := MaskedCache(handle.policy()))).logits
        four = model(input_ids=ids[:, :4], past_key_values=(cache := MaskedCache(handle.policy()))).logits
    torch.testing.assert_close(four, whole[:, :4])
    for long, short in zip(five.layers, cache.layers, strict=True):
        torch.testing.assert_close(short.state.evict_logit, long.state.evict_logit[..., :4], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt_oss"])  # plain; soft-cap and sliding window; sinks
def test_the_triton_kernels_train_a_model_as_the_exact_attention_does(family):
    pytest.importorskip("triton", reason="the package triton is not installed: pip install dms_lab[gpu]")
    document = torch.tensor([[0] * 12 + [1] * 8, [2] * 17 + [-1] * 3])
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: the kernels are not interpreted, and the model is on the CPU")
    found = {}
    for backend in ("chunked", "triton"):
        model = build(family)
        handle = decide(retrofit(model, DmsConfig(window=3)))
        hidden = model.get_decoder()(
            input_ids=batch()["input_ids"],
            attention_mask=torch.ones_like(document),
            use_cache=False,
            dms=handle.soft(Relaxation((0, 0, 0)), document, backend),
        ).last_hidden_state
        real = hidden[document >= 0]
        trained = [
            p for n, p in model.named_parameters() if PREDICTOR in n or "q_proj" in n or "v_proj" in n or "sinks" in n
        ]
        found[backend] = (real.detach(), *torch.autograd.grad((real * torch.linspace(-1, 1, real.shape[1])).sum(), trained))
    assert len(found["triton"]) >= 9
    for got, want in zip(found["triton"], found["chunked"], strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


def test_in_the_fading_stage_nothing_is_evicted_and_the_element_fades():
    model = build("llama")
    handle = decide(retrofit(model, DmsConfig(window=3, predictor="neuron")))
    ids = batch()["input_ids"]

    def hidden(plan):
        return model.get_decoder()(input_ids=ids, use_cache=False, dms=plan).last_hidden_state

    with torch.no_grad():
        whole = hidden(handle.off())
        kept = [hidden(handle.soft(Relaxation(None, keep, decides=False))) for keep in (1.0, 0.5, 0.0)]
        torch.testing.assert_close(kept[0], whole, rtol=1e-4, atol=1e-5)
        assert (kept[1] - whole).abs().max() > 1e-4
        assert (kept[2] - kept[1]).abs().max() > 1e-4
        deciding = hidden(handle.soft(Relaxation(None, 0.0)))
    assert (deciding - kept[2]).abs().max() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_and_predictors_get_gradients_and_the_base_none(family):
    model = build(family).requires_grad_(False)
    handle = decide(retrofit(model, DmsConfig(window=3, lora_rank=2)))
    handle.model.get_decoder()(
        input_ids=batch()["input_ids"], use_cache=False, dms=handle.soft(Relaxation((0, 0, 0)))
    ).last_hidden_state.square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained == {n for n, _ in model.named_parameters() if PREDICTOR in n or ".lora_" in n}


def test_the_package_offers_its_main_names():
    model = build("llama")
    handle = dms_lab.retrofit(model, dms_lab.DmsConfig(window=3))
    assert model.dms_retrofit is handle
    assert math.isfinite(last_logits(model, past_key_values=dms_lab.MaskedCache(handle.policy())).sum())
    with pytest.raises(AttributeError, match="it has retrofit"):
        dms_lab.attach  # noqa: B018


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


def test_a_flash_attention_model_is_refused_and_left_as_it_was():
    model = build("llama")
    model.config._attn_implementation = "flash_attention_2"  # as if it had been loaded with it
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2', which takes no decisions"):
        retrofit(model, DmsConfig())
    model.config._attn_implementation = "sdpa"
    before = last_logits(model)
    handle = retrofit(model, DmsConfig())
    handle.detach()
    assert torch.equal(last_logits(model), before)


def test_a_handle_that_was_taken_off_says_so():
    handle = retrofit(build("llama"), DmsConfig())
    handle.detach()
    for call in (handle.detach, handle.policy):
        with pytest.raises(ValueError, match="this attachment was taken off its model"):
            call()


def test_a_retrofit_that_fails_half_way_leaves_no_hook(monkeypatch):
    model = build("llama")
    before = last_logits(model)

    def fail(original):
        raise RuntimeError("no room")

    monkeypatch.setattr("dms_lab.attachment.register", fail)
    with pytest.raises(RuntimeError, match="no room"):
        retrofit(model, DmsConfig())
    assert torch.equal(last_logits(model), before)
    assert not any(PREDICTOR in name for name in model.state_dict())


@pytest.mark.parametrize("predictor", ["adapter", None])
def test_decoding_in_bfloat16_errs_as_little_as_the_original_model_does(predictor):
    """Against the same weights in float32; the original bfloat16 model is the yardstick."""
    model = build("llama").bfloat16()
    exact = build("llama").bfloat16().float()
    wanted = last_logits(exact)
    original = (last_logits(model).float() - wanted).abs().max()
    handle = retrofit(model, DmsConfig(window=TOKENS) if predictor else None)
    cache = MaskedCache(handle.policy() if predictor else FullPolicy())
    ids, mask = batch()["input_ids"], batch()["attention_mask"]
    parts = []
    with torch.no_grad():
        for i in range(TOKENS):
            out = model(input_ids=ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache)
            parts.append(out.logits)
    assert (torch.cat(parts, 1)[mask.bool()].float() - wanted).abs().max() < 2 * original + 1e-3


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
        with pytest.raises(ValueError, match="CompactCache"):
            model(input_ids=torch.tensor([[5], [6]]), past_key_values=cache)
