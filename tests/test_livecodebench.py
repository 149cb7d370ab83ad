"""LiveCodeBench on hand-made release files: what is read, what is compared, and what a program has to do to be right."""

import base64
import json
import os
import pickle
import re
import shutil
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dms_lab.evaluation import livecodebench, livecodebench_files
from dms_lab.evaluation.livecodebench import ERRATA, extract_code, grade, problems, same_lines, same_value
from dms_lab.evaluation.livecodebench_files import decoded
from dms_lab.evaluation.sandbox import SandboxError, SandboxLimits, run_tests
from dms_lab.evaluation.verdict import Verdict

FILES = Path(__file__).parent / "data" / "livecodebench"
LIMITS = SandboxLimits(seconds_per_test=2, memory_bytes=300 << 20, output_bytes=1 << 20)
SUM = "input()\nprint(sum(map(int, input().split())))"


@pytest.fixture
def read(tmp_path):
    def problems_of(source=FILES, **options):
        return list(problems(source, **({"release": "release_v2", "cache": tmp_path / "cache"} | options)))

    return problems_of


@pytest.fixture
def docs(read):
    return {doc["id"]: doc for doc in read(start=None, end=None)}


def fenced(code):
    return f"The idea is simple.\n\n```python\n{code}\n```\nThat is all."


def packed(value, compress=zlib.compress):
    return base64.b64encode(compress(pickle.dumps(value))).decode()


# -- reading -----------------------------------------------------------------------------------------------------------
def test_the_window_has_both_its_days(read):
    assert [doc["id"] for doc in read()] == ["made_b", "9001"]
    assert [doc["id"] for doc in read(start="2024-07-31", end="2025-01-30")] == ["made_a", "made_b"]
    assert [doc["id"] for doc in read(start=None, end=None)] == ["made_a", "made_b", "9001", "made_c"]


def test_a_problem_is_flat_text(read):
    stdin, functional = read()
    assert set(stdin) == set(
        "id title question starter_code fn_name platform difficulty contest_date public_tests private_tests".split()
    )
    assert all(isinstance(value, str) for doc in (stdin, functional) for value in doc.values())
    assert (stdin["fn_name"], stdin["starter_code"]) == ("", "")
    assert functional["fn_name"] == "pairWithSum"
    assert functional["contest_date"] == "2025-01-31T12:30:00"


def test_releases_are_cumulative(read):
    assert [doc["id"] for doc in read(release="release_v1", start=None, end=None)] == ["made_a", "made_b"]
    assert livecodebench_files.RELEASES["release_v1"] == ("test.jsonl",)
    assert livecodebench_files.RELEASES["release_v6"][1:] == tuple(f"test{n}.jsonl" for n in range(2, 7))


def test_one_file_can_be_read(read):
    assert [doc["id"] for doc in read(FILES / "test2.jsonl", release="release_v6", end=None)] == ["9001", "made_c"]


def test_lines_are_read_once(read, tmp_path, monkeypatch):
    first = read()
    assert len(list((tmp_path / "cache").iterdir())) == 2
    monkeypatch.setattr(livecodebench_files, "_lines", None)
    assert read() == first


def test_a_changed_file_is_read_again(read, tmp_path):
    shutil.copytree(FILES, tmp_path / "release")
    before = read(tmp_path / "release")
    path = tmp_path / "release" / "test.jsonl"
    path.write_text(path.read_text().replace("made_b", "changed"))
    assert [doc["id"] for doc in before] == ["made_b", "9001"]
    assert [doc["id"] for doc in read(tmp_path / "release")] == ["changed", "9001"]


