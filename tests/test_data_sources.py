"""Documents say what their source says, and what cannot be used is named."""

import dataclasses
import json
import logging
import re
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from dms_lab.config import DataConfig
from dms_lab.evaluation.sets import SETS
from dms_lab.preview import COMPLETION, PROMPT, render
from dms_lab.tiny.tokenizer import train_tokenizer
from dms_lab.training import documents
from dms_lab.training.data import RetrofitData, check_reachable
from dms_lab.training.packing import collate
from dms_lab.training.sources import held_out_documents
from dms_lab.training.text_files import text_files

# As R1's: thoughts of assistant turns are dropped, the generation prompt opens one.
R1 = (
    "{%- for m in messages -%}{%- if m['role'] == 'assistant' -%}"
    "{{- '<|im_start|>assistant\\n' + m['content'].split('</think>')[-1] + '<|im_end|>' -}}"
    "{%- else -%}{{- '<|im_start|>user\\n' + m['content'] -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}"
)
# As Qwen3's: the model opens the thought itself.
QWEN3 = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
TRACE = "<think>\nTwo and two, so 4.\n</think>\n\nThe answer is \\boxed{4}."
LONG = "Find the sum of all positive integers n such that n squared plus three divides seven n plus one"


@pytest.fixture(scope="module")
def plain():
    return train_tokenizer(["def f(x):\n    return x + 1\n"] * 20)


@pytest.fixture
def tokenizer(plain):
    before, plain.chat_template = plain.chat_template, QWEN3
    yield plain
    plain.chat_template = before


def write_lines(path, rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return path


def parts(document, tokenizer):
    """The prompt and the completion of a document as text."""
    first = document.is_completion.index(True)
    assert all(document.is_completion[first:])
    return tuple(tokenizer.decode(ids) for ids in (document.ids[:first], document.ids[first:]))


def chats(path, tokenizer, limit=0):
    bad = documents.BadLines(limit)
    lines = sorted((line for part in documents.split_lines([path]) for line in part), key=lambda line: line.number)
    return list(documents.chat_documents(lines, tokenizer, bad)), bad


def test_all_three_forms_of_a_line_are_read(tmp_path, tokenizer):
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": TRACE}]
    rows = [{"messages": turns}, {"prompt": "2+2?", "completion": TRACE}, "", {"text": "x = 1"}]
    (first, second, third), bad = chats(write_lines(tmp_path / "a.jsonl", rows), tokenizer)
    assert first == second
    expected = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert parts(first, tokenizer) == (expected, TRACE + tokenizer.eos_token)
    assert tokenizer.decode(third.ids) == tokenizer.bos_token + "x = 1"
    assert all(third.is_completion)
    assert not bad.found


BAD = [
    "{not json",
    "[1]",
    {"other": 1},
    {"messages": ["no object", "x"]},
    {"messages": [{"role": "user", "content": "x"}]},
    {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]},
    {"prompt": "x", "completion": " "},
]


@pytest.mark.parametrize("row", BAD, ids=range(len(BAD)))
def test_a_bad_line_is_named_by_file_and_number_and_costs_itself_alone(tmp_path, tokenizer, caplog, row):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "good"}, row, {"text": "good"}])
    found, bad = chats(path, tokenizer, limit=1)
    assert len(found) == 2
    assert [entry.split(": ")[0] for entry in bad.found] == [f"{path}:2"]
    assert f"{path}:2" in caplog.text


