"""The bars that transformers shows while it loads a model."""

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import logging


@contextlib.contextmanager
def gguf_bars_as_told() -> Iterator[None]:
    """Within it, no bar is shown for a GGUF file if transformers' bars are off (`logging.disable_progress_bar`)."""
    # it has a bar that knows nothing of the switch that all others obey
    from transformers import modeling_gguf_pytorch_utils

    module: Any = modeling_gguf_pytorch_utils
    shown = vars(module).get("tqdm")
    if shown is None or logging.is_progress_bar_enabled():
        yield
        return
    module.tqdm = logging.tqdm
    try:
        yield
    finally:
        module.tqdm = shown
