"""Programs that are right, wrong, greedy or hostile, in the sandbox: each costs its own test and nothing else."""

import ast
import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dms_lab.evaluation import sandbox, sandbox_inside
from dms_lab.evaluation.sandbox import SandboxError, SandboxLimits, check_sandbox, run_tests

LIMITS = SandboxLimits(seconds_per_test=3, memory_bytes=300 << 20, file_bytes=4 << 20, output_bytes=1 << 20)
QUICK = SandboxLimits(seconds_per_test=0.5, memory_bytes=512 << 20)
ECHO = "print(input())"


pytestmark = pytest.mark.usefixtures("bubblewrap")


@pytest.fixture(params=["bubblewrap", "none"])
def place(request):
    return request.param


def run(source, *inputs, limits=LIMITS, place="bubblewrap", fn_name=""):
    return run_tests(source, inputs or ("",), limits, place, fn_name)


def statuses(outcomes):
    return [outcome.status for outcome in outcomes]


def processes(marker):
    """Processes of this machine whose command line has the marker."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (folder / "cmdline").read_bytes():
                found.append(folder.name)
        except OSError:
            pass
    return found


# -- what programs may do ----------------------------------------------------------------------------------------------
def test_each_input_gets_its_own_output(place):
    outcomes = run("print(int(input()) + 1)", "1", "41", "x", "9\n", place=place)
    assert statuses(outcomes) == ["ok", "ok", "error", "ok"]
    assert [outcome.output for outcome in outcomes] == ["2\n", "42\n", "", "10\n"]
    assert "ValueError" in outcomes[2].note


def test_tests_share_no_state(place):
    source = """
try:
    print(open("left").read())
except OSError:
    print("new", hasattr(math, "seen"))
