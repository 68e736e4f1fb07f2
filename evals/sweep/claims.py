"""Points shared among processes: the first to claim one measures it.

A claim is a lock on a file, which the system releases when its process ends, however it ends; another process can then
measure what a killed one had begun. Processes on several machines need a folder with shared locks.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout


class Claims:
    """Claims on the points of a sweep, in a folder next to its rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / ".claims"
        self.folder.mkdir(exist_ok=True)

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Whether the point is ours while the block runs; False if another process has it."""
        lock = FileLock(self.folder / f"{key}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()