def test_a_line_that_is_not_utf8_costs_itself_alone(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n{"text": "\xff"}\n\n{"text": "good"}\n')
    found, bad = chats(path, tokenizer, limit=1)
    assert len(found) == 2
    assert bad.found[0].startswith(f"{path}:2")


def test_more_bad_lines_than_the_limit_stop_the_run_and_the_first_are_listed(tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", ["{"] * 5)
    with pytest.raises(ValueError, match=r"max_bad_lines=3.*a\.jsonl:1.*a\.jsonl:2.*a\.jsonl:3"):
        chats(path, tokenizer, limit=3)


@pytest.mark.parametrize(("template", "opened"), [(QWEN3, False), (R1, True)], ids=["qwen3", "r1"])
def test_a_trace_survives_whatever_the_template_does_to_assistant_turns(tokenizer, template, opened):
    tokenizer.chat_template = template
    history = [{"role": "user", "content": "2+2?"}]
    document = documents.encode_trace(history, TRACE, tokenizer)
    prompt, _ = parts(document, tokenizer)
    assert prompt == tokenizer.apply_chat_template(history, add_generation_prompt=True, tokenize=False)
    text = tokenizer.decode(document.ids)
    assert text.endswith("<|im_start|>assistant\n" + TRACE + tokenizer.eos_token)
    assert text.count("<think>") == 1
    assert prompt.endswith("<think>\n") is opened
    naive = tokenizer.apply_chat_template([*history, {"role": "assistant", "content": TRACE}], tokenize=False)
    assert ("Two and two" in naive) is not opened


def test_the_round_trip_check_refuses_a_doubled_thought_and_another_text(tokenizer):
    tokenizer.chat_template = R1
    history = [{"role": "user", "content": "2+2?"}]
    prompt = tokenizer.apply_chat_template(history, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt + TRACE + tokenizer.eos_token, add_special_tokens=False).input_ids
    document = documents.Document(ids)
    with pytest.raises(ValueError, match="opens it again"):
        documents.check_round_trip(document, prompt, TRACE, tokenizer)
    with pytest.raises(ValueError, match="trace back"):
        documents.check_round_trip(document, prompt, TRACE + "x", tokenizer)
    with pytest.raises(ValueError, match="prompt back"):
        documents.check_round_trip(document, "x" + prompt, TRACE, tokenizer)


def openr1_row(problem, *correct):
    return {
        "problem": problem,
        "generations": [f"<think>\nway {i}\n</think>\n4" for i in range(len(correct))],
        "correctness_math_verify": list(correct),
    }


@pytest.mark.parametrize("as_folder", [False, True], ids=["file", "folder"])
def test_of_openr1_every_correct_trace_is_taken_and_no_other(tmp_path, tokenizer, monkeypatch, as_folder):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    rows = [openr1_row("2+2?", True, False, True), openr1_row("3+1?", False, False)]
    path = write_lines(tmp_path / "set" / "train.jsonl", rows)
    place = str(path.parent if as_folder else path)
    found = list(documents.openr1_documents(place, tokenizer, [], documents.BadLines(0)))
    assert [["way 0" in parts(d, tokenizer)[1], "way 2" in parts(d, tokenizer)[1]] for d in found] == [
        [True, False],
        [False, True],
    ]


def test_problems_of_an_evaluation_set_are_removed_and_counted(tmp_path, tokenizer, caplog):
    disguised = "Warm-up. " + LONG.upper().replace(" ", "  ") + "!"
    path = write_lines(tmp_path / "a.jsonl", [openr1_row(disguised, True), openr1_row("2+2?", True)])
    with caplog.at_level(logging.INFO):
        found = list(documents.openr1_documents(str(path), tokenizer, [LONG], documents.BadLines(0)))
    assert len(found) == 1
    assert "2+2?" in parts(found[0], tokenizer)[0]
    assert "1 of 2 problems overlap" in caplog.text


def test_twelve_common_words_are_no_contamination():
    words = LONG.split()
    assert not documents.word_runs(" ".join(words[:12] + ["a"] * 9)) & documents.word_runs(LONG)
    assert documents.word_runs(" ".join(words[:13] + ["a"] * 9)) & documents.word_runs(LONG)


def test_a_folder_is_searched_by_extension_and_the_split_goes_by_relative_path(tmp_path):
    for i in range(60):
        (tmp_path / f"d{i}").mkdir()
        (tmp_path / f"d{i}" / "same.py").write_text("x")
    (tmp_path / "d0" / "no.bin").write_text("x")
    files = text_files(str(tmp_path), (".py",))
    training, held_out = documents.split_held_out(files)
    assert len(files) == 60
    assert sorted(training + held_out) == files
    assert {f for f in files if documents.is_held_out(f"{f.parent.name}/same.py")} == set(held_out)
    with pytest.raises(ValueError, match="no file found"):
        text_files(str(tmp_path), (".rst",))


def test_a_file_that_is_not_utf8_is_left_out_aloud(tmp_path, tokenizer, caplog):
    (tmp_path / "a.txt").write_bytes(b"\xff" * 99)
    assert not list(documents.text_documents([tmp_path / "a.txt"], tokenizer, 64))
    assert "a.txt is not UTF-8" in caplog.text


def test_batches_of_files_are_full_rows_and_held_out_text_is_not_among_them(make_config, tmp_path, tokenizer):
    rows = [{"prompt": f"question {i}", "completion": "x" * i} for i in range(1, 41)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    config = dataclasses.replace(make_config(steps=20), data=DataConfig("jsonl", str(path)))
    data = RetrofitData(config, tokenizer)
    assert data.batch(0)["ids"].shape == (config.batch_size, config.context)
    trained = {tuple(d.ids) for row in data.packed.rows for d in row}
    held_out = held_out_documents(config, tokenizer, 10**6)
    assert len(trained) + len(held_out) == 40
    assert 0 < len(held_out) < 10
    assert not trained & {tuple(d.ids) for d in held_out}
    order, other = (RetrofitData(dataclasses.replace(config, seed=seed), tokenizer).packed.rows for seed in (0, 1))
    assert [d.ids for row in order for d in row] != [d.ids for row in other for d in row]
    again = RetrofitData(config, tokenizer)
    again.batch(0)
    assert all(torch.equal(value, again.batch(7)[key]) for key, value in data.batch(7).items())


def test_the_preview_colours_what_is_learned_and_shows_each_document(tokenizer):
    document = documents.encode_trace([{"role": "user", "content": "2+2?"}], TRACE, tokenizer)
    text = render(collate([[document, document]], 2 * len(document.ids) + 3, 0), tokenizer)
    styled = [(text.plain[s.start : s.end], s.style) for s in text.spans]
    assert [piece for piece, style in styled if style == COMPLETION] == [TRACE + tokenizer.eos_token] * 2
    assert all("2+2?" in piece for piece, style in styled if style == PROMPT)
    assert "document 1" in text.plain
    assert "3 of" in text.plain


def problem_config(make_config, path, **data):
    return dataclasses.replace(make_config(steps=40), data=DataConfig("openr1_math", str(path), **data))


def test_openr1_holds_out_whole_problems_and_reads_in_the_order_of_the_seed(make_config, tmp_path, tokenizer):
    rows = [openr1_row(f"What is {i} plus {i + 1}?", True, True) for i in range(60)]
    config = problem_config(make_config, write_lines(tmp_path / "a.jsonl", rows))
    held_out = held_out_documents(config, tokenizer, 10**6)
    trained = [d for row in RetrofitData(config, tokenizer).packed.rows for d in row]
    seen, kept = ({parts(d, tokenizer)[0] for d in found} for found in (trained, held_out))
    assert not seen & kept
    assert len(seen) + len(kept) == 60
    assert 0 < len(kept) < 15
    assert 2 * len(kept) == len(held_out)
    other = RetrofitData(dataclasses.replace(config, seed=1), tokenizer)
    assert [d.ids for row in other.packed.rows for d in row] != [d.ids for d in trained]


def test_training_is_cleared_of_the_evaluation_sets_it_names(make_config, tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", [openr1_row(LONG, True), *(openr1_row(f"{i}+2?", True) for i in range(9))])
    evaluated = write_lines(tmp_path / "aime.jsonl", [{"problem": LONG}])
    config = problem_config(make_config, path, decontaminate=(f"{evaluated}:problem",))
    trained = [parts(d, tokenizer)[0] for row in RetrofitData(config, tokenizer).packed.rows for d in row]
    assert trained
    assert not any("sum of all positive" in prompt for prompt in trained)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("nobody/nothing@x:problem", "hf download --repo-type dataset nobody/nothing"),
        ("no column", "<hub id, folder or jsonl file>"),
        ("{file}:question", "cannot be read"),
    ],
)
def test_an_evaluation_set_that_cannot_be_read_stops_the_run(tmp_path, entry, reason):
    file = write_lines(tmp_path / "aime.jsonl", [{"problem": LONG}])
    with pytest.raises(ValueError, match=reason):
        documents.evaluation_texts([entry.format(file=file)])


def test_no_more_is_read_than_the_run_needs(make_config, tmp_path, tokenizer, monkeypatch):
    for i in range(50):
        (tmp_path / f"{i}.txt").write_text(f"line {i}\n" * 400)
    read = []
    original = documents.Path.read_text
    monkeypatch.setattr(documents.Path, "read_text", lambda self, **k: read.append(self.name) or original(self, **k))
    config = dataclasses.replace(make_config(steps=2), data=DataConfig("text", str(tmp_path)))
    data = RetrofitData(config, tokenizer)
    assert len(data.packed.rows) == 2 * config.batch_size
    assert len(read) < 5


def test_documents_too_short_for_the_window_are_refused_with_the_ratio_they_allow(make_config, tmp_path, tokenizer):
    path = write_lines(tmp_path / "a.jsonl", [{"text": f"x = {i}"} for i in range(40)])
    config = dataclasses.replace(make_config(steps=20), data=DataConfig("jsonl", str(path)))
    rows = RetrofitData(config, tokenizer).packed.rows  # what a preview shows all the same
    with pytest.raises(ValueError, match=r"cr=4 cannot be reached on this data: .* window=4 alone keeps"):
        check_reachable(rows, config)
    check_reachable(rows, dataclasses.replace(config, count="decisions"))


def test_equal_lines_are_never_on_both_sides_and_a_lone_line_serves_both_aloud(make_config, tmp_path, tokenizer, caplog):
    path = write_lines(tmp_path / "a.jsonl", [{"text": f"line {i % 20} " * 9} for i in range(200)])
    training, held_out = documents.split_lines([path])
    texts = path.read_text().splitlines()
    assert len(training) + len(held_out) == 200
    assert held_out
    assert not {texts[line.number - 1] for line in training} & {texts[line.number - 1] for line in held_out}
    lone = write_lines(tmp_path / "b.jsonl", [{"text": "one line alone " * 20}])
    config = dataclasses.replace(make_config(), data=DataConfig("jsonl", str(lone)))
    assert held_out_documents(config, tokenizer, 10)
    assert "of text trained on" in caplog.text


def test_no_held_out_document_is_told_before_anything_is_trained(make_config, tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("short")
    (tmp_path / "b.txt").write_text("short")
    config = dataclasses.replace(make_config(), data=DataConfig("text", str(tmp_path)))
    with pytest.raises(ValueError, match="holds out no document"):
        held_out_documents(config, tokenizer, 10)


def test_traces_are_cleared_of_every_benchmark_but_programs():
    said = OmegaConf.load(Path(__file__).parent.parent / "conf" / "data" / "openr1_math.yaml").decontaminate
    cleared = {re.split("[@:]", source)[0] for source in said}
    assert cleared == {found.hub_id for name, found in SETS.items() if name != "livecodebench"}
