"""`python -m dms_lab.generate`: any prompt, files that resume, answers that are never lost or mixed."""

import dataclasses
import inspect
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_commands import run
from transformers import AutoModelForCausalLM, AutoTokenizer

from dms_lab.accounting import Request
from dms_lab.answers import AnswerFile, encode, read_prompts
from dms_lab.attachment import retrofit
from dms_lab.chains import Generated, Prompt, Settings
from dms_lab.checkpoint import fingerprint, save_checkpoint
from dms_lab.generate import batch, with_quoted_prompt
from dms_lab.generate import run as generate
from dms_lab.generation import Engine
from dms_lab.generation_config import resolve_generate
from dms_lab.policies import FullPolicy
from dms_lab.policies.dms import DmsConfig
from dms_lab.sampling import SamplingConfig

WORDS = ["chat=false", "max_new_tokens=6", "threads=1"]


@pytest.fixture(scope="module")
def checkpoint(base_folder, tmp_path_factory):
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    handle = retrofit(model, DmsConfig(window=4))
    for predictor in handle.predictors.values():
        predictor.weight.data.normal_(0.0, 1.0)
    folder = tmp_path_factory.mktemp("checkpoint") / "cr4"
    return save_checkpoint(folder, handle, "adapter", str(base_folder), fingerprint(model), {"cr": 4.0})


@pytest.fixture
def composed():
    from hydra import compose, initialize
    from omegaconf import OmegaConf

    def make(*words):
        with initialize(version_base="1.3", config_path="../conf"):
            return OmegaConf.to_container(compose("generate", with_quoted_prompt(list(words))))

    return make


def prompts_file(tmp_path, count=4):
    path = tmp_path / "prompts.jsonl"
    rows = [{"id": f"q{i}", "prompt": "def f(x):\n    return x + " + "1" * i} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_one_prompt_streams_and_ends_with_a_line_of_accounting(tmp_path, checkpoint, base_folder):
    text = run("generate", f"checkpoint={checkpoint}", "prompt=def f(x): return [${x}, 'a'", *WORDS, cwd=tmp_path)
    assert "1 chains, 6 tokens" in text
    assert "compression" in text
    assert "by eviction" in text
    assert not list(tmp_path.iterdir())


def test_a_file_is_answered_and_the_same_command_goes_on(tmp_path, checkpoint):
    path = prompts_file(tmp_path)
    words = [f"checkpoint={checkpoint}", f"prompts={path}", "out=answers.jsonl", "chains=2", "temperature=0.7", *WORDS]
    assert "8 chains in answers.jsonl, 8 of them new" in run("generate", *words, cwd=tmp_path)
    out = tmp_path / "answers.jsonl"
    whole = {(r["id"], r["chain"]): r["ids"] for r in map(json.loads, out.read_text().splitlines())}
    assert len(whole) == 8
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:3]) + lines[3][:40])  # a stop in the middle of a line
    assert "8 chains in answers.jsonl, 5 of them new" in run("generate", *words, "places=3", cwd=tmp_path)
    assert {(r["id"], r["chain"]): r["ids"] for r in map(json.loads, out.read_text().splitlines())} == whole
    before = out.read_bytes()
    assert "is an answer of run" in run("generate", *words, "seed=1", cwd=tmp_path, code=1)
    assert out.read_bytes() == before


def test_answers_come_at_another_ratio_than_was_trained_and_are_not_mixed(tmp_path, checkpoint, composed, capsys):
    path, text = prompts_file(tmp_path, 2), tmp_path / "own.py"
    text.write_text(inspect.getsource(json.decoder)[:3000])
    words = [f"checkpoint={checkpoint}", f"prompts={path}", f"out={tmp_path / 'a.jsonl'}", *WORDS]
    with pytest.raises(ValueError, match="lies in no run that names its data; give calibrate="):
        generate(resolve_generate(composed(*words, "cr=2")))
    words.append(f"calibrate={text}")
    generate(resolve_generate(composed(*words, "cr=2")))
    said = capsys.readouterr()
    assert float(re.search(r"cr=2: .* compressed (\S+) times", said.err)[1]) == pytest.approx(2, rel=0.02)
    assert "2 chains in" in said.out
    generate(resolve_generate(composed(*words, "cr=2")))
    assert "are in" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is an answer of run"):
        generate(resolve_generate(composed(*words, "cr=3")))
    text.write_text(inspect.getsource(json.encoder)[:3000])
    with pytest.raises(ValueError, match="is an answer of run"):
        generate(resolve_generate(composed(*words, "cr=2")))


