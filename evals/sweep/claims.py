"""Points shared among processes: whoever claims one first measures it.

A claim is a lock on a file, which the system lets go when its process ends, in whatever way; what a killed process had
begun is then free for another. Processes of several machines need a folder whose locks they share.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout


class Claims:
    """Claims on the points of a sweep, in a folder beside its rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / ".claims"
        self.folder.mkdir(exist_ok=True)

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Whether the point is ours for as long as the block lasts; False where another process has it."""
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
