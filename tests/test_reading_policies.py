"""The policies that keep everything: Quest reads a part, offload keeps old tokens in host memory."""

import copy

import pytest
import torch
from test_retrofit import batch, build

from dms_lab.attachment import retrofit
from dms_lab.cache.compact import CompactCache
from dms_lab.cache.masked import MaskedCache
from dms_lab.cache.policy import LayerState, Scores
from dms_lab.policies import FullPolicy, OffloadPolicy, QuestPolicy

H, K, T, D = 4, 2, 23, 8
FAMILIES = ("llama", "qwen3", "gemma2", "gpt_oss")
CUTS = ((0, 9), (9, 13), *((i, i + 1) for i in range(13, 20)))
POLICIES = {
    "quest": lambda: QuestPolicy(8, block=4, dense_layers=0),
    "quest_one_block": lambda: QuestPolicy(4, block=4, dense_layers=1),
    "offload": lambda: OffloadPolicy(5),
    "offload_one": lambda: OffloadPolicy(1),
}


def test_quest_reads_the_blocks_with_the_highest_bounds_and_the_newest():
    """Against the published rule, stated token by token for each KV head."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(1, H, 1, D, generator=g)
    k, v = (torch.randn(1, K, T, D, generator=g) for _ in range(2))
    block, count = 4, 3
    expected = torch.zeros(1, H, 1, D)
    for head in range(K):
        bounds = []
        for start in range(0, T, block):
            keys = k[0, head, start : start + block]
            low, high = keys.amin(0), keys.amax(0)
            mine = [
                sum(max(x * a, x * b) for x, a, b in zip(q[0, h, 0], low, high, strict=True))
                for h in (2 * head, 2 * head + 1)
            ]
            bounds.append(max(mine).item())
        newest = len(bounds) - 1
        best = sorted(range(newest), key=lambda i: -bounds[i])[: count - 1]
        read = [j for j in range(T) if j // block in {*best, newest}]
        for h in (2 * head, 2 * head + 1):
            weights = torch.softmax(torch.stack([q[0, h, 0] @ k[0, head, j] * 0.4 for j in read]), 0)
            expected[0, h, 0] = weights @ v[0, head, read]
    found, live = QuestPolicy(block * count, block, dense_layers=0).attend(LayerState(), q, k, v, Scores(0.4))
    torch.testing.assert_close(found, expected)
    assert torch.equal(live, torch.full((1, K, 1), T))


def walk(model, cache, ids, mask):
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    parts = [
        model(
            input_ids=ids[:, a:b], attention_mask=mask[:, :b], position_ids=positions[:, a:b], past_key_values=cache
        ).logits
        for a, b in CUTS
    ]
    return torch.cat(parts, 1)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 5, 256])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_compact_cache_equals_the_masked_one(family, name, chunk):
    model = build(family)
    retrofit(model, None)
    ids, mask = batch()["input_ids"], batch()["attention_mask"].clone()
    mask[1, 9:11] = mask[0, 9] = 0  # padding inside: turns of unequal lengths
    wanted = walk(model, MaskedCache(POLICIES[name]()), ids, mask)
    cache = CompactCache(POLICIES[name](), chunk=chunk)
    torch.testing.assert_close(walk(model, cache, ids, mask)[mask.bool()], wanted[mask.bool()], rtol=1e-4, atol=2e-6)
    layer = len(cache.layers) - 1  # full attention in every family
    tokens = mask.sum(1)
    live, read = cache.live_slots()[:, layer], cache.read_slots()[:, layer]
    if name.startswith("quest"):
        budget = cache.policy.budget
        assert torch.equal(live, tokens[:, None].expand_as(live))
        last = (tokens - 1) % 4 + 1
        assert torch.equal(read, (budget - 4 + last)[:, None].expand_as(read))
    else:
        assert torch.equal(live, tokens[:, None].expand_as(live))
        assert torch.equal(read, live)
        held = cache.held_slots()[:, layer]
        assert torch.equal(held, torch.full_like(held, cache.policy.window))


@torch.no_grad()
@pytest.mark.parametrize("name", ["quest", "offload"])
def test_copies_selections_and_releases_keep_each_sequence_its_own(name):
    model = build("llama")
    retrofit(model, None)
    ids = batch()["input_ids"]

    def after(ids, cache, start):
        for i in range(start, ids.shape[1]):
            logits = model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits
        return logits

    def fresh(rows):
        cache = CompactCache(POLICIES[name]())
        model(input_ids=ids[rows][:, :9], past_key_values=cache)
        return cache

    wanted = [after(ids[[row]], fresh([row]), 9) for row in range(2)]
    cache = fresh([0, 1])
    cache.batch_select_indices(torch.tensor([1, 0, 1]))
    twin = copy.deepcopy(cache)
    torch.testing.assert_close(after(ids[[1, 0, 1]], cache, 9), torch.cat([wanted[1], wanted[0], wanted[1]]))
    torch.testing.assert_close(after(ids[[1, 0, 1]], twin, 9), torch.cat([wanted[1], wanted[0], wanted[1]]))
    cache.reset()
    assert cache.allocated_bytes == 0
    model(input_ids=ids[:, :9], past_key_values=cache)
    torch.testing.assert_close(after(ids, cache, 9), torch.cat(wanted))


@torch.no_grad()
def test_offloading_holds_a_window_on_the_device_and_the_rest_in_host_memory():
    model = build("llama")
    retrofit(model, None)
    cache, full = CompactCache(OffloadPolicy(4), page_size=4), CompactCache(FullPolicy(), page_size=4)
    for c in (cache, full):
        model(input_ids=batch()["input_ids"], past_key_values=c)
    slot = 2 * 8 * 4
    assert cache.pool.num_pages - cache.pool.count_free() == 2 * 2 * 2  # layers, KV heads, sequences: one page each
    for layer in cache.layers:
        assert 2 * 2 * 16 * slot <= layer.host_bytes <= 2 * 2 * 16 * slot * 9 / 8
    assert cache.pool.allocated_bytes < full.pool.allocated_bytes / 2


def test_impossible_blocks_and_windows_are_refused():
    with pytest.raises(ValueError, match="at least block=32"):
        QuestPolicy(16, block=32)
    with pytest.raises(ValueError, match="page_size=8 is not the block of policy quest"):
        CompactCache(QuestPolicy(64), page_size=8)
    with pytest.raises(ValueError, match="at least 1 token on the device"):
        OffloadPolicy(0)
    cache = CompactCache(QuestPolicy(64))
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)
