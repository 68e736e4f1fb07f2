"""Where and how a kernel runs: on a GPU, or on a CPU under Triton's interpreter (TRITON_INTERPRET=1).

`op` declares an op, once; `launch` starts its kernels, and under `recording` lists them instead.

Triton is imported here and nowhere else: the other files take `tl` and `triton` from here. Where it is not installed
(macOS, Windows, builds of torch without it) both are stand-ins, and every op takes its PyTorch path.
"""

import functools
import inspect
import os
import sys
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from kvcompress.kernels.missing_triton import MissingTriton

_missing: MissingTriton | None = None
if TYPE_CHECKING:
    # under its own name: a re-export, which other files import
    import triton as triton
    import triton.language
else:
    try:
        import triton.language
    except ImportError as error:
        triton = _missing = MissingTriton(error)
tl = triton.language

HAS_TRITON = _missing is None
if _missing is not None and os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "on", "true"):
    # who asks for the kernels must not get anything else
    raise _missing.error("TRITON_INTERPRET=1")

# read once: Triton too decides at import, and torch.compile cannot trace reading the environment
INTERPRETED: bool = HAS_TRITON and triton.knobs.runtime.interpret

# launch options that let a kernel use all registers: left to itself, ptxas spills a few of them to fit one more block
# on a multiprocessor (AMD's compiler does not)
ALL_REGISTERS: dict[str, int] = {"maxnreg": 255} if torch.version.hip is None else {}

# the dtypes that kernels are compiled for ahead of time: float16 behaves like bfloat16
AOT_DTYPES = (torch.bfloat16, torch.float32)
# every pair of a tile and a tail up to the widest (common/tile.py); others only mask more
AOT_HEAD_DIMS = (64, 80, 96, 128, 144, 192, 256)
# latents and what is shared of keys: DeepSeek's and MiniCPM3's
AOT_LATENTS = ((512, 64), (256, 32))

Given = ParamSpec("Given")
Found = TypeVar("Found")


def runs_triton(tensor: Tensor) -> bool:
    """True where a Triton kernel can take this tensor; ops use their PyTorch path elsewhere.

    The kernels compute in float32, so float64 always takes the PyTorch path. A GPU without Triton takes it too, which
    is right but slow: the first time, it warns.
    """
    if _missing is not None:
        # torch.compile cannot trace a warning
        if tensor.is_cuda and not torch.compiler.is_compiling():
            _warn_of_speed(_missing)
        return False
    return (tensor.is_cuda or INTERPRETED or _recording is not None) and tensor.dtype != torch.float64


# the widest head_dim for which attention kernels have tiles
WIDEST_HEAD = 256


def attends_in_triton(query: Tensor) -> bool:
    """True where a Triton kernel can take a query [..., head_dim]: wider heads, such as latents, attend in PyTorch."""
    return runs_triton(query) and query.shape[-1] <= WIDEST_HEAD


@functools.cache
def _warn_of_speed(missing: MissingTriton) -> None:
    reason = missing.error("what is fast on a GPU")
    warnings.warn(f"kvcompress computes in PyTorch, which is right and slower: {reason}", stacklevel=3)


def autotune(
    configs: list[triton.Config], key: list[str], prune: Callable[..., list[triton.Config]] | None = None
) -> Callable[[Any], Any]:
    """triton.autotune on a GPU. The interpreter has no clock to tune by, so it takes the first config.

    Args:
        key: arguments on whose values, as on all dtypes, tuning depends. None of them may change while decoding.
        prune: (configs, arguments, **constants) to the configs worth trying there.
    """
    if INTERPRETED:
        first = {name: lambda _, value=value: value for name, value in configs[0].kwargs.items()}
        decorator: Callable[[Any], Any] = triton.heuristics(first)
    else:
        decorator = triton.autotune(configs, key, prune_configs_by={"early_config_prune": prune} if prune else None)
    return decorator


