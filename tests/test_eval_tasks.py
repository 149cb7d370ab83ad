"""The task files of lm-eval and the loaders behind them: every file loads offline, and every row is what graders expect."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, DatasetDict

from dms_lab.evaluation import benchmarks, livecodebench, problems, ruler, sets
from dms_lab.evaluation.benchmarks import BENCHMARKS

lm_eval_tasks = pytest.importorskip("lm_eval.tasks", reason="the extra `eval` is not installed")
from lm_eval.tasks._yaml_loader import load_yaml  # noqa: E402

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data"
TASKS = ROOT / "dms_lab" / "evaluation" / "tasks"
SOURCES = {
    "dms_aime24": "aime24.jsonl",
    "dms_aime25": "aime25.jsonl",
    "dms_math500": "math500.jsonl",
    "dms_gpqa_diamond": "gpqa_diamond.csv",
    "dms_livecodebench": "livecodebench",
}
REASONING = list(SOURCES)
RETRIEVAL = ["dms_niah_single", "dms_niah_multikey", "dms_vt"]
EMBEDDED = ["dms_tiny_ledger", "dms_tiny_road", "dms_tiny_program"]


@pytest.fixture(autouse=True)
def cache_of_livecodebench(monkeypatch, tmp_path):
    monkeypatch.setattr(livecodebench.files, "default_cache", lambda: tmp_path / "livecodebench")


def load(name, **metadata):
    metadata = {"lengths": [512], "num_problems": 3, "pretrained": "embedded", "dtype": "bfloat16", **metadata}
    if name in SOURCES:
        metadata.setdefault("source", str(DATA / SOURCES[name]))
    if name == "dms_livecodebench":
        metadata = {"release": "release_v2", "start": None, "end": None, **metadata}
    manager = lm_eval_tasks.TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    return manager.load([name])["tasks"][name]


def rows(name, **metadata):
    return list(load(name, **metadata).dataset["test"])


def test_every_task_file_is_a_task_known_here():
    manager = lm_eval_tasks.TaskManager(include_path=str(TASKS), include_defaults=False)
    assert manager.all_subtasks == sorted(REASONING + RETRIEVAL + EMBEDDED)
    assert len(list(TASKS.glob("dms_*.yaml"))) == len(manager.all_subtasks)


@pytest.mark.parametrize("name", REASONING + RETRIEVAL + EMBEDDED)
def test_a_task_loads_offline_with_unique_ids_prompts_and_answers(name):
    task = load(name)
    docs = list(task.eval_docs)
    assert len(docs) >= 2
    assert len({doc["id"] for doc in docs}) == len(docs)
    for doc in docs:
        assert isinstance(doc["id"], str)
        assert task.doc_to_text(doc) == doc["prompt"]
        assert len(doc["prompt"]) > 40
        assert task.doc_to_target(doc) == doc["answer"]
        assert isinstance(doc["answer"], str)


@pytest.mark.parametrize("name", REASONING + RETRIEVAL + EMBEDDED)
def test_no_stop_string_fires_inside_a_thought_and_all_samples_reach_the_grader(name):
    task = load(name)
    settings = task.config.generation_kwargs
    assert settings["until"] == []
    if name in REASONING:
        assert settings == {
            "until": [], "do_sample": True, "temperature": 0.6, "top_p": 0.95, "max_gen_toks": 32768
        }  # fmt: skip
    else:
        assert settings["do_sample"] is False
        assert settings["max_gen_toks"] == (96 if name in EMBEDDED else 128)
    assert task.config.num_fewshot == 0
    assert set(task.aggregation()) == {"avg", "maj", "pass_all", "truncated"}
    assert task.higher_is_better()["truncated"] is False
    assert all(value for metric, value in task.higher_is_better().items() if metric != "truncated")

    task.build_all_requests(limit=2, rank=0, world_size=1)
    for instance in task.instances:
        instance.resps = [f"sample {i} of {instance.doc['id']}" for i in range(3)]
    task.apply_filters()
    for instance in task.instances:
        assert instance.filtered_resps == {"all": [f"sample {i} of {instance.doc['id']}" for i in range(3)]}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("dms_aime24", "aime"),
        ("dms_aime25", "aime"),
        ("dms_math500", "math"),
        ("dms_gpqa_diamond", "choice"),
        ("dms_livecodebench", "code"),
        *((name, "ruler") for name in RETRIEVAL),
        *((name, "embedded") for name in EMBEDDED),
    ],
)
def test_a_task_names_its_grader(name, kind):
    content = load_yaml(TASKS / f"{name}.yaml", resolve_func=False)
    assert Path(content["process_results"]).name == f"dms_lab.evaluation.benchmarks.results_of_{kind}"
    assert benchmarks.BENCHMARKS[name].kind == kind


@pytest.mark.parametrize("name", ["dms_gpqa_diamond", *RETRIEVAL, *EMBEDDED])
def test_the_answer_of_a_document_is_right_by_its_own_grader(name):
    """Where neither programs are run nor formulas compared."""
    task = load(name)
    doc = task.eval_docs[0]
    right = {"dms_gpqa_diamond": "Answer: {}", "dms_vt": "They are {}."}.get(name, "{}").format(
        ", ".join(json.loads(doc["answer"])) if name in RETRIEVAL else doc["answer"]
    )
    found = task.process_results(doc, [[right, right, "I do not know."]])
    assert found["avg"] == pytest.approx(2 / 3)
    assert found["pass_all"] == 1.0
    assert set(found) == set(task.aggregation()) - (set() if BENCHMARKS[name].votes else {"maj"})


@pytest.mark.parametrize("name", ["dms_aime24", "dms_aime25", "dms_math500"])
def test_mathematics_is_asked_for_in_both_styles(name):
    for style, phrase in [
        ("paper", "Think step by step"),
        ("card", "\nPlease reason step by step, and put your final answer"),
    ]:
        for row in rows(name, prompt_style=style):
            assert row["question"] in row["prompt"]
            assert phrase in row["prompt"]
            assert "\\boxed{}" in row["prompt"]
    assert rows(name)[0]["prompt"] == rows(name, prompt_style="paper")[0]["prompt"]


def test_the_answers_of_aime_are_plain_integers():
    assert [row["answer"] for row in rows("dms_aime24")] == ["20", "71", "84"]
    assert [row["answer"] for row in rows("dms_aime25")] == ["360", "400", "1"]
    assert [row["id"] for row in rows("dms_aime24")] == ["aime24-60", "aime24-61", "aime24-62"]


@pytest.mark.parametrize("answer", ["1000", "-3", "\\frac{1}{2}", "3.0", ""])
def test_an_answer_that_aime_cannot_have_is_refused(tmp_path, answer):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"id": 7, "problem": "?", "answer": answer}))
    with pytest.raises(ValueError, match=r"aime24-7 is .* integers from 0 to 999"):
        problems.load_aime24(source=str(path))


def test_the_choices_of_gpqa_are_lettered_in_both_styles():
    for style, phrase in [("paper", "'Answer: $LETTER'"), ("card", '`"answer": "C"`')]:
        for row in rows("dms_gpqa_diamond", prompt_style=style):
            assert row["question"] in row["prompt"]
            assert phrase in row["prompt"]
            for letter, choice in zip("ABCD", row["choices"], strict=True):
                assert f"\n{letter}) {choice}\n" in f"{row['prompt']}\n"


def test_the_letter_of_gpqa_is_that_of_the_right_choice_whatever_the_seed():
    right = {"recInvented0": "900 J", "recInvented1": "Xenon", "recInvented2": "Seven", "recInvented4": "+4"}
    letters = set()
    for seed in range(6):
        found = rows("dms_gpqa_diamond", choices_seed=seed)
        letters.add("".join(row["answer"] for row in found))
        for row in found:
            if row["id"] in right:
                assert row["choices"]["ABCD".index(row["answer"])] == right[row["id"]]
    assert len(letters) > 3
    assert rows("dms_gpqa_diamond", choices_seed=3) == rows("dms_gpqa_diamond", choices_seed=3)


@pytest.fixture
def asked(monkeypatch):
    """What the reader of LiveCodeBench was asked for; it has tests of its own, and yields two programs here."""
    found = {}
    whole = {"id": "abc001_a", "question": "Print the sum of two integers.", "starter_code": ""}
    starter = {"id": "9001", "question": "Double n.", "starter_code": "class Solution:\n    def f(self, n):\n        "}
    monkeypatch.setattr(livecodebench, "problems", lambda **options: found.update(options) or iter([whole, starter]))
    return found


def test_programs_are_asked_for_with_starter_code_or_with_standard_input(asked):
    for style in ("paper", "card"):
        whole, starter = rows("dms_livecodebench", prompt_style=style)
        assert all(row["question"] in row["prompt"] for row in (whole, starter))
        assert "```python\n# YOUR CODE HERE\n```" in whole["prompt"]
        assert "```python\nclass Solution:\n    def f(self, n):\n        \n```" in starter["prompt"]
        assert any(words in whole["prompt"] for words in ("standard input", "stdin"))
        assert not any(words in starter["prompt"] for words in ("standard input", "stdin"))


def test_livecodebench_is_given_the_options_it_knows_and_no_model_argument(asked):
    options = {"release": "release_v5", "start": None, "end": "2025-01-31", "errata": "official"}
    load("dms_livecodebench", **options, data_revision="abc", revision="the model's")
    assert asked == {"source": str(DATA / "livecodebench"), "revision": "abc", **options}
    asked.clear()
    problems.load_livecodebench(source=None, data_revision=None, dtype="bfloat16")
    assert asked == {}


def test_the_rows_of_livecodebench_keep_what_its_grader_needs():
    found = rows("dms_livecodebench")
    assert [row["answer"] for row in found] == [""] * len(found)
    for row in found:
        assert {"fn_name", "public_tests", "private_tests", "contest_date", "difficulty"} <= set(row)
        assert livecodebench.files.tests_of(row["public_tests"], row["private_tests"], row["id"])[0]


@pytest.mark.parametrize("loader", ["aime24", "aime25", "math500", "gpqa_diamond", "livecodebench"])
def test_an_unknown_prompt_style_is_answered_with_the_known_ones(loader):
    with pytest.raises(ValueError, match="prompt_style='card2' is unknown; choose one of paper, card"):
        getattr(problems, f"load_{loader}")(source=str(DATA), prompt_style="card2")


@pytest.mark.parametrize("name", ["dms_aime24", "dms_aime25", "dms_math500", "dms_gpqa_diamond"])
def test_a_set_that_is_not_there_is_answered_with_the_command_that_gets_it(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    info = sets.SETS[name.removeprefix("dms_")]
    with pytest.raises(ValueError, match="source=") as caught:
        load(name, source=None)
    command = f"`hf download --repo-type dataset {info.hub_id} {info.file} --revision {info.revision}`"
    assert command in str(caught.value)
    gated = [f"gated, so accept its terms on https://huggingface.co/datasets/{info.hub_id}", "`hf auth login`"]
    assert all((words in str(caught.value)) == (name == "dms_gpqa_diamond") for words in gated)


def test_the_hub_is_asked_for_the_pinned_revision_or_for_the_one_given(monkeypatch):
    asked = []

    def download(hub_id, file, *, repo_type, revision):
        asked.append((hub_id, file, repo_type, revision))
        return str(DATA / "math500.jsonl")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    load("dms_math500", source=None, revision="the model's")
    load("dms_math500", source=None, data_revision="other")
    pinned = sets.SETS["math500"].revision
    assert asked == [("HuggingFaceH4/MATH-500", "test.jsonl", "dataset", r) for r in (pinned, "other")]


@pytest.mark.parametrize("kind", ["parquet", "saved", "saved splits", "download", "lone file"])
def test_a_source_may_be_any_form_the_hub_gives(kind, tmp_path):
    found = [json.loads(line) for line in (DATA / "aime24.jsonl").read_text().splitlines()]
    if kind == "parquet":
        source = tmp_path / "set.parquet"
        Dataset.from_list(found).to_parquet(source)
    else:
        source = tmp_path / "folder"
        if kind == "saved":
            Dataset.from_list(found).save_to_disk(source)
        elif kind == "saved splits":
            other = Dataset.from_list([{**row, "answer": "1"} for row in found])
            DatasetDict({"test": other, "train": Dataset.from_list(found)}).save_to_disk(source)
        elif kind == "download":
            (source / "data").mkdir(parents=True)
            Dataset.from_list(found).to_parquet(source / "data" / "train-00000-of-00001.parquet")
            (source / "extra.csv").write_text("a,b\n1,2\n")
        else:
            source.mkdir()
            shutil.copy(DATA / "aime24.jsonl", source / "mine.jsonl")
    assert rows("dms_aime24", source=str(source)) == rows("dms_aime24")


def test_a_missing_column_is_named_with_what_was_found(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"unique_id": "a", "problem": "?", "subject": "Algebra", "level": 1}\n')
    with pytest.raises(
        ValueError, match=r"lacks the column 'answer'; math500 needs .* finds unique_id, problem, subject, level"
    ):
        problems.load_math500(source=str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"id": 1, "problem": "?", "answer": "1"}\n{"id": 1, "problem": "!", "answer": "2"}\n',
            "aime24-1 stands in two rows",
        ),
        ("\n", "has no rows"),
        ("{\n", "cannot be read as jsonl"),
        ("3\n", "no JSON object"),
    ],
)
def test_a_file_that_cannot_be_evaluated_on_is_refused(tmp_path, content, message):
    path = tmp_path / "own.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        problems.load_aime24(source=str(path))


def test_a_source_that_is_nothing_or_too_much_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        problems.load_aime24(source=str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="no data file"):
        problems.load_aime24(source=str(tmp_path))
    (tmp_path / "set.txt").write_text("x")
    with pytest.raises(ValueError, match=r"suffix is none of \.jsonl, \.parquet, \.csv"):
        problems.load_aime24(source=str(tmp_path / "set.txt"))
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=r"2 data files \(a.jsonl, b.jsonl\)"):
        problems.load_aime24(source=str(tmp_path))
    Dataset.from_list([{"a": 1}]).save_to_disk(tmp_path / "x")
    DatasetDict({"test": Dataset.from_list([{"a": 1}])}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="no split train"):
        problems.load_aime24(source=str(tmp_path / "saved"))


def test_embedded_problems_are_those_of_the_demo_and_a_function_of_their_id():
    from dms_lab.evaluation.hard import make_problems

    found = rows("dms_tiny_road", num_problems=4, lengths=[256], data_seed=5)
    assert [row["id"] for row in found] == [f"road-5-256-{i}" for i in range(4)]
    assert [(row["prompt"], row["answer"]) for row in found] == [
        (problem.prompt, problem.answer) for problem in make_problems("road", 4, 256, 5)
    ]
    assert rows("dms_tiny_road", num_problems=2, lengths=[256], data_seed=5) == found[:2]
    with pytest.raises(ValueError, match="num_problems of 1 or more"):
        problems.load_tiny_road(num_problems=0)


def test_ids_that_repeat_far_apart_are_seen_and_long_sets_keep_their_order():
    found = [{"id": str(i), "prompt": "?", "answer": "!"} for i in range(200)]
    assert list(problems.as_split(iter(found))["test"]) == found
    with pytest.raises(ValueError, match="the id 3 stands in two rows"):
        problems.as_split([*found, found[3]])


def test_retrieval_tasks_size_their_prompts_by_the_models_tokenizer():
    found = rows("dms_vt", lengths=[512, 1024], num_problems=2, data_seed=1)
    assert [row["id"] for row in found] == ["vt-1-512-0", "vt-1-512-1", "vt-1-1024-0", "vt-1-1024-1"]
    assert [row["max_length"] for row in found] == [512, 512, 1024, 1024]
    for row in found:
        assert row["num_tokens"] + 128 <= row["max_length"]
        assert all(name in row["prompt"] for name in json.loads(row["answer"]))
    assert rows("dms_vt", lengths=1024, num_problems=2, data_seed=1) == found[2:]
    with pytest.raises(ValueError, match="give tokenizer="):
        ruler.load_vt(lengths=[512])


def test_the_registry_says_what_is_on_the_hub():
    assert {name: info.num_problems for name, info in sets.SETS.items() if name != "livecodebench"} == {
        "aime24": 30, "aime25": 30, "math500": 500, "gpqa_diamond": 198
    }  # fmt: skip
    assert [name for name, info in sets.SETS.items() if info.gated] == ["gpqa_diamond"]
    assert all(info.page == f"https://huggingface.co/datasets/{info.hub_id}" for info in sets.SETS.values())
    pinned = [info.revision for info in sets.SETS.values()]
    assert sets.SETS["livecodebench"].revision == livecodebench.files.REVISION
    assert all(len(revision) == 40 and set(revision) <= set("0123456789abcdef") for revision in pinned)


def test_the_wheel_carries_the_task_files():
    """Hatch takes whatever lies in the package and git does not ignore."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    files = sorted(TASKS.glob("*.yaml"))
    assert len(files) == 15
    names = "\n".join(str(path.relative_to(ROOT)) for path in files)
    found = subprocess.run(
        ["git", "check-ignore", "--no-index", "--stdin"], input=names, cwd=ROOT, capture_output=True, text=True
    )
    assert found.stdout == ""
    tracked = subprocess.run(["git", "ls-files", str(TASKS)], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert tracked.split() == names.split()


def test_a_task_file_holds_nothing_but_its_name_its_loader_and_its_grader():
    """What tasks share stands in the files they include, so that two tasks cannot come apart."""
    loader = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!function", lambda found, node: found.construct_scalar(node))
    for path in TASKS.glob("dms_*.yaml"):
        content = yaml.load(path.read_text(), loader)
        assert content["task"] == path.stem
        assert set(content) <= {"task", "include", "custom_dataset", "process_results"}
