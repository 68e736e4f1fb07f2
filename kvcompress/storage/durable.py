"""Files that appear whole or not at all, whoever is killed meanwhile and however many processes write at once."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

# what a writer that was killed leaves behind
PARTIAL = ".partial"


def write_whole(folder: Path, stem: str, write: Callable[[BinaryIO], str]) -> Path:
    """A file of a folder, which takes its place in one step after all of it has reached the disk.

    Args:
        stem: how the name begins under which it is written, with a random part and PARTIAL after it.
        write: writes the file, which is open for reading too, and gives the name that it shall have in the folder.

    Raises:
        OSError: the folder cannot be written, or is full; what was there before is there still.
    """
    partial = folder / f"{stem}-{secrets.token_hex(8)}{PARTIAL}"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    # unlike tempfile's, with the permissions that any other file gets
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
    """Makes names that were given or taken in a folder outlast a loss of power."""
    if os.name == "nt":
        # there a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
