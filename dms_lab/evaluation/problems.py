"""Problems of the reasoning benchmarks and of the embedded tasks, as lm-eval asks for them.

    hub file or source=...  ->  rows checked for their columns  ->  {"test": Dataset of id, prompt, answer, ...}

The YAML files in `tasks/` name one loader each as `custom_dataset`; lm-eval calls it with the task's metadata as keywords.
That metadata holds the model's arguments as well, so a loader takes the options it knows and ignores the rest; for the
same reason the revision of a data set is called `data_revision`: `revision` is the model's.
"""

import csv
import itertools
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk

Row = dict[str, Any]


@dataclass(frozen=True)
class SetInfo:
    """A benchmark on the hub: where it lies, how large it is, under which licence as far as known here.

    `file` is the one file that is read, `revision` a commit; LiveCodeBench has a module of its own for its many files.
    """

    hub_id: str
    configuration: str | None
    split: str
    num_problems: int
    licence: str = "see page"
    gated: bool = False
    file: str | None = None
    revision: str = "main"

    @property
    def page(self) -> str:
        """Its page, with the terms to accept where it is gated."""
        return f"https://huggingface.co/datasets/{self.hub_id}"


SETS: dict[str, SetInfo] = {
    "aime24": SetInfo(
        "HuggingFaceH4/aime_2024",
        None,
        "train",
        30,
        file="data/train-00000-of-00001.parquet",
        revision="2fe88a2f1091d5048c0f36abc874fb997b3dd99a",
    ),
    "aime25": SetInfo(
        "math-ai/aime25", None, "test", 30, file="test.jsonl", revision="563bb8404243c5f09de6ec262f2db674fe5bce9b"
    ),
    "math500": SetInfo(
        "HuggingFaceH4/MATH-500", None, "test", 500, file="test.jsonl", revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be"
    ),
    "gpqa_diamond": SetInfo(
        "Idavidrein/gpqa",
        "gpqa_diamond",
        "train",
        198,
        licence="CC-BY-4.0",
        gated=True,
        file="gpqa_diamond.csv",
        revision="633f5ee89ab8ad4522a9f850766b73f62147ffdd",
    ),
    # Releases are cumulative; 1055 is release_v6.
    "livecodebench": SetInfo(
        "livecodebench/code_generation_lite", None, "test", 1055, revision="0fe84c3912ea0c4d4a78037083943e8f0c4dd505"
    ),
}

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


def load_tiny_ledger(num_problems: int = 64, length: int = 512, data_seed: int = 0, **_: Any) -> dict[str, Dataset]:
    """Held-out problems of the family `ledger`, `length` tokens each: a pure function of the arguments."""
    return _tiny("ledger", num_problems, length, data_seed)


def load_tiny_road(num_problems: int = 64, length: int = 512, data_seed: int = 0, **_: Any) -> dict[str, Dataset]:
    """Held-out problems of the family `road`, `length` tokens each: a pure function of the arguments."""
    return _tiny("road", num_problems, length, data_seed)


def load_tiny_program(num_problems: int = 64, length: int = 512, data_seed: int = 0, **_: Any) -> dict[str, Dataset]:
    """Held-out problems of the family `program`, `length` tokens each: a pure function of the arguments."""
    return _tiny("program", num_problems, length, data_seed)


def read_rows(name: str, columns: tuple[str, ...], source: str | None = None, revision: str | None = None) -> list[Row]:
    """The rows of a set in `SETS`, all of which have `columns`, from the hub's cache, the hub or `source`.

    `source` is a jsonl, parquet or csv file, a folder that `save_to_disk` wrote, or one with the set's file in it.
    Raises `ValueError` where it cannot be had, saying how to get it, or lacks a column, naming it.
    """
    info = SETS[name]
    path = _download(info, revision or info.revision) if source is None else Path(source).expanduser()
    rows = _read_folder(path, info) if path.is_dir() else _read_file(path)
    if not rows:
        raise ValueError(f"{path} has no rows, so there is nothing to evaluate {name} on")
    for number, row in enumerate(rows):
        missing = [column for column in columns if row.get(column) is None]
        if missing:
            raise ValueError(
                f"row {number} of {path} lacks the column {missing[0]!r}; {name} needs {', '.join(columns)} and finds "
                f"{', '.join(map(str, row))}"
            )
    return rows


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


def _tiny(family: str, num_problems: int, length: int, data_seed: int) -> dict[str, Dataset]:
    from dms_lab.evaluation.hard import make_problems

    return as_split(
        {"id": f"{family}-{data_seed}-{length}-{number}", "prompt": problem.prompt, "answer": problem.answer}
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


def _download(info: SetInfo, revision: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(info.hub_id, info.file, repo_type="dataset", revision=revision))
    except Exception as error:  # the client raises its own, the system's and its HTTP library's
        terms = f"it is gated, so accept its terms on {info.page}, run `hf auth login` and then " if info.gated else "run "
        raise ValueError(
            f"{info.hub_id} cannot be loaded ({type(error).__name__}): {terms}"
            f"`hf download --repo-type dataset {info.hub_id} {info.file} --revision {revision}` where there is a network, "
            "or give source=<a jsonl, parquet or csv file, or a folder, with the same columns>"
        ) from error


def _read_folder(folder: Path, info: SetInfo) -> list[Row]:
    if any((folder / name).exists() for name in ("state.json", "dataset_dict.json")):
        found = load_from_disk(str(folder))
        if isinstance(found, DatasetDict):
            if info.split not in found:
                raise ValueError(f"{folder} has no split {info.split}, which {info.hub_id} has, but {', '.join(found)}")
            found = found[info.split]
        return found.to_list()
    files = [path for path in (folder / info.file, folder / Path(info.file).name) if path.is_file()]
    files = files or sorted(path for path in folder.rglob("*") if path.suffix in READERS)
    if not files:
        raise ValueError(f"{folder} has no data file; these can be read: {', '.join(READERS)}")
    if len(files) > 1 and files[0].name != Path(info.file).name:
        names = ", ".join(str(path.relative_to(folder)) for path in files[:5])
        raise ValueError(f"{folder} has {len(files)} data files ({names}); give source=<one of them>")
    return _read_file(files[0])


def _read_file(path: Path) -> list[Row]:
    if not path.is_file():
        raise ValueError(f"source={path} is neither a file nor a folder")
    if path.suffix not in READERS:
        raise ValueError(f"source={path} cannot be read: its suffix is none of {', '.join(READERS)}")
    try:
        return READERS[path.suffix](path)
    except (OSError, ValueError) as error:
        raise ValueError(f"source={path} cannot be read as {path.suffix[1:]}: {error}") from error


def _read_jsonl(path: Path) -> list[Row]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is no JSON object")
    return rows


def _read_parquet(path: Path) -> list[Row]:
    from pyarrow import parquet

    return parquet.read_table(path).to_pylist()


def _read_csv(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
