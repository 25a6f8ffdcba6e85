"""Huge pages for what the C library allocates.

A training step on a CPU allocates its temporaries anew, gigabytes of them. In pages of 4 KiB the
system spends more than a tenth of the step on handing them out (`docs/performance.md`). Where Linux
gives huge pages to those who ask, glibc asks only if its environment told it so when the process
started; so the process starts again.
"""

import os
import sys
from pathlib import Path

_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_NAME, _TUNABLE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"


def restart_with_huge_pages() -> None:
    """Start this process again with huge pages, unless it has them or the system gives none.

    For `__main__` only: the same command runs from its beginning, as the same process.
    """
    tunables = os.environ.get(_NAME, "")
    if not _SYSTEM.exists() or "[madvise]" not in _SYSTEM.read_text() or _TUNABLE in tunables:
        return
    tunables = ":".join(filter(None, (tunables, f"{_TUNABLE}=1")))
    command = [sys.executable, *sys.orig_argv[1:]]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, command, os.environ | {_NAME: tunables})
