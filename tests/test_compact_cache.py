"""The compact cache gives what one dense forward under the hard mask gives, however the tokens arrive."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_retrofit import FAMILIES, WAYS, build, decide
from transformers.cache_utils import DynamicLayer

from dms_lab import eviction
from dms_lab.attachment import retrofit
from dms_lab.attention import paged, reference
from dms_lab.cache.compact import CompactCache
from dms_lab.cache.masked import MaskedCache
from dms_lab.cache.pages import PoolExhausted
from dms_lab.cache.policy import LayerState, PolicyCache, RankedRule, Scores
from dms_lab.policies import DmsPolicy, FullPolicy, H2OPolicy, KeyDiffPolicy, RandomPolicy, StreamingLLMPolicy, TovaPolicy
from dms_lab.policies.base import WindowedPolicy
from dms_lab.policies.dms import DmsConfig

H, K, D = 4, 2, 4
POLICIES = {
    "full": FullPolicy,
    "streaming_llm": lambda: StreamingLLMPolicy(7, num_sinks=2),
    "tova": lambda: TovaPolicy(7),
    "h2o": lambda: H2OPolicy(7),
    "keydiff": lambda: KeyDiffPolicy(7),
    "random": lambda: RandomPolicy(7),
}


# --- the truth: one row alone, all its tokens at once


class Scripted(WindowedPolicy):
    """Decisions written down beforehand, [B, K, T]: the same whatever the precision of the model."""

    name = "scripted"

    def __init__(self, evict, window, decided_by="self"):
        self.script, self.window, self.decided_by = evict, window, decided_by

    def flags(self, evict_logit, position, num_kv_heads):
        index = position.clamp(max=self.script.shape[2] - 1)[:, None].expand(-1, num_kv_heads, -1)
        return self.script.gather(2, index)

    def of_row(self, row):
        return Scripted(self.script[row : row + 1], self.window, self.decided_by)


def attend_at_once(policy, query, key, value, scores, logit, layer=0):
    """Attention of a row under the hard mask as it is written down, and how many slots its last query sees [B, K]."""
    if isinstance(policy, RankedRule):
        state = LayerState(layer=layer)
        output, live = policy.attend(state, query, key, value, scores)
        return output, live[:, :, -1]
    positions = torch.arange(key.shape[2])
    flags = policy.flags(logit, positions.expand(key.shape[0], -1), key.shape[1])
    if flags is None:
        seen = eviction.visible(torch.zeros(key.shape[:3], dtype=torch.bool), 1)
    else:
        evict = eviction.govern(flags.float(), policy.decided_by, policy.window, fill=0.0) > 0
        seen = eviction.visible(evict, policy.window)
    if scores.sliding_window is not None:
        seen = seen & (positions[:, None] - positions < scores.sliding_window)
    output, _ = reference.attend(query, key, value, seen, scores.scaling, scores.softcap, scores.sinks)
    return output, seen[:, :, -1].sum(-1)


class DenseCache(PolicyCache):
    """Serves one forward over whole rows without padding."""

    def __init__(self, policy):
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self.policy, self.live = policy, []

    def attend(self, layer_idx, query, key, value, scores, evict_logit, document):
        output, live = attend_at_once(self.policy, query, key, value, scores, evict_logit, layer_idx)
        self.live.append(live)
        return output

    def live_slots(self):
        return torch.stack(self.live, 1)


# --- attention alone


def padded_turn(rows, starts, counts, columns):
    """The next `counts` tokens of each row [heads, T, D], on the left of them garbage."""
    out = 50 * torch.randn(len(rows), rows[0].shape[0], columns, rows[0].shape[2], dtype=rows[0].dtype)
    for i, (row, start, count) in enumerate(zip(rows, starts, counts, strict=True)):
        out[i, :, columns - count :] = row[:, start : start + count]
    return out


def converse(cache, rows, turns, scores):
    """Feeds the tokens of `rows` (q, k, v, logit a row) turn by turn, padded on the left; returns each row's outputs."""
    found, starts = [[] for _ in rows], [0] * len(rows)
    document = torch.zeros(len(rows), 0, dtype=torch.long)
    for counts in turns:
        columns = max(counts)
        query, key, value, logit = (
            padded_turn([row[part] for row in rows], starts, counts, columns) for part in range(len(rows[0]))
        )
        new = torch.stack([torch.arange(columns) >= columns - count for count in counts]).long() - 1
        document = torch.cat([document, new], 1)
        has_padding = bool((document < 0).any())
        cache.announce("test")
        key, value = cache.update(key, value, 0)
        output = cache.attend(0, query, key, value, scores, logit[..., 0], document if has_padding else None)
        assert torch.isfinite(output[(new >= 0)[:, None].expand(output.shape[:3])]).all()
        for i, count in enumerate(counts):
            found[i].append(output[i, :, columns - count :])
            if isinstance(cache, CompactCache):
                assert (output[i, :, : columns - count] == 0).all()
        starts = [start + count for start, count in zip(starts, counts, strict=True)]
    return [torch.cat(parts, 1) for parts in found]


