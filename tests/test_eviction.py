"""Who decides, who is seen, how much must go: checked against slow statements of the same."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dms_lab import eviction


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 12), st.randoms(use_true_random=False), st.booleans())
def test_visible_is_the_one_line_of_the_definition(num_tokens, window, rng, with_documents):
    evict = torch.tensor([[[rng.random() < 0.5 for _ in range(num_tokens)] for _ in range(2)]])
    document = torch.tensor([sorted(rng.choice((-1, 0, 1)) for _ in range(num_tokens))]) if with_documents else None
    seen = eviction.visible(evict, window, key_document=document)
    for k in range(2):
        for i in range(num_tokens):
            for j in range(num_tokens):
                expected = j <= i and (not evict[0, k, j] or i - j < window)
                if document is not None:
                    expected = expected and document[0, i] == document[0, j] and document[0, j] >= 0
                assert seen[0, k, i, j] == expected


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(eviction.DECIDED_BY), st.integers(1, 9), st.integers(1, 12), st.randoms(use_true_random=False))
def test_govern_takes_the_value_from_the_deciding_token(decided_by, num_tokens, window, rng):
    x = torch.arange(num_tokens, dtype=torch.float)[None, None].repeat(1, 2, 1)
    document = torch.tensor([sorted((rng.choice((-1, 0, 1)) for _ in range(num_tokens)), reverse=True)])
    shift = {"self": 0, "next": 1, "delayed": window}[decided_by]
    got = eviction.govern(x, decided_by, window, document, fill=-1.0)
    free = eviction.govern(x, decided_by, window, None, fill=-1.0)
    for j in range(num_tokens):
        decider = j + shift
        inside = decider < num_tokens
        assert free[0, 0, j] == (decider if inside else -1)
        same = inside and document[0, decider] == document[0, j] and document[0, j] >= 0
        assert got[0, 1, j] == (decider if same else -1)


def test_the_drawing_in_the_docstring_is_true():
    evict = torch.tensor([[[False, True, False, False, False]]])
    rows = eviction.visible(evict, 3)[0, 0].int().tolist()
    assert rows[3] == [1, 1, 1, 1, 0]
    assert rows[4] == [1, 0, 1, 1, 1]


def test_immediate_eviction_leaves_a_token_to_itself_alone():
    seen = eviction.visible(torch.ones(1, 1, 4, dtype=torch.bool), 1)[0, 0]
    assert torch.equal(seen, torch.eye(4, dtype=torch.bool))


def test_noise_is_logistic_and_follows_its_key():
    draw = eviction.logistic_noise((200_000,), eviction.noise_generator(0, 1, 2, 3))
    assert abs(draw.mean()) < 0.02
    assert draw.std().item() == pytest.approx(math.pi / math.sqrt(3), rel=0.01)
    again = eviction.logistic_noise((200_000,), eviction.noise_generator(0, 1, 2, 3))
    assert torch.equal(draw, again)
    keys = [(1, 1, 2, 3), (0, 2, 2, 3), (0, 1, 0, 3), (0, 1, 2, 0)]
    assert not any(torch.equal(draw[:9], eviction.logistic_noise((9,), eviction.noise_generator(*k))) for k in keys)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 10), st.randoms(use_true_random=False))
def test_visibility_follows_the_given_positions_and_not_the_slots(num_queries, num_keys, window, rng):
    evict = torch.tensor([[[rng.random() < 0.5 for _ in range(num_keys)]]])
    queries = torch.tensor([[rng.randrange(12) for _ in range(num_queries)]])
    keys = torch.tensor([rng.sample(range(12), num_keys)])
    of_query = torch.tensor([[rng.choice((-1, 0, 1)) for _ in range(num_queries)]])
    of_key = torch.tensor([[rng.choice((-1, 0, 1)) for _ in range(num_keys)]])
    seen = eviction.visible(evict, window, queries, keys, of_query, of_key)
    for q in range(num_queries):
        for s in range(num_keys):
            i, j = queries[0, q], keys[0, s]
            expected = j <= i and (not evict[0, 0, s] or i - j < window)
            assert seen[0, 0, q, s] == (expected and of_query[0, q] == of_key[0, s] and of_key[0, s] >= 0)


def test_the_relaxed_decision_and_its_log_keep_agree():
    logit, noise = torch.tensor([-30.0, -0.2, 0.0, 0.3, 30.0, -math.inf]), torch.tensor(0.1)
    probability = eviction.evict_probability(logit, noise, 0.5)
    assert probability[1].item() == pytest.approx(1 / (1 + math.exp(0.2)))
    assert torch.allclose(eviction.log_keep(logit, noise, 0.5).exp(), 1 - probability, atol=1e-6)
    assert eviction.log_keep(logit, noise, 0.5)[-1] == 0
    assert eviction.log_keep(logit, noise, 0.5)[4] == pytest.approx(-60.2)  # still a slope where 1 - a is 0


def test_unknown_choices_are_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match="choose one of self, next, delayed"):
        eviction.govern(torch.zeros(1, 1, 3), "previous", 2)
    with pytest.raises(ValueError, match="choose one of live, decisions"):
        eviction.evict_target(4, 10, 5, "tokens")


def test_a_live_target_over_packed_documents_counts_a_window_each_and_never_exceeds_one():
    lengths, window, cr = (100, 60, 8), 16, 3
    old = sum(max(n - window, 0) for n in lengths)
    share = eviction.evict_target(cr, sum(lengths), old)
    assert sum(lengths) / (sum(lengths) - share * old) == pytest.approx(cr)
    assert eviction.evict_target(8, 20, 4) == 1
    assert eviction.evict_target(8, 10, 0) == 1


def test_cr_rises_linearly_and_stays():
    assert eviction.cr_at(0, 8, 100) == 1
    assert eviction.cr_at(40, 8, 100) == pytest.approx(4.5)
    assert eviction.cr_at(80, 8, 100) == eviction.cr_at(100, 8, 100) == 8


def test_a_live_target_gives_the_asked_ratio_at_the_training_length():
    tokens, window, cr = 512, 16, 8
    share = eviction.evict_target(cr, tokens, tokens - window, "live")
    live = window + (1 - share) * (tokens - window)
    assert tokens / live == pytest.approx(cr)
    assert eviction.evict_target(cr, tokens, tokens - window, "decisions") == 1 - 1 / cr


def test_padding_never_counts_in_the_retention_loss():
    real = torch.tensor([[True, True, False]])
    one = [torch.tensor([[[0.2, 0.4, 0.9]]]), torch.tensor([[[0.0, 0.2, 1.0]]])]
    two = [torch.tensor([[[0.2, 0.4, 0.0]]]), torch.tensor([[[0.0, 0.2, 0.0]]])]
    assert eviction.retention_loss(one, real, 0.5) == eviction.retention_loss(two, real, 0.5)
    assert eviction.retention_loss(one, real, 0.5).item() == pytest.approx(0.3)
    assert eviction.retention_loss(one, real, 0.1) == 0


@settings(deadline=None, max_examples=80)
@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(1, 7)), min_size=1, max_size=4), st.integers(1, 9))
def test_live_slots_are_those_that_the_last_query_of_a_document_sees(runs, window):
    """Documents as runs of one id (neighbours of equal id are one run); the oracle is the visibility rule itself."""
    document = torch.tensor([[name for name, length in runs for _ in range(length)]])
    num_tokens = document.shape[1]
    evict = torch.rand(1, 2, num_tokens, generator=torch.Generator().manual_seed(num_tokens)) < 0.6
    if not (document >= 0).any():
        return
    first = [i for i in range(num_tokens) if i == 0 or document[0, i] != document[0, i - 1]]
    unique = torch.tensor([[sum(f <= i for f in first) if document[0, i] >= 0 else -1 for i in range(num_tokens)]])
    seen = eviction.visible(evict, window, key_document=unique)
    ends = [i for i in range(num_tokens) if unique[0, i] >= 0 and (i + 1 == num_tokens or unique[0, i + 1] != unique[0, i])]
    live = seen[0, :, ends].sum(-1).float().mean(0).sum()
    found = eviction.live_ratio([evict.float()], unique, window)
    assert found.item() == pytest.approx(((unique >= 0).sum() / live).item())


def test_the_schedule_waits_for_its_start():
    assert eviction.cr_at(50, 8, 150, 1.0, start=50) == 1
    assert eviction.cr_at(100, 8, 150, 1.0, start=50) == pytest.approx(4.5)
    assert eviction.cr_at(10, 8, 150, 1.0, start=50) == 1


def test_two_sided_retention_also_costs_what_is_too_much():
    real = torch.ones(1, 2, dtype=torch.bool)
    one = [torch.tensor([[[0.9, 0.7]]])]
    assert eviction.retention_loss(one, real, 0.5, "one_sided") == 0
    assert eviction.retention_loss(one, real, 0.5, "two_sided").item() == pytest.approx(0.3)
    assert eviction.retention_loss(one, real, 0.0, "two_sided") == 0
    with pytest.raises(ValueError, match="choose one of one_sided, two_sided"):
        eviction.retention_loss(one, real, 0.5, "both")