math.seen = True
"""
    assert [outcome.output for outcome in run(source, "", "", place=place)] == ["new False\n"] * 2


@pytest.mark.parametrize(
    "source",
    [
        "print(gcd(4, 6), Counter('aa')['a'], pow(2, 5, 7), sys.getrecursionlimit())",
        "import os\nos.write(1, b'2 2 4 50000\\n')",
        "if __name__ == '__main__':\n    print('2 2 4 50000')\n    quit()",
        "print('2 2 4 50000')\nsys.exit(3)",
        "import threading\nthreading.Timer(0.2, lambda: print('2 2 4 50000')).start()",
        "import atexit\natexit.register(lambda: print('2 2 4 50000'))",
        "def f(n):\n    return n and 1 + f(n - 1)\nprint(2, 2, 4, f(40000) + 10000)",
        "import asyncio\nasync def f():\n    await asyncio.sleep(0.01)\n    print('2 2 4 50000')\nasyncio.run(f())",
        "import io\nout = io.TextIOWrapper(open(1, 'wb', closefd=False))\nprint('2 2 4 50000', file=out)\nout.close()",
    ],
)
def test_what_competition_programs_do_works(source, place):
    (outcome,) = run(source, place=place)
    assert (outcome.status, outcome.output) == ("ok", "2 2 4 50000\n"), outcome


@pytest.mark.parametrize(
    "read",
    (
        "input() sys.stdin.readline() sys.stdin.read() sys.stdin.buffer.read().decode() open(0).read() next(sys.stdin) "
        "open('/dev/stdin').read() os.read(0,100).decode()"
    ).split(),
)
def test_stdin_is_a_real_one(read):
    (outcome,) = run(f"import os, sys\nprint({read}.strip())", "né\n")
    assert outcome.output == "né\n", outcome


def test_inputs_and_outputs_of_megabytes_pass_the_pipes(place):
    limits = SandboxLimits(seconds_per_test=10, output_bytes=16 << 20)
    text = "x" * 12_000_000
    outcomes = run(ECHO, text, text, limits=limits, place=place)
    assert [outcome.output == text + "\n" for outcome in outcomes] == [True, True]


def test_numpy_is_there():
    pytest.importorskip("numpy")
    outcomes = run("import numpy as np\nprint(np.linalg.det(np.eye(3) * int(input())).round())", "2", "3")
    assert [outcome.output for outcome in outcomes] == ["8.0\n", "27.0\n"], outcomes


@pytest.mark.parametrize(
    ("body", "value"),
    [
        ("return (a, [b])", "[1, [2]]"),
        ("return {'k': a / b, 's': str(b), 'n': None}", '{"k": 0.5, "s": "2", "n": null}'),
        ("print('seen by nobody')\n        return a < b", "true"),
    ],
)
def test_functions_return_json(body, value, place):
    source = f"class Solution:\n    def f(self, a: int, b: List[int]):\n        {body}"
    (outcome,) = run(source, "1\n2", place=place, fn_name="f")
    assert (outcome.status, outcome.output) == ("ok", value), outcome


def test_a_function_needs_no_class():
    assert run("def f(a):\n    return a[::-1]", "[1, 2]", fn_name="f")[0].output == "[2, 1]"


@pytest.mark.parametrize(
    ("body", "note"),
    [
        ("return [(1, 2)]", "tuple"),
        ("return {1: 2}", "dict"),
        ("return {1, 2}", "set"),
        ("exit()", "SystemExit"),
        ("import os; os._exit(0)", "ended without returning"),
    ],
)
def test_what_no_json_value_equals_is_an_error(body, note):
    (outcome,) = run(f"def f(a):\n    {body}", "1", fn_name="f")
    assert outcome.status == "error"
    assert note in outcome.note


def test_a_missing_function_is_an_error():
    (outcome,) = run("def g(a):\n    return a", "1", fn_name="f")
    assert "no f" in outcome.note


def test_go_on_ends_the_run():
    outcomes = run_tests(ECHO, ["1", "2", "3"], LIMITS, "bubblewrap", go_on=lambda index, outcome: outcome.output == "1\n")
    assert [outcome.output for outcome in outcomes] == ["1\n", "2\n"]


# -- limits ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "source", ["while True: pass", "import time\ntime.sleep(99)", "import sys\nsys.stdout.close()\nwhile 1: 0"]
)
def test_a_slow_program_costs_its_test_alone(source, place):
    outcomes = run(
        f"if input() == 'slow':\n    exec({source!r})\nprint('done')", "slow", "quick", limits=QUICK, place=place
    )
    assert statuses(outcomes) == ["timeout", "ok"]
    assert outcomes[0].seconds < 2


def test_the_time_of_a_problem_ends_its_tests(place):
    started = time.monotonic()
    limits = SandboxLimits(seconds_per_test=1, seconds_per_problem=1.5)
    outcomes = run("while True: pass", *"12345", limits=limits, place=place)
    assert statuses(outcomes) == ["timeout", "timeout"]
    assert "whole problem" in outcomes[1].note
    assert time.monotonic() - started < 4


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("x = bytearray(1 << 30)", "memory"),
        ("x = []\nwhile True: x.append([0] * 10000)", "memory"),
        ("raise MemoryError", "memory"),
        ("while True: print('x' * 9999)", "output"),
        ("import os\nos.kill(os.getpid(), 11)", "error"),
        ("import os\nos._exit(3)", "error"),
        ("def f(): f()\nf()", "error"),
        ("(", "error"),
        ("x = '\0'", "error"),
        ("raise ValueError('x' * 10**6)", "error"),
        ("class E(Exception):\n    def __str__(self): raise KeyboardInterrupt\nraise E", "error"),
    ],
)
def test_a_broken_or_greedy_program_costs_its_test_alone(source, status, place):
    outcomes = run(source, "", "", place=place)
    assert statuses(outcomes) == [status, status]
    assert all(len(outcome.note) <= 300 for outcome in outcomes)


def test_many_processes_together_have_no_more_memory_than_one():
    source = "import os, time\nfor _ in range(7):\n    if os.fork() == 0: break\nx = bytearray(100 << 20)\ntime.sleep(9)"
    assert statuses(run(source)) == ["memory"]


filtered = pytest.mark.skipif(os.uname().machine not in sandbox_inside._MACHINES, reason="no filter on this machine")


@filtered
@pytest.mark.parametrize(
    "call",
    [
        "checked(libc.shmget(0, 150 << 20, 0o1600))",
        "checked(libc.semget(0, 32000, 0o1600))",
        "checked(libc.msgget(0, 0o1600))",
        "checked(libc.inotify_init1(0))",
        "os.memfd_create('x')",
        "checked(libc.vmsplice(os.pipe()[1], None, 0, 0))",
        "__import__('socket').create_server(('127.0.0.1', 0))",
        "os.fork() and os._exit(os.wait()[1] >> 8) or os.memfd_create('x')",  # a child has the filter, too
    ],
)
def test_memory_that_no_limit_counts_cannot_be_had(call):
    source = f"""import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def checked(value):
    if value == -1:
        raise OSError(ctypes.get_errno(), "refused")
{call}"""
    (outcome,) = run(source)
    assert (outcome.status, outcome.note.split("]")[0]) == ("error", "PermissionError: [Errno 1"), outcome


@filtered
def test_every_call_of_the_filter_is_refused_and_no_other():
    column = list(sandbox_inside._MACHINES).index(os.uname().machine)
    numbers = [row[column] for row in sandbox_inside._REFUSED.values() if row[column] is not None]
    source = f"""import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