def test_many_rows_come_in_order_and_by_date(read, tmp_path):
    row = json.loads((FILES / "test.jsonl").read_text().splitlines()[0])
    days = [f"2024-{month:02}-{day:02}" for month in range(1, 13) for day in range(1, 11)]
    text = "".join(json.dumps(row | {"question_id": day, "contest_date": day}) + "\n" for day in days)
    (tmp_path / "many.jsonl").write_text(text)
    found = [doc["id"] for doc in read(tmp_path / "many.jsonl", start="2024-03-05", end="2024-09-02")]
    assert found == [day for day in days if "2024-03-05" <= day <= "2024-09-02"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 of .*no JSON"),
        ("[]", "question_title"),
        ("DATE", r"line 2 .*contest_date='soon'"),
        ("METADATA", "metadata"),
    ],
)
def test_a_bad_line_is_named_and_leaves_no_table(read, tmp_path, line, message):
    good = (FILES / "test.jsonl").read_text().splitlines()[0]
    changes = {"DATE": {"contest_date": "soon"}, "METADATA": {"metadata": {}}}.get(line)
    bad = json.dumps(json.loads(good) | changes) if changes else line
    (tmp_path / "bad.jsonl").write_text(good + "\n" + bad + "\n")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "bad.jsonl")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"release": "release_v7"}, "choose one of release_v1, "),
        ({"start": "August"}, "start='August' is no day"),
        ({"start": "2025-02-01"}, "is after"),
        ({"release": "release_v4"}, r"test3\.jsonl, test4\.jsonl missing.*hf download"),
        ({"errata": "nowhere.txt"}, "is no file"),
        (
            {"source": None, "revision": "0" * 40},
            r"test\.jsonl of livecodebench/code_generation_lite.*`hf download --repo-type",
        ),
    ],
)
def test_what_cannot_be_had_is_refused_with_the_remedy(read, options, message):
    with pytest.raises(ValueError, match=message):
        read(**options)


def test_a_table_of_a_commit_needs_no_hub(read, tmp_path, monkeypatch):
    import huggingface_hub

    commit = "ab" * 20
    folder = tmp_path / commit
    shutil.copytree(FILES, folder)
    asked = []

    def download(repo, name, *, repo_type, revision):
        asked.append((repo, name, repo_type, revision))
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    first = read(None, revision="main")
    assert asked == [
        ("livecodebench/code_generation_lite", name, "dataset", "main") for name in ("test.jsonl", "test2.jsonl")
    ]
    assert read(None, revision=commit) == first
    assert len(asked) == 2


def test_errata_leave_problems_out(read, tmp_path, monkeypatch):
    (tmp_path / "ids.txt").write_text("made_b\n\n")
    (tmp_path / "ids.jsonl").write_text('{"question_id": "9001", "why": "x"}\n')
    assert [doc["id"] for doc in read(errata=tmp_path / "ids.txt")] == ["9001"]
    assert [doc["id"] for doc in read(errata=tmp_path / "ids.jsonl")] == ["made_b"]
    assert len(read(errata="official")) == 2
    monkeypatch.setitem(ERRATA, "sum-of-a-line", "made up here")
    assert [doc["id"] for doc in read(errata="official")] == ["9001"]
    assert {"arc185_c", "arc189_a", "find-the-peaks", "most-frequent-ids"} <= set(ERRATA)
    assert len(ERRATA) == 18


# -- tests -------------------------------------------------------------------------------------------------------------
def test_tests_are_public_and_private_in_both_encodings(docs):
    plain, num_public = livecodebench_files.tests_of(docs["made_a"]["public_tests"], docs["made_a"]["private_tests"], "a")
    coded, _ = livecodebench_files.tests_of(docs["made_b"]["public_tests"], docs["made_b"]["private_tests"], "b")
    assert [(test.input, test.output, test.testtype) for test in plain] == [
        ("3\n", "6\n", "stdin"),
        ("0\n", "0\n", "stdin"),
    ]
    assert num_public == 1
    assert coded[2].output == "100\n"
    assert not docs["made_b"]["private_tests"].startswith("[")


def encoded(number, size=1):
    tests = [{"input": f"{number}\n", "output": "x" * size, "testtype": "stdin"}]
    return json.dumps(tests), packed(json.dumps(tests))


@pytest.fixture
def decodings(monkeypatch):
    """The private tests that were decoded, with nothing kept from before."""
    found = []
    monkeypatch.setattr(livecodebench_files, "decoded", lambda text: found.append(text) or decoded(text))
    monkeypatch.setattr(livecodebench_files, "_KEPT", type(livecodebench_files._KEPT)())
    return found