@st.composite
def conversations(draw):
    """Up to three turns of unequal lengths, each followed by single tokens."""
    num_rows, turns = draw(st.integers(1, 3)), []
    for turn in range(draw(st.integers(1, 3))):
        counts = draw(st.lists(st.integers(0 if turn else 1, 13), min_size=num_rows, max_size=num_rows))
        turns += [counts] if max(counts) else []
        for _ in range(draw(st.integers(0, 4))):
            is_token = draw(st.lists(st.integers(0, 3), min_size=num_rows, max_size=num_rows))
            turns += [[min(1, n) for n in is_token]] if max(is_token) else []
    return turns


@st.composite
def layouts(draw):
    page_size = draw(st.sampled_from([1, 2, 4, 8]))
    return {"page_size": page_size, "chunk": draw(st.sampled_from([1, 2, 7, page_size, 64]))}


SCORES = st.builds(
    Scores,
    st.just(0.6),
    st.sampled_from([None, None, 2.0]),
    st.sampled_from([None, None, torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)]),
    st.one_of(st.none(), st.none(), st.integers(1, 12)),
)
DMS = st.builds(
    lambda window, decided_by: DmsPolicy(DmsConfig(window=window, decided_by=decided_by)),
    st.one_of(st.integers(1, 6), st.integers(7, 70)),
    st.sampled_from(eviction.DECIDED_BY),
)
RULES = {
    "dms": DMS,
    "full": st.just(FullPolicy()),
    "streaming_llm": st.builds(lambda window, sinks: StreamingLLMPolicy(window + sinks, sinks), *[st.integers(1, 9)] * 2),
    "tova": st.builds(TovaPolicy, st.integers(2, 14)),
    "h2o": st.builds(H2OPolicy, st.integers(2, 14)),
    "keydiff": st.builds(KeyDiffPolicy, st.integers(3, 14)),
    "random": st.builds(RandomPolicy, st.integers(2, 14), st.integers(0, 3)),
}


