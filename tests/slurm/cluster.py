"""A real Slurm of two nodes on the loopback device, for as long as a `with` block lasts.

    munged -> mariadbd -> slurmdbd -> slurmctld -> slurmd n1, slurmd n2

Everything lies in a temporary folder and listens on free ports or on sockets in there, so another Slurm, munge or database
of the machine is neither used nor disturbed. The daemons run in the foreground as children, and end with this process.
Needs root and what install.sh installs. By hand: ``python tests/slurm/cluster.py`` prints how to talk to it, and waits.
"""

import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

from processes import kill, of_jobs, step_managers

PROGRAMS = (
    "munged mariadbd mariadb-install-db slurmdbd slurmctld slurmd sbatch srun sacct sacctmgr scontrol setpriv".split()
)
NODES = ("n1", "n2")
TERMINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
_HERE = Path(__file__).parent
_PREFIX = "dms-lab-slurm-"


def why_not() -> str | None:
    """Why no cluster can be started here, in a sentence; None if one can."""
    if os.geteuid() != 0:
        return "a Slurm cluster is started as root only: its node daemons start jobs in any user's name"
    missing = [name for name in PROGRAMS if shutil.which(name, path=_search_path()) is None]
    if missing:
        return (
            f"{', '.join(missing)} not found: tests/slurm/install.sh installs slurm-wlm, slurmdbd, munge and mariadb-server"
        )
    try:
        pwd.getpwnam("munge")
    except KeyError:
        return "there is no user `munge`, whom the package munge adds"
    return None


def _search_path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/bin", "/sbin", "/bin"])


def wait_until(what: str, is_true: Callable[[], object], seconds: float = 60.0, every: float = 0.1) -> None:
    """`is_true()` holds, or `TimeoutError` says which thing did not become true in that time."""
    end = time.monotonic() + seconds
    while not is_true():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:g} s: {what}")
        time.sleep(every)