def test_tests_of_the_last_few_problems_are_decoded_once(decodings):
    for number in [0, 0, 1, 2, 3, 0, 4, 0, 1]:  # 1 is the one that was longest unused when 4 came
        tests, num_public = livecodebench_files.tests_of(*encoded(number), "x")
        assert ([test.input for test in tests], num_public) == ([f"{number}\n"] * 2, 1)
    assert decodings == [encoded(number)[1] for number in [0, 1, 2, 3, 4, 1]]
    assert len(livecodebench_files._KEPT) == 4


def test_problems_that_differ_in_either_text_are_told_apart(decodings):
    public, private = encoded(1)
    assert len(livecodebench_files.tests_of(public, private, "x")[0]) == 2
    assert len(livecodebench_files.tests_of(public, "[]", "x")[0]) == 1
    assert livecodebench_files.tests_of("[]", public, "x")[1] == 0
    assert livecodebench_files.tests_of(public, "[]", "x")[1] == 1


def test_few_characters_are_kept_decoded(decodings, monkeypatch):
    monkeypatch.setattr(livecodebench_files, "_MOST_KEPT_CHARACTERS", 1000)
    for number in range(3):
        livecodebench_files.tests_of(*encoded(number, 200), "x")
    assert len(livecodebench_files._KEPT) == 2
    livecodebench_files.tests_of(*encoded(3, 2000), "x")
    livecodebench_files.tests_of(*encoded(3, 2000), "x")
    assert len(livecodebench_files._KEPT) == 1  # more than that, but the one in use
    assert len(decodings) == 4


def test_threads_that_ask_at_once_decode_once(decodings):
    problem = encoded(0, 2_000_000)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: livecodebench_files.tests_of(*problem, "x"), range(16)))
    assert len(decodings) == 1
    assert all(tests is found[0][0] for tests, _ in found)


def test_tests_that_cannot_be_read_are_named_each_time_and_not_kept(decodings):
    for name in ("made_x", "made_y"):
        with pytest.raises(ValueError, match=name):
            livecodebench_files.tests_of("[]", "[]", name)
    assert not livecodebench_files._KEPT


class Malicious:
    def __reduce__(self):
        return (os.mkdir, ("/tmp/unpickled-by-livecodebench",))


@pytest.mark.parametrize(
    "value", [Malicious(), ["[]"], {"a": 1}, 3, b"[]", ("a", "b")], ids=lambda value: type(value).__name__
)
def test_a_pickle_of_anything_but_a_string_is_refused(value):
    with pytest.raises(ValueError, match="where a single"):
        decoded(packed(value))
    assert not os.path.exists("/tmp/unpickled-by-livecodebench")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("text", ["[]", '["é\\n"]', "[" + "1, " * 50000 + "2]"], ids=["short", "wide", "long"])
def test_a_pickled_string_is_read_in_every_protocol(protocol, text):
    assert decoded(base64.b64encode(zlib.compress(pickle.dumps(text, protocol))).decode()) == text


def test_decoding_is_bounded():
    bomb = packed("[" + " " * 10_000_000 + "]")
    assert len(bomb) < 20_000
    with pytest.raises(ValueError, match="more than 1000000 bytes"):
        decoded(bomb, 1_000_000)
    with pytest.raises(ValueError, match="cut off"):
        decoded(base64.b64encode(zlib.compress(pickle.dumps("[]"))[:-3]).decode())
    with pytest.raises(ValueError, match="neither JSON nor"):
        decoded("what is this")


@pytest.mark.parametrize(("public", "private"), [("{", "[]"), ('[{"input": ""}]', "[]"), ("[]", "[]"), ("3", "[]")])
def test_tests_that_cannot_be_read_are_no_verdict(public, private):
    with pytest.raises(ValueError, match="problem made_x"):
        livecodebench_files.tests_of(public, private, "made_x")


