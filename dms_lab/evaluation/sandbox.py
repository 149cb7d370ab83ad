"""Runs untrusted Python: one bubblewrap sandbox a solution, one forked process a test, limits on all of it.

source + inputs -> [sandbox: supervisor (`sandbox_inside`) -> a child a test] -> outcomes; comparing is the caller's

Inside there is no network, no file of the user, no process of the host and nothing to write but a small /tmp. What hands
out memory that is counted for no process (SysV IPC, memfd_create, sockets and the like) is refused with EPERM, by a filter
of system calls on x86_64 and aarch64; elsewhere there is none, and such memory is not bounded. Not bounded anywhere, for
want of a cgroup: the buffers of pipes, socketpairs and terminals (64 open files a process, some 200 KB each), and the share
of the processor. Linux only.
"""

import contextlib
import functools
import importlib.util
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

_SUPERVISOR = Path(__file__).with_name("sandbox_inside.py")
_NOBODY = 65534
_GRACE_SECONDS = 5  # for a supervisor to end what runs when the time of a problem is over
_END_SECONDS = 1  # for a process that was asked to end
_START_SECONDS = 60  # for a supervisor to be ready, on a machine under load
_PACKAGES = "/packages"  # where the sandbox has numpy
_OPTIONS = ("--disable-userns", "--size", "--as-pid-1")  # of bubblewrap 0.8


@dataclass(frozen=True)
class SandboxLimits:
    """What a solution may use. Breaking a limit costs it the test, or the rest of its tests.

    `memory_bytes` is address space for each process; in bubblewrap also resident memory of all of them, with the files.
    `processes` counts threads too, and the supervisor; root's are not counted, hence bubblewrap is started as nobody
    there. `file_bytes` bounds a file and all of /tmp, `output_bytes` what a test prints or returns. `seconds_per_problem`
    None stands for the official checker's `(seconds_per_test + 1) * tests + 5`.
    """

    seconds_per_test: float = 6.0
    seconds_per_problem: float | None = None
    memory_bytes: int = 4 << 30
    processes: int = 32
    file_bytes: int = 16 << 20
    output_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} must be positive")


@dataclass(frozen=True)
class TestOutcome:
    """How one test ended: `status` is "ok", "error", "timeout", "memory" or "output" (too much of it).

    `output` is what a program printed, or what a function returned, as JSON; empty unless ok. `note` says more in a few
    words that come from the solution: not to be trusted.
    """

    status: str
    output: str = ""
    note: str = ""
    seconds: float = 0.0
    __test__ = False  # no test of pytest's


class SandboxError(RuntimeError):
    """The sandbox itself failed: nothing is known about the solution."""


def check_sandbox() -> None:
    """Returns if bubblewrap works here, tried once a process; raises `ValueError` that says what to install or allow."""
    _bwrap()
    _try_sandbox()


@functools.cache
def _try_sandbox() -> None:
    round_it = "The only way round is sandbox=none i_trust_the_code=true, which runs the code with your rights."
    try:
        (outcome,) = run_tests("print(input())", ["works"], SandboxLimits(), "bubblewrap")
    except SandboxError as error:
        raise ValueError(
            f"bubblewrap is installed but cannot make a sandbox here ({error}). It needs user namespaces: `sysctl "
            "user.max_user_namespaces` must not be 0; where they exist, `kernel.unprivileged_userns_clone` must be 1 and "
            "`kernel.apparmor_restrict_unprivileged_userns` 0; a container must allow them and a new /proc. " + round_it
        ) from None
    if outcome.status != "ok" or outcome.output != "works\n":
        raise ValueError(f"bubblewrap starts here, but a program that echoes a word did not: {outcome}. {round_it}")


@functools.cache
def _bwrap() -> str:
    """bubblewrap's path; raises `ValueError` where it is missing or too old."""
    wanted = "Install it with `apt-get install bubblewrap` or `dnf install bubblewrap`; the only way round is sandbox=none "
    wanted += "i_trust_the_code=true, which runs the code with your rights."
    path = shutil.which("bwrap")
    if sys.platform != "linux" or path is None:
        raise ValueError(f"code is run in a bubblewrap sandbox, and there is no `bwrap` on this machine. {wanted}")
    options = subprocess.run([path, "--help"], capture_output=True, text=True, timeout=60).stdout
    missing = [option for option in _OPTIONS if option not in options]
    if missing:
        raise ValueError(f"{path} does not know {', '.join(missing)}: bubblewrap 0.8 or newer is needed. {wanted}")
    if os.getuid() == 0 and not (shutil.which("setpriv") and shutil.which("unshare")):
        raise ValueError("as root the sandbox is started as nobody, by `setpriv` and `unshare`: install util-linux")
    return path