zeros = [ctypes.c_ulong(0)] * 6
for number in {numbers}:
    print(libc.syscall(number, *zeros), ctypes.get_errno())
print(libc.syscall({{"x86_64": 39, "aarch64": 172}}[os.uname().machine]) == os.getpid())"""
    assert run(source)[0].output == "-1 1\n" * len(numbers) + "True\n"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the other numbers of x86_64")
@pytest.mark.parametrize("numbers", ["of x32", "of i386"])
def test_the_filter_is_not_passed_by_other_numbers(numbers):
    source = r"""import ctypes, mmap
if NUMBERS == "of x32":
    print(ctypes.CDLL(None).syscall(ctypes.c_ulong(0x40000000 | 319), b"x", 0))
else:
    code = mmap.mmap(-1, 4096, prot=7)
    code.write(b"\xb8\x14\0\0\0\xcd\x80\xc3")  # mov eax, getpid; int 0x80; ret
    print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))())"""
    (outcome,) = run(source.replace("NUMBERS", repr(numbers)))
    assert (outcome.output, outcome.note) in [("-1\n", ""), ("", "killed by signal 11")]  # that: no i386 in this kernel


def verdict_of(code, arch, number):
    """What a classic BPF program of `_filter`'s four operations returns for a system call."""
    place, value = 0, None
    while True:
        kind, if_true, if_false, operand = struct.unpack_from("HBBI", code, 8 * place)
        if kind == 0x20:
            value, jump = {0: number, 4: arch}[operand], 0
        elif kind == 0x06:
            return operand
        else:
            jump = if_true if {0x15: value == operand, 0x35: value >= operand}[kind] else if_false
        place += 1 + jump


@pytest.mark.parametrize(("machine", "arch"), sandbox_inside._MACHINES.items())
def test_the_filter_of_each_machine_refuses_its_own_numbers_and_all_of_others(machine, arch, monkeypatch):
    monkeypatch.setattr(sandbox_inside.os, "uname", lambda: SimpleNamespace(machine=machine))
    code = sandbox_inside._filter()
    column = list(sandbox_inside._MACHINES).index(machine)
    refused = {row[column] for row in sandbox_inside._REFUSED.values()} - {None}
    found = {number for number in range(1000) if verdict_of(code, arch, number) == 0x50001}
    assert found == refused
    assert {verdict_of(code, arch, number) for number in set(range(1000)) - refused} == {0x7FFF0000}
    assert {verdict_of(code, 0x40000003, number) for number in range(1000)} == {0x50001}
    assert {verdict_of(code, arch, 0x40000000 + number) for number in range(1000)} == {0x50001}


def test_a_machine_whose_numbers_are_unknown_has_no_filter(monkeypatch):
    monkeypatch.setattr(sandbox_inside.os, "uname", lambda: SimpleNamespace(machine="riscv64"))
    assert sandbox_inside._filter() == b""


