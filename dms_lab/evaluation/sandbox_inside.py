"""The supervisor that runs inside the sandbox: standard library only, started as `python -I -S -c <this file>`.

stdin: {"source", "fn_name", limits...} as one line, then one line {"input", "seconds"} a test
each test: a forked child with limits and a filter of system calls, in its own process group -> one line of JSON on stdout

Expected outputs never come here. A child has none of the supervisor's pipes, and may not read its memory. What a solution
can reach by force is this process at most, and all that could gain is to report other outputs of its own.
"""

import atexit
import contextlib
import ctypes
import errno
import importlib
import json
import math
import numbers
import os
import resource
import select
import signal
import struct
import sys
import threading
import time
import types

# Names that a solution finds without importing them, as the official checker offers them; later ones win.
_STARRED = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json "
    "builtins typing"
).split()
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_CHILD_SUBREAPER = 1, 4, 36
_OUT_OF_MEMORY = 120  # exit status of a child that had no memory left to say so
_RESULT = 3  # where a child writes what it has to say beside its stdout
_BYTES_PER_INODE = 2048  # of kernel memory for an empty file or another name of one, at most

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*
# System calls that hand out memory which no limit of a process counts, with their numbers on these machines.
_REFUSED = {
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "socket": (41, 198),  # buffers of TCP; socketpair is left, for asyncio
    "vmsplice": (278, 75),  # a pipe keeps a huge page for each small one
    "io_uring_setup": (425, 425),
    "userfaultfd": (323, 282),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
}


def main() -> None:
    """Answers requests until there are no more, and ends this process."""
    code = _filter() if os.getpid() == 1 else b""  # in a sandbox
    if code and _set_filter(None) != errno.EFAULT:  # a kernel that has filters says that there is none at no address
        raise SystemExit("the kernel lets nobody filter system calls (CONFIG_SECCOMP_FILTER): memory would not be bounded")
    requests, reports = os.fdopen(os.dup(0), "rb"), os.dup(1)
    for fd in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _prctl(_PR_SET_DUMPABLE, 0)
    job = json.loads(requests.readline())
    job["filter"] = code
    sys.path += job["paths"]
    for name in (*_STARRED, "numpy") if "numpy" in job["source"] else _STARRED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)  # once, before all forks
    _report(reports, {"ready": True})
    for line in requests:
        request = json.loads(line)
        _report(reports, _run(job, request["input"], request["seconds"]))
    os._exit(0)


