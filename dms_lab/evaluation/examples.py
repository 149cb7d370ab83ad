"""A few chains to read, beside the results: what was asked, what was said, what the grader made of it.

    the store's first chains of each method and task -> examples.jsonl, bounded in number and length -> people, W&B

The store has every chain, but neither its prompt nor the method that drew it.
"""

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from dms_lab.evaluation.hard import Label
from dms_lab.evaluation.lm import Asked, DmsLM
from dms_lab.evaluation.sample import Sample
from dms_lab.evaluation.scores import cut
from dms_lab.evaluation.verdict import Verdict

EXAMPLES = "examples.jsonl"
NUM_CHAINS = 8  # of each method, CR and task
NUM_CHARACTERS = 2000  # of a prompt, and of a text
_WITHHELD = ("dms_gpqa_diamond",)  # its authors ask that no problem is shown where a model may be trained on it
_NAME = ("task", "method", "target_cr", "settings")


def examples_of(lm: DmsLM, label: Label, record: dict[str, Any]) -> list[dict[str, Any]]:
    """The first chain of each of the first problems that `lm` was asked, a row each, as it stood at the limit of tokens.

    `record` is what decided them, as in their results.
    """
    return [row | {"settings": record} for asked in lm.asked for row in _of_task(lm, asked, label)]


def _of_task(lm: DmsLM, asked: Asked, label: Label) -> list[dict[str, Any]]:
    firsts = (sample for sample in lm.stored(asked) if sample.chain == 0)
    judged: list[tuple[Sample, list[Verdict]]] = []
    with lm.grading(asked.task, asked.run) as grading:
        for sample in islice(firsts, NUM_CHAINS):
            judged.append((sample, []))
            job = asked.jobs[sample.problem, 0]
            if grading is not None:  # the store has the verdict: nothing is graded again
                grading.put(sample, asked.max_tokens, job.doc, job.think_end, judged[-1][1].append)
    return [_row(lm, asked, label, sample, verdict[0] if verdict else None) for sample, verdict in judged]


def _row(lm: DmsLM, asked: Asked, label: Label, sample: Sample, verdict: Verdict | None) -> dict[str, Any]:
    part = cut(sample, asked.max_tokens)
    cost = sample.trace.request(sample.num_prompt, asked.max_tokens)
    prompt, text = lm.tokenizer.decode(asked.jobs[sample.problem, 0].ids), lm.text_of(part.ids)
    if asked.task in _WITHHELD:
        prompt = text = "(withheld: the data set's authors ask not to show its problems)"
    return {
        "run_id": label.run_id,
        "config_hash": label.config_hash,
        "task": asked.task,
        "problem": sample.problem,
        "method": label.method,
        "target_cr": label.target_cr,
        "prompt": shortened(prompt),
        "text": shortened(text),
        "answer": verdict.answer if verdict else None,
        "score": verdict.score if verdict else None,
        "note": verdict.note if verdict else "",
        "finish_reason": "length" if part.truncated else sample.finish_reason,
        "num_tokens": len(part.ids),
        "kv_reads": cost.kv_reads,
        "peak_tokens": cost.peak_tokens,
    }


def shortened(text: str, most: int = NUM_CHARACTERS) -> str:
    """`text`, or its beginning and its end: answers stand there."""
    if len(text) <= most:
        return text
    gap = f"\n[... {len(text) - most} characters ...]\n"
    return text[: most // 2] + gap + text[len(text) - (most - most // 2) :]


def keep(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """`path` has these rows, and of others those of another task, method, CR or settings; written whole or not at all."""
    new = {_name(row) for row in rows}
    kept = [row for row in load(path) if _name(row) not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in (*kept, *rows)))
    temporary.replace(path)


def load(path: Path) -> list[dict[str, Any]]:
    """The rows of `path`; none if there is no such file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _name(row: dict[str, Any]) -> str:
    return json.dumps([row[name] for name in _NAME], sort_keys=True)
