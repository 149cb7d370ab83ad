"""Writes the prompts that dms_lab evaluates, as token ids: python experiments/peers/kvpress/prompts.py --out prompts.jsonl

Runs in the project's environment, where dms_lab is; what it writes is read by `run.py` in the other one. Same family,
count, length and seed, same problems as `dms_lab.evaluation.hard.make_problems`.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dms_lab.evaluation import hard
from dms_lab.models import EMBEDDED
from dms_lab.tiny import corpus, tasks
from dms_lab.tiny.tokenizer import END_THINK


def rows(families: list[str], count: int, length: int, seed: int, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict]:
    """One object a problem: id, task and length, token ids of the prompt, the answer, the mark that it stands behind."""
    for family in families:
        for index, problem in enumerate(hard.make_problems(family, count, length, seed)):
            ids = corpus.encode_prompt(problem, tokenizer)
            yield {
                "id": f"{family}-{index}",
                "task": family,
                "length": length,
                "ids": ids,
                "answer": problem.answer,
                "after": END_THINK,
            }


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(tasks.FAMILIES), choices=tasks.FAMILIES)
    parser.add_argument("--count", type=int, default=16, help="problems a family")
    parser.add_argument("--length", type=int, default=512, help="tokens of prompt, thought and answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, default=EMBEDDED, help="folder of the tokenizer")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    found = rows(args.families, args.count, args.length, args.seed, tokenizer)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(row) + "\n" for row in found))


if __name__ == "__main__":
    main()
