"""Files that appear whole or not at all, even if a writer is killed or several processes write at once."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

# the suffix of what a killed writer leaves behind
PARTIAL = ".partial"


def write_whole(folder: Path, stem: str, write: Callable[[BinaryIO], str]) -> Path:
    """Writes a file in a folder; it gets its name in one step, after all of it has reached the disk.

    Args:
        stem: the beginning of the temporary name, before a random part and PARTIAL.
        write: writes the file, which is open for reading too, and returns its final name.

    Raises:
        OSError: the folder cannot be written, or is full; what was there before is still there.
    """
    partial = folder / f"{stem}-{secrets.token_hex(8)}{PARTIAL}"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    # with normal permissions, unlike tempfile's
    descriptor = os.open(partial, flags, 0o666)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            path = folder / write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(folder)
    return path


def _sync(folder: Path) -> None:
    """Makes new and deleted names in a folder survive a loss of power."""
    if os.name == "nt":
        # Windows cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
