"""How many bytes PyTorch's allocator has out at most, on a CPU, while something runs."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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


class _Living(TorchDispatchMode):
    """Counts the bytes of tensors that operations have returned, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, Any] = {}
        self.held = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                # from before, or counted
                self._note(tensor.untyped_storage(), 0)
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        self.most = max(self.most, self.held)
        return found

    def _note(self, storage: torch.UntypedStorage, size: int) -> None:
        if id(storage) not in self.known:
            self.known[id(storage)] = weakref.finalize(storage, self._forget, id(storage), size)
            self.held += size

    def _forget(self, name: int, size: int) -> None:
        del self.known[name]
        self.held -= size


def peak_of_tensors(run: Callable[[], Any]) -> tuple[int, Any]:
    """The most bytes of tensors that lived beside those from before at a time of `run()`, without what an operation
    takes while it runs, and what it returned."""
    with _Living() as living:
        result = run()
    return living.most, result
