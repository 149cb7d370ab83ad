"""Processes of a cluster's jobs, as the kernel shows them."""

import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


def of_jobs(conf: Path, job: str | None = None) -> list[int]:
    """What jobs of the cluster of `conf` started, or one job alone (its id as sacct shows it, `7` or `7_0`)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        values = _environment(path)
        if values.get("SLURM_CONF") != str(conf) or "SLURM_JOB_ID" not in values:
            continue
        in_array = f"{values.get('SLURM_ARRAY_JOB_ID')}_{values.get('SLURM_ARRAY_TASK_ID')}"
        if job is None or job in (values["SLURM_JOB_ID"], in_array):
            found.append(int(path.parent.name))
    return sorted(found)


def _environment(path: Path) -> dict[str, str]:
    try:
        entries = path.read_bytes().decode(errors="replace").split("\0")
    except OSError:  # it has ended
        return {}
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def tasks(conf: Path, job: str) -> list[int]:
    """The Python processes in which submitit runs a job's function, one a rank."""
    found = []
    for pid in of_jobs(conf, job):
        with suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"submitit.core._submit" in words and b"python" in Path(os.fsdecode(words[0])).name.encode():
                found.append(pid)
    return found


def step_managers(conf: Path) -> list[int]:
    """The `slurmstepd` processes of the cluster, which outlive the node daemon that started them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/exe"):
        with suppress(OSError):
            if path.resolve().name.startswith("slurmstepd") and (path.parent / "cwd").resolve() == conf.parent.resolve():
                found.append(int(path.parent.name))
    return sorted(found)


def kill(pids: Sequence[int], number: int = signal.SIGKILL) -> None:
    """The signal is sent to those that still run."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