def random_rows(turns, seed):
    """q, k, v and eviction logit of each row; a head evicts nothing, everything or half, row by row."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for total in map(sum, zip(*turns, strict=True)):
        q, k, v = (torch.randn(n, total, D, generator=g, dtype=torch.float64) for n in (H, K, K))
        leaning = torch.randint(-1, 2, (K, 1), generator=g) * 100.0
        logit = torch.randn(K, total, generator=g) + leaning
        rows.append((q, k, v, logit[..., None]))
    return rows


@pytest.mark.parametrize("kind", RULES)
def test_any_conversation_gives_the_attention_of_each_row_alone_at_once(kind):
    @settings(deadline=None, max_examples=60, derandomize=True)
    @given(RULES[kind], conversations(), layouts(), SCORES, st.integers(0, 999))
    def check(policy, turns, layout, scores, seed):
        rows = random_rows(turns, seed)
        cache = CompactCache(policy, **layout)
        found = converse(cache, rows, turns, scores)
        masked = converse(MaskedCache(policy), rows, turns, scores)
        for i, (q, k, v, logit) in enumerate(rows):
            wanted, live = attend_at_once(policy, q[None], k[None], v[None], scores, logit[None, ..., 0])
            torch.testing.assert_close(found[i], wanted[0], rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(masked[i], wanted[0], rtol=1e-9, atol=1e-10)
            assert torch.equal(cache.live_slots()[i, 0], live[0]), "live slots are what the newest query sees"

    check()


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.one_of(*RULES.values()), conversations(), layouts(), st.integers(0, 999))
def test_all_rows_at_once_as_on_a_gpu_give_the_same(policy, turns, layout, seed):
    rows, scores = random_rows(turns, seed), Scores(0.6)
    wanted = converse(CompactCache(policy, **layout), rows, turns, scores)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged, "_groups", paged._unseen_groups)
        found = converse(CompactCache(policy, **layout), rows, turns, scores)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


def looked_at(rule, storage="model"):
    """What a rule of budget 6 was given to rank in a conversation of two rows, and the rows."""
    seen = []

    class Looking(rule):
        def rank(self, found):
            seen.append(found)
            return super().rank(found)

    turns = [(9, 4), *[(1, 1)] * 5, (1, 0), (3, 2)]
    rows = random_rows(turns, seed=0)
    converse(CompactCache(Looking(6), storage, page_size=4), rows, turns, Scores(0.6))
    return seen, rows


@pytest.mark.parametrize(("storage", "bound"), [("model", 0.0), ("fp8", 1 / 16), ("int8", 0.02)])
def test_a_rule_that_looks_at_keys_is_given_those_that_are_attended_to(storage, bound):
    seen, rows = looked_at(KeyDiffPolicy, storage)
    assert len(seen) > 10
    for found in seen:
        for i, (_, keys, *_) in enumerate(rows):
            is_live = (found.key[i] != 0).any(-1)
            assert (is_live.sum(-1) <= 6).all()
            for head in range(K):
                position = found.position[i, head][is_live[head]]
                assert position.unique().numel() == position.numel()
                error = (found.key[i, head][is_live[head]] - keys[head, position]).abs().max()
                assert error <= bound * keys[head].abs().max()


def test_a_rule_is_given_no_keys_and_no_weights_that_it_does_not_look_at():
    assert {found.key for found in looked_at(TovaPolicy)[0]} == {None}
    assert {found.weights for found in looked_at(KeyDiffPolicy)[0]} == {None}


@st.composite
def company(draw, columns):
    """Turns of a number of columns, with the tokens in them of one row and of two that it may be batched with."""
    turns = []
    for _ in range(draw(st.integers(1, 8))):
        width = draw(st.sampled_from(columns))
        turns.append((width, [draw(st.integers(0, width)) for _ in range(3)]))
    return turns


@pytest.mark.parametrize("kind", RULES)
def test_apart_no_bit_of_a_row_depends_on_the_rows_beside_it(kind):
    is_windowed = kind in ("dms", "full", "streaming_llm")  # a ranked rule cuts a prompt where any row meets its budget

    @settings(deadline=None, max_examples=40, derandomize=True)
    @given(RULES[kind], company([1, 1, 1, 9] if is_windowed else [1]), layouts(), SCORES, st.integers(0, 99))
    def check(policy, turns, layout, scores, seed):
        sinks = None if scores.sinks is None else scores.sinks.float()
        scores = Scores(scores.scaling, scores.softcap, sinks, scores.sliding_window)
        rows = [tuple(x.float() for x in row) for row in random_rows([counts for _, counts in turns], seed)]

        def first_row_beside(other):
            cache, found, starts = CompactCache(policy, apart=True, **layout), [], [0, 0]
            for width, counts in turns:
                mine = [counts[0], counts[other]]
                parts = [padded_turn([rows[0][p], rows[other][p]], starts, mine, width) for p in range(4)]
                document = torch.stack([torch.arange(width) >= width - n for n in mine]).long() - 1
                query, key, value, logit = parts
                cache.announce("test")
                cache.update(key, value, 0)
                output = cache.attend(0, query, key, value, scores, logit[..., 0], document)
                found.append(output[0, :, width - counts[0] :])
                starts = [start + n for start, n in zip(starts, mine, strict=True)]
            return torch.cat(found, 1)

        assert torch.equal(first_row_beside(1), first_row_beside(2))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged, "_GROUP_BYTES", 400)  # so that how many heads go at once depends on their lengths
        check()


CASES = np.load(Path(__file__).parent / "data" / "attention_cases.npz", allow_pickle=False)


@pytest.mark.parametrize("chunk", [1, 4, 256])
@pytest.mark.parametrize("name", sorted({name.split("/")[0] for name in CASES.files}))
def test_the_golden_cases_come_out_of_the_compact_cache(name, chunk):
    case = {k.split("/")[1]: CASES[k] for k in CASES.files if k.startswith(name + "/")}
    q, k, v, logit, document, wanted = (
        torch.from_numpy(case[part]) for part in ("q", "k", "v", "evict_logit", "document", "hard_output")
    )
    policy = DmsPolicy(DmsConfig(window=int(case["window"]), decided_by=str(case["decided_by"])))
    scores, num_documents = Scores(q.shape[-1] ** -0.5), 0
    for row in range(q.shape[0]):
        for index in document[row].unique().tolist():
            mine = document[row] == index
            if index >= 0:
                num_documents += 1
                cache = CompactCache(policy, page_size=2, chunk=chunk)
                alone = [x[row : row + 1, :, mine] for x in (q, k, v)]
                cache.announce("test")
                cache.update(*alone[1:], 0)
                output = cache.attend(0, *alone, scores, logit[row : row + 1, :, mine], None)
                torch.testing.assert_close(output[0], wanted[row][:, mine], rtol=1e-10, atol=1e-10)
    assert num_documents >= q.shape[0]
    if document.max() == 0 or case["layout"] in ("left", "right", "none"):
        cache = CompactCache(policy, page_size=2, chunk=chunk)
        cache.announce("test")
        cache.update(k, v, 0)
        output = cache.attend(0, q, k, v, scores, logit, document)
        real = (document >= 0)[:, None].expand(output.shape[:3])
        torch.testing.assert_close(output[real], wanted[real], rtol=1e-10, atol=1e-10)


# --- through models


def dense(handle, policy, rows):
    """Logits [T, vocabulary] of each row alone in one forward, and the live slots [L, K] after it."""
    found = []
    for i, row in enumerate(rows):
        cache = DenseCache(policy.of_row(i) if isinstance(policy, Scripted) else policy)
        with torch.no_grad():
            logits = handle.model(torch.tensor([row]), past_key_values=cache).logits[0]
        found.append((logits, cache.live_slots()[0]))
    return found


@torch.no_grad()
def talk(handle, cache, rows, turns):
    """Logits [T, vocabulary] of each row when its tokens come turn by turn in one left-padded batch."""
    found, starts = [[] for _ in rows], [0] * len(rows)
    mask = torch.zeros(len(rows), 0, dtype=torch.long)
    for counts in turns:
        columns = max(counts)
        ids = torch.zeros(len(rows), columns, dtype=torch.long)
        for i, count in enumerate(counts):
            ids[i, columns - count :] = torch.tensor(rows[i][starts[i] : starts[i] + count], dtype=torch.long)
        new = torch.stack([torch.arange(columns) >= columns - count for count in counts]).long()
        mask = torch.cat([mask, new], 1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -columns:]
        logits = handle.model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits
        assert torch.isfinite(logits).all(), "padding gives numbers as well"
        for i, count in enumerate(counts):
            found[i].append(logits[i, columns - count :])
        starts = [start + count for start, count in zip(starts, counts, strict=True)]
    return [torch.cat(parts) for parts in found]


def tokens(*lengths, seed=5):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 97, (n,), generator=g).tolist() for n in lengths]


ROWS = tokens(18, 13)
TURNS = [(9, 6), (4, 2), *[(1, 1)] * 5]


def assert_as_dense(handle, policy, cache, rows, turns, atol=2e-5):
    for (wanted, live), logits, length in zip(
        dense(handle, policy, rows), talk(handle, cache, rows, turns), cache.live_slots(), strict=True
    ):
        torch.testing.assert_close(logits, wanted, rtol=0, atol=atol)
        assert torch.equal(length, live)


@pytest.mark.parametrize(
    ("decided_by", "way"),
    [("self", "adapter"), ("next", "adapter"), ("delayed", "adapter"), ("next", "neuron"), ("next", "lora")],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_a_padded_batch_equals_one_dense_forward(family, decided_by, way):
    handle = decide(retrofit(build(family), DmsConfig(window=3, decided_by=decided_by, **WAYS[way])))
    cache = CompactCache(handle.policy(), page_size=4, chunk=7)
    assert_as_dense(handle, handle.policy(), cache, ROWS, TURNS)
    assert cache.live_slots().float().mean() < 0.8 * 15, "something was evicted"


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "qwen3"])
def test_every_rule_in_a_padded_batch_equals_one_dense_forward(family, kind):
    handle = retrofit(build(family), None)
    policy = POLICIES[kind]()
    assert_as_dense(handle, policy, CompactCache(policy, page_size=4, chunk=7), ROWS, TURNS)


LONG, LONG_TURNS = tokens(44, 31, seed=6), [(19, 12), *[(1, 1)] * 3, (14, 9), (1, 1), (7, 6)]


def errors(handle, policy, cache, rows, turns):
    """How far off plain float32 is and how far the cache: the largest error of the logits against float64."""
    with torch.no_grad():
        exact = [logits for logits, _ in dense(_as_double(handle), policy, rows)]
    plain = max((x - y).abs().max() for (x, _), y in zip(dense(handle, policy, rows), exact, strict=True))
    found = max((x - y).abs().max() for x, y in zip(talk(handle, cache, rows, turns), exact, strict=True))
    return plain.item(), found.item()


def _as_double(handle):
    model = build("llama").double()
    twin = retrofit(model, handle.config)
    model.load_state_dict(handle.model.state_dict())
    for mine, theirs in zip(twin.predictors.values(), handle.predictors.values(), strict=True):
        mine.offset = theirs.offset
    return twin


@pytest.mark.parametrize("chunk", [1, 7, 8, 256])
@pytest.mark.parametrize("kind", ["dms", *POLICIES])
def test_over_several_pages_and_turns_the_error_is_that_of_plain_float32(kind, chunk):
    handle = retrofit(build("llama"), DmsConfig(window=5) if kind == "dms" else None)
    if kind == "dms":
        decide(handle)
    policy = handle.policy() if kind == "dms" else POLICIES[kind]()
    plain, found = errors(handle, policy, CompactCache(policy, page_size=8, chunk=chunk), LONG, LONG_TURNS)
    assert plain < 1e-5
    assert found <= 2 * plain


@pytest.mark.parametrize("decided_by", eviction.DECIDED_BY)
@pytest.mark.parametrize("window", [1, 2, 8, 100])
@pytest.mark.parametrize("way", ["adapter", "neuron"])
def test_every_window_and_deciding_token_errs_as_plain_float32_does(way, window, decided_by):
    config = DmsConfig(window=window, decided_by=decided_by, **WAYS[way])
    handle = decide(retrofit(build("llama"), config))
    cache = CompactCache(handle.policy(), page_size=8, chunk=16)
    plain, found = errors(handle, handle.policy(), cache, LONG, LONG_TURNS)
    assert plain < 1e-5
    assert found <= 2 * plain


def test_every_length_up_to_three_pages_equals_one_dense_forward():
    handle = decide(retrofit(build("llama"), DmsConfig(window=3)))
    (row,) = tokens(26)
    ((wanted, _),) = dense(handle, handle.policy(), [row])
    for length in range(1, 26):
        cache = CompactCache(handle.policy(), page_size=8, chunk=8)
        (found,) = talk(handle, cache, [row], [(length,), (1,)])
        torch.testing.assert_close(found, wanted[: length + 1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("window", [1, 4, 64])
@pytest.mark.parametrize("chunk", [1, 8, 256])
def test_in_bfloat16_the_error_is_that_of_plain_bfloat16(window, chunk):
    """The yardstick is one forward in bfloat16 under the same mask; decisions are written down, so that none flips."""
    script = torch.rand(2, 2, 44, generator=torch.Generator().manual_seed(1)) < 0.6
    policy = Scripted(script, window, "next")
    exact = [x for x, _ in dense(retrofit(build("llama").bfloat16().float(), None), policy, LONG)]
    handle = retrofit(build("llama").bfloat16(), None)
    found = talk(handle, CompactCache(policy, page_size=8, chunk=chunk), LONG, LONG_TURNS)
    masked = []
    for i, row in enumerate(LONG):
        with torch.no_grad():
            masked.append(handle.model(torch.tensor([row]), past_key_values=MaskedCache(policy.of_row(i))).logits[0])
    plain, error = torch.cat(masked).float() - torch.cat(exact), torch.cat(found).float() - torch.cat(exact)
    assert error.abs().max() <= 2 * plain.abs().max()
    assert error.square().mean().sqrt() <= 1.2 * plain.square().mean().sqrt()


# --- heads of their own kind


@pytest.mark.parametrize("decided_by", eviction.DECIDED_BY)
@pytest.mark.parametrize(
    ("first_row", "second_row"),
    [((1, 1), (1, 1)), ((0, 0), (0, 0)), ((1, 0), (0, 1)), ((1, 0), (1, 0))],
    ids=["nothing is kept", "everything is kept", "a head keeps nothing here and all there", "one head keeps nothing"],
)
def test_heads_that_keep_nothing_or_everything(first_row, second_row, decided_by):
    window, lengths = 4, [44, 31]
    script = torch.tensor([first_row, second_row], dtype=torch.bool)[:, :, None].expand(-1, -1, 44)
    handle, policy = retrofit(build("llama"), None), Scripted(script, window, decided_by)
    cache = CompactCache(policy, page_size=8, chunk=7)
    assert_as_dense(handle, policy, cache, LONG, LONG_TURNS)
    wanted = torch.where(script[:, :, 0], window, torch.tensor(lengths)[:, None])
    assert torch.equal(cache.live_slots(), wanted[:, None].expand(-1, 2, -1))
    pages = cache.pool.num_pages - cache.pool.count_free()
    assert pages == 2 * (-(-wanted // 8)).sum()


@pytest.mark.parametrize("decided_by", eviction.DECIDED_BY)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_beyond_the_end_equals_the_original_model(family, decided_by):
    handle = decide(retrofit(build(family), DmsConfig(window=18, decided_by=decided_by)))
    with handle.disabled(), torch.no_grad():
        wanted = [handle.model(torch.tensor([row]), use_cache=False).logits[0] for row in ROWS]
    found = talk(handle, CompactCache(handle.policy(), page_size=4, chunk=7), ROWS, TURNS)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


# --- one request and the next


def place_step(handle, cache, place, ids, start):
    cache.rows = torch.tensor([place])
    with torch.no_grad():
        plan = handle.hard(cache)
        positions = torch.arange(start, start + len(ids))[None]
        return handle.model(
            torch.tensor([ids]), position_ids=positions, past_key_values=cache, use_cache=True, dms=plan
        ).logits[0]


@pytest.mark.parametrize("kind", ["dms", "full", "tova"])
def test_a_request_is_untouched_by_another_that_ran_out_of_pages(kind):
    handle = retrofit(build("llama"), DmsConfig(window=4) if kind == "dms" else None)
    if kind == "dms":
        decide(handle)
    policy = handle.policy() if kind == "dms" else FullPolicy() if kind == "full" else TovaPolicy(60)
    first, second = tokens(20, 200)

    def run(disturbed):
        cache = CompactCache(policy, page_size=4, num_pages=48, num_places=3, chunk=8, apart=True)
        parts = [place_step(handle, cache, 0, first[:12], 0)]
        for i in range(12, 20):
            if disturbed and i in (12, 15):
                with pytest.raises(PoolExhausted, match=r"exhausted: \d+ pages are needed"):
                    place_step(handle, cache, 2, second, 0)
                cache.release(torch.tensor([2]))
            parts.append(place_step(handle, cache, 0, first[i : i + 1], i))
        cache.release(torch.tensor([0]))
        assert cache.pool.count_free() == 48
        return torch.cat(parts), cache

    (alone, _), (found, cache) = run(False), run(True)
    assert torch.equal(found, alone)
    again = torch.cat([place_step(handle, cache, 2, second[:9], 0), place_step(handle, cache, 2, second[9:13], 9)])
    ((wanted, _),) = dense(handle, policy, [second[:13]])
    torch.testing.assert_close(again, wanted, rtol=0, atol=2e-5)


def test_a_reset_cache_serves_the_next_batch_as_a_new_one_and_holds_no_memory():
    handle = decide(retrofit(build("llama"), DmsConfig(window=4)))
    cache = CompactCache(handle.policy(), page_size=8, chunk=7)
    talk(handle, cache, LONG, LONG_TURNS)
    used = cache.allocated_bytes
    cache.reset()
    assert cache.allocated_bytes == 0 < used
    assert cache.get_seq_length() == 0
    fresh = CompactCache(handle.policy(), page_size=8, chunk=7)
    for found, wanted in zip(talk(handle, cache, ROWS[:1], [(18,)]), talk(handle, fresh, ROWS[:1], [(18,)]), strict=True):
        assert torch.equal(found, wanted)
    assert cache.allocated_bytes == fresh.allocated_bytes


def test_a_cache_begun_in_inference_mode_goes_on_outside_of_it():
    handle = decide(retrofit(build("llama"), DmsConfig(window=3)))
    cache = CompactCache(handle.policy(), page_size=4, chunk=7)
    ids = torch.tensor([ROWS[0]])
    with torch.inference_mode():
        first = handle.model(ids[:, :9], past_key_values=cache).logits
    with torch.no_grad():
        rest = handle.model(ids[:, 9:], past_key_values=cache).logits
    ((wanted, _),) = dense(handle, handle.policy(), ROWS[:1])
    torch.testing.assert_close(torch.cat([first.clone(), rest], 1)[0], wanted, rtol=0, atol=2e-5)


# --- what it costs


@pytest.mark.parametrize("storage", ["model", "fp8", "int8"])
def test_compression_is_eviction_and_storage_and_what_was_allocated(storage):
    script = torch.tensor([[True, False]])[:, :, None].expand(-1, -1, 90)
    handle, policy = retrofit(build("llama"), None), Scripted(script, 6)
    cache = CompactCache(policy, storage, page_size=8, chunk=16)
    rows = tokens(90)
    talk(handle, cache, rows, [(70,), *[(1,)] * 20])
    found = cache.compression()
    assert found.eviction == pytest.approx(2 * 90 / (90 + 6))
    plain = 2 * 8 * 4
    slot = {"model": plain, "fp8": plain / 4 + 8 / 8, "int8": plain / 4 + 8 / 8}[storage]
    assert found.storage == pytest.approx(plain / slot)
    assert found.together == pytest.approx(2 * 2 * 90 * plain / cache.allocated_bytes)
    assert found.together < found.eviction * found.storage, "pages, positions and tables are paid for as well"
    held = cache.pool.num_pages - cache.pool.count_free()
    assert held == 2 * (1 + 12)
    assert cache.pool.num_pages <= held * 17 / 16 + 1


@pytest.mark.parametrize(("storage", "bound"), [("fp8", 0.06), ("int8", 0.02)])
def test_quantised_storage_moves_the_logits_little(storage, bound):
    script = torch.rand(2, 2, 44, generator=torch.Generator().manual_seed(1)) < 0.5
    handle, policy = retrofit(build("llama"), None), Scripted(script, 4)
    wanted = torch.cat([x for x, _ in dense(handle, policy, LONG)])
    found = torch.cat(talk(handle, CompactCache(policy, storage, page_size=8, chunk=7), LONG, LONG_TURNS))
    error = ((found - wanted).square().mean() / wanted.square().mean()).sqrt()
    assert 0 < error < bound


# --- nothing waits for the device


def on_meta(x):
    """Moves every tensor of an object to a device without data: whoever looks at a number fails."""
    for name, value in vars(x).items():
        if isinstance(value, torch.Tensor):
            setattr(x, name, value.to("meta"))


@pytest.mark.parametrize("rows", [None, [2, 0]], ids=["all places", "some places"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("storage", ["model", "fp8", "int8"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("kind", ["dms", "full", "streaming_llm"])
def test_a_decode_step_looks_at_no_number_of_the_device(kind, family, storage, masked, rows):
    model = build(family)
    handle = retrofit(model, DmsConfig(window=4) if kind == "dms" else None)
    policy = handle.policy() if kind == "dms" else POLICIES[kind]()
    cache = CompactCache(policy, storage, page_size=4, num_pages=200, num_places=None if rows is None else 3)
    cache.rows = None if rows is None else torch.tensor(rows)
    ids = torch.tensor(tokens(9, 9))
    plan = handle.hard(cache)
    with torch.no_grad():
        model(ids, past_key_values=cache, position_ids=torch.arange(9)[None], dms=plan)
    model.to("meta")
    for layer in cache.layers:
        layer.slots._widen(8)
        on_meta(layer.slots)
    for x in (cache, cache.pool, cache.pool.key, cache.pool.value):
        on_meta(x)
    cache.pool.device = torch.device("meta")
    if rows is not None:
        cache.rows = torch.tensor(rows, device="meta")
    mask = torch.ones(2, 10, dtype=torch.long, device="meta") if masked else None
    with torch.no_grad():
        for step in range(3):
            new = torch.zeros(2, 1, dtype=torch.long, device="meta")
            plan = handle.hard(cache, None if mask is None else mask[:, -1:] > 0)
            logits = model(new, past_key_values=cache, position_ids=new + 9 + step, dms=plan).logits
    assert logits.shape == (2, 1, 97)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        int(cache.layers[0].slots.length.max())  # as a look at a number does


# --- what is refused


def test_a_backward_through_its_output_is_refused_by_name():
    handle = decide(retrofit(build("llama"), DmsConfig(window=3)))
    logits = handle.model(torch.tensor([ROWS[0]]), past_key_values=CompactCache(handle.policy())).logits
    with pytest.raises(RuntimeError, match="the compact cache carries no gradients"):
        logits.sum().backward()


def test_a_cache_of_another_model_attachment_or_policy_is_refused():
    model = build("llama")
    handle = decide(retrofit(model, DmsConfig(window=3)))
    cache = CompactCache(handle.policy())
    talk(handle, cache, ROWS, TURNS)
    other = retrofit(build("llama", seed=1), DmsConfig(window=3))
    with pytest.raises(ValueError, match="another model or of another attachment"):
        talk(other, cache, ROWS, TURNS)
    with pytest.raises(ValueError, match=r"window=4.* but the model was retrofitted with .*window=3"):
        talk(handle, CompactCache(DmsPolicy(DmsConfig(window=4))), ROWS, TURNS)
    handle.detach()
    again = retrofit(model, DmsConfig(window=3))
    with pytest.raises(ValueError, match="another attachment"):
        talk(again, cache, ROWS, TURNS)
    seam = retrofit(build("llama"), None)
    with pytest.raises(ValueError, match="no predictor"):
        talk(seam, CompactCache(DmsPolicy(DmsConfig())), ROWS, TURNS)


def test_another_batch_or_width_than_the_cache_holds_is_refused():
    handle = retrofit(build("llama"), None)
    cache = CompactCache(FullPolicy())
    talk(handle, cache, ROWS, [(5, 5)])
    with pytest.raises(ValueError, match="serves 2 sequences with 2 KV heads, but was given 1 with 2"):
        handle.model(torch.tensor([[5]]), past_key_values=cache)
    narrow = torch.zeros(2, 2, 1, 6)
    with pytest.raises(ValueError, match="another model's tokens"):
        cache.attend(0, torch.zeros(2, 4, 1, 6), narrow, narrow, Scores(1.0), None, None)


def test_impossible_settings_are_refused_with_what_works():
    with pytest.raises(ValueError, match="storage='fp4' is not known; choose one of model, fp8, int8"):
        CompactCache(FullPolicy(), storage="fp4")
    with pytest.raises(ValueError, match="chunk=0"):
        CompactCache(FullPolicy(), chunk=0)
    handle = retrofit(build("llama"), None)
    with pytest.raises(ValueError, match="page_size=0"):
        talk(handle, CompactCache(FullPolicy(), page_size=0), ROWS, TURNS)
    with pytest.raises(ValueError, match="num_pages=0"):
        talk(handle, CompactCache(FullPolicy(), num_pages=0), ROWS, TURNS)


def test_a_deep_copy_shares_nothing_with_its_original():
    handle = decide(retrofit(build("llama"), DmsConfig(window=3)))
    cache = CompactCache(handle.policy(), page_size=4, chunk=7)
    talk(handle, cache, ROWS, [(9, 6)])
    twin = copy.deepcopy(cache)
    ids = torch.tensor([row[-4:] for row in ROWS])
    with torch.no_grad():
        first = handle.model(ids, past_key_values=cache).logits
        second = handle.model(ids, past_key_values=twin).logits
    assert torch.equal(first, second)
    assert torch.equal(cache.live_slots(), twin.live_slots())


def test_long_heads_are_attended_in_parts(monkeypatch):
    """Several parts, the last of them cut short by the head's length, against one gathering."""
    from dms_lab.attention import paged
    from dms_lab.cache.pages import PagePool

    for dtype, bound in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        pool = PagePool(8, 8, dtype, torch.device("cpu"), page_size=4, num_pages=40)
        table = pool.take(torch.ones(1, 2, 17, dtype=torch.bool))
        for store in (pool.key, pool.value):
            store.data.normal_(generator=torch.Generator().manual_seed(1))
        query = torch.randn(1, 4, 1, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        slots = paged.Slots(pool, table, torch.tensor([[66, 9]]))
        monkeypatch.setattr(paged, "_LONG_BYTES", 2**22)
        whole, _ = paged.decode(query, slots, Scores(0.3))
        monkeypatch.setattr(paged, "_LONG_BYTES", 64)
        monkeypatch.setattr(paged, "_GROUP_BYTES", 1)
        monkeypatch.setattr(paged, "_PART_BYTES", 5 * 4 * 8 * dtype.itemsize)
        parts, _ = paged.decode(query, slots, Scores(0.3))
        assert (parts.float() - whole.float()).abs().max() < bound
        alone = paged.Slots(pool, table[:, 1:], torch.tensor([[9]]))
        with monkeypatch.context() as patch:  # as on a GPU, where a single head is as wide as the table
            patch.setattr(paged, "_groups", paged._unseen_groups)
            found, _ = paged.decode(query[:, 2:], alone, Scores(0.3))
        assert (found.float() - whole[:, 2:].float()).abs().max() < bound


def test_a_cache_that_ran_out_of_pages_on_the_way_is_of_no_use_until_it_is_emptied():
    handle = decide(retrofit(build("llama"), DmsConfig(window=40)))
    ids = torch.arange(3, 23)[None]
    cache = CompactCache(handle.policy(), page_size=4, num_pages=15)
    with torch.no_grad():
        with pytest.raises(PoolExhausted):
            handle.model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="its layers hold different tokens"):
            handle.model(ids[:, :1], past_key_values=cache)
        with pytest.raises(ValueError, match="its layers hold different tokens"):
            cache.crop(-1)
        cache.reset()
        fresh = CompactCache(handle.policy(), page_size=4)
        again = [handle.model(ids[:, :9], past_key_values=c).logits for c in (cache, fresh)]
    assert torch.equal(*again)


