"""The process that runs a submission on this machine: so many points at a time, and a note on what became of each.

    submit -> python -m dms_lab.sweeping.supervisor <folder> <workers> -> a process a point, in a session of its own

A place at work is a lock on a file that the point's process inherits: two submissions together run no more points than
one, and a place is free when its process is dead, however that and its supervisor ended.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dms_lab.sweeping.locks import try_lock

_SECONDS = 60.0  # that nvidia-smi may take


@dataclass(frozen=True)
class Note:
    """What became of a job: its process, when it began and ended (seconds since 1970), its exit code once it has ended."""

    pid: int | None
    pid_started: int | None
    began: float
    ended: float | None = None
    code: int | None = None
    is_stopped: bool = False


def read_note(log: Path) -> Note | None:
    """The note on the job that writes to `log`; None before it was started."""
    try:
        return Note(**json.loads(log.with_suffix(".state").read_text()))
    except FileNotFoundError:
        return None


def _write_note(log: Path, note: Note) -> None:
    temporary = log.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(note)) + "\n")
    temporary.replace(log.with_suffix(".state"))


def started_at(pid: int) -> int | None:
    """When a process began, in the kernel's clock ticks, which tells it from a later one of the same number."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError):
        return None


def is_alive(pid: int | None, began: int | None) -> bool:
    """Whether the process still runs; one that ended and that nobody has waited for does not."""
    if pid is None:
        return False
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z" and started_at(pid) == began


@dataclass
class _Running:
    """A process at work on a point, where it writes to, and the file whose lock is its place."""

    log: Path
    process: subprocess.Popen
    place: Any
    note: Note


class Supervisor:
    """Runs the jobs described in a folder, `workers` at a time; after SIGTERM it starts no more, and stops the others."""

    def __init__(self, batch: Path, workers: int) -> None:
        self.workers = workers
        self.waiting = sorted(batch.glob("*.json"))
        self.places = batch.parent
        self.running: list[_Running] = []
        self.is_stopped = False

    def run(self) -> None:
        """Returns when every job has ended."""
        signal.signal(signal.SIGTERM, self._stop)
        while self.waiting or self.running:
            while self.waiting and not self.is_stopped and (place := self._free_place()) is not None:
                self._start(self.waiting.pop(0), *place)
            self._reap()
            if self.is_stopped:
                self._drop_waiting()
            time.sleep(0.1)

    def _stop(self, number: int, frame: Any) -> None:
        self.is_stopped = True
        for job in self.running:
            with suppress(ProcessLookupError):
                os.killpg(job.process.pid, signal.SIGTERM)

    def _free_place(self) -> tuple[int, Any] | None:
        for index in range(self.workers):
            file = (self.places / f"place{index}.lock").open("a")
            if try_lock(file):
                return index, file
            file.close()
        return None

    def _start(self, spec: Path, index: int, place: Any) -> None:
        log = spec.with_suffix(".log")
        with log.open("w") as file:
            process = subprocess.Popen(
                command_of(spec),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=environment_of(spec, index, self.workers),
                start_new_session=True,
                pass_fds=(place.fileno(),),
            )
        note = Note(process.pid, started_at(process.pid), time.time())
        self.running.append(_Running(log, process, place, note))
        _write_note(log, note)
        if self.is_stopped:  # the signal came while it was started
            self._stop(signal.SIGTERM, None)

    def _reap(self) -> None:
        for job in list(self.running):
            if (code := job.process.poll()) is not None:
                ended = asdict(job.note) | {"ended": time.time(), "code": code, "is_stopped": self.is_stopped and code != 0}
                _write_note(job.log, Note(**ended))
                job.place.close()
                self.running.remove(job)

    def _drop_waiting(self) -> None:
        for spec in self.waiting:
            now = time.time()
            _write_note(spec.with_suffix(".log"), Note(None, None, now, now, code=1, is_stopped=True))
        self.waiting = []


def command_of(spec: Path) -> list[str]:
    """What runs a described job: Python, or torchrun where a run has several processes."""
    devices = _devices(spec)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"] if devices > 1 else []
    return [sys.executable, *launcher, "-m", "dms_lab.sweeping.job", str(spec)]


def environment_of(spec: Path, place: int, workers: int) -> dict[str, str]:
    """The environment of a job at a place: as many GPUs as its run has processes, the next ones for the next place.

    They are those of CUDA_VISIBLE_DEVICES, or all that there are. Places share GPUs where there are too few for all, and
    where runs of one sweep have different numbers of processes.
    """
    environment = dict(os.environ)
    gpus, devices = visible_gpus(environment.get("CUDA_VISIBLE_DEVICES")), _devices(spec)
    if len(gpus) > devices:
        first = place * devices
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[(first + i) % len(gpus)] for i in range(devices))
    if workers > 1:  # processes that share processors gain nothing from threads
        environment.setdefault("OMP_NUM_THREADS", "1")
    return environment


def visible_gpus(said: str | None) -> list[str]:
    """What CUDA_VISIBLE_DEVICES says; where that is not set, the names of this machine's GPUs, by its driver.

    If the driver does not answer, that is told on stderr, and there are none to tell apart.
    """
    if said is not None:
        return [name for name in said.split(",") if name]
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        asked = ["nvidia-smi", "--list-gpus"]
        listed = subprocess.run(asked, capture_output=True, text=True, timeout=_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        print(f"the GPUs cannot be listed, so points are not spread over them: {error}", file=sys.stderr, flush=True)
        return []
    names = re.findall(r"UUID: ((?:GPU|MIG)-[\w/-]+)", listed)
    parts = [name for name in names if name.startswith("MIG-")]  # a GPU that is cut into these cannot be used whole
    return parts or names


def _devices(spec: Path) -> int:
    return json.loads(spec.read_text())["composed"].get("devices") or 1


if __name__ == "__main__":
    Supervisor(Path(sys.argv[1]), int(sys.argv[2])).run()