def test_shared_memory_is_not_written_past_the_limits():
    source = "from multiprocessing import shared_memory\nshared_memory.SharedMemory(create=True, size=500 << 20)"
    (outcome,) = run(source)
    assert (outcome.status, outcome.note.split(":")[0]) == ("error", "OSError"), outcome


def test_shared_memory_of_many_processes_is_counted():
    source = """import mmap, os, time
for _ in range(4):
    shared = mmap.mmap(-1, 100 << 20)
    if os.fork() == 0:
        break
    shared.close()
else:
    time.sleep(9)
for _ in range(100):
    shared.write(bytes(1 << 20))
time.sleep(9)"""
    assert statuses(run(source)) == ["memory"]


@pytest.mark.parametrize("more", ["os.link('x', f'{i}')", "os.mknod(f'{i}')", "os.symlink('x' * 100, f'{i}')"])
def test_names_of_files_are_counted_as_memory(more):
    source = f"import os\nos.mknod('x')\nfor i in range(1 << 20): {more}"
    outcomes = run(source, "", limits=SandboxLimits(memory_bytes=100 << 20, seconds_per_test=30))
    assert statuses(outcomes) == ["memory"]


@pytest.mark.parametrize("bomb", ["while True: os.fork()", "while os.fork(): pass\ntime.sleep(99)"])
def test_a_fork_bomb_is_over_with_its_test(bomb):
    outcomes = run(f"import os, time\nif input() == 'bomb':\n    exec({bomb!r})\nprint(1)", "bomb", "none", limits=QUICK)
    assert outcomes[0].status != "ok"
    assert outcomes[1].output == "1\n"


def test_processes_are_counted_for_root_too():
    source = """
import os, time
made = 0
try:
    while made < 200:
        if os.fork() == 0:
            time.sleep(99)
        made += 1
except OSError:
    print(made)
"""
    (outcome,) = run(source, limits=SandboxLimits(processes=20))
    assert outcome.output == "18\n"  # with the supervisor and the program itself


@pytest.mark.parametrize(
    "source", ["open('big', 'wb').write(bytes(5 << 20))", "for i in range(9): open(f'{i}', 'wb').write(bytes(1 << 20))"]
)
def test_files_are_bounded(source):
    assert statuses(run(source)) == ["error"]


def test_one_file_is_bounded_outside_of_bubblewrap_too():
    assert statuses(run("open('big', 'wb').write(bytes(5 << 20))", place="none")) == ["error"]


@pytest.mark.parametrize(
    "where", ["/", "/usr/lib", "/usr/bin", "/dev/shm", "/dev", "/etc", "/packages", sys.base_prefix + "/lib"]
)
def test_nothing_but_tmp_can_be_written(where):
    (outcome,) = run(f"open({where + '/planted'!r}, 'w').write('x')")
    assert outcome.status == "error"
    assert not Path(where, "planted").exists()


# -- hostile programs --------------------------------------------------------------------------------------------------
def test_there_is_no_network():
    source = """
import socket
for place in [("127.0.0.1", PORT), ("10.0.0.1", 80)]:
    try:
        socket.create_connection(place, 1)
        print("connected")
    except OSError:
        print("no")
print(len(open("/proc/net/dev").readlines()) - 2)
"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        (outcome,) = run(source.replace("PORT", str(server.getsockname()[1])))
    assert outcome.output == "no\nno\n1\n"


def test_the_users_files_processes_and_environment_are_not_there(tmp_path, monkeypatch):
    (tmp_path / "secret").write_text("secret")
    monkeypatch.setenv("SECRET", "x")
    source = f"""
