"""Problems of the reasoning benchmarks and of the embedded tasks, as lm-eval asks for them.

    rows of a set (`sets`), or generated  ->  a prompt in a style  ->  {"test": Dataset of id, prompt, answer, ...}

The YAML files in `tasks/` name one loader each as `custom_dataset`; lm-eval calls it with the task's metadata as keywords.
That metadata holds the model's arguments as well, so a loader takes the options it knows and ignores the rest; for the
same reason the revision of a data set is called `data_revision`: `revision` is the model's.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

from datasets import Dataset, concatenate_datasets

from dms_lab.evaluation.sets import Row, read_rows

# `paper` asks for what the DMS paper's protocol asks for: steps and \boxed{}, `Answer: $LETTER`, a Python program.
# `card` has the sentences that model cards prescribe for benchmarks: DeepSeek-R1 ("Usage Recommendations") and Qwen3 ("Best
# Practices"); neither prescribes one for programs, so there it is LiveCodeBench's own (lcb_runner, code_generation.py).
MATH_PROMPTS = {
    "paper": "Solve the following mathematics problem. Think step by step, and write the final answer, and nothing else, "
    "inside \\boxed{{}} on the last line of your response.\n\n{question}",
    "card": "{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}.",
}
CHOICE_PROMPTS = {
    "paper": "Answer the following multiple choice question. Think step by step. The last line of your response must be "
    "'Answer: $LETTER' (without quotes), where LETTER is one of ABCD.\n\n{question}\n\n{choices}",
    "card": "{question}\n\n{choices}\n\nPlease show your choice in the `answer` field with only the choice letter, e.g., "
    '`"answer": "C"`.',
}
CODE_PROMPTS = {
    "paper": "Write a Python program that solves the following problem and passes all tests. Think step by step, and end "
    "your response with the whole program in one fenced block.\n\n{question}\n\n{form}\n```python\n{code}\n```",
    "card": "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
    "correct Python program that matches the specification and passes all tests.\n\n### Question:\n{question}\n\n"
    "### Format: {form}\n```python\n{code}\n```\n\n### Answer: (use the provided format with backticks)\n\n",
}
# What stands for `form`, with starter code and without.
CODE_FORMS = {
    "paper": (
        "Complete this starter code, keeping its names:",
        "The program reads standard input and writes the answer to standard output. Give it in this form:",
    ),
    "card": (
        "You will use the following starter code to write the solution to the problem and enclose your code within "
        "delimiters.",
        "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample "
        "inputs). Enclose your code within delimiters as follows. Ensure that when the python program runs, it reads the "
        "inputs, runs the algorithm and writes output to STDOUT.",
    ),
}


def load_aime24(
    source: str | None = None, data_revision: str | None = None, prompt_style: str = "paper", **_: Any
) -> dict[str, Dataset]:
    """The 30 problems of AIME 2024; `answer` is an integer without leading zeros. Raises as `read_rows`."""
    return _aime("aime24", source, data_revision, prompt_style)


def load_aime25(
    source: str | None = None, data_revision: str | None = None, prompt_style: str = "paper", **_: Any
) -> dict[str, Dataset]:
    """The 30 problems of AIME 2025; `answer` is an integer without leading zeros. Raises as `read_rows`."""
    return _aime("aime25", source, data_revision, prompt_style)


def load_math500(
    source: str | None = None, data_revision: str | None = None, prompt_style: str = "paper", **_: Any
) -> dict[str, Dataset]:
    """MATH-500 with `subject` and `level`; `answer` is LaTeX. Raises as `read_rows`."""
    template = _style(MATH_PROMPTS, prompt_style)
    rows = read_rows("math500", ("problem", "answer", "subject", "level", "unique_id"), source, data_revision)
    return as_split(
        {
            "id": str(row["unique_id"]),
            "prompt": template.format(question=row["problem"]),
            "question": row["problem"],
            "answer": str(row["answer"]),
            "subject": row["subject"],
            "level": str(row["level"]),
        }
        for row in rows
    )


def load_gpqa_diamond(
    source: str | None = None,
    data_revision: str | None = None,
    prompt_style: str = "paper",
    choices_seed: int = 0,
    **_: Any,
) -> dict[str, Dataset]:
    """GPQA-Diamond with its choices in the order of `choices_seed`; `answer` is a letter, `choices` are A to D.

    Raises as `read_rows`; the set is gated.
    """
    from dms_lab.evaluation.checking import permute_choices

    template = _style(CHOICE_PROMPTS, prompt_style)
    wrong_columns = ("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    rows = read_rows("gpqa_diamond", ("Record ID", "Question", "Correct Answer", *wrong_columns), source, data_revision)

    def document(row: Row) -> Row:
        question = row["Question"].strip()
        wrong = [row[column].strip() for column in wrong_columns]
        choices, letter = permute_choices(question, row["Correct Answer"].strip(), wrong, choices_seed)
        listed = "\n".join(f"{name}) {choice}" for name, choice in zip("ABCD", choices, strict=True))
        return {
            "id": str(row["Record ID"]),
            "prompt": template.format(question=question, choices=listed),
            "question": question,
            "answer": letter,
            "choices": list(choices),
        }

    return as_split(map(document, rows))


def load_livecodebench(prompt_style: str = "paper", **options: Any) -> dict[str, Dataset]:
    """LiveCodeBench's problems by `release`, `start`, `end` and `errata`, as `livecodebench.problems` reads them.

    `answer` is empty: the tests in `public_tests` and `private_tests` decide.
    """
    from dms_lab.evaluation import livecodebench

    template, forms = _style(CODE_PROMPTS, prompt_style), CODE_FORMS[prompt_style]
    wanted = {name: options[name] for name in ("release", "start", "end", "errata") if name in options}
    named = {"source": options.get("source"), "revision": options.get("data_revision")}
    wanted |= {name: value for name, value in named.items() if value is not None}

    def document(row: Row) -> Row:
        starter = row["starter_code"].strip("\n")
        prompt = template.format(
            question=row["question"], form=forms[0 if starter else 1], code=starter or "# YOUR CODE HERE"
        )
        return {**row, "prompt": prompt, "answer": ""}

    return as_split(map(document, livecodebench.problems(**wanted)))


def load_tiny_ledger(
    num_problems: int = 64, lengths: Sequence[int] = (), data_seed: int = 0, **_: Any
) -> dict[str, Dataset]:
    """Held-out problems of the family `ledger`, as `_tiny` makes them."""
    return _tiny("ledger", num_problems, lengths, data_seed)


def load_tiny_road(num_problems: int = 64, lengths: Sequence[int] = (), data_seed: int = 0, **_: Any) -> dict[str, Dataset]:
    """Held-out problems of the family `road`, as `_tiny` makes them."""
    return _tiny("road", num_problems, lengths, data_seed)


def load_tiny_program(
    num_problems: int = 64, lengths: Sequence[int] = (), data_seed: int = 0, **_: Any
) -> dict[str, Dataset]:
    """Held-out problems of the family `program`, as `_tiny` makes them."""
    return _tiny("program", num_problems, lengths, data_seed)


def as_split(rows: Iterable[Row]) -> dict[str, Dataset]:
    """What a loader returns: the rows as the split `test`. Raises `ValueError` for no rows and for an id that repeats."""
    rows, seen, parts = iter(rows), set(), []
    while batch := list(itertools.islice(rows, 64)):  # LiveCodeBench's tests are gigabytes: no second copy, no huge array
        for row in batch:
            if row["id"] in seen:
                raise ValueError(f"the id {row['id']} stands in two rows; results are kept by id, so each must be unique")
            seen.add(row["id"])
        parts.append(Dataset.from_list(batch))
    if not parts:
        raise ValueError("there are no problems to evaluate: widen the selection, or ask for num_problems of 1 or more")
    return {"test": concatenate_datasets(parts)}


def _aime(name: str, source: str | None, revision: str | None, prompt_style: str) -> dict[str, Dataset]:
    template = _style(MATH_PROMPTS, prompt_style)
    rows = read_rows(name, ("id", "problem", "answer"), source, revision)
    return as_split(
        {
            "id": f"{name}-{row['id']}",
            "prompt": template.format(question=row["problem"]),
            "question": row["problem"],
            "answer": _integer(row["answer"], f"{name}-{row['id']}"),
        }
        for row in rows
    )


def _tiny(family: str, num_problems: int, lengths: Sequence[int], data_seed: int) -> dict[str, Dataset]:
    """`num_problems` of 512 tokens, or of each of the `lengths` (`max_length` then): a pure function of the arguments."""
    from dms_lab.evaluation.hard import make_problems

    return as_split(
        {"id": f"{family}-{data_seed}-{length}-{number}", "prompt": problem.prompt, "answer": problem.answer}
        | ({"max_length": length} if lengths else {})
        for length in lengths or (512,)
        for number, problem in enumerate(make_problems(family, num_problems, length, data_seed))
    )


def _integer(answer: Any, name: str) -> str:
    """`073` and `336^\\circ` (both are in circulation) are `73` and `336`."""
    found = re.fullmatch(r"(\d{1,3})(\^\\circ|\^\{\\circ\}|°)?", str(answer).strip())
    if not found:
        raise ValueError(f"the answer of {name} is {answer!r}; AIME's answers are integers from 0 to 999")
    return str(int(found[1]))


def _style(templates: dict[str, str], prompt_style: str) -> str:
    if prompt_style not in templates:
        raise ValueError(f"prompt_style={prompt_style!r} is unknown; choose one of {', '.join(templates)}")
    return templates[prompt_style]