def _report(fd: int, outcome: dict) -> None:
    _write(fd, json.dumps(outcome).encode() + b"\n")


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _filter() -> bytes:
    """The classic BPF program by which `_REFUSED` and all calls by another machine's numbers fail with EPERM.

    Empty on a machine whose numbers are not known here.
    """
    machine = os.uname().machine
    if machine not in _MACHINES or sys.maxsize < 1 << 32:
        return b""
    column = list(_MACHINES).index(machine)
    numbers = [row[column] for row in _REFUSED.values() if row[column] is not None]
    load, equal, at_least, give = 0x20, 0x15, 0x35, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_JMP|JGE|K, BPF_RET|K
    code = [
        (load, 0, 0, 4),  # seccomp_data.arch
        (equal, 0, len(numbers) + 3, _MACHINES[machine]),  # to EPERM unless equal
        (load, 0, 0, 0),  # seccomp_data.nr
        (at_least, len(numbers) + 1, 0, 0x40000000),  # numbers of x32, of the same arch as x86_64
        *((equal, len(numbers) - place, 0, number) for place, number in enumerate(numbers)),
        (give, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
        (give, 0, 0, 0x00050000 | errno.EPERM),  # SECCOMP_RET_ERRNO
    ]
    return b"".join(struct.pack("HBBI", *line) for line in code)


def _set_filter(code: bytes | None) -> int:
    """Puts this process and its future children under a filter for good; the errno, 0 if it holds."""
    libc, buffer, address = ctypes.CDLL(None, use_errno=True), None, None
    if code is not None:
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        buffer = ctypes.create_string_buffer(code, len(code))
        address = struct.pack("HP", len(code) // 8, ctypes.addressof(buffer))  # sock_fprog
    call = libc.prctl(_PR_SET_SECCOMP, ctypes.c_ulong(_SECCOMP_MODE_FILTER), address, ctypes.c_ulong(0), ctypes.c_ulong(0))
    return ctypes.get_errno() if call else 0


def _run(job: dict, text: str, seconds: float) -> dict:
    """The outcome of one test; nothing that it started is left."""
    stdin = os.memfd_create("stdin")
    if not job["fn_name"]:
        _write(stdin, text.encode("utf-8", "surrogateescape"))
        os.lseek(stdin, 0, os.SEEK_SET)
    (stdout, stdout_end), (result, result_end) = os.pipe(), os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(job, text, stdin, stdout_end, result_end)
    for fd in (stdin, stdout_end, result_end):
        os.close(fd)
    outcome, status, (printed, said) = _watch(job, pid, (stdout, result), started + seconds)
    _end_all(pid)
    os.close(stdout)
    os.close(result)
    return _judge(job, outcome, status, printed, said) | {"seconds": time.monotonic() - started}


def _watch(job: dict, pid: int, fds: tuple[int, int], deadline: float) -> tuple[str, int, list[bytes]]:
    """Reads a child's pipes until it ends or breaks a limit: the limit ("" for none), its wait status, what was read."""
    found = {fd: bytearray() for fd in fds}
    is_open, status, outcome = set(fds), None, ""
    while not outcome:
        ready = select.select(list(is_open), [], [], 0.02 if is_open and status is None else 0.001)[0]
        for fd in ready:
            data = os.read(fd, 1 << 16)
            found[fd] += data
            if not data:
                is_open.discard(fd)
        if status is not None and not ready:
            break  # what it wrote is read; a process it left behind may hold the pipes open
        if status is None:
            ended, code = os.waitpid(pid, os.WNOHANG)
            status = code if ended else None
        if any(len(data) > job["output_bytes"] for data in found.values()):
            outcome = "output"
        elif time.monotonic() > deadline:
            outcome = "timeout"
        elif _held_bytes() > job["memory_bytes"]:
            outcome = "memory"
    return outcome, 0 if status is None else status, [bytes(found[fd]) for fd in fds]


def _held_bytes() -> int:
    """Resident memory of all processes of the sandbox but this one, and what files and names in /tmp take of the kernel's.

    0 outside of a sandbox.
    """
    if os.getpid() != 1:
        return 0
    files, pages = os.statvfs("/tmp"), 0
    for name in os.listdir("/proc"):
        if name.isdigit() and name != "1":
            try:
                with open(f"/proc/{name}/statm") as file:
                    pages += int(file.read().split()[1])
            except (OSError, IndexError):
                pass  # it has just ended
    in_files = (files.f_files - files.f_ffree) * _BYTES_PER_INODE + (files.f_blocks - files.f_bfree) * files.f_frsize
    return pages * resource.getpagesize() + in_files


def _end_all(pid: int) -> None:
    """Kills what a test started and left: everything but this process in a sandbox, else all descendants."""
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        for target in [-1] if os.getpid() == 1 else [-pid, *_children()]:
            with contextlib.suppress(OSError):  # nobody there, or a process that became another user's
                os.kill(target, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def _children() -> list[int]:
    try:
        with open(f"/proc/self/task/{threading.get_native_id()}/children") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:
        return []


def _judge(job: dict, outcome: str, status: int, printed: bytes, said: bytes) -> dict:
    """What the supervisor reports of one test."""
    try:
        result = json.loads(said) if said else {}
    except ValueError:
        result = {"error": "its result cannot be read"}
    if not isinstance(result, dict):
        result = {"error": "its result cannot be read"}
    code = os.waitstatus_to_exitcode(status)
    if outcome or code == -signal.SIGXCPU:
        return {"status": outcome or "timeout", "note": ""}
    if code == _OUT_OF_MEMORY:
        return {"status": "memory", "note": ""}
    if "error" in result:
        return {"status": "error", "note": str(result["error"])[:300]}
    if code < 0:
        return {"status": "error", "note": f"killed by signal {-code}"}
    if code > 0:
        return {"status": "error", "note": f"exit status {code}"}
    if not job["fn_name"]:
        return {"status": "ok", "output": printed.decode("utf-8", "replace"), "note": ""}
    if not isinstance(result.get("value"), str):
        return {"status": "error", "note": "ended without returning"}
    return {"status": "ok", "output": result["value"], "note": ""}


def _child(job: dict, text: str, stdin: int, stdout: int, result: int) -> None:
    """Runs the solution once, and ends this process."""
    code = 1
    try:
        os.setsid()
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        null = os.open(os.devnull, os.O_RDWR)
        high = [os.dup(fd) for fd in (stdin, null if job["fn_name"] else stdout, null, result)]
        for place, fd in enumerate(high):
            os.dup2(fd, place)
        os.closerange(_RESULT + 1, max(high) + 64)
        _limit(job)
        if job["filter"] and (number := _set_filter(job["filter"])):
            raise OSError(number, "no filter of system calls could be set")
        sys.set_int_max_str_digits(50000)
        _write(_RESULT, json.dumps(_call(job, text) if job["fn_name"] else _program(job)).encode())
        code = 0
    except MemoryError:
        code = _OUT_OF_MEMORY
    except BaseException as error:
        try:
            _write(_RESULT, json.dumps({"error": f"{type(error).__name__}: {str(error)[:200]}"}).encode())
        except MemoryError:
            code = _OUT_OF_MEMORY
    finally:
        os._exit(code)


def _limit(job: dict) -> None:
    seconds = math.ceil(job["seconds_per_test"]) + 1
    for kind, value in (
        (resource.RLIMIT_AS, job["memory_bytes"]),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_NPROC, job["processes"]),
        (resource.RLIMIT_FSIZE, job["file_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _namespace(name: str, source: str) -> dict:
    """The globals that `source` left after running as the module `name`."""
    module = types.ModuleType(name)
    for starred in _STARRED:
        found = importlib.import_module(starred)
        public = getattr(found, "__all__", None) or [n for n in vars(found) if not n.startswith("_")]
        vars(module).update((n, getattr(found, n)) for n in public if hasattr(found, n))
    vars(module).update((n, importlib.import_module(n)) for n in _STARRED if n not in ("builtins", "typing"))
    builtins = importlib.import_module("builtins")
    builtins.exit = builtins.quit = sys.exit  # `site` would have set them
    sys.modules[name] = module
    sys.setrecursionlimit(50000)
    exec(compile(source, "<solution>", "exec", dont_inherit=True), vars(module))
    return vars(module)


def _program(job: dict) -> dict:
    """Runs the source as a program to its end, threads, exit functions and buffers included."""
    with contextlib.suppress(SystemExit):
        _namespace("__main__", job["source"])
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.__stdout__):
        with contextlib.suppress(AttributeError, ValueError):  # replaced by something else, or closed by the program
            stream.flush()
    return {}


def _call(job: dict, text: str) -> dict:
    """Calls the function with the arguments in `text`, one JSON value a line: {"value": its result as JSON}."""
    names = _namespace("solution", job["source"])
    home = names["Solution"]() if isinstance(names.get("Solution"), type) else types.SimpleNamespace(**names)
    if not hasattr(home, job["fn_name"]):
        raise NameError(f"the solution has no {job['fn_name']}")
    value = getattr(home, job["fn_name"])(*[json.loads(line) for line in text.split("\n")])
    return {"value": json.dumps(_plain(list(value) if isinstance(value, tuple) else value))}


def _plain(value: object) -> object:
    """`value` if JSON gives it back equal; `TypeError` for what no JSON value equals, inner tuples among it."""
    kind = type(value)
    if kind.__module__ == "numpy" and getattr(value, "shape", None) == ():
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, numbers.Number):  # a Fraction or a Decimal is as good as the number that it equals
        for make in (int, float):
            with contextlib.suppress(TypeError, ValueError, OverflowError):
                if (same := make(value)) == value:
                    return same
    raise TypeError(f"the result holds a {kind.__name__} that no expected value equals")


if __name__ == "__main__":
    main()
