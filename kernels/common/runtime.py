"""Where and how a kernel runs: on a GPU, or on a CPU under Triton's interpreter (TRITON_INTERPRET=1).

Triton is imported here and nowhere else: the other files take `tl` and `triton` from here. Where it is not installed
(macOS, Windows, builds of torch without it) both are stand-ins, and every op takes its PyTorch path.
"""

import functools
import os
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from kvcompress.kernels.missing_triton import MissingTriton

_missing: MissingTriton | None = None
if TYPE_CHECKING:
    import triton.language
else:
    try:
        import triton.language
    except ImportError as error:
        triton = _missing = MissingTriton(error)
tl = triton.language

HAS_TRITON = _missing is None
if _missing is not None and os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "on", "true"):
    # whoever asks for the kernels must not get something else
    raise _missing.error("TRITON_INTERPRET=1")

# read once: Triton decides at import too, and torch.compile cannot trace a look at the environment
INTERPRETED: bool = HAS_TRITON and triton.knobs.runtime.interpret

# launch options that let a kernel use what registers there are: left to itself, ptxas spills a few of them to make room
# for one block more on a multiprocessor (AMD's compiler does not)
ALL_REGISTERS: dict[str, int] = {"maxnreg": 255} if torch.version.hip is None else {}

Function = TypeVar("Function", bound=Callable[..., Any])


def runs_triton(tensor: Tensor) -> bool:
    """True where a Triton kernel can take this tensor; ops use their PyTorch path elsewhere.

    The kernels compute in float32, so float64 always takes the PyTorch path. A GPU without Triton takes it too, which
    is right and slow: the first time there is a warning.
    """
    if _missing is not None:
        # torch.compile cannot trace a warning
        if tensor.is_cuda and not torch.compiler.is_compiling():
            _warn_of_speed(_missing)
        return False
    return (tensor.is_cuda or INTERPRETED) and tensor.dtype != torch.float64


@functools.cache
def _warn_of_speed(missing: MissingTriton) -> None:
    reason = missing.error("what is fast on a GPU")
    warnings.warn(f"kvcompress computes in PyTorch, which is right and slower: {reason}", stacklevel=3)


def autotune(
    configs: list[triton.Config], key: list[str], prune: Callable[..., list[triton.Config]] | None = None
) -> Callable[[Any], Any]:
    """triton.autotune on a GPU. The interpreter has no clock to tune by, so it takes the first config.

    Args:
        key: arguments whose values, like all dtypes, call for tuning anew. None of them may change while decoding.
        prune: (configs, arguments, **constants) to the configs worth trying there.
    """
    if INTERPRETED:
        return triton.heuristics({name: lambda _, value=value: value for name, value in configs[0].kwargs.items()})
    return triton.autotune(configs, key, prune_configs_by={"early_config_prune": prune} if prune else None)


@functools.lru_cache
def core_count(device: torch.device) -> int:
    """Multiprocessors of a GPU; of no matter elsewhere, so few that the interpreter's tests split keys too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.lru_cache
def has_wgmma(device: torch.device) -> bool:
    """True for GPUs whose matrix units read shared memory (Hopper on), which leaves registers for larger tiles."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def compilable(fake: Callable[..., Any], mutates: Iterable[str] = ()) -> Callable[[Function], Function]:
    """Makes a function one opaque node of a compiled graph: the torch.library op kvcompress::<its name>.

    Only a call that torch.compile is tracing goes through the op; an eager call runs the function itself,
    because the dispatch of a custom op costs some 30 us, more than many of these functions.

    Args:
        fake: takes the same arguments and returns empty tensors as the function would.
        mutates: names of the arguments that the function writes to. What it returns must be fresh memory.
    """

    def decorate(function: Function) -> Function:
        name = f"kvcompress::{function.__name__.lstrip('_')}"
        op = torch.library.custom_op(name, function, mutates_args=tuple(mutates))
        op.register_fake(fake)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return op(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


class AotCase(NamedTuple):
    """One way a kernel can be launched: what the ahead-of-time check (evals/bench/aot.py) compiles without a GPU."""

    kernel: Any
    label: str
    signature: dict[str, Any]
    constants: dict[str, Any]
    needs_wgmma: bool
    options: dict[str, int]


def aot_case(
    kernel: Any,
    label: str,
    types: dict[str, Any],
    constants: dict[str, Any],
    *,
    needs_wgmma: bool = False,
    num_warps: int = 4,
    num_stages: int = 3,
) -> AotCase:
    """Completes a case from what its launch does not say by itself.

    Args:
        types: Triton type of each argument that is not a 32-bit integer, such as {"out_ptr": "*bf16"}.
        constants: the compile-time arguments, and the pointers that are None.
        needs_wgmma: launched only where `has_wgmma`.
    """
    # under the autotuner and its like lies the function itself
    while not isinstance(kernel, triton.JITFunction):
        kernel = kernel.fn
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return AotCase(kernel, label, signature, constants, needs_wgmma, options)
