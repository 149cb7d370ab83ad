"""What a cache costs, against numbers worked out by hand."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dms_lab import economics, models
from dms_lab.economics import Accelerator, KVGeometry, ModelShape

QWEN3_8B = KVGeometry(num_layers=36, num_kv_heads=8, head_dim=128)
LLAMA32_1B = KVGeometry(num_layers=16, num_kv_heads=8, head_dim=64)
QWEN3_8B_SHAPE = ModelShape(num_layers=36, hidden=4096, mlp=12288, kv_width=1024, vocabulary=151936)
LLAMA32_1B_SHAPE = ModelShape(num_layers=16, hidden=2048, mlp=8192, kv_width=512, vocabulary=128256)
GIB = 2**30


def test_bytes_of_a_token():
    assert QWEN3_8B.bytes_per_token == 2 * 36 * 8 * 128 * 2 == 147_456  # 144 KiB
    assert LLAMA32_1B.bytes_per_token == 2 * 16 * 8 * 64 * 2 == 32_768  # 32 KiB
    assert KVGeometry(36, 8, 128, dtype_bytes=1).bytes_per_token == 73_728


def test_what_a_gigabyte_holds():
    assert economics.tokens_that_fit(GIB, LLAMA32_1B) == 32_768
    assert economics.tokens_that_fit(GIB, LLAMA32_1B, cr=8) == 262_144
    assert economics.tokens_that_fit(GIB, QWEN3_8B) == 7_281  # 1,073,741,824 / 147,456 = 7281.8
    assert economics.tokens_that_fit(GIB, QWEN3_8B, cr=8) == 58_254
    assert economics.chains_that_fit(GIB, LLAMA32_1B, 8192) == 4
    assert economics.chains_that_fit(GIB, LLAMA32_1B, 8192, cr=8) == 32
    assert economics.chains_that_fit(GIB, QWEN3_8B, 8192) == 0
    assert economics.chains_that_fit(GIB, QWEN3_8B, 8192, cr=8) == 7


@given(st.integers(1, 10**12), st.integers(1, 10**5), st.floats(1, 64))
def test_chains_that_fit_do_fit_and_one_more_would_not(memory_bytes, length, cr):
    number = economics.chains_that_fit(memory_bytes, QWEN3_8B, length, cr)
    each = length * QWEN3_8B.bytes_per_token / cr
    assert number * each <= memory_bytes * (1 + 1e-12)
    assert (number + 1) * each > memory_bytes * (1 - 1e-12)


def test_the_geometry_of_a_configuration():
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(models.EMBEDDED)
    geometry = KVGeometry.of(config, dtype_bytes=4)
    assert (geometry.num_layers, geometry.num_kv_heads) == (config.num_hidden_layers, config.num_key_value_heads)
    assert geometry.bytes_per_token == 8 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    old = SimpleNamespace(num_hidden_layers=2, num_attention_heads=4, hidden_size=64)  # every head its own keys
    assert KVGeometry.of(old) == KVGeometry(2, 4, 16)


def test_a_step_of_qwen3_8b_by_hand():
    """One sequence, 8,192 tokens: weights 2 * 36 * (150,994,944 + 33,554,432 + 8,388,608) + 1,244,659,712 bytes."""
    device = Accelerator(flops=1e15, bandwidth_bytes=3e12, memory_bytes=80e9)
    step = economics.decode_step(QWEN3_8B_SHAPE, device, batch=1, context=8192)
    weights = 2 * 36 * 192_937_984 + 1_244_659_712
    assert weights == 15_136_194_560
    assert step.kv_bytes == 4 * 36 * 8192 * 1024 == 8192 * QWEN3_8B.bytes_per_token == 1_207_959_552
    assert step.total_bytes == weights + 1_207_959_552
    assert step.flops == 36 * (301_989_888 + 67_108_864 + 16_777_216 + 134_217_728) + 1_244_659_712
    assert step.seconds == pytest.approx(16_344_154_112 / 3e12)  # 5.4 ms: memory, not arithmetic (20 us)
    assert step.kv_share == pytest.approx(1_207_959_552 / 16_344_154_112)


def test_a_step_of_llama_3_2_1b_by_hand():
    """256 sequences of 8,192 tokens at ratio 8."""
    device = Accelerator(flops=1e15, bandwidth_bytes=3e12, memory_bytes=80e9)
    step = economics.decode_step(LLAMA32_1B_SHAPE, device, batch=256, context=8192, cr=8)
    weights = 2 * 16 * (50_331_648 + 8_388_608 + 2_097_152) + 525_336_576
    assert step.kv_bytes == 256 * 1024 * LLAMA32_1B.bytes_per_token == 8_589_934_592
    assert step.total_bytes == weights + 8_589_934_592 == 11_061_428_224
    assert step.flops == 256 * (16 * (100_663_296 + 16_777_216 + 4_194_304 + 8_388_608) + 525_336_576)
    assert step.kv_share == pytest.approx(8_589_934_592 / 11_061_428_224)
    assert step.seconds == pytest.approx(11_061_428_224 / 3e12)


def test_with_enough_sequences_arithmetic_is_the_slower_part():
    device = Accelerator(flops=1e12, bandwidth_bytes=3e12, memory_bytes=80e9)
    step = economics.decode_step(LLAMA32_1B_SHAPE, device, batch=64, context=1024)
    assert step.seconds == pytest.approx(step.flops / 1e12)
    assert step.kv_share == pytest.approx(step.kv_bytes / 3e12 / step.seconds)
    assert step.kv_share < 1


def test_what_does_not_fit_into_the_device_is_marked():
    """Weights of 15.1 GB and 1.21 GB for each sequence of 8,192 tokens: 53 fit into 80 GB, at ratio 8 429."""
    for cr, most in ((1, 53), (8, 429)):
        steps = [economics.decode_step(QWEN3_8B_SHAPE, economics.H100_SXM, batch, 8192, cr) for batch in (most, most + 1)]
        assert [step.fits for step in steps] == [True, False]


@given(st.integers(1, 512), st.integers(1, 10**5), st.floats(1, 32))
def test_a_higher_ratio_never_costs_more_and_reads_its_part(batch, context, cr):
    full = economics.decode_step(QWEN3_8B_SHAPE, economics.H100_SXM, batch, context)
    step = economics.decode_step(QWEN3_8B_SHAPE, economics.H100_SXM, batch, context, cr)
    assert step.kv_bytes == pytest.approx(full.kv_bytes / cr)
    assert step.seconds <= full.seconds
    assert 0 < step.kv_share <= 1
    assert step.total_bytes - step.kv_bytes == pytest.approx(full.total_bytes - full.kv_bytes)


def test_what_a_retrofit_takes():
    cost = economics.retrofit_cost(8, steps_per_unit=100, batch_sequences=256, context=32768, hours_per_unit=270)
    assert (cost.steps, cost.tokens, cost.hours) == (700, 700 * 256 * 32768, 1890)
    assert economics.retrofit_cost(1, 100, 256, 32768, 270).hours == 0


def test_what_makes_no_sense_is_refused():
    for call in (
        lambda: economics.tokens_that_fit(GIB, QWEN3_8B, cr=0.5),
        lambda: economics.chains_that_fit(GIB, QWEN3_8B, 10, cr=float("nan")),
        lambda: economics.decode_step(QWEN3_8B_SHAPE, economics.H100_SXM, 1, 10, cr=0),
        lambda: economics.retrofit_cost(0.9, 100, 1, 1, 1),
    ):
        with pytest.raises(ValueError, match="must be at least 1: the ratio is full / kept"):
            call()
    with pytest.raises(ValueError, match="length=0 must be at least 1"):
        economics.chains_that_fit(GIB, QWEN3_8B, 0)
    for memory in (-1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"memory_bytes={memory} must be a number of bytes"):
            economics.chains_that_fit(memory, QWEN3_8B, 10)
    with pytest.raises(ValueError, match="batch=0 and context=5 must be at least 1"):
        economics.decode_step(QWEN3_8B_SHAPE, economics.H100_SXM, 0, 5)
