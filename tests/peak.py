"""How many bytes PyTorch's allocator has out at most, on a CPU, while something runs."""

from collections.abc import Callable
from typing import Any

import torch


def peak_bytes(run: Callable[[], Any]) -> tuple[int, Any]:
    """The most bytes that lay beside those from before at a time of `run()`, and what it returned."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    # as the allocator was asked, whichever operation asked it
    moves = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(moves, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most, result