@functools.lru_cache
def core_count(device: torch.device) -> int:
    """Multiprocessors of a GPU; elsewhere a small number, so that the interpreter's tests split keys too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def has_wgmma(device: torch.device) -> bool:
    """True for GPUs whose matrix units read shared memory (Hopper on), which leaves registers for larger tiles."""
    return _has_wgmma(device) if _recording is None else _recording.has_wgmma


def runs_ptx(device: torch.device) -> bool:
    """True for NVIDIA's GPUs, whose kernels may hold assembly; one that may has a twin without."""
    if _recording is not None:
        return _recording.has_ptx
    return device.type == "cuda" and torch.version.hip is None


@functools.lru_cache
def _has_wgmma(device: torch.device) -> bool:
    return runs_ptx(device) and torch.cuda.get_device_capability(device) >= (9, 0)


def launch(kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
    """Launches a kernel on the device of its tensors, with all registers.

    Args:
        grid: how many programs, a tuple, or a function of the compile-time arguments that returns it.
        constants: the compile-time arguments, and launch options such as num_warps.
    """
    if _recording is not None:
        _recording.launches.append(Launch(kernel, arguments, constants))
        return
    with torch.cuda.device_of(next(argument for argument in arguments if isinstance(argument, Tensor))):
        kernel[grid](*arguments, **constants, **ALL_REGISTERS)


class Launch(NamedTuple):
    """What `launch` was called with, except for the grid."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


class _Recording(NamedTuple):
    launches: list[Launch]
    has_wgmma: bool
    has_ptx: bool


_recording: _Recording | None = None


@contextmanager
def recording(has_wgmma: bool = False, has_ptx: bool = True) -> Iterator[list[Launch]]:
    """Lists what ops would launch on a GPU with or without wgmma and PTX; nothing is launched, results are undefined.

    Ops take the GPU's path wherever their tensors are: those of `shaped` will do.
    """
    global _recording
    if _missing is not None:
        raise _missing.error("what kernels are launched with")
    _recording = _Recording([], has_wgmma, has_ptx)
    try:
        yield _recording.launches
    finally:
        _recording = None


def shaped(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor with a shape and a dtype but no numbers, for the calls in a file's `aot_calls`."""
    return torch.empty(shape, dtype=dtype, device="meta")


# called instead of an op's function, with it and its arguments
Recall = Callable[..., Any]
# each thread has its own
_recall: ContextVar[Recall | None] = ContextVar("_recall", default=None)


@contextmanager
def recalling(recall: Recall) -> Iterator[None]:
    """Gives the eager calls of ops that write to none of their arguments to `recall(function, *args, **kwargs)`, which
    may know their results from before."""
    token = _recall.set(recall)
    try:
        yield
    finally:
        _recall.reset(token)


class Op(NamedTuple):
    """What `op` made of a function: its fake, the torch.library op, and what turns a call's arguments into the op's."""

    function: Callable[..., Any]
    fake: Callable[..., Any]
    compiled: Any
    leaves: Callable[..., dict[str, Any]]

    @property
    def reference(self) -> Callable[..., Any]:
        """What the function means, in plain PyTorch: <its name>_reference, in the same file."""
        name = f"{self.function.__name__}_reference"
        found: Callable[..., Any] = getattr(sys.modules[self.function.__module__], name)
        return found


OPS: dict[str, Op] = {}


def op(
    fake: Callable[..., Any], mutates: Iterable[str] = ()
) -> Callable[[Callable[Given, Found]], Callable[Given, Found]]:
    """Makes a function one opaque node of a compiled graph, the torch.library op kvcompress::<its name>; see `OPS`.

    Only a call that torch.compile is tracing goes through the op; an eager call runs the function itself,
    because dispatching a custom op costs about 30 us, more than many of these functions.

    A schema has no named tuples: those among the arguments enter the op as their fields. A result that is not None, a
    tensor or a tuple of fixed length leaves it as a list of its tensors, without those at the end that are None. Nor
    does a schema have keyword-only tensors: the op takes all arguments in order.

    Args:
        fake: takes all arguments by name and returns empty tensors as the function would.
        mutates: names of the arguments that the function writes to; of a named tuple, all its fields. What it
            returns must be fresh memory.
    """

    def decorate(function: Callable[Given, Found]) -> Callable[Given, Found]:
        name, returns = function.__name__, inspect.signature(function).return_annotation
        is_writing = bool(tuple(mutates))
        is_named, is_listed = hasattr(returns, "_fields"), _is_listed(returns)
        tuples = _named_tuples(function)
        leaves = _taking_apart(function, tuples)
        compiled = torch.library.custom_op(
            f"kvcompress::{name}",
            _of_leaves(function, function, tuples),
            mutates_args=[leaf for each in mutates for leaf in _names(each, tuples.get(each))],
        )
        compiled.register_fake(_of_leaves(fake, function, tuples))
        OPS[name] = Op(function, fake, compiled, leaves)

        @functools.wraps(function)
        def call(*args: Given.args, **kwargs: Given.kwargs) -> Found:
            if not torch.compiler.is_compiling():
                recall = None if is_writing else _recall.get()
                if recall is not None:
                    recalled: Found = recall(function, *args, **kwargs)
                    return recalled
                return function(*args, **kwargs)
            found: Any = compiled(**leaves(*args, **kwargs))
            if is_listed:
                found = returns(*found) if is_named else tuple(found)
            whole: Found = found
            return whole

        return call

    return decorate


def _is_listed(returns: Any) -> bool:
    """Whether a result leaves an op as a list, because a schema cannot express it."""
    return returns not in (None, Tensor) and typing.get_origin(returns) is not tuple


def _named_tuples(function: Callable[..., Any]) -> dict[str, Any]:
    """The parameters that are named tuples, and of which kind."""
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each.annotation for each in parameters if hasattr(each.annotation, "_fields")}