def run_tests(
    source: str,
    inputs: Sequence[str],
    limits: SandboxLimits,
    sandbox: str = "bubblewrap",
    fn_name: str = "",
    go_on: Callable[[int, TestOutcome], bool] | None = None,
) -> list[TestOutcome]:
    """The outcomes of `source` on one input after the other, each in a fresh process of one sandbox.

    Without `fn_name` the source is a program and an input is its stdin; with it, an input has the arguments of that
    function (or method of `Solution`) as JSON, one a line. `go_on(index, outcome)` False ends the run after that test. The
    list is shorter than `inputs` then, and where the sandbox's life ended: its last outcome says why. Raises `SandboxError`
    where no sandbox could be started, `ValueError` for a `sandbox` that is neither "bubblewrap" nor "none".
    """
    if sandbox not in ("bubblewrap", "none"):
        raise ValueError(f'sandbox={sandbox!r} must be "bubblewrap" or "none"')
    outcomes: list[TestOutcome] = []
    with _Supervisor(source, fn_name, limits, sandbox) as supervisor:
        whole = limits.seconds_per_problem or (limits.seconds_per_test + 1) * len(inputs) + 5
        deadline = time.monotonic() + whole
        for index, text in enumerate(inputs):
            outcome, is_alive = supervisor.test(text, deadline)
            if time.monotonic() >= deadline and outcome.status == "timeout":
                outcome, is_alive = replace(outcome, note="the time of the whole problem is over"), False
            outcomes.append(outcome)
            if not is_alive or (go_on is not None and not go_on(index, outcome)):
                break
    return outcomes


class _Supervisor:
    """A supervisor process and its pipes; entering waits until it is ready, leaving ends all that ran in it."""

    def __init__(self, source: str, fn_name: str, limits: SandboxLimits, sandbox: str) -> None:
        self._limits, self._stack = limits, contextlib.ExitStack()
        self._job = {"source": source, "fn_name": fn_name} | vars(limits)
        self._is_boxed = sandbox == "bubblewrap"

    def __enter__(self) -> "_Supervisor":
        with self._stack:  # undone if what follows raises
            folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="sandbox-")))
            errors = self._stack.enter_context(tempfile.TemporaryFile())
            numpy = _numpy_folders()
            self._job["processes"] += _processes_counted_besides(self._is_boxed)
            self._job["paths"] = [_PACKAGES if self._is_boxed else str(numpy[0].parent)] if numpy else []
            supervise = [_python(), "-I", "-S", "-X", "utf8", "-c", _SUPERVISOR.read_text()]
            command = _boxed(supervise, self._limits, numpy, folder) if self._is_boxed else supervise
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    cwd=folder,
                    env={"PATH": "/usr/bin:/bin", "HOME": str(folder), "LANG": "C.UTF-8"} | _ONE_THREAD,
                    bufsize=0,
                    start_new_session=True,
                )
            except OSError as error:
                raise SandboxError(f"the sandbox could not be started: {error}") from error
            self._stack.callback(self._end)
            for pipe in (self._process.stdin, self._process.stdout):
                os.set_blocking(pipe.fileno(), False)
            reply = self._ask(json.dumps(self._job).encode() + b"\n", time.monotonic() + _START_SECONDS, 1000)
            if reply != {"ready": True}:
                self._end()
                errors.seek(0)
                said = errors.read(2000).decode("utf-8", "replace").strip()
                raise SandboxError(f"the sandbox did not start: {said or reply or 'it ended at once'}")
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def test(self, text: str, deadline: float) -> tuple[TestOutcome, bool]:
        """The outcome of one test, and whether another can follow."""
        seconds = max(0.0, min(self._limits.seconds_per_test, deadline - time.monotonic()))
        request = json.dumps({"input": text, "seconds": seconds}).encode() + b"\n"
        reply = self._ask(request, deadline + _GRACE_SECONDS, 6 * self._limits.output_bytes + 4096)
        if reply == "late":
            return TestOutcome("timeout"), False
        try:
            outcome = TestOutcome(
                reply["status"], str(reply.get("output", "")), str(reply["note"])[:300], float(reply["seconds"])
            )
        except (KeyError, TypeError, ValueError):
            outcome = TestOutcome("broken")
        if outcome.status not in ("ok", "error", "timeout", "memory", "output"):
            return TestOutcome("error", note="it broke the supervisor of its sandbox"), False
        return outcome, True

    def _ask(self, request: bytes, deadline: float, most_bytes: int) -> object:
        """The supervisor's answer to a line; "late" after the deadline, None if it ended or answered nonsense."""
        stdin, stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        unsent, found, poll = memoryview(request), bytearray(), select.poll()
        poll.register(stdin, select.POLLOUT)
        poll.register(stdout, select.POLLIN)
        while not found.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0:
                return "late"
            ready = [fd for fd, _ in poll.poll(1000 * left)]
            try:
                if stdin in ready:
                    unsent = unsent[os.write(stdin, unsent[: 1 << 16]) :]
                data = os.read(stdout, 1 << 16) if stdout in ready else None
            except BlockingIOError:
                continue
            except OSError:
                return None  # nobody reads any more
            if not unsent and stdin in ready:
                poll.unregister(stdin)
            found += data or b""
            if data == b"" or len(found) > most_bytes:
                return None
        try:
            return json.loads(found)
        except (ValueError, RecursionError):
            return None

    def _end(self) -> None:
        """Ends everything: by the end of its input where it listens, else from the inside out, so that all are waited for.

        A sandbox dies with its parent, and all in it with its first process.
        """
        self._process.stdin.close()
        self._process.stdout.close()
        if not self._ended_within(_END_SECONDS):
            for pid in _children(self._process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if not self._ended_within(_END_SECONDS):
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _ended_within(self, seconds: float) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.returncode is not None


_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def _python() -> str:
    return os.path.realpath(sys.executable)


def _children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _numpy_folders() -> list[Path]:
    """The folders that numpy is installed in; empty without numpy."""
    spec = importlib.util.find_spec("numpy")
    if spec is None or not spec.submodule_search_locations:
        return []
    folder = Path(next(iter(spec.submodule_search_locations)))
    return [place for place in (folder, folder.with_name("numpy.libs")) if place.is_dir()]


def _processes_counted_besides(is_boxed: bool) -> int:
    """Threads of this user that the kernel counts against a limit set in the supervisor: none of a new user namespace's."""
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    if os.getuid() == 0 or (is_boxed and release >= (5, 14)):
        return 0
    count = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError, KeyError):
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
            count += int(fields["Threads"]) if int(fields["Uid"].split()[0]) == os.getuid() else 0
    return count


