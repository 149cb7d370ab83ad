"""lm-eval's model `dms`: what is asked reaches the chains, what they say the graders, and nothing is drawn twice."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM, AutoTokenizer

from dms_lab import models
from dms_lab.attachment import retrofit
from dms_lab.cache.masked import MaskedCache
from dms_lab.checkpoint import fingerprint, save_checkpoint
from dms_lab.evaluation import lm as lm_module
from dms_lab.evaluation.attached import Attached, attach
from dms_lab.evaluation.hard import make_problems
from dms_lab.evaluation.lm import DmsLM
from dms_lab.evaluation.store import SampleStore
from dms_lab.policies import HEURISTICS, FullPolicy
from dms_lab.policies.dms import DmsConfig
from dms_lab.tiny import corpus

TINY = models.EMBEDDED
END = "</think>"


def ask(task, prompt, doc, chains=1, **kwargs):
    request = Instance("generate_until", doc, (prompt, {"until": [], "max_gen_toks": 12} | kwargs), 0, (task, 0, chains))
    return [request] * chains


@pytest.fixture(scope="module")
def tiny():
    return attach(str(TINY), None, "full", None, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def random(base_folder):
    """A random model under DMS with decisions that matter, and its checkpoint's folder."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    handle = retrofit(model, DmsConfig(window=4))
    with torch.no_grad():
        for predictor in handle.predictors.values():
            for parameter in predictor.parameters():
                parameter.add_(torch.randn_like(parameter))
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    return Attached(handle, handle.policy, tokenizer, {"path": "random"})


def lines(problem, tokenizer):
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": problem.prompt}], add_generation_prompt=True, tokenize=False
    )


def test_a_prompt_has_the_ids_that_the_project_itself_gives_it(tiny):
    problem = make_problems("road", 1, 128, 0)[0]
    (job,) = DmsLM(attached=tiny)._jobs(ask("dms_tiny_road", lines(problem, tiny.tokenizer), {"id": "a"}))
    assert job.ids == corpus.encode_prompt(problem, tiny.tokenizer)
    assert (job.problem, job.chain, job.think_end) == ("a", 0, END)


def test_k_samples_arrive_are_different_and_come_again(random, tmp_path):
    requests = ask("dms_aime24", "What?", {"id": "a", "answer": "1"}, 6, do_sample=True, temperature=1.0)
    requests += ask("dms_aime24", "Why?", {"id": "b", "answer": "1"}, 6, do_sample=True, temperature=1.0)
    model = DmsLM(attached=random, samples=str(tmp_path / "one"), places=5)
    replies = model.generate_until(requests)
    assert len(replies) == 12
    assert len(set(replies)) == 12
    stored = list(model.stored(model.asked[0]))
    assert [(s.problem, s.chain) for s in stored] == [(p, c) for p in "ab" for c in range(6)]
    assert [s.text for s in stored] == replies
    assert DmsLM(attached=random, places=3).generate_until(requests) == replies
    assert set(DmsLM(attached=random, seed=1).generate_until(requests)).isdisjoint(replies)


def test_greedy_chains_are_equal_whatever_the_temperature_says(random):
    requests = ask("dms_aime24", "What?", {"id": "a", "answer": "1"}, 3, do_sample=False, temperature=0.9, top_p=0.5)
    assert len(set(DmsLM(attached=random).generate_until(requests))) == 1


def test_what_the_store_has_is_not_generated_again(random, tmp_path, monkeypatch):
    requests = ask("dms_aime24", "What?", {"id": "a", "answer": "1"}, 3, do_sample=True, temperature=1.0)
    store = SampleStore(tmp_path, "one")
    first = DmsLM(attached=random, samples=store).generate_until(requests[:2])
    asked = []

    class Spy(lm_module.Engine):
        def run(self, prompts, on_token=None):
            asked.extend(prompts)
            return super().run(prompts, on_token)

    monkeypatch.setattr(lm_module, "Engine", Spy)
    again = DmsLM(attached=random, samples=store).generate_until(requests)
    assert again[:2] == first
    assert [(p.problem, p.chain) for p in asked] == [("a", 2)]
    asked.clear()
    DmsLM(attached=random, samples=store).generate_until(
        ask("dms_aime24", "Another", {"id": "a", "answer": "1"}, 2, do_sample=True, temperature=1.0)
    )
    assert len(asked) == 2  # another prompt under the same id is another chain


