"""math-verify in its process: right verdicts, and nothing that an answer can do to the parent."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("math_verify", reason="math-verify is the optional extra eval")

from dms_lab.evaluation import math_worker
from dms_lab.evaluation.math_worker import LONGEST, MathWorker, Result


@pytest.fixture(scope="module")
def worker():
    with MathWorker() as worker:
        yield worker


def gone(pid: int, seconds: float) -> bool:
    """Whether a process has ended, waited for that long; one that nobody has fetched counts as ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("gold", "text", "expected"),
    [
        (r"\frac{1}{2}", r"So we get $\boxed{0.5}$.", Result(True, "1/2")),
        (r"\frac{1}{2}", r"So we get $\boxed{0.3}$.", Result(False, "3/10")),
        ("5", r"First \boxed{4}, no: \[\boxed{x = 5}\]", Result(True, "5")),
        ("5", "The final answer is $5$. I hope it is correct.", Result(True, "5")),
        ("5", "I do not know.", Result(False, None)),
        ("5", "", Result(False, None)),
    ],
)
def test_a_verdict_comes_with_the_simplified_answer(worker, gold, text, expected):
    assert worker.verify(gold, text, 60) == expected


def test_values_written_differently_have_one_canonical_form(worker):
    def form(text):
        return worker.verify("0", rf"\boxed{{{text}}}", 60).canonical

    assert len({form(text) for text in (r"\frac12", ".50", r"\dfrac{2}{4}", "x = 1/2", r"\tfrac{1}{2}", "0.5")}) == 1
    assert form(r"\sqrt{12}, 3, 3.0") == form(r"3, 2\sqrt{3}") == form(r"\{\frac{6}{2}, 2\sqrt{3}\}")
    assert form("3,1,2") == form(r"\{2, 3, 1\}") != form("(3,1,2)")
    assert form(r"\begin{pmatrix}0.5\\2\end{pmatrix}") == form(r"\begin{bmatrix}\frac12\\2\end{bmatrix}") == "[[1/2], [2]]"
    assert form(r"\frac{\sqrt{12}}{2}") == form(r"\sqrt3") == "sqrt(3)"
    assert form("(3, 5)") != form("(5, 3)")


@pytest.mark.parametrize("tower", ["9^{9^{9^{9}}}", "((((10!)!)!)!)!", r"\sum_{n=1}^{10^{9}} n^{n}"])
def test_an_answer_that_would_take_for_ever_costs_its_limit_and_the_next_is_graded(worker, tower):
    worker.verify("1", r"\boxed{1}", 60)  # the start is not part of the limit
    started = time.monotonic()
    result = worker.verify("5", rf"\boxed{{{tower}}}", 1.0)
    assert result == Result(None, None, "math-verify took longer than 1 s")
    assert 0.9 < time.monotonic() - started < 8
    assert worker.verify("7", r"\boxed{7}", 60) == Result(True, "7")


def test_an_answer_longer_than_any_is_not_read(worker):
    result = worker.verify("5", r"\boxed{" + "1" * 1_000_000 + "}", 60)
    assert result == Result(None, None, f"an answer of 1000008 characters, more than {LONGEST}")
    assert worker.verify("1" * (LONGEST + 1), "1", 60).is_right is None
    assert worker.verify("5", "x" * (LONGEST - 8) + r" \boxed5", 60).note == ""


def test_the_worker_cannot_take_more_memory_than_its_limit(worker):
    worker.verify("1", r"\boxed{1}", 60)
    with open(f"/proc/{worker._process.pid}/limits") as file:
        limits = file.read()
    assert next(line for line in limits.splitlines() if "address space" in line).split()[3:5] == [str(1 << 30)] * 2


@pytest.mark.parametrize("text", ["\x00\\boxed{5}", "\ud800 \\boxed{5}", "\u2028\n\\boxed{5}\n", '"}{\\n\\boxed{5}'])
def test_any_character_reaches_the_worker(worker, text):
    assert worker.verify("5", text, 60).is_right is True


def test_a_worker_that_was_killed_is_started_again_and_its_question_is_noted():
    with MathWorker() as worker:
        assert worker.verify("7", r"\boxed{7}", 60).is_right
        first = worker._process.pid
        worker._process.kill()
        worker._process.wait()
        assert worker.verify("7", r"\boxed{7}", 60).is_right  # was idle: nothing is lost
        second = worker._process.pid
        threading.Timer(0.5, os.kill, (second, signal.SIGKILL)).start()
        assert worker.verify("7", r"\boxed{9^{9^{9^{9}}}}", 30) == Result(None, None, "math-verify's process died")
        assert worker.verify("7", r"\boxed{7}", 60).is_right
        assert len({first, second, worker._process.pid}) == 3


def test_threads_share_a_worker_and_each_gets_its_own_verdict(worker):
    found = {}

    def ask(number):
        found[number] = worker.verify(str(number), rf"\boxed{{{number}}}", 60)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: Result(True, str(number)) for number in range(40)}


def test_closing_ends_the_process_and_the_object_can_be_used_again():
    worker = MathWorker()
    worker.close()
    with worker:
        worker.verify("1", r"\boxed{1}", 60)
        pid = worker._process.pid
    assert gone(pid, 1)
    with worker:
        assert worker.verify("1", r"\boxed{1}", 60).is_right
        pid = worker._process.pid
    del worker
    assert gone(pid, 1)


def test_a_process_ends_with_the_object_that_started_it():
    worker = MathWorker()
    worker.verify("1", r"\boxed{1}", 60)
    pid = worker._process.pid
    del worker
    assert gone(pid, 1)


PARENT = """
import sys, threading
from dms_lab.evaluation.math_worker import MathWorker
worker = MathWorker()
worker.verify("1", "1", 60)
print(worker._process.pid, flush=True)
print(sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "sympy", "math_verify"}), flush=True)
if sys.argv[1] == "busy":
    threading.Thread(target=worker.verify, args=("1", r"\\boxed{9^{9^{9^{9}}}}", 1.0)).start()
if sys.argv[1] != "leave":
    threading.Event().wait()
"""


@pytest.mark.parametrize("what", ["leave", "idle", "busy"])
def test_no_worker_outlives_its_parent(what, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, script, what], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        assert parent.stdout.readline() == "[]\n"  # the parent imports none of what the worker needs
        if what != "leave":
            time.sleep(0.5)
            parent.kill()
        parent.wait(30)
        assert gone(pid, 12)


def test_the_worker_imports_no_torch_and_nothing_of_the_project(worker):
    worker.verify("1", r"\boxed{1}", 60)
    with open(f"/proc/{worker._process.pid}/maps") as file:
        assert "torch" not in file.read()
    with open(f"/proc/{worker._process.pid}/cmdline") as file:
        assert file.read().split("\0")[1:3] == ["-P", math_worker.__file__]


def test_without_math_verify_the_error_names_the_extra(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('No module named math_verify')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with MathWorker() as worker, pytest.raises(ImportError, match=r"dms_lab\[eval\]"):
        worker.verify("1", "1")


def test_a_limit_must_be_above_zero(worker):
    with pytest.raises(ValueError, match="seconds=0 must be above 0"):
        worker.verify("1", "1", 0)
