"""Locks on files, which the system releases when their process ends, however it ends."""

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from esft_jax.errors import InputError
from esft_jax.files import reason


class NoLocks(InputError):
    """The file system of a path knows no locks."""


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Lock a file, which is made if need be, for the time of the block.

    Yields:
        Whether the lock is ours; False if another process, or another block of this one, holds it.

    Raises:
        InputError: the file cannot be made or is no file; `NoLocks` where there are none.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A link could lead elsewhere; a FIFO would be waited for.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        raise InputError(f"{path}: cannot be locked: {reason(error)}") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InputError(f"{path}: cannot be locked: is no regular file")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = True
        except BlockingIOError:
            ours = False
        except OSError as error:
            raise NoLocks(f"{path}: its file system knows no locks ({reason(error)})") from None
        yield ours
    finally:
        os.close(descriptor)