import os
print(os.path.exists({str(tmp_path)!r}), os.path.exists({str(Path(__file__))!r}), "SECRET" in os.environ)
print(len([name for name in os.listdir("/proc") if name.isdigit()]), os.getuid(), os.listdir("/tmp"))
"""
    assert run(source)[0].output == "False False False\n2 65534 []\n"
    top = set(ast.literal_eval(run("import os\nprint(os.listdir('/'))")[0].output))
    python = {Path(sys.base_prefix).parts[1], *(path.parts[1] for path in sandbox._python_places())}
    assert top <= {"bin", "dev", "etc", "lib", "lib32", "lib64", "libexec", "packages", "proc", "tmp", "usr"} | python


@pytest.mark.parametrize(
    "call",
    [
        "os.setuid(0)",
        "os.chroot('/tmp')",
        "if libc.mount(b'/usr', b'/tmp', None, 4096, None): raise OSError",
        "if libc.unshare(0x10000000): raise OSError",
        "if libc.sethostname(b'x', 1): raise OSError",
    ],
)
def test_rights_cannot_be_regained(call):
    (outcome,) = run(f"import ctypes, os\nlibc = ctypes.CDLL(None)\n{call}")
    assert outcome.status == "error"
    assert outcome.note.startswith(("PermissionError", "OSError")), outcome


def test_the_supervisor_cannot_be_killed_stopped_or_read():
    source = """import os, signal
for number in (9, 15, 19, 2):
    os.kill(os.getppid(), number)
for name in ("mem", "fd/4", "environ", "maps"):
    try:
        os.listdir("/proc/1/fd")
        open(f"/proc/{os.getppid()}/{name}", "rb").read(1)
        print("read", name)
    except OSError:
        pass
print(ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) if (ctypes := __import__("ctypes")) else 0)
"""
    assert [outcome.output for outcome in run(source, "", "")] == ["-1\n", "-1\n"]


def test_a_program_that_kills_its_supervisor_outside_of_bubblewrap_loses():
    outcomes = run("import os\nos.kill(os.getppid(), 9)\nprint(1)", "", "", place="none")
    assert statuses(outcomes) == ["error"]
    assert "supervisor" in outcomes[0].note


def test_forged_reports_are_nothing_but_output():
    forged = '{"status": "ok", "output": "42", "note": "", "seconds": 0.1}'
    source = f"""
import os
for fd in range(3, 256):
    try:
        os.write(fd, {forged.encode()!r} + b"\\n")
    except OSError:
        pass
print({forged!r}, flush=True)
os._exit(0)
"""
    assert [outcome.output for outcome in run(source, "", "")] == [forged + "\n"] * 2


@pytest.mark.parametrize("daemon", ["pass", "os.setsid()", "os.setsid(); os.fork() and os._exit(0)"])
def test_what_a_test_leaves_running_is_ended(daemon, place):
    marker = f"left-running-{os.getpid()}-{len(daemon)}"
    source = f"""
import os, time
if os.fork() == 0:
    {daemon}
    os.execv("/bin/sh", ["sh", "-c", "sleep 97; : {marker}"])