def test_a_longer_limit_draws_only_what_was_cut_and_goes_on_as_it_began(random, tmp_path):
    def requests(most):
        return ask("dms_aime24", "What?", {"id": "a", "answer": "1"}, 8, do_sample=True, temperature=3.0, max_gen_toks=most)

    model = DmsLM(attached=random, samples=str(tmp_path), places=8)
    model.generate_until(requests(150))
    short = {s.chain: s for s in model.stored(model.asked[-1])}
    assert {s.finish_reason for s in short.values()} == {"eos", "length"}
    model.generate_until(requests(200))
    long = {s.chain: s for s in model.stored(model.asked[-1])}
    for chain, sample in long.items():
        assert sample.ids[:150] == short[chain].ids
        assert (sample.created == short[chain].created) == (short[chain].finish_reason == "eos")
    assert model.asked[0].run == model.asked[1].run
    shortened = [r for r in model.generate_until(requests(20))]
    assert [str(r) for r in shortened] == [model.text_of(long[c].ids[:20]) for c in range(8)]
    assert [r.truncated for r in shortened] == [len(long[c].ids) > 20 for c in range(8)]


@pytest.mark.parametrize(
    ("thinking", "prompt", "is_ours", "expected"),
    [
        ("auto", "question<think>", True, END),
        ("auto", "question", True, END),
        ("auto", "question<think>\n\n</think>\n\n", True, None),
        ("auto", "earlier <think>a</think> b <think>", True, END),
        ("auto", "question", False, None),
        ("yes", "question", False, END),
        ("no", "question<think>", True, None),
    ],
)
def test_whether_an_answer_stands_after_a_thought(tiny, thinking, prompt, is_ours, expected):
    assert DmsLM(attached=tiny, thinking=thinking).think_end(prompt, is_ours) == expected


def test_templates_that_can_are_told_whether_to_think(tiny):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = "{{ 'off' if enable_thinking is defined and not enable_thinking else 'on' }}"
    for thinking, expected in (("auto", "on"), ("yes", "on"), ("no", "off")):
        model = DmsLM(attached=replace(tiny, tokenizer=tokenizer), thinking=thinking)
        assert model.apply_chat_template([{"role": "user", "content": "a"}]) == expected


def test_a_model_without_the_token_does_not_think(tiny):
    class Plain:
        def get_vocab(self):
            return {"a": 0}

    model = DmsLM(attached=tiny)
    model.tokenizer = Plain()
    assert model.think_end("question") is None


def test_no_stop_string_holds_within_a_thought(tiny):
    model = DmsLM(attached=tiny)
    sampling, most = model.sampling_of({"until": ["\n\n"], "max_tokens": 7, "do_sample": True, "temperature": 0.5}, END)
    assert (sampling.stop, sampling.stop_after, sampling.temperature, most) == (("\n\n",), END, 0.5, 7)
    assert model.sampling_of({"until": [], "top_p": 0.9}, END)[0].stop_after is None


def test_keywords_without_a_meaning_here_are_refused(tiny):
    with pytest.raises(ValueError, match="hold num_beams; known are until, temperature"):
        DmsLM(attached=tiny).sampling_of({"num_beams": 4, "until": []}, None)
    with pytest.raises(ValueError, match="model_args hold parallelize, which the model dms does not know"):
        DmsLM(attached=tiny, parallelize=True)
    with pytest.raises(ValueError, match="thinking='maybe' is not known"):
        DmsLM(attached=tiny, thinking="maybe")