def test_a_cache_is_refused_by_a_model_that_leaves_no_attention_to_it():
    model = build("llama")
    with torch.no_grad(), pytest.raises(ValueError, match="works with a retrofitted model alone"):
        model(torch.tensor([[5, 6]]), past_key_values=CompactCache(FullPolicy()))
    handle = retrofit(model, None)
    cache = CompactCache(FullPolicy())
    with torch.no_grad():
        model(torch.tensor([[5, 6]]), past_key_values=cache)
        handle.detach()
        with pytest.raises(ValueError, match="works with a retrofitted model alone"):
            model(torch.tensor([[7]]), past_key_values=cache)
    with pytest.raises(ValueError, match="was taken off"):
        handle.hard(cache)


def test_an_empty_cache_has_nothing_to_count():
    cache = CompactCache(FullPolicy())
    for count in (cache.compression, cache.live_slots, cache.read_slots, lambda: cache.storage_factor):
        with pytest.raises(ValueError, match="this cache is empty"):
            count()


def test_caches_and_models_are_copied_and_pickled_with_what_they_hold():
    import copy
    import pickle

    for config in (DmsConfig(window=4), DmsConfig(window=4, predictor="neuron")):
        handle = decide(retrofit(build("qwen3"), config))
        ids = torch.arange(3, 23)[None]
        with torch.no_grad():
            cache = CompactCache(handle.policy())
            handle.model(ids[:, :12], past_key_values=cache)
            stored = pickle.dumps(cache)
            wanted = handle.model(ids[:, 12:], past_key_values=cache).logits
            assert torch.equal(handle.model(ids[:, 12:], past_key_values=pickle.loads(stored)).logits, wanted)
            twin = copy.deepcopy(handle.model)
            for parameter in twin.parameters():
                parameter.mul_(0.5)
            assert torch.equal(handle.model(ids[:, 12:], past_key_values=pickle.loads(stored)).logits, wanted)
            assert not torch.equal(twin(ids).logits, handle.model(ids).logits)


