"""What a step of decoding asks of a GPU, counted without one: `python -m tests.contract.launches [FILE]` writes it.

Caches run on a pretended device (tests/parallel/devices.py) in a model of two layers and in one of three; the
difference is what a layer takes. Under `recording` ops launch nothing and list their kernels. Other operations that a
device would run are counted where the innermost frame is kvcompress' and not transformers', and so is what the host
waits for: numbers read from the device, and tensors copied to it from memory that is not pinned. Everything runs in a
process of its own, because it gives torch a second kind of device.
"""

import contextlib
import dataclasses
import functools
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import kvcompress
from kvcompress import DenseCache, HydragenCache
from kvcompress.evals.provenance import provenance
from kvcompress.kernels.common.runtime import recording
from tests.contract.caches import ENTRIES, Entry, by_name
from tests.contract.drive import feed
from tests.contract.models import build, prompt
from tests.parallel.devices import KIND, Devices, tensors_in

ROOT = Path(kvcompress.__file__).resolve().parents[1]
OURS = tuple(str(ROOT / folder) for folder in ("kvcompress", "kernels", "policies"))
TRANSFORMERS = f"{Path(sys.modules['transformers'].__file__).parent}"
# operations on the device; numbers read from it; copies to it from memory that is not pinned
KINDS = ("operations", "reads", "copies")
SYNCS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique_consecutive", "_unique2")
ALLOCATIONS = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided")


class Count(TorchDispatchMode):
    """Counts what kvcompress asks of the device, by kind, name and place in the source."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.rpartition("::")[2]
        if name in ALLOCATIONS:
            # kernels that are not launched leave it as it is
            return out.zero_()
        given, made = [*tensors_in(args), *tensors_in((kwargs or {}).values())], [*tensors_in(out)]
        from_host = any(x.device.type == "cpu" and x.dim() for x in given)
        on_device = [any(x.device.type == KIND for x in tensors) for tensors in (given, made)]
        is_view = any(each.alias_info and not each.alias_info.is_write for each in func._schema.returns)
        if any(on_device) and not is_view and name not in ("_unsafe_view", "lift_fresh", "detach", "alias"):
            to_host = on_device[0] and any(x.device.type == "cpu" for x in made)
            kind = "reads" if name in SYNCS or to_host else "copies" if from_host else "operations"
            self.note(kind, name)
        return out

    def note(self, kind: str, name: str) -> None:
        frame = sys._getframe(2)
        while frame is not None:
            file = frame.f_code.co_filename
            if file.startswith(TRANSFORMERS):
                return
            if ours := _own(file):
                self.found[kind, name, f"{ours}:{frame.f_lineno}"] += 1
                return
            frame = frame.f_back


@functools.cache
def _own(file: str) -> str:
    """Where in the library a source file is; nothing where it is elsewhere."""
    path = str(Path(file).resolve())
    return str(Path(path).relative_to(ROOT)) if path.startswith(OURS) else ""


class Pretended(TorchFunctionMode):
    """Tensors on the device say that they are on a GPU, and those of the host that it can read them.

    It counts the lists made of tensors on the device, too, which no dispatch shows.
    """

    def __init__(self, count: Count) -> None:
        self.count = count

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.is_cuda.__get__:
            return args[0].device.type == KIND
        if func is Tensor.is_pinned:
            return True
        if func is Tensor.tolist and args[0].device.type == KIND:
            self.count.note("reads", "tolist")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def streams() -> Iterator[None]:
    """Streams of a GPU, on which nothing runs."""
    cuda = {name: mock.MagicMock() for name in ("Stream", "stream", "current_stream")}
    with mock.patch.multiple(torch.cuda, **cuda):
        yield


def step(entry: Entry, layers: int) -> Counter:
    """What one step of decoding takes behind a prompt and some steps, by kind, name and place."""
    model = build("llama", num_hidden_layers=layers).to(KIND)
    cache = entry.make(model)
    feed(model, cache, prompt(20, 2).to(KIND))
    feed(model, cache, prompt(1, 2).to(KIND))
    if entry.shares:
        # a copy has no tables that were made for a device without kernels
        cache = cache.clone()
    token = prompt(1, 2).to(KIND)
    # the first step on a GPU settles what the ones before it left elsewhere
    for _ in range(2):
        count = Count()
        with recording(has_wgmma=True) as launches, streams(), count, Pretended(count):
            feed(model, cache, token)
    for launch in launches:
        kernel = launch.kernel
        while not hasattr(kernel, "params"):
            kernel = kernel.fn
        count.found["launch", kernel.__name__, ""] += 1
    return count.found


def per_layer(entry: Entry) -> dict[str, Any]:
    """What a layer takes of a step, and under "step" what the step takes beside its layers."""
    two, three = step(entry, 2), step(entry, 3)
    found: dict[str, Any] = {"launches": {}, **dict.fromkeys(KINDS, 0), "step": dict.fromkeys(KINDS, 0)}
    for key in sorted(two | three):
        kind, name, _ = key
        layer = three[key] - two[key]
        if kind == "launch":
            found["launches"][name] = layer
        else:
            found[kind] += layer
            found["step"][kind] += two[key] - 2 * layer
    return found


# rows that continue from one prefix
SHARED = dataclasses.replace(
    by_name["hydragen"],
    name="hydragen_shared",
    make=lambda model: HydragenCache.from_prefix(model, prompt(40, seed=3)[0].to(KIND)),
)


def _wasteful(model: Any) -> DenseCache:
    """A cache whose layers each compute, read and copy a number that nobody needs: what the count must find."""
    cache = DenseCache(model)
    for layer in cache.layers:
        layer.attend = functools.partial(_waste, layer.attend)  # type: ignore[method-assign]
    return cache


def _waste(attend: Any, query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    query.sum().item()
    query.new_zeros(3).tolist()
    torch.ones(3).to(query.device)
    return attend(query, *args, **kwargs)


def main() -> None:
    """Counts every cache of the contract, and prints or writes the table."""
    torch.set_num_threads(1)
    _setup_privateuseone_for_python_backend()
    wasteful = dataclasses.replace(ENTRIES[0], name="wasteful", make=_wasteful)
    entries = [*ENTRIES, SHARED] if sys.argv[1:] else [*ENTRIES, SHARED, wasteful]
    with Devices():
        table = {entry.name: per_layer(entry) for entry in entries}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(found)}" for name, found in table.items())
    text = f'{{"provenance": {json.dumps(provenance("cpu"))},\n"caches": {{\n{lines}\n}}}}\n'
    if sys.argv[1:]:
        Path(sys.argv[1]).write_text(text, "utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
