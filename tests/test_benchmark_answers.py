"""Each benchmark from its data to its results, with chains whose texts are known: only the model is made up."""

from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from test_benchmark_runs import checkpoint, configure, rows_of  # noqa: F401  a fixture

from dms_lab.accounting import Trace
from dms_lab.chains import Generated
from dms_lab.evaluation import lm
from dms_lab.evaluation.loading import load_task
from dms_lab.evaluation.reasoning import evaluate_benchmarks
from dms_lab.evaluation.sets import SETS
from dms_lab.evaluation.store import SampleStore

DATA = Path(__file__).parent / "data"
SUM = "input()\nprint(sum(map(int, input().split())))"
PAIR = (
    "class Solution:\n    def pairWithSum(self, nums, target):\n        for i, x in enumerate(sorted(nums)):\n"
    "            if target - x in nums and target - x > x:\n                return [x, target - x]\n        return []"
)
MOST = 600


def fenced(code):
    return f"The program:\n```python\n{code}\n```"


@pytest.fixture
def says(monkeypatch):
    """Has chains say given texts: `says(answer)`, a function of (problem id, chain) to text; None is cut in its thought."""

    def install(answer):
        class Speaker:
            def __init__(self, handle, policy, settings, sampling, eos_ids, tokenizer):
                self.settings, self.end, self.tokenizer = settings, eos_ids[0], tokenizer

            def run(self, prompts, on_token=None):
                for prompt in prompts:
                    text = answer(prompt.problem, prompt.chain)
                    ids = self.tokenizer(text or "So it goes on. " * 900, add_special_tokens=False).input_ids
                    ids = ids[: self.settings.max_new_tokens] if text is None else [*ids, self.end]
                    live = np.arange(len(ids)) + float(len(prompt.ids))
                    trace = Trace(live, np.where(np.arange(len(ids)) > 0, live, 0.0), 100 * live)
                    reason, cost = "length" if text is None else "eos", trace.request(len(prompt.ids))
                    yield Generated(ids, reason, cost, prompt.problem, prompt.chain, trace=trace)

        monkeypatch.setattr(lm, "Engine", Speaker)

    return install


def run(checkpoint, out, task, source, **changes):  # noqa: F811
    sources = (f"{task}:{DATA / source}",)
    values = {"tasks": (task,), "sources": sources, "max_tokens": (MOST,), "samples": 3, "width": (1, 3)} | changes
    evaluate_benchmarks(configure(checkpoint, out, **values))
    return {row["width"]: row for row in rows_of(out)}


def documents(checkpoint, task, source):  # noqa: F811
    config = configure(checkpoint, None, tasks=(task,), sources=(f"{task}:{DATA / source}",))
    return {doc["id"]: doc for doc in load_task(task, config, str(checkpoint)).leaves[task].eval_docs}


MATHEMATICS = [
    ("dms_aime24", "aime24.jsonl", lambda gold: rf"so it is \boxed{{0{gold}}}", r"perhaps \boxed{999}"),
    ("dms_aime25", "aime25.jsonl", lambda gold: rf"$\boxed{{{gold}}}$", r"\boxed{999}"),
    ("dms_math500", "math500.jsonl", lambda gold: rf"The answer is $\boxed{{ {gold} }}$.", r"\boxed{-12345}"),
    ("dms_gpqa_diamond", "gpqa_diamond.csv", lambda gold: f"**Answer: {gold}**", "Answer: none of them"),
]


@pytest.mark.parametrize(("task", "source", "right", "wrong"), MATHEMATICS)
def test_answers_are_read_after_the_thought_and_chains_are_combined(
    checkpoint,  # noqa: F811
    tmp_path,
    says,
    task,
    source,
    right,
    wrong,
):
    docs = documents(checkpoint, task, source)

    def answer(problem, chain):
        gold = docs[problem]["answer"]
        return (
            f"is it {wrong}?</think>{right(gold)}",
            None,  # an answer within a thought that never ends would be no answer either
            f"surely {right(gold)}</think>{wrong}",
        )[chain]

    says(answer)
    found = run(checkpoint, tmp_path, task, source)
    assert found[1]["num_problems"] == len(docs)
    assert found[1]["metrics"]["avg"][0] == pytest.approx(1 / 3)
    assert found[1]["truncation_rate"] == pytest.approx(1 / 3)
    assert (found[3]["headline"], found[3]["accuracy"]) == ("maj", 1.0)  # the right answer was the first seen of two
    assert found[3]["metrics"]["pass_at_k"][0] == 1
    with SampleStore(tmp_path / "samples") as store:
        (run_hash,) = {summary.run for summary in store.summaries()}
        verdicts = store.graded(task, run_hash)
        frame = store.to_frame()
    assert {v.note for (key, _, _), v in verdicts.items() if key.chain == 1} == {"cut off within the thought"}
    assert frame.groupby("chain")["score"].mean().tolist() == [1, 0, 0]


def test_programs_are_run_and_any_chain_that_passes_counts(
    checkpoint,  # noqa: F811
    tmp_path,
    says,
    bubblewrap,
    monkeypatch,
):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    good = {"made_b": SUM, "9001": PAIR}

    def answer(problem, chain):
        return (f"</think>{fenced('print(0)')}", None, f"hm</think>{fenced(good[problem])}")[chain]

    says(answer)
    found = run(checkpoint, tmp_path, "dms_livecodebench", "livecodebench", release="release_v2")
    assert found[1]["num_problems"] == 2
    assert found[1]["accuracy"] == pytest.approx(1 / 3)
    assert (found[3]["headline"], found[3]["accuracy"]) == ("pass_all", 1.0)


def test_where_there_is_no_sandbox_nothing_is_generated(checkpoint, tmp_path, says, monkeypatch):  # noqa: F811
    from dms_lab.evaluation import benchmarks

    def missing():
        raise ValueError("bubblewrap is missing")

    monkeypatch.setattr(benchmarks, "check_sandbox", missing)
    says(lambda problem, chain: pytest.fail("it was generated"))
    with pytest.raises(ValueError, match="bubblewrap is missing"):
        run(checkpoint, tmp_path, "dms_livecodebench", "livecodebench")
    assert not list(tmp_path.rglob("*.sqlite"))


def test_a_gated_set_says_how_to_get_access(checkpoint, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"accept its terms on .*gpqa, run `hf auth login`"):
        evaluate_benchmarks(configure(checkpoint, tmp_path, tasks=("dms_gpqa_diamond",)))
    assert SETS["gpqa_diamond"].gated