def test_a_run_is_named_by_what_decides_its_tokens_and_not_by_their_number(tiny, random):
    def name(model, **kwargs):
        return model.run_of(model.sampling_of({"until": []} | kwargs, None)[0])

    plain = name(DmsLM(attached=tiny))
    assert name(DmsLM(attached=tiny, places=3, attention="torch", step="eager"), max_gen_toks=99) == plain
    sampled = {"do_sample": True, "temperature": 0.6}
    others = [
        name(DmsLM(attached=random)),
        name(DmsLM(attached=tiny, seed=1)),
        name(DmsLM(attached=tiny, storage="int8")),
        name(DmsLM(attached=tiny, attention="triton")),
        name(DmsLM(attached=tiny, attention="triton", step="graph")),
        name(DmsLM(attached=tiny, deterministic=True)),
        name(DmsLM(attached=tiny, deterministic=True, places=3)),
        name(DmsLM(attached=tiny), **sampled),
        name(DmsLM(attached=tiny), **sampled, top_p=0.9),
    ]
    assert len({plain, *others}) == 10


def test_chains_that_fail_are_named_and_the_others_are_kept(tiny, tmp_path):
    good = ask("dms_tiny_road", "a<think>", {"id": "good", "answer": "x"})
    bad = ask("dms_tiny_road", "b " * 3000, {"id": "bad", "answer": "x"})
    model = DmsLM(attached=tiny, samples=str(tmp_path))
    with pytest.raises(
        ValueError, match=r"1 of 2 chains could not be generated: dms_tiny_road, problem bad, chain 0: .*kept"
    ):
        model.generate_until(bad + good)
    assert [s.problem for s in model.stored(model.asked[0])] == ["good"]


def test_other_tasks_are_given_the_answer_alone(tiny):
    problem = make_problems("road", 1, 256, 3)[0]
    requests = ask("gsm8k", lines(problem, tiny.tokenizer), {"question": "q"}, max_gen_toks=96)
    assert DmsLM(attached=tiny).generate_until(requests) == [problem.answer]
    requests = ask("gsm8k", lines(problem, tiny.tokenizer), {"question": "q"}, max_gen_toks=3)
    assert DmsLM(attached=tiny, thinking="yes").generate_until(requests) == [""]


# -- loglikelihood -----------------------------------------------------------------------------------------------------
def scored(model, pairs):
    requests = [Instance("loglikelihood", {}, pair, i, ("t", i, 1)) for i, pair in enumerate(pairs)]
    return [found[0] for found in model.loglikelihood(requests)]


PAIRS = [("def f(x):\n    return x + 1\n" * 4, " return"), ("return x", " + 1"), ("def f(x):\n" * 9, "    return x + 1")]


def test_evictions_are_active_in_what_is_scored(random):
    model = DmsLM(attached=random, batch_size=3)
    found = scored(model, PAIRS)
    expected = []
    for context, continuation in PAIRS:
        ids, rest = model._encode_pair(context, continuation)
        whole = ids + rest
        cache = MaskedCache(random.make_policy())
        with torch.no_grad():
            logits = random.handle.model(torch.tensor([whole]), past_key_values=cache, use_cache=True).logits[0]
        logits = logits[len(ids) - 1 : -1].log_softmax(-1)
        expected.append(float(logits.gather(1, torch.tensor(whole[len(ids) :])[:, None]).sum()))
    assert found == pytest.approx(expected, abs=1e-4)
    with random.handle.disabled():
        whole = replace(random, make_policy=FullPolicy)
        full = scored(DmsLM(attached=whole, batch_size=3), PAIRS)
    assert max(abs(a - b) for a, b in zip(found, full, strict=True)) > 1e-3


