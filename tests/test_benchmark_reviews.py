"""What decides a result is what it is known by, and one thing that fails ends nothing else."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_benchmark_runs import FOREIGN, TINY, checkpoint, configure, rows_of  # noqa: F401  a fixture

from dms_lab import models
from dms_lab.evaluation import lm
from dms_lab.evaluation.reasoning import evaluate_benchmarks, plan
from dms_lab.evaluation.store import SampleStore


@pytest.fixture
def base(tmp_path):
    """A copy of the embedded model, whose weights may be overwritten."""
    shutil.copytree(models.EMBEDDED, tmp_path / "base")
    return tmp_path / "base"


def as_it_is(base, out, **changes):
    config = configure(None, out, num_problems=3, **changes)
    return replace(config, checkpoint=None, policy="full", model=replace(TINY, name="hf", path=str(base)))


def test_other_weights_at_the_same_path_are_another_model(base, tmp_path):
    evaluate_benchmarks(as_it_is(base, tmp_path / "out"))
    weights = load_file(base / "model.safetensors")
    save_file({name: torch.randn_like(w.float()).to(w.dtype) for name, w in weights.items()}, base / "model.safetensors")
    from dms_lab.evaluation import suite

    suite._base.cache_clear()
    evaluate_benchmarks(as_it_is(base, tmp_path / "out"))
    suite._base.cache_clear()
    before, after = rows_of(tmp_path / "out")
    assert (before["accuracy"], after["accuracy"]) == (1.0, 0.0)
    assert before["model"].endswith("base")


def test_models_of_different_paths_have_folders_of_their_own(tmp_path):
    folders = {
        plan(replace(as_it_is(path, None), out=None)).folder for path in ("org/model", "other/model", "/data/model/")
    }
    assert len(folders) == 3


def test_runs_that_share_a_store_draw_full_attention_once(checkpoint, tmp_path, monkeypatch):  # noqa: F811
    asked = []

    class Spy(lm.Engine):
        def run(self, prompts, on_token=None):
            asked.append(len(prompts))
            return super().run(prompts, on_token)

    monkeypatch.setattr(lm, "Engine", Spy)
    for out in ("one", "two"):
        evaluate_benchmarks(configure(checkpoint, tmp_path / out, full=True, store=str(tmp_path / "store"), num_problems=3))
    assert asked == [3, 3]
    assert len(list((tmp_path / "store").glob("*.sqlite"))) == 2
    assert len(rows_of(tmp_path / "two")) == 2


def test_rows_of_other_settings_are_other_rows(checkpoint, tmp_path):  # noqa: F811
    for changes in ({}, {}, {"storage": "int8"}, {"temperature": 0.3}, {"num_problems": 2}):
        evaluate_benchmarks(configure(checkpoint, tmp_path, **{"num_problems": 3} | changes))
    rows = rows_of(tmp_path)
    assert len(rows) == 4
    assert len({json.dumps(row["settings"], sort_keys=True) for row in rows}) == 4
    assert [row["settings"]["generation"].get("temperature") for row in rows] == [None, None, 0.3, None]


def test_a_part_grades_every_limit_for_the_run_that_makes_the_results(checkpoint, tmp_path, monkeypatch):  # noqa: F811
    values = {"max_tokens": (20, 96), "num_problems": 4}
    for part in (1, 2):
        evaluate_benchmarks(configure(checkpoint, tmp_path, shard=(part, 2), **values))
    with SampleStore(tmp_path / "samples") as store:
        (summary, *_) = store.summaries()
        cuts = {cut for _, cut, _ in store.graded(summary.task, summary.run)}
    assert 20 in cuts
    assert max(cuts) > 20
    from dms_lab.evaluation import grading

    monkeypatch.setattr(grading, "judge", lambda *_: pytest.fail("it was graded already"))
    evaluate_benchmarks(configure(checkpoint, tmp_path, **values))
    assert len(rows_of(tmp_path)) == 2


def test_what_fails_is_told_at_the_end_and_the_rest_is_there(checkpoint, tmp_path):  # noqa: F811
    tasks = ("dms_tiny_road", "dms_tiny_ledger")
    config = configure(checkpoint, tmp_path, tasks=tasks, num_problems=2, max_tokens=(96, 1600))
    with pytest.raises(ValueError, match=r"dms at CR 2: 2 of 2 chains could not be generated: dms_tiny_road.*positions"):
        evaluate_benchmarks(config)
    assert not (tmp_path / "results.jsonl").exists()
    good = lm.DmsLM._generate

    def breaks(self, prompts, *rest):
        for found in good(self, prompts, *rest):
            is_bad = found.problem.startswith("road") and found.problem.endswith("1")
            yield replace(found, error="the logits are not finite") if is_bad else found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm.DmsLM, "_generate", breaks)
        with pytest.raises(ValueError, match=r"dms at CR 2: 1 of 2 .*road.*not finite; the other chains are kept in"):
            evaluate_benchmarks(configure(checkpoint, tmp_path, tasks=tasks, num_problems=2))
    assert [row["task"] for row in rows_of(tmp_path)] == ["dms_tiny_ledger"]
    evaluate_benchmarks(configure(checkpoint, tmp_path, tasks=tasks, num_problems=2))
    assert [row["task"] for row in rows_of(tmp_path)] == ["dms_tiny_ledger", "dms_tiny_road"]


def test_lengths_are_reported_apart(checkpoint, tmp_path):  # noqa: F811
    evaluate_benchmarks(
        configure(checkpoint, tmp_path, tasks=("dms_niah_single",), lengths=(512, 768), num_problems=2, max_tokens=(24,))
    )
    rows = rows_of(tmp_path)
    assert [row["task"] for row in rows] == ["dms_niah_single_512", "dms_niah_single_768"]
    assert all(row["num_problems"] == 2 and "maj" not in row["metrics"] for row in rows)
    assert rows[0]["kv_reads"] < rows[1]["kv_reads"]


@pytest.fixture
def group(tmp_path, monkeypatch):
    """A group of lm-eval's own without a sum over its tasks: 3 problems and 1."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "files"
    folder.mkdir()
    for name, number in (("many", 3), ("one", 1)):
        docs = [
            {"q": f"def f{i}(x):\n    return", "choices": [" x", " f"], "a": 0, "text": "import os"} for i in range(number)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        head = f"task: local_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / name}.jsonl}}}}\n"
        (folder / f"{name}.yaml").write_text(f"{head}test_split: test\ndoc_to_text: '{{{{q}}}}'\n{FOREIGN['text']}\n")
    return folder


def test_every_task_of_a_group_without_a_sum_has_its_row(checkpoint, tmp_path, group, monkeypatch):  # noqa: F811
    from lm_eval.tasks import TaskManager

    from dms_lab.evaluation import loading

    (group / "group.yaml").write_text("group: local_group\ntask: [local_many, local_one]\n")
    manager = TaskManager(include_path=str(group), include_defaults=False)
    monkeypatch.setattr(loading, "TaskManager", lambda **_: manager)
    evaluate_benchmarks(configure(checkpoint, tmp_path / "out", tasks=("local_group",)))
    assert [(row["task"], row["num_problems"]) for row in rows_of(tmp_path / "out")] == [
        ("local_many", 3),
        ("local_one", 1),
    ]
    for part in (1, 2):
        evaluate_benchmarks(configure(checkpoint, tmp_path / "parts", tasks=("local_group",), shard=(part, 2)))
    with SampleStore(tmp_path / "parts" / "samples") as store:
        assert len(store.summaries()) == 4
    evaluate_benchmarks(configure(checkpoint, tmp_path / "parts", tasks=("local_group",)))
    keep = ("task", "accuracy", "kv_reads", "num_problems")
    assert [[row[k] for k in keep] for row in rows_of(tmp_path / "parts")] == [
        [row[k] for k in keep] for row in rows_of(tmp_path / "out")
    ]
