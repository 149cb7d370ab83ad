"""Each rule against an independent few-line statement of it, on random scores."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dms_lab.attention import reference
from dms_lab.cache.policy import LayerState, Ranking, Scores
from dms_lab.policies import FullPolicy, H2OPolicy, KeyDiffPolicy, RandomPolicy, StreamingLLMPolicy, TovaPolicy
from dms_lab.policies.base import live_keys, visible_keys
from dms_lab.policies.dms import AdapterPredictor, DmsConfig

H, K, T, D = 4, 2, 15, 8


@pytest.fixture
def qkv():
    g = torch.Generator().manual_seed(0)
    return torch.randn(1, H, T, D, generator=g), *(torch.randn(1, K, T, D, generator=g) for _ in range(2))


def attend(policy, q, k, v, pieces=(T,)):
    """Output and live counts when the tokens arrive in pieces."""
    state, outputs, counts, stop = LayerState(), [], [], 0
    for size in pieces:
        start, stop = stop, stop + size
        out, live = policy.attend(state, q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], Scores(0.4))
        outputs.append(out)
        counts.append(live)
    return torch.cat(outputs, 2), torch.cat(counts, 2)


def walk(qkv, choose):
    """Output of a rule stated as: which of the kept tokens (per KV head) goes, given the weights of the newest query."""
    q, k, v = qkv
    kept = [[] for _ in range(K)]
    output = torch.zeros(1, H, T, D)
    for i in range(T):
        weights = torch.zeros(H, T)
        for h in range(H):
            head = kept[h // 2]
            if h % 2 == 0:
                head.append(i)
            w = torch.softmax(torch.stack([q[0, h, i] @ k[0, h // 2, j] * 0.4 for j in head]), 0)
            weights[h, head] = w
            output[0, h, i] = w @ v[0, h // 2, head]
        choose(kept, weights, i)
    return output


def test_tova_drops_what_the_newest_query_of_the_layer_attends_to_least(qkv):
    def choose(kept, weights, i):
        if len(kept[0]) == 5:
            lowest = min(kept[0], key=lambda j: weights[:, j].sum().item())
            for head in kept:
                head.remove(lowest)

    torch.testing.assert_close(attend(TovaPolicy(5), *qkv)[0], walk(qkv, choose))


def test_h2o_drops_the_lightest_hitter_outside_the_recent_half(qkv):
    totals = torch.zeros(K, T)

    def choose(kept, weights, i):
        for head in range(K):
            totals[head] += weights[2 * head : 2 * head + 2].sum(0)
            if len(kept[head]) == 6:
                old = [j for j in kept[head] if j <= i - 3]
                kept[head].remove(min(old, key=lambda j: totals[head, j].item()))

    torch.testing.assert_close(attend(H2OPolicy(6), *qkv)[0], walk(qkv, choose))


def test_keydiff_drops_the_key_most_similar_to_the_mean_of_the_normalised_ones(qkv):
    """The definition is the paper's, as kvpress computes it over the keys that a head holds."""

    def choose(kept, weights, i):
        for index, head in enumerate(kept):
            if len(head) == 5:
                keys = qkv[1][0, index, head]
                anchor = F.normalize(keys, dim=-1).mean(0, keepdim=True)
                head.pop(int(F.cosine_similarity(keys, anchor, dim=-1).argmax()))

    torch.testing.assert_close(attend(KeyDiffPolicy(5), *qkv)[0], walk(qkv, choose))


def test_keydiff_by_hand():
    """Keys to the right, up, diagonal, left: the diagonal goes first, though longest, then up, between right and left.

    With each key turned by a half the other head has to choose alike. A last key like the first: both are as close to the
    mean of right, left, right, so the older one goes.
    """
    keys = torch.tensor([[1.0, 0], [0, 2], [30, 30], [-1, 0], [1, 0]])
    key = torch.stack([keys, -keys])[None]
    query, value = torch.zeros(1, 4, 5, 2), torch.eye(5).expand(1, 2, 5, 5)
    state = LayerState()
    output, live = KeyDiffPolicy(3).attend(state, query, key, value, Scores(1.0))
    seen = [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 3, 4]]  # every query weighs what it sees alike
    for head in range(4):
        assert [row.nonzero()[:, 0].tolist() for row in output[0, head]] == seen
    assert live[0].tolist() == [[1, 2, 3, 3, 3]] * 2
    assert state.notes["live"][0].nonzero()[:, 1].tolist() == [3, 4, 3, 4]


def test_the_length_of_a_key_does_not_matter_to_keydiff(qkv):
    q, k, _ = qkv
    stretched = k * torch.logspace(-2, 2, T)[torch.randperm(T, generator=torch.Generator().manual_seed(1)), None]
    states = LayerState(), LayerState()
    for state, key in zip(states, (k, stretched), strict=True):
        KeyDiffPolicy(5).attend(state, q, key, k, Scores(0.4))
    assert torch.equal(*(state.notes["live"] for state in states))


