"""Two devices on a machine that has none: tensors that compute on the CPU and say that they are elsewhere.

An operation over tensors of several devices fails, as it does between real ones; tensors without dimensions may come
from the CPU. Moving is `to` and `copy_`. The device type has no backend in torch, so nothing else can run on it.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

KIND = "privateuseone"
_MOVES = ("copy_", "_to_copy", "to")


class Elsewhere(Tensor):
    """A tensor on a device of KIND; `here` has its values, on the CPU."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor, device: torch.device) -> "Elsewhere":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=device,
        )
        made.here = here
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # a wrapper has no memory of its own
        if func in (Tensor.data_ptr, Tensor.untyped_storage, Tensor.tolist):
            return func(args[0].here)
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"{self.here!r} on {self.device}"


class Devices(TorchDispatchMode):
    """Within it tensors can be made on the devices of KIND."""

    def __enter__(self) -> "Devices":
        # torch.tensor then makes CPU tensors and moves them, in a way that a mode sees
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(False)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name.rpartition("::")[2]
    tensors = [*tensors_in(args), *tensors_in(kwargs.values())]
    asked = kwargs.get("device")
    places = {tensor.device for tensor in tensors if tensor.dim() or tensor.device.type != "cpu"}
    if len(places) > 1 and name not in _MOVES:
        raise RuntimeError(f"{func} over tensors on {', '.join(sorted(map(str, places)))}")
    if asked is not None:
        place = torch.device(asked)
        kwargs = kwargs | {"device": torch.device("cpu") if place.type == KIND else place}
    elif name == "copy_":
        place = args[0].device
    else:
        place = next(iter(places), torch.device("cpu"))

    out = func(*map(_here, args), **{name: _here(value) for name, value in kwargs.items()})
    if place.type != KIND:
        return out
    # what was changed in place is the tensor that came
    came = {id(x.here): x for x in tensors if isinstance(x, Elsewhere)}
    return mapped(lambda x: came[id(x)] if id(x) in came else Elsewhere(x, place), out)


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors among an operation's arguments or results, of which some are lists.

    torch's own way to find them takes several times as long as the operations on such small tensors.
    """
    for x in values if isinstance(values, Iterable) and not isinstance(values, Tensor) else (values,):
        if isinstance(x, Tensor):
            yield x
        elif type(x) in (list, tuple):
            yield from tensors_in(x)


def mapped(change: Callable[[Tensor], Any], x: Any) -> Any:
    """A value with all of its tensors changed."""
    if isinstance(x, Tensor):
        return change(x)
    return type(x)(mapped(change, part) for part in x) if type(x) in (list, tuple) else x


def _here(x: Any) -> Any:
    return mapped(lambda tensor: tensor.here if isinstance(tensor, Elsewhere) else tensor, x)