def _names(parameter: str, kind: Any) -> list[str]:
    """What a parameter is called in the op: its fields, where it is a named tuple of this kind."""
    return [parameter] if kind is None else [f"{parameter}_{field}" for field in kind._fields]


def _taking_apart(function: Callable[..., Any], tuples: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """The function's arguments as its op takes them, by name."""
    parameters = inspect.signature(function).parameters
    defaults = {name: each.default for name, each in parameters.items() if each.default is not each.empty}
    positions = sum(each.kind is not each.KEYWORD_ONLY for each in parameters.values())
    # not the mapping itself: torch 2.11 gives up tracing over one once a model has changed any dict
    names = tuple(parameters)

    def leaves(*args: Any, **kwargs: Any) -> dict[str, Any]:
        if len(args) > positions:
            raise TypeError(f"{function.__name__} takes {positions} arguments by position, got {len(args)}")
        given = defaults | dict(zip(names, args, strict=False)) | kwargs
        for name in tuples:
            for field, leaf in given.pop(name)._asdict().items():
                given[f"{name}_{field}"] = leaf
        return given

    return leaves


def _of_leaves(
    run: Callable[..., Any], function: Callable[..., Any], tuples: dict[str, Any]
) -> Callable[..., list[Tensor] | Any]:
    """`run`, which takes the function's arguments, as its op: from leaves, with a result that a schema can express."""
    signature = inspect.signature(function)
    is_listed = _is_listed(signature.return_annotation)
    flat = signature.replace(
        parameters=[leaf for each in signature.parameters.values() for leaf in _leaves(each)],
        return_annotation=list[Tensor] if is_listed else signature.return_annotation,
    )

    def call(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(flat.parameters, args, strict=False)) | kwargs
        for name, kind in tuples.items():
            given[name] = kind(*map(given.pop, _names(name, kind)))
        found = run(**given)
        return [tensor for tensor in found if tensor is not None] if is_listed else found

    call.__signature__ = flat  # type: ignore[attr-defined]
    return call


def _leaves(parameter: inspect.Parameter) -> list[inspect.Parameter]:
    """A parameter as a schema can express it: a named tuple as its fields, literals as a string."""
    kind = parameter.annotation
    fields = typing.get_type_hints(kind) if hasattr(kind, "_fields") else {}
    if fields:
        of_fields = (parameter.replace(name=f"{parameter.name}_{name}", annotation=fields[name]) for name in fields)
        return [leaf for field in of_fields for leaf in _leaves(field)]
    kind = str if typing.get_origin(kind) is typing.Literal else kind
    return [inspect.Parameter(parameter.name, parameter.POSITIONAL_OR_KEYWORD, annotation=kind)]
