"""A decode step in a fixed form gives what the eager one gives, waits for nothing, and is captured anew when it must be."""

import numpy as np
import pytest
import torch
from test_retrofit import build, decide

from dms_lab.attachment import retrofit
from dms_lab.cache import fixed
from dms_lab.cache.compact import CompactCache
from dms_lab.chains import Prompt, Settings
from dms_lab.policies import FullPolicy, OffloadPolicy, QuestPolicy, StreamingLLMPolicy, TovaPolicy
from dms_lab.policies.dms import DmsConfig
from dms_lab.sampling import Sampler, SamplingConfig

pytest.importorskip("triton", reason="the package triton is not installed: pip install dms_lab[gpu]")

from no_sync import SynchronisedError, no_sync
from paged_cases import DEVICE

from dms_lab.attention import paged
from dms_lab.attention.kernels import paged as kernels
from dms_lab.decode_step import DecodeStep, Given
from dms_lab.generation import Engine

GREEDY, SAMPLED = SamplingConfig(), SamplingConfig(temperature=0.8, top_p=0.95, top_k=50, min_p=0.01, seed=2)
PROMPTS = [Prompt(f"p{i}", list(range(5 + i, 5 + i + size)), chain) for i, size in ((0, 4), (1, 9)) for chain in range(2)]


@pytest.fixture(autouse=True)
def plain_prompts(monkeypatch):
    """Prompts are not what is tested here, and the interpreter is slow."""

    def attend(query, chunk, slots, scores):
        plain = paged.Slots(slots.pool, slots.table, slots.length)
        return paged.attend_chunk(query, chunk, plain, scores)[0]

    monkeypatch.setattr(kernels, "attend_chunk", attend)