@settings(deadline=None, max_examples=100)
@given(st.text(alphabet=st.one_of(st.sampled_from("\\'\"${}()[],=:a \n"), st.characters(exclude_categories=["Cs"]))))
def test_any_text_is_a_prompt(text):
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    if text in ("null", "???"):
        return
    (word,) = with_quoted_prompt(["prompt=" + text])
    config = OmegaConf.create({"prompt": None})
    OmegaConf.update(config, "prompt", OverridesParser.create().parse_override(word).value())
    assert OmegaConf.to_container(config, resolve=True)["prompt"] == text


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "give checkpoint=<folder of a checkpoint>, or model=<name> policy=<rule>"),
        (["model=tiny", "policy=full"], "give either prompt="),
        (["model=tiny", "policy=full", "prompt=a", "out=b"], "out= is for nothing else"),
        (["model=tiny", "policy=tova", "prompt=a"], "policy=tova needs budget="),
        (["model=tiny", "policy=full", "budget=3", "prompt=a"], "budget=3 is for"),
        (["model=tiny", "policy=best", "prompt=a"], "choose one of full"),
        (["checkpoint=x", "policy=full", "prompt=a"], "leave one of the two out"),
        (["model=tiny", "policy=full", "prompt=a", "cr=3"], "give checkpoint=<its folder>"),
        (["checkpoint=x", "prompt=a", "calibrate=a.txt"], "add cr=<ratio>"),
        (["model=tiny", "policy=full", "prompt=a", "chains=0"], "chains=0 must be at least 1"),
        (["model=tiny", "policy=full", "prompt=a", "temperature=warm"], "temperature='warm' must be a finite number"),
    ],
)
def test_a_command_that_cannot_work_is_refused_in_a_sentence(composed, words, sentence):
    with pytest.raises(ValueError, match=sentence.replace("(", r"\(")):
        resolve_generate(composed(*words))


def test_prompts_that_cannot_be_read_are_named_by_file_and_line(tmp_path, base_folder):
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    path = tmp_path / "p.jsonl"
    for line, sentence in (
        ("{", "p.jsonl:2 is not a JSON object"),
        ('{"text": "a"}', 'p.jsonl:2 has neither a "prompt"'),
        ('{"messages": ["hi"]}', 'p.jsonl:2 has neither a "prompt"'),
        ('{"messages": []}', 'p.jsonl:2 has neither a "prompt"'),
        ('{"id": 1, "prompt": "b"}', 'p.jsonl:2 has "id" 1'),
    ):
        path.write_text('{"prompt": "a"}\n' + line + "\n")
        with pytest.raises(ValueError, match=sentence):
            read_prompts(path, tokenizer, False, 1)
    path.write_text("")
    with pytest.raises(ValueError, match="is empty"):
        read_prompts(path, tokenizer, False, 1)
    with pytest.raises(ValueError, match="is no file"):
        read_prompts(tmp_path / "none", tokenizer, False, 1)
    path.write_text('{"prompt": "a\u2028b\x85"}\n{"prompt": ""}\n', encoding="utf-8")
    assert [p.ids for p in read_prompts(path, tokenizer, False, 1)][1] == []
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template; add chat=false"):
        encode("a", tokenizer, True)


def test_a_chat_prompt_is_the_templates_text(base_folder):
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    ids = encode("what is 1 + 1", tokenizer, True)
    conversation = [{"role": "user", "content": "what is 1 + 1"}]
    assert encode(conversation, tokenizer, False) == ids
    wanted = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(ids, skip_special_tokens=False) == wanted


def test_a_file_that_is_no_answer_file_is_left_as_it_is(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"x": 1}\n')
    with pytest.raises(ValueError, match="is no answer"):
        AnswerFile(path, "run", [])
    assert path.read_text() == '{"x": 1}\n'


def answered(problem, reason="eos"):
    return Generated([7, 3], reason, Request(0.0, 0.0, 0.0, 3, 2, 0.0), problem)


def test_answers_to_other_prompts_are_refused_and_errors_are_done_again(tmp_path):
    path = tmp_path / "a.jsonl"
    prompts = [Prompt("a", [5, 6]), Prompt("b", [7])]
    file = AnswerFile(path, "run", prompts)
    file.append(answered("a"))
    file.append(answered("b", "error"))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="jsonl:1 answers another prompt of the id 'a'"):
        AnswerFile(path, "run", [Prompt("a", [5, 9]), *prompts[1:]])
    assert path.read_bytes() == before
    assert AnswerFile(path, "run", prompts).left == prompts[1:]
    assert path.read_bytes() == before.splitlines(keepends=True)[0]
    assert AnswerFile(path, "run", prompts[1:]).left == prompts[1:]


def test_a_chain_that_fails_stands_in_the_file_and_the_others_are_answered(tmp_path, base_folder, capsys):
    handle = retrofit(AutoModelForCausalLM.from_pretrained(base_folder), None)
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "' + "b " * 600 + '"}\n{"prompt": "c"}\n')
    prompts = read_prompts(path, tokenizer, False, 1)
    file = AnswerFile(tmp_path / "out.jsonl", "run", prompts)

    def make():
        return Engine(handle, FullPolicy(), Settings(max_new_tokens=4, places=2), SamplingConfig(), [3], tokenizer)

    with pytest.raises(SystemExit):
        batch(make, prompts, file)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert {r["id"]: r["finish_reason"] == "error" for r in rows} == {1: False, 2: True, 3: False}
    assert "exceeds the model's 512 positions" in capsys.readouterr().err
    assert {f.name for f in dataclasses.fields(Generated)} - {"problem", "trace"} <= set(rows[0])
    again = AnswerFile(tmp_path / "out.jsonl", "run", prompts)
    assert [p.problem for p in again.left] == [2]
    prompts = [p for p in prompts if p.problem != 2]
    batch(make, prompts, AnswerFile(tmp_path / "out.jsonl", "run", prompts))
    assert "all 2 chains are in" in capsys.readouterr().out
