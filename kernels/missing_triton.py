"""Stand-ins for `triton` and `tl` where Triton cannot be imported: kernels can be defined, but not launched.

They have what the files of this folder use of Triton before a launch. Any other attribute is an error that names the
remedy.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple


class Constant(NamedTuple):
    """In place of triton.language.constexpr."""

    value: Any


class Config:
    """In place of triton.Config."""

    def __init__(self, kwargs: dict[str, Any], **options: Any) -> None:
        self.kwargs = kwargs


class Kernel:
    """In place of what triton.jit makes of a function."""

    def __init__(self, triton: "MissingTriton", function: Callable[..., Any]) -> None:
        self.triton = triton
        self.name = function.__name__

    def __getitem__(self, grid: Any) -> Any:
        raise self.triton.error(f"the kernel {self.name}")


class MissingTriton:
    """In place of the modules triton and triton.language.

    Args:
        reason: why they cannot be imported.
    """

    Config = Config
    constexpr = Constant

    def __init__(self, reason: ImportError) -> None:
        self.reason = reason
        self.language = self

    def __getattr__(self, name: str) -> Any:
        # Python itself asks for some dunder names
        raise AttributeError(name) if name.startswith("__") else self.error(f"triton.{name}")

    def error(self, what: str) -> ImportError:
        """The error of something that needs Triton."""
        return ImportError(
            f"{what} needs Triton, which cannot be imported here ({self.reason}). Install it: on Linux by "
            "pip install 'triton>=3.5', or for ROCm as the build of torch names it; on Windows by "
            "pip install triton-windows. CPUs and Apple's GPUs do without",
            name="triton",
        )

    def jit(self, function: Callable[..., Any] | None = None, **options: Any) -> Any:
        return functools.partial(Kernel, self) if function is None else Kernel(self, function)

    def constexpr_function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    def autotune(self, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
        return lambda kernel: kernel

    def cdiv(self, x: int, y: int) -> int:
        return -(-x // y)

    def next_power_of_2(self, n: int) -> int:
        return 1 << (n - 1).bit_length() if n > 0 else 0