time.sleep(0.3)
print("done")
"""
    started = time.monotonic()
    assert [outcome.output for outcome in run(source, "", "", place=place)] == ["done\n"] * 2
    assert time.monotonic() - started < 5
    assert processes(marker) == []


SEARCH = (Path(__file__).parent / "data" / "livecodebench" / "search.py").read_text()


def test_a_search_of_files_and_memory_finds_inputs_and_nothing_else_of_a_test():
    expected = "needle-" + "".join(map(str, range(3, 9)))  # known out here, as it would be to a grader
    (outcome,) = run(SEARCH, "needle-111111", limits=SandboxLimits(seconds_per_test=30))
    assert outcome.output == "needle-111111\n", (outcome, expected)


# -- the outside -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "reply",
    ["x" * 10_000_000, "[1]\n", '{"status": "won", "note": "", "seconds": 0}\n', "{}\n", "[" * 99999 + "\n"],
    ids=["long", "list", "status", "empty", "deep"],
)
def test_a_supervisor_that_answers_nonsense_loses(reply, monkeypatch, tmp_path):
    fake = tmp_path / "fake.py"
    answer = "for _ in range(2): sys.stdin.readline()\nsys.stdout.write(REPLY)\nsys.stdout.flush()\ntime.sleep(99)"
    short = f"'x' * {len(reply)}" if reply.startswith("xx") else repr(reply)
    fake.write_text(f"import sys, time\nREPLY = {short}\nprint('{{\"ready\": true}}', flush=True)\n{answer}")
    monkeypatch.setattr(sandbox, "_SUPERVISOR", fake)
    monkeypatch.setattr(sandbox, "_END_SECONDS", 0.1)
    limits = SandboxLimits(seconds_per_test=1, seconds_per_problem=2, output_bytes=1000)
    assert statuses(run(ECHO, "1", "2", limits=limits, place="none")) == ["error"]


def test_a_supervisor_that_is_silent_is_ended_in_time(monkeypatch, tmp_path):
    fake = tmp_path / "fake.py"
    fake.write_text("import time\nprint('{\"ready\": true}', flush=True)\ntime.sleep(99)")
    monkeypatch.setattr(sandbox, "_SUPERVISOR", fake)
    monkeypatch.setattr(sandbox, "_GRACE_SECONDS", 0.5)
    monkeypatch.setattr(sandbox, "_END_SECONDS", 0.1)
    started = time.monotonic()
    outcomes = run(ECHO, "1" * 1_000_000, "2", limits=SandboxLimits(seconds_per_problem=0.5))
    assert statuses(outcomes) == ["timeout"]
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("text", ["raise SystemExit('no room')", "print('nonsense')"])
def test_a_sandbox_that_does_not_start_is_no_verdict(text, monkeypatch, tmp_path, place):
    fake = tmp_path / "fake.py"
    fake.write_text(text)
    monkeypatch.setattr(sandbox, "_SUPERVISOR", fake)
    with pytest.raises(SandboxError, match="no room" if "room" in text else "did not start"):
        run(ECHO, "1", place=place)


@filtered
def test_a_kernel_without_filters_is_no_verdict(monkeypatch, tmp_path):
    old_kernel = tmp_path / "old_kernel.py"
    old_kernel.write_text(sandbox._SUPERVISOR.read_text().replace("errno.EFAULT", "errno.EINVAL"))
    monkeypatch.setattr(sandbox, "_SUPERVISOR", old_kernel)
    with pytest.raises(SandboxError, match="CONFIG_SECCOMP_FILTER"):
        run(ECHO, "1")
    assert run(ECHO, "1", place="none")[0].output == "1\n"


def test_what_is_missing_is_said_with_the_remedy(monkeypatch, tmp_path):
    sandbox._bwrap.cache_clear()
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"apt-get install bubblewrap.*sandbox=none i_trust_the_code=true"):
        check_sandbox()
    old = tmp_path / "bwrap"
    old.write_text("#!/bin/sh\necho '  --size BYTES'\n")
    old.chmod(0o755)
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: str(old))
    with pytest.raises(ValueError, match=r"--disable-userns.*0\.8 or newer"):
        check_sandbox()
    sandbox._bwrap.cache_clear()


def test_no_user_namespaces_is_said_with_the_remedy(monkeypatch, tmp_path):
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    tmp_path.chmod(0o755)
    monkeypatch.setattr(sandbox, "_bwrap", lambda: str(broken))
    monkeypatch.setattr(sandbox.os, "getuid", lambda: 1000)
    sandbox._try_sandbox.cache_clear()
    with pytest.raises(ValueError, match=r"No permissions.*user\.max_user_namespaces.*i_trust_the_code=true"):
        check_sandbox()
    sandbox._try_sandbox.cache_clear()


@pytest.mark.parametrize("name", ["seconds_per_test", "seconds_per_problem", "memory_bytes", "processes"])
def test_limits_are_positive(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be positive"):
        SandboxLimits(**{name: 0})


def test_an_unknown_sandbox_is_refused():
    with pytest.raises(ValueError, match='"bubblewrap" or "none"'):
        run(ECHO, place="docker")


def test_the_supervisor_needs_the_standard_library_alone():
    code = "import sys; sys.argv = ['x']; import runpy; runpy.run_path(sys.stdin.readline().strip()); print('imported')"
    found = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], input=str(sandbox._SUPERVISOR), capture_output=True, text=True, timeout=60
    )
    assert found.stdout == "imported\n", found.stderr
