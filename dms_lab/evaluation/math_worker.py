"""math-verify in a process of its own: an answer that would hang or fill the memory costs that process, no more.

    MathWorker.verify(gold, text) -> {"gold", "text", "limit"} -> worker: {"is_right"}, then {"canonical"} -> Result

The worker runs this file as a script and so imports math-verify and sympy alone: no torch, no model, nothing of the
parent's. It speaks JSON lines, ends when its input does, and has two guards that need nobody's help: a limit on its address
space, and a timer whose signal ends it even inside a long computation in C. POSIX only.
"""

import json
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import dataclass

LONGEST = 8192  # characters of an answer; far below what a pipe takes at once, so that a request never blocks
_START_SECONDS = 120.0
_MEMORY_BYTES = 1 << 30
_LONGEST_CANONICAL = 400


@dataclass(frozen=True)
class Result:
    """What math-verify found: `is_right` is None where it gave no verdict, and `note` says why.

    `canonical` is the answer as a simplified expression, the same text for most ways to write one value; None if the
    answer is no expression or could not be simplified in time.
    """

    is_right: bool | None
    canonical: str | None = None
    note: str = ""


class MathWorker:
    """A process that compares answers, started by the first `verify` and again after each one that it does not survive.

    Threads may share one, and are served one after the other. It is a context manager; the process ends with `close`,
    with the object, and with the parent (at the latest some seconds after its current limit if the parent is killed).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._stop = lambda: None
        self._unread = b""

    def verify(self, gold: str, text: str, seconds: float = 10.0) -> Result:
        """Whether the answer that `text` ends with equals `gold`, LaTeX without dollar signs, by wall clock in `seconds`.

        Never raises for what an answer holds; `ImportError` without math-verify, `RuntimeError` if no worker starts.
        """
        if not seconds > 0:
            raise ValueError(f"seconds={seconds} must be above 0")
        length = max(len(gold), len(text))
        if length > LONGEST:
            return Result(None, note=f"an answer of {length} characters, more than {LONGEST}")
        request = json.dumps({"gold": gold, "text": text, "limit": seconds + 3}).encode() + b"\n"
        with self._lock:
            try:
                return self._asked(request, seconds)
            except TimeoutError:
                self._end()
                return Result(None, note=f"math-verify took longer than {seconds:g} s")
            except EOFError:
                self._end()
                return Result(None, note="math-verify's process died")
            except BaseException:  # a Ctrl-C between question and reply: the next reply would be taken for this one's
                self._end()
                raise

    def close(self) -> None:
        """Ends the process; a later `verify` starts another."""
        with self._lock:
            self._end()

    def __enter__(self) -> "MathWorker":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _asked(self, request: bytes, seconds: float) -> Result:
        """The reply to a request; raises `TimeoutError` or `EOFError` if there is none."""
        self._send(request)
        deadline = time.monotonic() + seconds
        verdict = self._receive(deadline)
        if verdict["is_right"] is None:
            return Result(None, note=verdict["note"])
        try:
            return Result(verdict["is_right"], self._receive(deadline)["canonical"])
        except (TimeoutError, EOFError):  # a verdict without a simplified form is still a verdict
            self._end()
            return Result(verdict["is_right"])

    def _send(self, request: bytes) -> None:
        for _ in range(2):
            if self._process is None:
                self._start()
            try:
                self._process.stdin.write(request)
                return
            except BrokenPipeError:  # died while idle
                self._end()
        raise RuntimeError("math-verify's process ended twice before it took a question: is memory short?")

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", os.path.abspath(__file__)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=os.environ | {"PYTHONHASHSEED": "0"},  # the order of a set, in every process
        )
        self._stop = weakref.finalize(self, _kill, self._process)
        try:
            error = self._receive(time.monotonic() + _START_SECONDS)["error"]
        except (TimeoutError, EOFError) as problem:
            self._end()
            raise RuntimeError("math-verify's process did not start: is memory short?") from problem
        if error:
            self._end()
            raise ImportError(f"math-verify is missing ({error}): pip install 'dms_lab[eval]'")

    def _receive(self, deadline: float) -> dict:
        """The next line of the worker; raises `TimeoutError` at the deadline, `EOFError` if the worker has ended."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                piece = self._process.stdout.read(65536)
                if not piece:
                    raise EOFError
                self._unread += piece
        line, self._unread = self._unread.split(b"\n", 1)
        return json.loads(line)

    def _end(self) -> None:
        self._stop()
        self._process, self._unread = None, b""


def _kill(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def _serve() -> None:
    """The worker: answers requests until its input ends."""
    import resource
    import signal

    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not be read as a reply
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what a Ctrl-C ends
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process in the kernel, whatever it computes
    for limit, value in ((resource.RLIMIT_AS, _MEMORY_BYTES), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))

    def reply(**values) -> None:
        replies.write(json.dumps(values) + "\n")
        replies.flush()

    try:
        import math_verify  # noqa: F401
    except ImportError as error:
        reply(error=str(error))
        return
    reply(error=None)
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, request["limit"])
        _answer(request, reply)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _answer(request: dict, reply) -> None:
    """Replies with the verdict as soon as it is known, then with the simplified answer."""
    try:
        is_right, parsed = _compare(request["gold"], request["text"])
    except Exception as error:  # out of memory, too deep: whatever an answer can do to a parser
        reply(is_right=None, note=f"math-verify failed: {type(error).__name__}")
        return
    reply(is_right=is_right)
    try:
        found = _canonical(parsed[0]) if parsed and not isinstance(parsed[0], str) else None
        reply(canonical=found if found is not None and len(found) <= _LONGEST_CANONICAL else None)
    except Exception:
        reply(canonical=None)


def _compare(gold: str, text: str) -> tuple[bool, list]:
    """Whether they are equal, and what was read in `text`. A `\\boxed{}` is believed before anything in prose."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    how = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    # No time limits of its own: they are alarms, and the one that counts is the parent's.
    parsed = parse(text, how, parsing_timeout=None)
    expected = parse(f"\\boxed{{{gold}}}", how, parsing_timeout=None)
    return verify(expected, parsed, timeout_seconds=None), parsed


def _canonical(value) -> str:
    """An expression evaluated and simplified, as text: `x = 2/4`, `0.5` and `\\frac12` are all `1/2`."""
    import sympy

    if isinstance(value, sympy.Equality) and isinstance(value.lhs, sympy.Symbol):
        return _canonical(value.rhs)
    if isinstance(value, sympy.FiniteSet):
        return "{" + ", ".join(sorted({_canonical(part) for part in value.args})) + "}"
    if isinstance(value, sympy.Tuple):
        return "(" + ", ".join(_canonical(part) for part in value.args) + ")"
    if isinstance(value, sympy.MatrixBase):
        rows = ("[" + ", ".join(_canonical(part) for part in row) + "]" for row in value.tolist())
        return "[" + ", ".join(rows) + "]"
    value = sympy.nsimplify(value.doit(), rational=True) if isinstance(value, sympy.Expr) else value.doit()
    return str(sympy.simplify(value) if isinstance(value, sympy.Expr) else value)


if __name__ == "__main__":
    _serve()
