"""Decoding over slots in pages by the Triton kernels equals the dense reference, through the interpreter or on a GPU."""

import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_retrofit import build, decide

from dms_lab.attachment import retrofit
from dms_lab.attention import flashinfer_paged, paged, reference
from dms_lab.cache.compact import CompactCache
from dms_lab.cache.pages import PagePool, PoolExhausted
from dms_lab.cache.policy import Scores
from dms_lab.cache.slots import SlotTable
from dms_lab.policies import FullPolicy, KeyDiffPolicy, QuestPolicy, TovaPolicy
from dms_lab.policies.dms import DmsConfig

pytest.importorskip("triton", reason="the package triton is not installed: pip install dms_lab[gpu]")

from kernel_bounds import within_bounds  # noqa: F401  every test of this file has it
from paged_cases import DEVICE, errs_like, fill, held, normal, state

from dms_lab.attention.kernels import device
from dms_lab.attention.kernels import paged as kernels

SINKS = Scores(0.3, softcap=2.0, sinks=normal(6, seed=9))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Parts of at least 64 slots, so that few slots are cut."""
    monkeypatch.setattr(kernels, "LEAST_PART", 64)


def exact(query, slots, scores):
    """The dense reference in float64 on what the slots hold."""
    key, value, used = held(slots)
    sinks = None if scores.sinks is None else scores.sinks.double()
    return reference.attend(query.double(), key, value, used[:, :, None], scores.scaling, scores.softcap, sinks)[0]


def check(query, slots, scores, atol=2e-6):
    found, weights = paged.decode(query, slots, scores)
    assert weights is None
    assert found.dtype == query.dtype
    torch.testing.assert_close(found.double(), exact(query, slots, scores), rtol=2e-6, atol=atol)


@pytest.mark.parametrize("storage", ["model", "fp8", "int8"])
@pytest.mark.parametrize(
    ("lengths", "widths", "group", "page_size", "scores"),
    [
        ([[1]], (16, 16), 1, 4, Scores(0.25)),
        ([[0, 7], [8, 9]], (16, 16), 3, 4, Scores(0.25)),
        ([[64, 65]], (64, 64), 7, 32, Scores(0.125)),
        ([[130, 0], [1, 63]], (24, 80), 3, 16, SINKS),
        ([[70]], (96, 16), 2, 5, Scores(0.1, softcap=1.5)),
    ],
)
def test_ragged_heads_equal_the_reference(lengths, widths, group, page_size, scores, storage):
    slots = fill(lengths, widths, page_size, storage)
    query = normal(len(lengths), group * len(lengths[0]), 1, widths[0], seed=5)
    check(query, slots, scores)


@pytest.mark.parametrize("widths", [(256, 256), (128, 80)])
def test_wide_heads_equal_the_reference(widths):
    check(normal(1, 2, 1, widths[0], seed=5), fill([[40, 33]], widths, 16), Scores(0.06))


@settings(deadline=None, max_examples=15, derandomize=True)
@given(st.data())
def test_any_lengths_pages_and_rules_equal_the_reference(data):
    num_heads = data.draw(st.integers(1, 3))
    lengths = data.draw(
        st.lists(st.lists(st.integers(0, 90), min_size=num_heads, max_size=num_heads), min_size=1, max_size=2)
    )
    page_size, group = data.draw(st.sampled_from([1, 2, 4, 32])), data.draw(st.integers(1, 4))
    scores = Scores(
        0.5,
        data.draw(st.sampled_from([None, 3.0])),
        data.draw(st.sampled_from([None, normal(num_heads * group, seed=2)])),
    )
    slots = fill(lengths, (8, 8), page_size, data.draw(st.sampled_from(["model", "fp8", "int8"])), spare=1)
    check(normal(len(lengths), num_heads * group, 1, 8, seed=4), slots, scores)


def test_a_head_of_more_than_the_most_parts_gets_longer_ones(monkeypatch):
    monkeypatch.setattr(kernels, "MAX_PARTS", 4)
    check(normal(1, 2, 1, 16), fill([[4 * 64 + 1, 30]], page_size=32), Scores(0.25))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("storage", ["model", "fp8", "int8"])
def test_low_precision_errs_at_most_twice_as_much_as_plain(storage, dtype):
    slots = fill([[150, 70], [33, 9]], (32, 32), 16, storage, dtype)
    query = normal(2, 6, 1, 32, seed=5).to(dtype)
    key, value, used = held(slots)
    plain, _ = reference.attend(query, key.to(dtype), value.to(dtype), used[:, :, None], 0.2)
    found, _ = paged.decode(query, slots, Scores(0.2))
    assert found.dtype == dtype
    assert errs_like(found, plain, exact(query, slots, Scores(0.2)))


def test_no_bit_of_a_row_depends_on_the_rows_beside_it():
    query = normal(2, 4, 1, 16).bfloat16()
    slots = fill([[150, 70], [400, 1]], page_size=16, dtype=torch.bfloat16)
    together, _ = paged.decode(query, slots, Scores(0.3))
    alone, _ = paged.decode(query[:1], replace(slots, table=slots.table[:1, :, :10], length=slots.length[:1]), Scores(0.3))
    assert torch.equal(together[:1], alone)


def test_queries_and_tables_as_a_model_gives_them_change_nothing():
    slots = fill([[21, 5], [0, 9]])
    query = normal(2, 1, 4, 16)  # [B, 1, H, D], transposed
    wide = slots.table.repeat_interleave(2, 2)[:, :, ::2]
    found, _ = paged.decode(query.transpose(1, 2), replace(slots, table=wide), Scores(0.3))
    wanted, _ = paged.decode(query.transpose(1, 2).contiguous(), slots, Scores(0.3))
    assert torch.equal(found, wanted)


def test_values_that_are_no_numbers_reach_the_output_of_their_head_alone():
    slots = fill([[90, 90]], page_size=16)
    slots.pool.value.data[slots.table[0, 0, 4], 3] = torch.nan
    found, _ = paged.decode(normal(1, 2, 1, 16), slots, Scores(0.3))
    assert found[0, 0].isnan().all()
    assert not found[0, 1].isnan().any()


def test_weights_come_from_the_reference():
    slots = replace(fill([[5, 8]]), backend="torch")
    query = normal(1, 2, 1, 16)
    _, wanted = paged.decode(query, slots, Scores(0.3), want_weights=True)
    _, found = paged.decode(query, replace(slots, backend="triton"), Scores(0.3), want_weights=True)
    assert torch.equal(found, wanted)


# -- appending ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("window", "shift", "page_size", "places", "rows", "is_padded", "storage"),
    [
        (None, 0, 2, 2, [None], False, "model"),
        (2, 0, 2, 2, [None], True, "model"),
        (2, 1, 2, 3, [None, [1, 0], [2]], True, "model"),
        (1, 1, 4, 2, [None, [1]], False, "model"),
        (3, 3, 1, 2, [None], False, "model"),
        (None, 0, 4, 2, [None], True, "fp8"),
        (2, 1, 3, 2, [None], False, "fp8"),
        (None, 0, 4, 2, [None], False, "int8"),
        (2, 1, 3, 2, [slice(2)], True, "int8"),
    ],
)
@pytest.mark.parametrize("sliding", [None, 2, 4])
def test_a_token_appended_at_once_is_where_torch_would_have_put_it(
    window, shift, page_size, places, rows, is_padded, storage, sliding
):
    tables, num_kv_heads = [], 3
    for _ in range(2):
        pool = PagePool(8, 24, torch.float32, DEVICE, page_size, num_pages=60, storage=storage)
        for store in (pool.key, pool.value):
            store.data.copy_(torch.full_like(store.data, 9))  # what the last holder of a page may have left there
            if store.scale is not None:
                store.scale.fill_(9.0)
        tables.append(SlotTable(pool, places, num_kv_heads, window, shift, sliding))
    plain, fused = tables
    for step in range(6 if sliding is None else 10):
        g, mine = torch.Generator().manual_seed(step), rows[step % len(rows)]
        batch = places if mine is None or isinstance(mine, slice) else len(mine)
        key, value = (1.5**step * normal(batch, 1, num_kv_heads, n, seed=step).transpose(1, 2) for n in (8, 24))
        flag = None if plain.window is None else (torch.rand(batch, num_kv_heads, generator=g) < 0.7).to(DEVICE)
        real = torch.tensor([step % 3 > 0] + [True] * (batch - 1), device=DEVICE) if is_padded else None
        for table in tables:
            table.rows = torch.tensor(mine, device=DEVICE) if isinstance(mine, list) else mine
        position = plain.get("seen")[:, None].expand(-1, num_kv_heads).flatten()
        address = plain.append_one(flag, real)
        if real is not None:
            key, value = (x.masked_fill(~real[:, None, None, None], 0.0) for x in (key, value))
        plain.pool.write(address.flatten(), key.flatten(0, 2), value.flatten(0, 2), position, one_a_page=True)
        assert fused.claim_one()
        kernels.append(fused, flag, real, key, value)
    found, wanted = state(fused), state(plain)
    if sliding is not None:  # pages come back before others are taken, or after it
        found[-1], wanted[-1] = (x[-1].unique().numel() * torch.ones(1) for x in (found, wanted))
    for got, want in zip(found, wanted, strict=True):
        # A GPU divides scales by multiplying with the inverse, so that a number may round otherwise there.
        slack = {} if storage == "model" or DEVICE.type == "cpu" else {"rtol": 1e-6, "atol": 1}
        torch.testing.assert_close(got, want, **({"rtol": 0, "atol": 0} | slack))
    assert fused.pool.count_free() == plain.pool.count_free()


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("storage", ["fp8", "int8"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_quantised_key_that_is_no_number_spoils_its_own_page_for_good(storage, bad):
    table = SlotTable(PagePool(8, 8, torch.float32, DEVICE, 4, num_pages=4, storage=storage), 1, 2, None, 0)
    for step in range(3):
        key = normal(1, 2, 1, 8, seed=step)
        if step == 1:
            key[0, 1, 0, 3] = bad
        assert table.claim_one()
        kernels.append(table, None, None, key, normal(1, 2, 1, 8))
    found = table.pool.key.read(table.address(torch.arange(3, device=DEVICE).expand(1, 2, -1))[0])
    assert found[0].isfinite().all()
    assert not found[1].isfinite().any()


def test_a_pool_without_the_pages_is_left_to_what_grows_it_or_says_so():
    pool = PagePool(16, 16, torch.float32, DEVICE, page_size=4, num_pages=3)
    table = SlotTable(pool, 2, 2, None, 0)
    assert not table.claim_one()
    assert pool.count_free() == 3
    key = torch.zeros(1, 1, 1, 16, device=DEVICE)
    for num_pages, length in ((None, 9), (2, 8)):
        cache = CompactCache(FullPolicy(), page_size=4, num_pages=num_pages, attention="triton")
        for step in range(9):
            cache.announce("test")
            cache.update(key, key, 0)
            if step == length:
                with pytest.raises(PoolExhausted):
                    cache.attend(0, key, key, key, Scores(1.0), None, None)
                break
            cache.attend(0, key, key, key, Scores(1.0), None, None)
        assert cache.live_slots().item() == length


# -- in the cache ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("family", "storage", "make"),
    [
        ("llama", "model", None),
        ("gpt_oss", "fp8", None),  # sinks and a sliding window
        ("gemma2", "int8", None),  # bounded scores and a sliding window
        ("qwen3", "model", lambda: QuestPolicy(8, block=4, dense_layers=1)),
        ("qwen3", "model", lambda: TovaPolicy(9)),
        ("qwen3", "int8", lambda: KeyDiffPolicy(9)),
    ],
)
def test_a_model_generates_the_tokens_that_torch_gives_it(family, storage, make, monkeypatch):
    calls = []
    for name in ("decode", "attend_chunk"):
        kernel = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args, kernel=kernel: calls.append(kernel) or kernel(*args))
    model = build(family).to(DEVICE)
    model.generation_config.eos_token_id = None
    handle = retrofit(model, DmsConfig(window=3) if make is None else None)
    ids = torch.randint(3, 97, (2, 10), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    if make is None:
        decide(handle)
    found = []
    for attention in ("torch", "triton"):
        page_size = None if make else 4
        cache = CompactCache((make or handle.policy)(), storage, page_size, chunk=6, attention=attention)
        settings = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        out = model.generate(ids, attention_mask=mask, past_key_values=cache, **settings)
        found.append((out.sequences, torch.stack(out.logits), cache.live_slots()))
        assert bool(calls) == (attention == "triton")
    (tokens, logits, live), (wanted, exact_logits, exact_live) = found
    assert torch.equal(tokens, wanted)
    assert torch.equal(live, exact_live)
    torch.testing.assert_close(logits, exact_logits, rtol=1e-4, atol=1e-4)


def test_a_cache_takes_a_backend_by_name():
    assert CompactCache(FullPolicy()).attention == "auto"
    with pytest.raises(ValueError, match="attention='flash' is not known; choose one of auto, torch, triton"):
        CompactCache(FullPolicy(), attention="flash")
    cache = CompactCache(FullPolicy(), attention="triton")
    key = torch.zeros(1, 1, 1, 8, dtype=torch.float64, device=DEVICE)
    cache.announce("test")
    cache.update(key, key, 0)
    with pytest.raises(ValueError, match="not float64; use attention=torch"):
        cache.attend(0, key, key, key, Scores(1.0), None, None)


# -- refusals ----------------------------------------------------------------------------------------------------------
def pool(dtype=torch.float32, width=16, storage="model"):
    return PagePool(width, 16, dtype, DEVICE, num_pages=1, storage=storage)


def test_auto_stays_with_what_was_measured():
    assert paged.choose_backend("auto", pool()) == "torch"
    assert paged.choose_backend("triton", pool()) == "triton"
    with pytest.raises(
        ValueError, match="attention='flash' is not known; choose one of auto, torch, triton, flash_attn, flashinfer"
    ):
        paged.choose_backend("flash", pool())


def test_what_the_kernels_cannot_do_is_refused_with_what_can(monkeypatch):
    with pytest.raises(ValueError, match="not float64; use attention=torch"):
        paged.choose_backend("triton", pool(torch.float64))
    with pytest.raises(ValueError, match="width up to 256, not 264 and 16; use attention=torch"):
        paged.choose_backend("triton", pool(width=264))
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    with pytest.raises(ValueError, match="kernels for cuda, not for cpu; use attention=torch"):
        kernels.check_pool(PagePool(16, 16, torch.float32, torch.device("cpu"), num_pages=1))
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ValueError, match=r"package triton .* pip install 'dms_lab\[gpu\]', or use attention=torch"):
        CompactCache(FullPolicy(), attention="triton")


def test_8_bit_floats_are_refused_where_a_gpu_has_none(monkeypatch):
    old = pool(storage="fp8")
    old.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an A100")
    with pytest.raises(ValueError, match=r"8\.9 and later, not on an A100; use storage=int8"):
        kernels.check_pool(old)


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    monkeypatch.setattr(device, "Tensor", SimpleNamespace)
    second, here = (SimpleNamespace(device=torch.device(name)) for name in ("cuda:1", "cpu"))
    launch = device.where_its_tensors_are(lambda table, flag, key: key)
    assert launch("table", None, here) is here
    assert entered == []
    assert launch("table", None, second) is second
    assert entered == [torch.device("cuda:1")]


def test_importing_the_paged_attention_leaves_triton_alone():
    code = "import sys, dms_lab.attention.paged; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- flash-attn --------------------------------------------------------------------------------------------------------
def paged_stub(q, k_cache, v_cache, *, cache_seqlens, block_table, softmax_scale, softcap):
    """What `flash_attn_with_kvcache` (2.8) says it does with these arguments, q [rows, 1, heads, D]."""
    assert cache_seqlens.dtype == block_table.dtype == torch.int32
    assert k_cache.shape[1] % 256 == 0
    found = []
    for row, length in enumerate(cache_seqlens.tolist()):
        if length == 0:
            found.append(torch.full_like(q[:1], torch.nan))
            continue
        key, value = (x[block_table[row].long()].flatten(0, 1)[:length].transpose(0, 1)[None] for x in (k_cache, v_cache))
        seen = torch.ones(1, key.shape[1], 1, length, dtype=torch.bool, device=q.device)
        mine = reference.attend(q[row : row + 1].transpose(1, 2), key, value, seen, softmax_scale, softcap or None)[0]
        found.append(mine.transpose(1, 2))
    return torch.cat(found)


def test_flash_attn_is_given_each_head_as_a_sequence(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_with_kvcache=paged_stub))
    slots = replace(fill([[300, 0], [5, 256]], page_size=256), backend="flash_attn")
    query = normal(2, 6, 1, 16, seed=3)
    for scores in (Scores(0.3), Scores(0.3, softcap=2.0)):
        check(query, slots, scores)
    with pytest.raises(ValueError, match="knows no attention sinks"):
        paged.decode(query, slots, SINKS)


class PlannedStub:
    """What flashinfer's wrapper (0.7) says it does with these arguments."""

    def __init__(self, workspace, layout, use_tensor_cores):
        assert (workspace.dtype, layout, use_tensor_cores) == (torch.uint8, "NHD", True)

    def plan(self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, **more):
        assert {x.dtype for x in (indptr, indices, last_page_len)} == {torch.int32}
        assert indptr[-1] == len(indices)
        self.pages = indices.long().split(indptr.diff().tolist())
        self.lengths = ((indptr.diff() - 1).clamp(min=0) * page_size + last_page_len).tolist()  # as get_seq_lens does
        self.sizes, self.more = (num_qo_heads, num_kv_heads, head_dim), more

    def run(self, q, paged_kv_cache):
        assert (q.shape[1], paged_kv_cache[0].shape[2], q.shape[2]) == self.sizes
        assert (self.more["q_data_type"], self.more["kv_data_type"]) == (q.dtype, paged_kv_cache[0].dtype)
        found = []
        for row, (pages, length) in enumerate(zip(self.pages, self.lengths, strict=True)):
            key, value = (x[pages].flatten(0, 1)[:length].transpose(0, 1)[None] for x in paged_kv_cache)
            seen = torch.ones(1, key.shape[1], 1, length, dtype=torch.bool, device=q.device)
            scaling, softcap = self.more["sm_scale"], self.more["logits_soft_cap"]
            mine = reference.attend(q[row, None, :, None], key, value, seen, scaling, softcap)[0] if length else None
            found.append(torch.full_like(q[row], torch.nan) if mine is None else mine[0, :, 0])
        return torch.stack(found)