@dataclass
class Cluster:
    """The running cluster: its clients by `run`, its daemons by name ("slurmctld", "n1", ...)."""

    folder: Path
    environment: dict[str, str]
    daemons: dict[str, subprocess.Popen] = field(default_factory=dict)

    @property
    def conf(self) -> Path:
        """What SLURM_CONF names."""
        return self.folder / "slurm.conf"

    def run(self, *command: str, check: bool = True, **options: object) -> str:
        """What a Slurm command prints; `RuntimeError` with its words if it fails and `check` holds."""
        done = subprocess.run(command, env=self.environment, text=True, capture_output=True, timeout=60, **options)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    # -- daemons -------------------------------------------------------------------------------------------------------
    def start(self, name: str, *command: str, user: str | None = None, **variables: str) -> None:
        """A daemon runs as a child that is killed when this process ends; what it says is in `<folder>/log/<name>.log`."""
        identity = [f"--reuid={user}", f"--regid={user}", "--clear-groups"] if user else []
        with (self.folder / "log" / f"{name}.log").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                ["setpriv", *identity, "--pdeathsig", "KILL", *command],
                env=self.environment | variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
            )

    def stop(self, name: str, number: int = signal.SIGTERM, seconds: float = 10.0) -> None:
        """The daemon has ended; killed if it took longer than `seconds`."""
        daemon = self.daemons.pop(name)
        with suppress(ProcessLookupError):
            daemon.send_signal(number)
        try:
            daemon.wait(seconds)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def wait_for(self, name: str, what: str, is_true: Callable[[], object], seconds: float = 60.0) -> None:
        """As `wait_until`; if the daemon `name` ends or time runs out, a `RuntimeError` with the end of its log."""
        log = self.folder / "log" / f"{name}.log"
        try:
            wait_until(what, lambda: is_true() or self.daemons[name].poll() is not None, seconds)
        except TimeoutError as error:
            raise RuntimeError(f"{error}\n{_tail(log)}") from None
        if self.daemons[name].poll() is not None:
            raise RuntimeError(f"{name} ended before this was true: {what}\n{_tail(log)}")

    def start_controller(self) -> None:
        """slurmctld answers, with the jobs that it had before."""
        self.start("slurmctld", "slurmctld", "-D", "-f", str(self.conf))
        self.wait_for("slurmctld", "the controller answers", lambda: "UP" in self.run("scontrol", "ping", check=False))

    def start_node(self, name: str) -> None:
        """The node daemon runs; it takes jobs once `is_up`."""
        self.start(name, "slurmd", "-D", "-f", str(self.conf), "-N", name)

    def is_up(self, node: str) -> bool:
        """Whether the controller would give the node a job."""
        state = self.run("sinfo", "-h", "-n", node, "-o", "%T", check=False).split()
        return state[:1] in (["idle"], ["mixed"], ["allocated"])

    # -- jobs ----------------------------------------------------------------------------------------------------------
    def accounting(self, jobs: Sequence[str], *fields: str) -> list[dict[str, str]]:
        """What sacct knows of these jobs, a row each: JobID, State and `fields`."""
        names = ("JobID", "State", *fields)
        text = self.run("sacct", "-n", "-P", "-X", "-o", ",".join(names), "-j", ",".join(jobs))
        return [dict(zip(names, line.split("|"), strict=True)) for line in text.splitlines()]

    def states(self, jobs: Sequence[str]) -> dict[str, str]:
        """The state of each job in one word, COMPLETED, FAILED, ...; of those that accounting has heard of."""
        rows = self.accounting(jobs)
        return {row["JobID"]: row["State"].split()[0] for row in rows if row["JobID"] in jobs}

    def restarts(self, job: str) -> int:
        """How often a job was requeued."""
        words = dict(word.split("=", 1) for word in self.run("scontrol", "show", "job", job).split() if "=" in word)
        return int(words["Restarts"])

    def wait_for_jobs(self, jobs: Sequence[str], seconds: float = 600.0) -> dict[str, str]:
        """Every job has ended: its state by its id."""
        states: dict[str, str] = {}

        def have_ended() -> bool:
            is_queued = bool(self.run("squeue", "-h", "-j", ",".join(jobs), check=False).strip())
            states.update(self.states(jobs))  # of a job that is queued again: how it ended before
            return not is_queued and all(states.get(job) in TERMINAL for job in jobs)

        try:
            wait_until("all jobs have ended", have_ended, seconds, every=0.5)
        except TimeoutError as error:
            raise TimeoutError(f"{error}; last seen: {states}") from None
        return states

    def mend(self) -> None:
        """All daemons run, no job waits or runs, and both nodes are up."""
        if "slurmctld" not in self.daemons:
            self.start_controller()
        self.run("scancel", "--quiet", "--user=root", check=False)
        for node in set(NODES) - set(self.daemons):
            self.start_node(node)
        kill(of_jobs(self.conf), signal.SIGCONT)
        wait_until("all jobs are cancelled", lambda: not self.run("squeue", "-h").strip(), 60)
        for node in NODES:
            self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
            self.wait_for(node, f"node {node} is up", lambda node=node: self.is_up(node))


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Inside, two idle nodes with accounting; afterwards nothing of them is left. `RuntimeError` with a log if it fails."""
    if reason := why_not():
        raise RuntimeError(reason)
    _remove_leftovers()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    folder.chmod(0o755)  # the user munge and the clients go in and out
    (folder / "owner").write_text(str(os.getpid()))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "MYSQL_"))}
    found = Cluster(folder, kept | {"PATH": _search_path(), "SLURM_CONF": str(folder / "slurm.conf")})
    try:
        _configure(found)
        _start(found)
        yield found
    finally:
        _tear_down(found)


def _remove_leftovers() -> None:
    """Nothing is left of clusters whose process was killed: their daemons ended with it, but not their jobs."""
    for owner in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/owner"):
        if not Path("/proc", owner.read_text()).exists():
            _end_jobs(owner.parent / "slurm.conf")
            shutil.rmtree(owner.parent, ignore_errors=True)


def _end_jobs(conf: Path) -> None:
    kill(step_managers(conf) + of_jobs(conf))


def _configure(found: Cluster) -> None:
    folder = found.folder
    for name in ("log", "state", "munge", "database"):
        (folder / name).mkdir()
    controller, database, *nodes = _free_ports(2 + len(NODES))
    values = {
        "folder": folder,
        "host": socket.gethostname().split(".")[0],
        "munge_socket": folder / "munge" / "socket",
        "controller_port": controller,
        "database_port": database,
        "node_ports": ",".join(str(port) for port in nodes),
    }
    for name in ("slurm.conf", "slurmdbd.conf"):
        (folder / name).write_text(Template((_HERE / name).read_text()).substitute(values))
    (folder / "slurmdbd.conf").chmod(0o600)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    for path in (folder / "munge", key):
        shutil.chown(path, "munge", "munge")


def _free_ports(number: int) -> list[int]:
    """Ports that nobody listens on, below those that the kernel gives to connections: a restarted daemon finds its own."""
    found: set[int] = set()
    while len(found) < number:
        port = random.randrange(12000, 30000)
        with socket.socket() as tried, suppress(OSError):
            tried.bind(("127.0.0.1", port))
            found.add(port)
    return sorted(found)


def _start(found: Cluster) -> None:
    munge, database = found.folder / "munge", found.folder / "database"
    files = [f"--{name}-file={munge / name}" for name in ("key", "log", "pid", "seed")]
    found.start("munged", "munged", "--foreground", f"--socket={munge / 'socket'}", *files, user="munge")
    found.wait_for("munged", "munge answers", (munge / "socket").is_socket, 20)

    place = ["--no-defaults", f"--datadir={database / 'data'}", "--user=root"]
    with (found.folder / "log" / "install.log").open("wb") as log:
        install = ["mariadb-install-db", *place, "--auth-root-authentication-method=normal", "--skip-test-db"]
        subprocess.run(install, check=True, env=found.environment, stdout=log, stderr=log, timeout=120)
    database.chmod(0o700)  # its root needs no password, so nobody else may come near the socket
    options = ["--skip-networking", "--innodb-flush-log-at-trx-commit=0", "--innodb-buffer-pool-size=32M"]
    files = [f"--{name}={database / name}" for name in ("socket", "pid-file")]
    found.start("mariadbd", "mariadbd", *place, *options, *files)
    found.wait_for("mariadbd", "the database answers", (database / "socket").is_socket)

    found.start("slurmdbd", "slurmdbd", "-D", MYSQL_UNIX_PORT=str(database / "socket"))
    add = ("sacctmgr", "-i", "add", "cluster", "dmslab")
    found.wait_for("slurmdbd", "accounting knows the cluster", lambda: "dmslab" in found.run(*add, check=False))

    found.start_controller()
    for node in NODES:
        found.start_node(node)
    for node in NODES:
        found.wait_for(node, f"node {node} is up", lambda node=node: found.is_up(node))
    known = ("sacctmgr", "-n", "-P", "list", "cluster", "format=Cluster,ControlPort")
    found.wait_for("slurmctld", "accounting hears of jobs", lambda: int(found.run(*known).strip().split("|")[1]))


def _tear_down(found: Cluster) -> None:
    """Jobs first, then the daemons in reverse, then the folder."""
    _end_jobs(found.conf)
    for name in reversed(list(found.daemons)):
        found.stop(name, signal.SIGKILL if name == "mariadbd" else signal.SIGTERM, 5)
    _end_jobs(found.conf)
    shutil.rmtree(found.folder, ignore_errors=True)


def _tail(path: Path, number: int = 20) -> str:
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return "\n".join([f"-- the end of {path.name}", *lines[-number:]])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with cluster() as running:
        print(f"export SLURM_CONF={running.conf}   # two nodes, partitions main and high; ends with Ctrl-C", flush=True)
        with suppress(KeyboardInterrupt):
            signal.pause()
