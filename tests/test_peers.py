"""The bridge to kvpress: same prompts, same accounting, same lines, though its environment cannot hold dms_lab."""

import ast
import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from dms_lab import accounting, models, pareto, results
from dms_lab.attachment import retrofit
from dms_lab.chains import Generated
from dms_lab.evaluation import hard
from dms_lab.policies.full import FullPolicy
from dms_lab.tiny import tasks

FOLDER = Path(__file__).parent.parent / "experiments" / "peers" / "kvpress"
PYTHON = FOLDER / ".venv" / "bin" / "python"
MODULES = ("decoding", "lines", "meter", "presses", "prompts", "run")


@pytest.fixture
def peer(monkeypatch):
    """Imports a module of the folder, as its scripts do, and forgets it afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(models.EMBEDDED)


def write_prompts(peer, monkeypatch, path, **options):
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["prompts.py", "--out", str(path), *words])
    peer("prompts").main()


class Seen(Exception):
    """Stops an evaluation once its prompts are known."""


def prompts_that_dms_lab_evaluates(family, problems, tokenizer, monkeypatch):
    def generate(model, make_policy, prompts, **_):
        raise Seen(list(prompts))

    monkeypatch.setattr(hard, "generate_greedy", generate)
    label = hard.Label("r", "tiny", "full", 1.0, None, 0, "abc")
    with pytest.raises(Seen) as seen:
        hard.evaluate_tasks(SimpleNamespace(model=None), FullPolicy, tokenizer, {family: problems}, label)
    return seen.value.args[0]


def test_the_prompts_file_has_the_prompts_that_dms_lab_evaluates(peer, tokenizer, monkeypatch, tmp_path):
    path = tmp_path / "prompts.jsonl"
    write_prompts(peer, monkeypatch, path, count=3, length=96, seed=5)
    prompts = peer("run").read_prompts(path)
    assert list(dict.fromkeys(p.task for p in prompts)) == list(tasks.FAMILIES)
    for family in tasks.FAMILIES:
        problems = hard.make_problems(family, 3, 96, 5)
        found = [p for p in prompts if p.task == family]
        assert [p.ids for p in found] == prompts_that_dms_lab_evaluates(family, problems, tokenizer, monkeypatch)
        assert [p.answer for p in found] == [p.answer for p in problems]


@pytest.mark.parametrize("name", [name for name in MODULES if name != "prompts"])
def test_what_runs_beside_kvpress_imports_nothing_of_dms_lab(name):
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    imported = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    imported += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert imported
    assert not [module for module in imported if module.split(".")[0] == "dms_lab"]


REQUESTS = [
    accounting.Request(
        kv_reads=900.0, peak_tokens=60.0, live_tokens=50.0, num_tokens=505, num_generated=30, kv_bytes_peak=120
    ),
    accounting.Request(
        kv_reads=300.0, peak_tokens=80.0, live_tokens=70.5, num_tokens=480, num_generated=11, kv_bytes_peak=161
    ),
]


def answered(lines, request, task, right):
    held = lines.Counts(request.kv_reads, request.peak_tokens, request.live_tokens)
    live = lines.Counts(request.kv_reads / 2, request.peak_tokens / 2, request.live_tokens / 2)
    return lines.Answered(task, right, request.num_tokens, request.num_generated, held, live, request.kv_bytes_peak, 0.5)


def test_costs_are_those_of_dms_labs_accounting(peer):
    lines = peer("lines")
    usage = lines.usage([answered(lines, request, "road", True) for request in REQUESTS])
    expected = dataclasses.asdict(accounting.usage(REQUESTS))
    shared = expected.keys() & usage.keys()
    assert shared == {"kv_reads", "peak_tokens", "kv_bytes_peak", "measured_cr", "tokens_generated"}
    assert {name: usage[name] for name in shared} == pytest.approx({name: expected[name] for name in shared})
    assert usage["live_measured_cr"] == pytest.approx(2 * expected["measured_cr"])


def test_a_line_is_a_result_with_live_fields_beside_it(peer, monkeypatch, tmp_path):
    lines = peer("lines")
    monkeypatch.setattr(lines, "PACKAGES", ("torch", "transformers"))
    answers = [
        answered(lines, r, task, right) for r, task, right in zip(REQUESTS, ("road", "ledger"), (True, None), strict=True)
    ]
    path = tmp_path / "results.jsonl"
    prompts = peer("run").Prompt([1], length=512), peer("run").Prompt([2], length=512)
    asked = peer("run").asked(list(prompts), 60)
    lines.append(path, lines.result_lines(lines.Label("tiny", "kvpress/TOVAPress", 4.0, 0, "abc", asked), answers))
    frame = results.load(path)
    assert list(frame["settings"]) == [{"length": 512, "live_tokens": 60}] * 2
    assert [list(scores) for scores in frame["problem_scores"]] == [[1.0], []]
    assert list(frame["task"]) == ["road", "ledger"]
    assert frame["accuracy"][0] == 1.0
    assert frame["accuracy"].isna()[1]
    fields = {f.name for f in dataclasses.fields(results.Result)}
    assert set(frame) - fields == {"live_measured_cr", "live_kv_reads", "live_peak_tokens"}
    row = json.loads(path.read_text().splitlines()[0])
    results.Result(**{name: value for name, value in row.items() if name in fields})


@pytest.mark.parametrize(("successes", "trials"), [(0, 16), (7, 16), (16, 16), (1, 1)])
def test_intervals_are_dms_labs(peer, successes, trials):
    assert peer("lines").wilson_interval(successes, trials) == pareto.wilson_interval(successes, trials)


@pytest.mark.parametrize(
    "text", ["a</think> 4<|im_end|>", "a</think> 5<|im_end|>", " 4<|im_end|>", "a</think> 4", "a<|im_end|>"]
)
@pytest.mark.parametrize("reason", ["eos", "length"])
@pytest.mark.parametrize("answer", [" 4", ""])
def test_answers_are_judged_as_in_dms_lab(peer, tokenizer, text, reason, answer):
    generated = Generated(tokenizer(text, add_special_tokens=False).input_ids, reason, REQUESTS[0])
    told = peer("lines").is_right(text, reason == "eos", answer, "</think>", tokenizer.eos_token)
    assert told == hard.is_right(generated, tasks.Problem("ledger", "", "", answer), tokenizer)


def meter_of(peer, masked):
    layers = [SimpleNamespace(self_attn=SimpleNamespace(masked_key_indices=m)) for m in masked]
    config = SimpleNamespace(_attn_implementation="sdpa")
    return peer("meter").Meter(SimpleNamespace(model=SimpleNamespace(layers=layers), config=config))


def store(cache, num_tokens):
    for layer in range(2):
        cache.update(torch.zeros(1, 2, num_tokens, 4), torch.zeros(1, 2, num_tokens, 4), layer)


def test_bytes_are_those_of_the_whole_storage_and_counted_before_a_press_cuts(peer):
    meter = meter_of(peer, (None, None))
    store(meter.cache, 10)
    full = 2 * 2 * 2 * 10 * 4 * 4
    assert peer("meter").held_bytes(meter.cache) == full
    for layer in meter.cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :5], layer.values[:, :, :5]
    assert peer("meter").held_bytes(meter.cache) == full  # a view frees nothing
    for layer in meter.cache.layers:
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    assert peer("meter").held_bytes(meter.cache) == full // 2
    assert meter.cache.peak_bytes == full


def test_masked_slots_are_held_but_not_live(peer):
    index = torch.zeros(6, dtype=torch.long)
    meter = meter_of(peer, ((index, index, index), None))
    store(meter.cache, 10)
    meter.prefilled()
    store(meter.cache, 1)
    meter.step(meter.masked())
    held, live = meter.counts()
    assert (held.kv_reads, held.peak_tokens, held.end_tokens) == (11.0, 11.0, 11.0)
    assert (live.kv_reads, live.peak_tokens, live.end_tokens) == (9.5, 9.5, 9.5)  # 6 of 2 layers x 2 heads


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.exists(), reason="the environment of kvpress is not built: make kvpress")
def test_without_a_press_kvpress_costs_what_full_attention_costs_in_dms_lab(peer, tokenizer, monkeypatch, tmp_path):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    write_prompts(peer, monkeypatch, prompts, families="road", count=2, length=128, seed=3)
    words = ("--model", models.EMBEDDED, "--prompts", prompts, "--out", out)
    subprocess.run([PYTHON, FOLDER / "run.py", *map(str, words)], check=True, capture_output=True)
    base = models.AutoModelForCausalLM.from_pretrained(models.EMBEDDED, dtype=torch.float32).eval()
    label = hard.Label("r", "tiny", "full", 1.0, None, 3, "abc")
    (expected,), _ = hard.evaluate_tasks(
        retrofit(base, None), FullPolicy, tokenizer, {"road": hard.make_problems("road", 2, 128, 3)}, label
    )
    (row,) = results.load(out).to_dict("records")
    same = ("task", "measured_cr", "kv_reads", "peak_tokens", "tokens_generated", "accuracy")
    assert {name: row[name] for name in same} == pytest.approx({name: getattr(expected, name) for name in same})