@pytest.fixture
def flashinfer_stub(monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=PlannedStub))
    flashinfer_paged._wrapper.cache_clear()
    yield
    flashinfer_paged._wrapper.cache_clear()


@pytest.mark.parametrize("lengths", [[[300, 0], [5, 256]], [[32, 33], [31, 64]]])
def test_flashinfer_is_given_each_head_as_a_sequence(flashinfer_stub, lengths):
    slots = replace(fill(lengths, page_size=32), backend="flashinfer")
    query = normal(2, 6, 1, 16, seed=3)
    for scores in (Scores(0.3), Scores(0.3, softcap=2.0)):
        check(query, slots, scores)
    with pytest.raises(ValueError, match="is given no attention sinks"):
        paged.decode(query, slots, SINKS)


def test_flashinfer_is_refused_where_it_cannot_read(flashinfer_stub, monkeypatch):
    with pytest.raises(ValueError, match="works on cuda, not on cpu"):
        paged.choose_backend("flashinfer", PagePool(64, 64, torch.bfloat16, torch.device("cpu"), 32, 1))
    for width, storage, words in ((64, "model", None), (80, "model", "of 80 and 80"), (64, "int8", "not torch.int8 of 64")):
        pool = PagePool(width, width, torch.bfloat16, DEVICE, 32, 1, storage=storage)
        pool.device = torch.device("cuda")
        if words is None:
            assert paged.choose_backend("flashinfer", pool) == "flashinfer"
            continue
        with pytest.raises(ValueError, match=words):
            paged.choose_backend("flashinfer", pool)
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    with pytest.raises(ValueError, match=r"needs the package flashinfer .* pip install 'flashinfer-python'"):
        CompactCache(FullPolicy(), attention="flashinfer")