# -- code and comparison -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "code"),
    [
        (fenced("a\nb"), "a\nb"),
        ("```\na\n```", "a"),
        ("```py\na\n```\nor\n```\nb\n```", "b"),
        ("```python\na\n```\nand then\n```python\nb", None),
        ("```python\na\n```\nand then\n```", None),
        ("```python\ncut off\n\n```python\nb\n```", "b"),
        ("say ```x```\n```python\na\n```\nwhere ```a``` is a", "a"),
        ("```python\na\n``` That is all.", "a"),
        ("   ```python\n   a\n   ```", "   a"),
        ("```python\n\n```", None),
        ("no code", None),
        ("", None),
    ],
)
def test_the_code_is_the_last_closed_block(text, code):
    assert extract_code(text) == code


@pytest.mark.parametrize(
    ("printed", "expected", "equal"),
    [
        ("1 2\n", "1 2", True),
        ("\n 1 2 \n\n", "1 2\n", True),
        ("1  2", "1 2", True),
        ("1.0 2", "1 2.000", True),
        ("1e3", "1000", True),
        ("50000000000000000", "50000000000000001", False),
        ("0.1", "0.10000000000000001", False),
        ("1\n\n2", "1\n2", False),
        ("1\n2", "1 2", False),
        ("1 2\n3", "1 2", False),
        ("a  b", "a b", False),
        ("Yes", "YES", False),
        ("nan", "nan", True),
        ("nan 1", "nan  1", False),
        ("sNaN 1", "sNaN  1", False),
        ("1 x", "1 y", False),
        ("", "", True),
        ("", "0", False),
        ("1" * 5000, "1" * 5000 + ".0", True),
        ("1\r\n2\r\n", "1\n2\n", True),
    ],
)
def test_lines_are_compared_as_text_or_as_decimals(printed, expected, equal):
    assert same_lines(printed, expected) is equal


@pytest.mark.parametrize(
    ("returned", "expected", "equal"),
    [
        ("[1, 2]", "[1,2]", True),
        ("1", "1.0", True),
        ("true", "1", True),
        ("0.30000000000000004", "0.3", False),
        ('"1"', "1", False),
        ("null", "null", True),
        ("null", "0", False),
        ("[2, 1]", "[1, 2]", False),
        ('{"b": 1, "a": [2]}', '{"a": [2], "b": 1}', True),
        ("1" * 5000, "1" * 5000, True),
        ("1" * 5000, "1" * 4999 + "2", False),
        ("[" * 100_000, "[]", False),
        ("", "[]", False),
        ("[NaN]", "[NaN]", False),
    ],
)
def test_results_are_compared_as_values(returned, expected, equal):
    assert same_value(returned, expected) is equal


# -- verdicts ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("code", "note"),
    [
        (SUM, ""),
        ("if __name__ == '__main__':\n    " + SUM.replace("\n", "\n    "), ""),
        ("print(6)", r"test 2 of 4 \(public\): wrong answer"),
        (SUM + "\nif _ := 0: pass\nimport sys\nsys.exit(1)", ""),
        ("n = int(input())\nprint(6 if n == 3 else -5)", r"test 3 of 4 \(private\): wrong answer"),
        ("while True: pass", r"test 1 of 4 \(public\): time limit"),
        ("1 / 0", r"test 1 of 4 \(public\): crash: ZeroDivisionError: division by zero"),
        ("x = bytearray(1 << 30)", r"test 1 of 4 \(public\): memory limit"),
        ("while True: print(10**1000)", r"test 1 of 4 \(public\): output limit"),
        ("import os\nwhile True: os.fork()", "test 1 of 4"),
    ],
)
def test_the_verdict_on_a_program(docs, bubblewrap, code, note):
    verdict = grade(docs["made_b"], fenced(code), LIMITS)
    assert verdict.score == (0 if note else 1), verdict
    assert verdict.answer is None
    assert re.match(note or "$", verdict.note), verdict