def small(family="qwen3", **extra):
    model = build(family, **({"num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8} | extra)).to(DEVICE)
    return decide(retrofit(model, DmsConfig(window=3)))


def answered(handle, make=None, sampling=GREEDY, prompts=PROMPTS, **changes):
    settings = Settings(**({"max_new_tokens": 6, "places": 2, "page_size": 4} | changes))
    engine = Engine(handle, (make or handle.policy)(), settings, sampling, [2])
    found = {(g.problem, g.chain): g for g in engine.run(prompts)}
    assert engine.cache.pool.count_free() == engine.cache.pool.num_pages
    return found, engine


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for key, mine in wanted.items():
        other = found[key]
        assert (other.ids, other.finish_reason, other.error) == (mine.ids, mine.finish_reason, mine.error)
        assert other.usage == mine.usage
        for name in ("live", "read", "held_bytes"):
            assert np.array_equal(getattr(other.trace, name), getattr(mine.trace, name))


# -- in the engine -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "sampling", "storage"),
    [(None, SAMPLED, "model"), (FullPolicy, GREEDY, "fp8"), (lambda: StreamingLLMPolicy(6, 2), GREEDY, "int8")],
)
def test_chains_and_what_they_cost_are_those_of_eager_steps(make, sampling, storage):
    handle = small()
    wanted, _ = answered(handle, make, sampling, storage=storage)
    found, engine = answered(handle, make, sampling, storage=storage, attention="triton", step="graph")
    assert_same(found, wanted)
    assert (engine._ahead.step.num_captures > 0) == (DEVICE.type == "cuda")


SLIDING = {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}


@pytest.mark.parametrize(
    ("make", "storage", "sliding"),
    [(None, "model", 6), (None, "int8", 5), (None, "model", 3), (FullPolicy, "fp8", 6), (FullPolicy, "model", 1)],
)
def test_layers_with_a_sliding_window_take_the_same_steps(make, storage, sliding):
    handle = small("gemma3_text", sliding_window=sliding, **SLIDING)
    changes = {"storage": storage, "max_new_tokens": 10}
    wanted, _ = answered(handle, make, SAMPLED, **changes)
    found, engine = answered(handle, make, SAMPLED, attention="triton", step="graph", **changes)
    assert_same(found, wanted)
    assert engine._ahead is not None


def test_a_chain_that_ends_leaves_no_trace_of_the_step_that_it_was_ahead(monkeypatch):
    handle = small()
    wanted, _ = answered(handle)
    ends = {(g.problem, g.chain): g.ids[2 + i] for i, g in enumerate(wanted.values())}
    stop = SamplingConfig(stop_ids=tuple(set(ends.values())))
    wanted, _ = answered(handle, sampling=stop)
    assert {g.finish_reason for g in wanted.values()} == {"stop"}
    launched = []
    launch = DecodeStep.launch
    monkeypatch.setattr(DecodeStep, "launch", lambda self, given: launched.extend(given) or launch(self, given))
    found, _ = answered(handle, sampling=stop, attention="triton", step="graph")
    assert_same(found, wanted)
    assert len(launched) > sum(len(g.ids) - 1 for g in wanted.values())  # there were such steps


def test_a_tight_pool_sends_chains_back_and_near_its_end_steps_are_eager():
    handle = small()
    settings = {"make": FullPolicy, "num_pages": 9, "max_new_tokens": 9, "prompts": PROMPTS[1:3], "reserve": 0.0}
    wanted, _ = answered(handle, **settings)
    found, _ = answered(handle, **settings, attention="triton", step="graph")
    assert sum(g.preemptions for g in found.values()) > 0
    assert_same(found, wanted)


def test_a_pool_too_small_for_the_only_chain_ends_it_with_the_same_sentence():
    handle = small()
    settings = {"make": FullPolicy, "num_pages": 5, "max_new_tokens": 14, "prompts": PROMPTS[:1]}
    wanted, _ = answered(handle, **settings)
    assert "too small for this sequence alone" in wanted["p0", 0].error
    assert_same(answered(handle, **settings, attention="triton", step="graph")[0], wanted)


# -- the step itself ---------------------------------------------------------------------------------------------------
def filled(handle, num_tokens=6, num_places=2, sampling=GREEDY, **settings):
    """A step over places that hold a prompt of `num_tokens` each; the table has one more."""
    cache = CompactCache(handle.policy(), num_places=num_places + 1, attention="triton", **({"page_size": 4} | settings))
    step = DecodeStep(handle, cache, Sampler(sampling, [2]), num_places)
    cache.rows = torch.arange(num_places, device=DEVICE)
    ids = (5 + torch.arange(num_places * num_tokens, device=DEVICE)).view(num_places, -1)
    with torch.no_grad():
        step.base(input_ids=ids, past_key_values=cache, use_cache=True, dms=handle.hard(cache))
    return step


def go(step, position, places=(0, 1), ids=(7, 8)):
    given = {place: Given(token, position, 0.3) for place, token in zip(places, ids, strict=False)}
    if not step.is_ready(places):
        assert step.make_ready(places)
    return step.launch(given).read()


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3_text"])
def test_a_step_waits_for_nothing(family, monkeypatch):
    layers = SLIDING if family == "gemma3_text" else {"num_hidden_layers": 2}
    step = filled(small(family, **layers), sampling=SAMPLED)
    run, step.capture = step._run, None

    def guarded():
        with no_sync(monkeypatch):
            run()

    step._replay = guarded
    go(step, 6)
    found = go(step, 7, ids=(-1, -1))
    assert [mine.is_sound for mine in found] == [True, True]
    assert step.cache.layers[0].slots.seen.tolist() == [8, 8, 0]


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool((x > 0).any()),
        lambda x: int(x.argmax()),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: torch.tensor([1.0, 2.0]),
        lambda x: x.repeat_interleave(torch.ones(1, dtype=torch.long).expand(x.shape[0]), dim=0),
    ],
)
def test_the_guard_sees_a_step_that_waits(wait, monkeypatch):
    step = filled(small())
    step.base.layers[0].register_forward_hook(lambda module, args, output: wait(output) and None)
    run, step.capture = step._run, None

    def guarded():
        with no_sync(monkeypatch):
            run()

    monkeypatch.setattr(kernels, "append", lambda *args: None)
    monkeypatch.setattr(kernels, "decode", lambda query, slots, scores: query.clone())
    step._replay = guarded
    with pytest.raises(SynchronisedError):
        go(step, 6)


def addresses(step):
    tensors = [step.given, step.found, step.token, *fixed.tensors(step.cache)]
    return [(x.data_ptr(), x.shape) for x in tensors]


class Recorded:
    """Stands in for `torch.cuda.graph`: what was captured runs on the tensors that it was captured with, or fails."""

    def __init__(self, step):
        self.step, self.captures = step, 0
        step.capture = self

    def __call__(self, run):
        self.captures += 1
        run()  # to warm up
        before = addresses(self.step)

        def replay():
            assert addresses(self.step) == before, "a graph would run on tensors that are no more"
            run()

        return replay


def test_no_tensor_moves_from_step_to_step_and_a_step_is_captured_anew_when_one_did():
    plain, step = (filled(small(), page_size=2, num_pages=60) for _ in range(2))
    graph, moved, before = Recorded(step), 0, None
    for position in range(6, 14):
        wanted, found = go(plain, position, ids=(-1, 9)), go(step, position, ids=(-1, 9))
        assert found == wanted
        assert torch.equal(step.logits, plain.logits)
        moved += before is not None and addresses(step) != before
        before = addresses(step)
    assert graph.captures == step.num_captures == 1 + moved == 2  # a wider table
    step.cache.pool.grow(1)
    step.cache.secured = 0
    go(step, 14)
    assert graph.captures == 3


