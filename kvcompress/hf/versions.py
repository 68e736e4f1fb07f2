"""The releases of transformers that the tests have passed on, and a warning if the installed one is newer."""

import warnings

import transformers
from packaging.version import Version

OLDEST_TESTED = "5.17.0"
NEWEST_TESTED = "5.24.0"

_told: set[str] = set()


def warn_of_untested_release() -> None:
    """Warns, once per process, if transformers is newer than the newest release tested."""
    installed = transformers.__version__
    if installed not in _told and Version(installed).release > Version(NEWEST_TESTED).release:
        _told.add(installed)
        warnings.warn(
            f"transformers {installed} is newer than {NEWEST_TESTED}, the newest release that kvcompress was tested "
            "with; `kvcompress check` tells whether it works here",
            stacklevel=4,
        )