def _boxed(command: list[str], limits: SandboxLimits, numpy: list[Path], folder: Path) -> list[str]:
    """`command` in a sandbox. `folder` is empty and ours: a place to mount what nobody could not reach."""
    shown = {place: place for place in _python_places()} | {place: Path(_PACKAGES, place.name) for place in numpy}
    box = [_bwrap(), *"--unshare-all --unshare-user --disable-userns --die-with-parent --new-session --as-pid-1".split()]
    box += ["--cap-drop", "ALL", "--uid", str(_NOBODY), "--gid", str(_NOBODY), "--hostname", "sandbox"]
    box += _system_places()
    box += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev", "--size", str(limits.file_bytes), "--tmpfs", "/tmp"]
    hidden = {}
    for number, (place, target) in enumerate(shown.items()):
        if os.getuid() == 0 and not _is_open_to_all(place):
            hidden[place] = folder / str(number)
        box += ["--ro-bind", str(hidden.get(place, place)), str(target)]
    box += ["--remount-ro", "/", "--chdir", "/tmp", "--setenv", "HOME", "/tmp", *command]
    return _as_nobody(box, hidden, folder) if os.getuid() == 0 else box


def _as_nobody(box: list[str], hidden: dict[Path, Path], folder: Path) -> list[str]:
    """Starts `box` from root as nobody, whose processes are counted; what nobody cannot reach is mounted first."""
    drop = ["setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups", *box]
    if not hidden:
        return drop
    folder.chmod(0o755)
    for place in hidden.values():
        place.mkdir()
    mounts = "".join('mount --bind "$1" "$2"; shift 2; ' for _ in hidden)
    pairs = [str(path) for pair in hidden.items() for path in pair]
    return ["unshare", "--mount", "sh", "-c", f'set -e; {mounts}exec "$@"', "sh", *pairs, *drop]


def _is_open_to_all(place: Path) -> bool:
    """Whether every folder on the way to `place`, and itself, can be entered by anybody."""
    return all(part.stat().st_mode & 0o001 for part in (place, *place.parents))


def _system_places() -> Iterator[str]:
    """bubblewrap's options for what programs and their libraries need; nothing else of the host is there."""
    for name in ("bin", "lib", "lib32", "lib64", "libexec"):
        if Path("/usr", name).is_dir():
            yield from ("--ro-bind", f"/usr/{name}", f"/usr/{name}")
        if Path("/", name).is_symlink():
            yield from ("--symlink", os.readlink(f"/{name}"), f"/{name}")
        elif Path("/", name).is_dir():
            yield from ("--ro-bind", f"/{name}", f"/{name}")
    for name in ("/etc/ld.so.cache", "/etc/alternatives"):
        yield from ("--ro-bind-try", name, name)


def _python_places() -> list[Path]:
    """The folders of the running interpreter that lie outside of the system's own."""
    base = Path(os.path.realpath(sys.base_prefix))
    if base == Path("/usr"):
        return []
    return [base / name for name in ("bin", "lib", "lib64") if (base / name).is_dir()]
