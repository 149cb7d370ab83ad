"""Documents keep their text, rows keep their documents, and bad lines are told."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dms_lab.config import DataConfig
from dms_lab.tiny.corpus import Document
from dms_lab.training import documents
from dms_lab.training.data import RetrofitData
from dms_lab.training.packing import collate, pack

R1_LIKE = (
    "{%- for m in messages -%}{%- if m['role'] == 'user' -%}{{- '<|im_start|>' + m['content'] -}}{%- else -%}"
    "{{- m['content'].split('</think>')[-1] + '<|im_end|>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_end|><think>\\n' -}}{%- endif -%}"
)


@pytest.fixture
def tokenizer(base_folder):
    return AutoTokenizer.from_pretrained(base_folder)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_packing_loses_and_doubles_nothing(sizes):
    found = [Document([number] * size, [True] * size) for number, size in enumerate(sizes)]
    rows = pack(found, 40)
    packed = sorted((d.ids[0], len(d.ids)) for row in rows for d in row)
    assert packed == sorted(enumerate(sizes))
    assert all(sum(len(d.ids) for d in row) <= 40 for row in rows)
    batch = collate(rows, 40, 0)
    real = batch["document"] >= 0
    assert int(real.sum()) == sum(sizes)
    starts = batch["position_ids"][real] == 0
    assert int(starts.sum()) == len(sizes)


def test_a_document_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="cut it first"):
        pack([Document([1] * 9, [True] * 9)], 8)


@pytest.mark.parametrize("template", [None, R1_LIKE])
def test_a_trace_is_trained_on_word_for_word(tokenizer, template):
    if template:
        tokenizer.chat_template = template
    document = documents.encode_trace([{"role": "user", "content": "1+1?"}], "<think>\ntwo</think>2", tokenizer)
    text = tokenizer.decode(document.ids, skip_special_tokens=False)
    assert text.endswith("two</think>2<|im_end|>")
    assert text.count("<think>") == 1
    answer = [i for i, c in zip(document.ids, document.is_completion, strict=True) if c]
    assert tokenizer.decode(answer).strip().startswith("two")


def chats(tmp_path, *lines):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


GOOD = (
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    {"prompt": "hi", "completion": "ho"},
    {"text": "plain text"},
)


def test_all_three_forms_of_a_chat_are_read(tmp_path, tokenizer):
    bad = documents.BadLines(0)
    found = list(documents.chat_documents([chats(tmp_path, *GOOD)], tokenizer, 64, bad))
    assert found[0] == found[1]
    assert tokenizer.decode(found[2].ids) == "plain text"


def test_bad_lines_are_named_counted_and_limited(tmp_path, tokenizer):
    path = chats(tmp_path, GOOD[0], "{", {"prompt": "x"}, GOOD[1], {"messages": [{"role": "user", "content": "x"}]})
    bad = documents.BadLines(3)
    assert len(list(documents.chat_documents([path], tokenizer, 64, bad))) == 2
    assert [line.split(":")[1] for line in bad.found] == ["2", "3", "5"]
    with pytest.raises(ValueError, match=r"max_bad_lines=1 .*chats.jsonl:2"):
        list(documents.chat_documents([path], tokenizer, 64, documents.BadLines(1)))


def test_only_correct_uncontaminated_traces_are_taken(tmp_path, tokenizer):
    words = " ".join(f"w{i}" for i in range(20))
    rows = [
        {"problem": "a b", "generations": ["wrong", "right"], "correctness_math_verify": [False, True]},
        {"problem": "none", "generations": ["wrong"], "correctness_math_verify": [False]},
        {"problem": f"known {words}", "generations": ["right"], "correctness_math_verify": [True]},
    ]
    data = DataConfig("openr1_math", str(chats(tmp_path, *rows)))
    found = list(documents.openr1_documents(data, tokenizer, 64, [words], documents.BadLines(0)))
    assert len(found) == 1
    assert "right<|im_end|>" in tokenizer.decode(found[0].ids)


def test_missing_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no file found by the folder"):
        documents.text_files(str(tmp_path), (".py",))
    with pytest.raises(ValueError, match="no file found by the glob"):
        documents.text_files(str(tmp_path / "*.zip"), (".py",))


@pytest.mark.parametrize("kind", ["tiny", "text"])
def test_a_batch_is_a_function_of_its_number(make_config, tmp_path, kind, tokenizer):
    for name in "abcdef":
        (tmp_path / f"{name}.txt").write_text(f"{name} some text " * 50)
    config = make_config(data=DataConfig(kind, str(tmp_path)))
    one, two = RetrofitData(config, tokenizer), RetrofitData(config, tokenizer)
    two.batch(9)
    assert all(torch.equal(x, two.batch(3)[key]) for key, x in one.batch(3).items())
    assert not torch.equal(one.batch(3)["ids"], one.batch(4)["ids"])


def test_held_out_files_are_not_trained_on(make_config, tmp_path, tokenizer):
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text(f"file {number} " * 40)
    data = RetrofitData(make_config(data=DataConfig("text", str(tmp_path))), tokenizer)
    trained = {tuple(d.ids) for row in data.rows for d in row}
    assert data.held_out
    assert not trained & {tuple(d.ids) for d in data.held_out}
