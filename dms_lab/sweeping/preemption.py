"""A job that makes room for another and ends before Slurm has put it back into the queue, puts itself there.

    preempted -> SIGTERM -> the training saves and ends -> [GraceTime later: SIGKILL, back into the queue]

Slurm requeues a preempted job when its time of grace is over. One that has ended by itself until then is a job that failed
or completed, and stays away; without GraceTime there is no such moment. SIGTERM alone says too little: `scancel` sends it,
too.
"""

import os
import re
import signal
import subprocess
import sys

_SECONDS = 60  # that Slurm may take to answer


def come_back_if_preempted() -> None:
    """Queues this job again, and ends it, if Slurm is taking it from its node; else returns.

    As submitit does at SIGUSR2, whose handler is called; in a job that is not submitit's, nothing is done.
    """
    handler = signal.getsignal(signal.SIGUSR2)
    if callable(handler) and "SLURM_JOB_ID" in os.environ and _is_preempted(os.environ["SLURM_JOB_ID"]):
        handler(signal.SIGUSR2, None)


def _is_preempted(job_id: str) -> bool:
    """Whether the controller has chosen the job for preemption: then it knows since when."""
    try:
        done = subprocess.run(["scontrol", "show", "job", job_id], capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return _told(f"scontrol: {error}")
    if done.returncode:
        return _told(done.stderr.strip())
    since = re.search(r"\bPreemptTime=(\S+)", done.stdout)
    return since is not None and since[1] not in ("None", "Unknown", "N/A")


def _told(why: str) -> bool:
    print(f"whether this job was preempted cannot be asked ({why}); if it was, submit it again", file=sys.stderr)
    return False