def test_h2o_refuses_to_crop():
    handle = retrofit(build("llama"), None)
    cache = CompactCache(H2OPolicy(24))
    with torch.no_grad():
        handle.model(torch.arange(3, 13)[None], past_key_values=cache)
    with pytest.raises(ValueError, match="attention summed up"):
        cache.crop(-2)


@pytest.mark.parametrize("kind", ["dms", "h2o"])
def test_a_repeated_and_selected_cache_goes_on_with_those_rows(kind):
    handle = retrofit(build("llama"), DmsConfig(window=3) if kind == "dms" else None)
    if kind == "dms":
        decide(handle)
    policy = handle.policy() if kind == "dms" else H2OPolicy(7)
    cache = CompactCache(policy, page_size=4, chunk=7)
    talk(handle, cache, LONG, [(9, 9)])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0, 1]))
    rows = [LONG[1], LONG[0], LONG[0][:9] + LONG[1][9:]]
    with torch.no_grad():
        for start, stop in ((9, 10), (10, 17)):
            ids = torch.tensor([row[start:stop] for row in rows])
            logits = handle.model(ids, past_key_values=cache, position_ids=torch.arange(start, stop)[None]).logits
    wanted = torch.stack([x[10:] for x, _ in dense(handle, policy, [row[:17] for row in rows])])
    torch.testing.assert_close(logits, wanted, rtol=0, atol=2e-5)