def test_streaming_llm_keeps_sinks_and_the_last_tokens(qkv):
    q, k, v = qkv
    i, j = torch.arange(T)[:, None], torch.arange(T)[None]
    seen = (j <= i) & ((j < 2) | (i - j < 5))
    expected, _ = reference.attend(q, k, v, seen.expand(1, K, T, T), 0.4)
    torch.testing.assert_close(attend(StreamingLLMPolicy(7, num_sinks=2), q, k, v)[0], expected)


@pytest.mark.parametrize("rule", [TovaPolicy, H2OPolicy, KeyDiffPolicy, RandomPolicy, lambda b: StreamingLLMPolicy(b, 2)])
@pytest.mark.parametrize("pieces", [(T,), (4, 1, 7, 3), (1,) * T])
def test_no_rule_exceeds_its_budget_and_pieces_do_not_matter(qkv, rule, pieces):
    output, live = attend(rule(6), *qkv, pieces)
    assert live.max() == 6
    assert torch.equal(live[0, 0], torch.arange(1, T + 1).clamp(max=6))
    if rule is not RandomPolicy:
        torch.testing.assert_close(output, attend(rule(6), *qkv)[0])


def test_full_keeps_everything(qkv):
    _, live = attend(FullPolicy(), *qkv, (4, 11))
    assert torch.equal(live[0, 1], torch.arange(1, T + 1))


def test_left_padding_changes_nothing(qkv):
    q, k, v = qkv
    pad = torch.randn(1, K, 3, D)
    padded = [torch.cat([torch.randn(1, H, 3, D), q], 2), torch.cat([pad, k], 2), torch.cat([pad, v], 2)]
    document = torch.tensor([[-1] * 3 + [0] * T])
    for rule in (TovaPolicy(5), H2OPolicy(6), KeyDiffPolicy(6), StreamingLLMPolicy(7, 2), FullPolicy()):
        out, live = rule.attend(LayerState(document), *padded, Scores(0.4))
        plain, count = attend(rule, q, k, v)
        torch.testing.assert_close(out[:, :, 3:], plain)
        assert torch.equal(live[:, :, 3:], count)


def test_budgets_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="at least 2"):
        TovaPolicy(1)
    with pytest.raises(ValueError, match="keydiff needs a budget of at least 3"):
        KeyDiffPolicy(2)
    with pytest.raises(ValueError, match="above its 4 sinks"):
        StreamingLLMPolicy(4)


@settings(deadline=None, max_examples=80)
@given(
    st.integers(1, 12), st.integers(1, 14), st.integers(0, 4), st.one_of(st.none(), st.integers(1, 14)), st.integers(0, 999)
)
def test_live_keys_are_the_visible_ones_counted(num_tokens, window, padding, sliding, seed):
    g = torch.Generator().manual_seed(seed)
    size = num_tokens + padding
    evict = torch.rand(2, K, size, generator=g) < 0.6
    document = torch.zeros(2, size, dtype=torch.long)
    document[0, :padding] = -1
    state, key = LayerState(document), torch.zeros(2, K, size, D)
    for num_queries in (size, 1):
        query = torch.zeros(2, H, num_queries, D)
        for decided in (evict, None):
            seen = visible_keys(decided, window, state, query, key, sliding).sum(-1)
            assert torch.equal(live_keys(decided, window, state, num_queries, key, sliding), seen)


def test_random_drops_every_older_token_equally_often_and_never_the_newest():
    """One step at a budget of 6: of the 5 older tokens each goes in a fifth of the draws, whatever the order of slots."""
    position = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(i)) for i in range(2000)])
    position = position[:, None].expand(-1, K, -1)
    counts = torch.zeros(K, 6)
    for seed in range(2):
        for layer in range(2):
            weights, total = torch.zeros(2000, H, 6), torch.zeros(2000, K, 6)
            now = torch.full((2000,), 5)
            # Rows of a batch draw alike: other rows are other steps.
            ranks = RandomPolicy(6, seed).rank(
                Ranking(
                    weights, total, position + 6 * torch.arange(2000)[:, None, None], now + 6 * torch.arange(2000), layer
                )
            )
            gone = position.gather(2, ranks.argmin(2, keepdim=True))[:, :, 0]
            for head in range(K):
                counts[head] += torch.bincount(gone[:, head], minlength=6)
    assert counts[:, 5].sum() == 0
    assert (counts[:, :5] - 1600).abs().max() < 5 * (8000 * 0.2 * 0.8) ** 0.5
    assert not torch.equal(counts[0], counts[1])


def test_autocast_does_not_round_the_logits_of_decisions():
    g = torch.Generator().manual_seed(0)
    predictor = AdapterPredictor(16, K, DmsConfig())
    predictor.weight.data.normal_(generator=g)
    residual = torch.randn(2, T, 16, generator=g)
    expected = predictor(residual)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(predictor(residual), expected)