@pytest.mark.parametrize(
    ("body", "note"),
    [
        ("return next(([a, b] for a, b in combinations(sorted(set(nums)), 2) if a + b == target), [])", ""),
        ("return next(((a, b) for a, b in combinations(sorted(set(nums)), 2) if a + b == target), ())", ""),
        (
            "return next(([a, b] for a in nums for b in nums if a + b == target and a != b), [])",
            "test 3 of 4 (private): wrong answer",
        ),
        ("return [4, 6]", "test 2 of 4 (public): wrong answer"),
        ("print([4, 6])", "test 1 of 4 (public): wrong answer"),
    ],
)
def test_the_verdict_on_a_function(docs, bubblewrap, body, note):
    code = f"class Solution:\n    def pairWithSum(self, nums: List[int], target: int) -> List[int]:\n        {body}"
    assert grade(docs["9001"], fenced(code), LIMITS) == Verdict(0.0 if note else 1.0, None, note)


@pytest.mark.parametrize(
    ("result", "expected", "passes"),
    [
        ("Fraction(1, 2)", "0.5", True),
        ("[Decimal(1), Fraction(4, 2)]", "[1, 2]", True),
        ("Fraction(1, 3)", "0.3333333333333333", False),
        ("complex(2, 1)", "2", False),
    ],
)
def test_a_number_of_another_kind_is_as_good_as_what_it_equals(docs, bubblewrap, result, expected, passes):
    tests = [{"input": "[]\n0", "output": expected, "testtype": "functional"}]
    doc = docs["9001"] | {"public_tests": json.dumps(tests), "private_tests": "[]"}
    code = "from decimal import Decimal\nfrom fractions import Fraction\nclass Solution:\n"
    code += f"    def pairWithSum(self, nums, target):\n        return {result}"
    assert grade(doc, fenced(code), LIMITS).score == passes


def test_nothing_is_run_after_the_first_failure(docs, bubblewrap, monkeypatch):
    runs = []

    def counted(*arguments):
        runs.append(run_tests(*arguments))
        return runs[-1]

    monkeypatch.setattr(livecodebench, "run_tests", counted)
    grade(docs["made_b"], fenced("print(6)"), LIMITS)
    grade(docs["made_b"], fenced(SUM), LIMITS)
    assert [len(outcomes) for outcomes in runs] == [2, 4]


def test_an_answer_without_code_needs_no_sandbox(docs):
    assert grade(docs["made_b"], "42", LIMITS, "nothing that exists") == Verdict(0.0, None, "no code")


def test_a_program_that_looks_for_the_expected_outputs_finds_none(docs, bubblewrap):
    search = fenced((FILES / "search.py").read_text())
    tests = [{"input": "x\n", "output": "needle-222222\n", "testtype": "stdin"}] * 2
    doc = docs["made_b"] | {"public_tests": json.dumps(tests), "private_tests": packed(json.dumps(tests))}
    assert grade(doc, search, SandboxLimits(seconds_per_test=30)).note == "test 1 of 4 (public): wrong answer"
    given = json.loads(json.dumps(tests).replace('"x', '"needle-222222'))
    doc |= {"public_tests": json.dumps(given[:1]), "private_tests": "[]"}
    assert grade(doc, search, SandboxLimits(seconds_per_test=30)).score == 1  # it finds what is there


def test_the_time_of_a_problem_is_bounded(docs, bubblewrap):
    limits = SandboxLimits(seconds_per_test=9, seconds_per_problem=1)
    verdict = grade(docs["made_b"], fenced("while True: pass"), limits)
    assert verdict == Verdict(0.0, None, "test 1 of 4 (public): time limit: the time of the whole problem is over")


def test_threads_grade_at_once_and_each_ends_in_its_time(docs, bubblewrap):
    answers = [fenced(code) for code in (SUM, "print(6)", "while True: pass")] * 3
    limits = SandboxLimits(seconds_per_test=0.7)
    started = time.monotonic()
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda answer: grade(docs["made_b"], answer, limits), answers))
    assert [verdict.score for verdict in found] == [1, 0, 0] * 3
    assert ["time" in verdict.note for verdict in found] == [False, False, True] * 3
    assert time.monotonic() - started < 20


def test_a_sandbox_that_fails_is_an_error_and_no_verdict(docs, monkeypatch):
    def broken(*_):
        raise SandboxError("the sandbox did not start: no room")

    monkeypatch.setattr(livecodebench, "run_tests", broken)
    with pytest.raises(SandboxError, match="no room"):
        grade(docs["made_b"], fenced(SUM), LIMITS)
