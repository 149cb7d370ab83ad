"""Locks that end with the process that holds them (the kernel's `flock`), and what is said where there are none.

On NFS they hold between nodes as long as the mount does not say `nolock` or `local_lock`, on Lustre with the mount option
`flock`. With `localflock` they hold on one node only, and then it is the queue that keeps a point from being submitted
twice.
"""

import fcntl
from typing import IO


def try_lock(file: IO, shared: bool = False) -> bool:
    """Whether the lock of an open file is taken now; False if another process has it. It ends when the file is closed.

    `shared`: beside others that share it. Raises `ValueError` where the file system has no such locks.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise ValueError(
            f"{file.name} cannot be locked ({error.strerror}), so that two jobs could work at the same run: its file "
            "system must know flock (on Lustre the mount option flock, on NFS lockd); work in a folder of another one"
        ) from error
    return True