def test_room_and_tables_end_with_the_sliding_window():
    step = filled(small("gemma3_text", sliding_window=6, **SLIDING), page_size=2, num_tokens=9)
    graph, wide, sliding = Recorded(step), *(layer.slots for layer in step.cache.layers)
    for position in range(9, 21):
        go(step, position)
    assert sliding.limit == 6
    assert sliding.table.shape[2] == 3 < wide.table.shape[2]
    assert not sliding.is_narrow(1000)
    captures = graph.captures
    assert step.cache.live_slots()[:, 1].max() <= 6
    lengths = [x.length[:2] for x in (wide, sliding)]
    free = step.cache.pool.count_free()
    step.cache.secured = 0
    assert fixed.secure(step.cache, [0, 1], 2) == 2
    assert step.cache.pool._promised == sum(
        int((-(-(x + 2).clamp(max=most) // 2) + x // -2).sum()) for x, most in zip(lengths, (10**9, 6), strict=True)
    )
    assert step.cache.pool.count_free() >= free
    assert graph.captures == captures


def test_what_is_captured_knows_places_only_by_what_it_is_given():
    step = filled(small(), num_pages=20)
    graph = Recorded(step)
    found = go(step, 6, places=(1,), ids=(8,))
    assert found[1].live == pytest.approx(step.cache.layers[0].slots.length[1].double().mean().item())
    assert step.cache.layers[0].slots.seen.tolist() == [6, 7, 0]
    go(step, 7)
    assert step.cache.layers[0].slots.seen.tolist() == [7, 8, 0]
    assert graph.captures == 1


def test_any_other_use_of_the_cache_ends_what_was_secured():
    step = filled(small(), num_pages=40)
    cache, handle = step.cache, step.handle
    assert step.make_ready((0, 1))
    assert step.is_ready((0,))
    assert not step.is_ready((0, 1, 2))
    before = cache.pool.count_free()
    cache.release(torch.tensor([0], device=DEVICE))
    assert not step.is_ready((1,))
    assert cache.pool.count_free() > before
    assert step.make_ready((1,))
    cache.rows = torch.tensor([0], device=DEVICE)
    with torch.no_grad():
        step.base(
            input_ids=torch.tensor([[5, 6]], device=DEVICE), past_key_values=cache, use_cache=True, dms=handle.hard(cache)
        )
    assert not step.is_ready((1,))


@pytest.mark.parametrize("num_pages", [None, 13])
def test_room_is_promised_for_as_many_tokens_as_surely_fit(num_pages, monkeypatch):
    monkeypatch.setattr(kernels, "decode", lambda query, slots, scores: query.clone())
    step = filled(small(), num_pages=num_pages, num_tokens=3)
    cache = step.cache
    while fixed.secure(cache, [0, 1], 4):
        secured = cache.secured
        assert secured == 4 or num_pages is not None
        free = cache.pool.count_free()
        for _ in range(secured):
            go(step, 0)
        assert cache.pool.count_free() >= 0
        assert cache.pool.count_free() <= free
        if cache.layers[0].slots.seen[0] > 12:
            break
    assert (cache.secured == 0) or num_pages is None
    assert int(cache.layers[0].slots.length.max()) <= cache.layers[0].slots.table.shape[2] * 4


# -- refusals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("make", "settings", "sampling", "message"),
    [
        (None, {"attention": "torch"}, GREEDY, "step=graph needs attention=triton, not torch"),
        (lambda: TovaPolicy(9), {}, GREEDY, "not for policy tova; use step=eager"),
        (lambda: QuestPolicy(8, block=4), {"page_size": None}, GREEDY, "not for policy quest; use step=eager"),
        (lambda: OffloadPolicy(8), {}, GREEDY, "not for policy offload; use step=eager"),
        (None, {}, SamplingConfig(repetition_penalty=1.1), "repetition_penalty=1.1 needs step=eager"),
    ],
)
def test_what_cannot_be_fixed_is_refused_before_anything_is_read(make, settings, sampling, message):
    handle = small()
    with pytest.raises(ValueError, match=message):
        answered(handle, make, sampling, **({"attention": "triton", "step": "graph"} | settings))


def test_frequencies_that_follow_positions_are_refused():
    dynamic = small("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(ValueError, match="takes no rope_type=dynamic"):
        answered(dynamic, attention="triton", step="graph")
    with pytest.raises(ValueError, match="step='fast' is not known; choose one of auto, eager, graph"):
        Settings(step="fast")


# -- on a GPU ----------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the step is captured on one alone")
def test_on_a_gpu_a_captured_step_gives_eager_chains_and_waits_for_nothing(monkeypatch):
    handle = small(num_hidden_layers=2)
    wanted, _ = answered(handle, sampling=SAMPLED, attention="triton", deterministic=True, max_new_tokens=40)
    launch = DecodeStep.launch

    def strict(self, given):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(self, given)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(DecodeStep, "launch", strict)
    settings = {"sampling": SAMPLED, "attention": "triton", "step": "graph", "deterministic": True, "max_new_tokens": 40}
    found, engine = answered(handle, **settings)
    assert_same(found, wanted)
    assert engine._ahead.step.num_captures > 0