def test_flash_attn_is_refused_where_its_paged_kernel_cannot_read(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ValueError, match="needs the package flash-attn"):
        CompactCache(FullPolicy(), attention="flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_with_kvcache=paged_stub))
    with pytest.raises(ValueError, match="works on cuda, not on cpu"):
        paged.choose_backend("flash_attn", PagePool(16, 16, torch.bfloat16, torch.device("cpu"), 256, 1))

    def on_cuda(**layout):
        made = PagePool(16, 16, torch.bfloat16, DEVICE, num_pages=1, **layout)
        made.device = torch.device("cuda")
        return made

    assert paged.choose_backend("flash_attn", on_cuda(page_size=256)) == "flash_attn"
    with pytest.raises(ValueError, match="multiple of 256 slots, not of 32: give page_size=256"):
        paged.choose_backend("flash_attn", on_cuda())
    narrow = PagePool(20, 20, torch.bfloat16, DEVICE, 256, 1)
    narrow.device = torch.device("cuda")
    with pytest.raises(ValueError, match=r"divisible by 8, not .*bfloat16 of 20 and 20"):
        paged.choose_backend("flash_attn", narrow)
    with pytest.raises(ValueError, match=r"storage=model.* not torch.int8 of 16 and 16"):
        paged.choose_backend("flash_attn", on_cuda(page_size=256, storage="int8"))