def test_full_attention_scores_as_the_original_model(base_folder):
    from lm_eval.models.huggingface import HFLM

    attached = attach(str(base_folder), None, "full", None, dtype="float32", device="cpu")
    original = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32),
        tokenizer=attached.tokenizer,
        batch_size=3,
    )
    assert scored(DmsLM(attached=attached, batch_size=3), PAIRS) == scored(original, PAIRS)


@pytest.mark.parametrize("policy", ["streaming_llm", "tova", "keydiff", "random"])
def test_rules_that_rank_score_alike_however_they_are_batched(base_folder, policy):
    attached = attach(str(base_folder), None, policy, 8, dtype="float32", device="cpu")
    alone = scored(DmsLM(attached=attached, batch_size=1), PAIRS)
    assert scored(DmsLM(attached=attached, batch_size=3), PAIRS) == pytest.approx(alone, abs=1e-4)


# -- what is attached --------------------------------------------------------------------------------------------------
def test_a_checkpoint_is_found_with_its_base(random, base_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    handle = retrofit(model, DmsConfig(window=4))
    save_checkpoint(tmp_path / "c", handle, "adapter", str(base_folder), fingerprint(model), {"cr": 4.0})
    attached = attach(None, str(tmp_path / "c"), None, None, dtype="float32", device="cuda:0")
    assert attached.handle.config == handle.config
    assert attached.num_heads == 4
    assert set(attached.identity) == {"weights", "dtype", "policy", "budget", "dms.json", "dms.safetensors"}


def test_an_attached_model_is_known_by_its_weights_and_their_dtype_and_not_by_its_path(base_folder, tmp_path):
    def identity(folder, dtype="float32", policy="full", budget=None):
        return attach(str(folder), None, policy, budget, dtype=dtype, device="cpu").identity

    same, other = tmp_path / "same", tmp_path / "other"
    shutil.copytree(base_folder, same)
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] += 1
    shutil.copytree(base_folder, other)
    model.save_pretrained(other)
    assert identity(base_folder) == identity(same)
    assert str(base_folder) not in json.dumps(identity(base_folder))
    names = [identity(base_folder), identity(other), identity(base_folder, "bfloat16")]
    names += [identity(base_folder, policy="tova", budget=budget) for budget in (8, 16)]
    assert len({json.dumps(name, sort_keys=True) for name in names}) == 5


def test_a_model_in_memory_is_named_by_its_weights(random, base_folder):
    attached = Attached.of(random.handle.model, random.tokenizer)
    requests = ask("dms_aime24", "What?", {"id": "a", "answer": "1"})
    assert DmsLM(attached=attached).generate_until(requests) == DmsLM(attached=random).generate_until(requests)
    names = {json.dumps(attached.identity, sort_keys=True)}
    predictor = next(iter(random.handle.predictors.values()))
    with torch.no_grad():
        predictor.weight[-1, -1] += 1
    names.add(json.dumps(Attached.of(random.handle.model, random.tokenizer).identity, sort_keys=True))
    with torch.no_grad():
        predictor.weight[-1, -1] -= 1
    assert len(names) == 2
    with pytest.raises(ValueError, match="no policy of its own"):
        Attached.of(AutoModelForCausalLM.from_pretrained(base_folder), random.tokenizer)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("m", "c", "full", None), "policy=full is for a model without a checkpoint"),
        (("m", "c", None, None), "give one of them; a checkpoint names its base"),
        ((None, None, None, None), "give checkpoint=<folder of a checkpoint>"),
        (("m", None, "h3o", None), f"choose one of full, {', '.join(HEURISTICS)}"),
        (("m", None, "tova", None), "needs budget="),
        (("m", None, "full", 9), "budget=9 is for"),
        ((None, None, "full", None), "give checkpoint="),
        (("no/such", None, "full", None), "no weights for model.path=no/such"),
    ],
)
def test_what_cannot_be_attached_is_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        attach(*values)


def test_replies_can_be_written_as_the_text_they_are(tiny):
    reply = lm_module.Reply("text", truncated=True)
    assert json.dumps([reply]) == '["text"]'
