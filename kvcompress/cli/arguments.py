"""What the commands read from a user, and how they report a mistake."""

import contextlib
import inspect
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer

from kvcompress.caches.budget import Budget

if TYPE_CHECKING:
    import torch
    from rich.table import Column, Table
    from transformers import PreTrainedModel

# the default of --methods: registry.USUAL
USUAL = "usual"
# stands in help texts for registry.METHODS, which takes seconds to import, until the help is shown
KNOWN = "{methods}"
# likewise for the names of tasks, and for what USUAL stands for
KNOWN_TASKS, IN_USUAL = "{tasks}", "{usual}"

ModelOption = Annotated[str | None, "Hub id, local folder or .gguf file; else SmolLM2-135M-Instruct."]
DeviceOption = Annotated[str | None, "cpu, cuda, cuda:1, ...; else a GPU if there is one."]
DataArgument = Annotated[
    list[Path],
    typer.Argument(
        help="Text files, or .jsonl with a text or a chat per line. All texts of a file, its paragraphs or lines, are "
        "read as one, which is cut every --length tokens; a chat is read by itself."
    ),
]
DtypeOption = Annotated[
    str | None, "float32, bfloat16, float16 or auto; else the checkpoint's own on a GPU, float32 on a CPU."
]
CacheOption = Annotated[str, f"With settings as in h2o:sinks=4:bits=4. Known: {KNOWN}."]


def with_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as typer takes it; its parameters carry their help texts: `Annotated[int, "decode steps"]`, and may
    say the least number that makes sense: `Annotated[int, "decode steps", 1]`."""
    hints = get_type_hints(function, include_extras=True)
    parameters = [
        parameter.replace(annotation=_option(parameter.name, hints[parameter.name]))
        for parameter in inspect.signature(function).parameters.values()
    ]
    vars(function)["__signature__"] = inspect.Signature(parameters)
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return function


def _option(name: str, hint: Any) -> Any:
    """An option of a parameter's type, with its words as help; an argument, or the context, as it is."""
    kind, words, least, *_ = (*get_args(hint), None) if get_origin(hint) is Annotated else (hint, None, None)
    if kind is typer.Context or not isinstance(words, str | None):
        return hint
    # a flag has no --no- form
    names = [f"--{name.replace('_', '-')}"] if kind is bool else []
    return Annotated[kind, typer.Option(*names, help=words, min=least)]


class UsageError(Exception):
    """A user's mistake, described on one line."""


def load(
    name: str | None,
    dtype: str | None,
    device: str | None,
    *,
    device_map: str | None = None,
    quantize_weights: int | None = None,
) -> "tuple[PreTrainedModel, Any]":
    """Loads a model without progress bars; what takes long is said on stderr.

    Args:
        dtype: None as in `load_model`.
        device: None for a GPU if there is one, and not with device_map.
        quantize_weights: None, or the bits that bitsandbytes keeps of a weight, 4 or 8, on a GPU.
    """
    import torch
    from transformers import logging as bars

    from kvcompress.loading import ModelUnavailableError, default_dtype, load_model

    bars.disable_progress_bar()
    has_gpu = torch.cuda.is_available()
    if device is None and device_map is None:
        # each process of a launcher has its own GPU
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if has_gpu else "cpu"
    kind: Any = "auto" if dtype == "auto" else default_dtype(device, device_map) if dtype is None else as_dtype(dtype)
    more = {} if quantize_weights is None else {"quantization_config": _quantized(name, quantize_weights, kind, device)}
    try:
        with user_errors(), _told():
            return load_model(name, dtype=kind, device=device, device_map=device_map, **more)
    except ModelUnavailableError as error:
        raise UsageError(str(error)) from error


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Within it, what kvcompress logs is shown on stderr."""
    logger, handler = logging.getLogger("kvcompress"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("kvcompress: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _quantized(name: str | None, bits: int, dtype: Any, device: str | None) -> Any:
    """transformers' config for weights of so many bits."""
    import torch
    from transformers import BitsAndBytesConfig

    from kvcompress.loading import read_config

    if bits not in (4, 8):
        raise UsageError(f"--quantize-weights must be 4 or 8 bits, got {bits}")
    if device == "cpu" or not torch.cuda.is_available():
        raise UsageError("--quantize-weights needs a GPU, where bitsandbytes keeps the weights; leave it out on a CPU")
    missing = [package for package in ("bitsandbytes", "accelerate") if find_spec(package) is None]
    if missing:
        raise UsageError(f"--quantize-weights needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    with user_errors():
        computes = read_config(name).dtype or torch.float32 if dtype == "auto" else dtype
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computes)


def check_extra(extra: str, *packages: str) -> None:
    """Fails early if packages are missing, rather than at an import after hours of work."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise UsageError(f"this command needs {', '.join(missing)}: pip install 'kvcompress[{extra}]'")


def as_dtype(name: str, option: str = "--dtype") -> "torch.dtype":
    import torch

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in kinds:
        auto = " or auto" * (option == "--dtype")
        raise UsageError(f"{option} must be one of {', '.join(kinds)}{auto}, got {name!r}")
    return kinds[name]


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Within it, errors about values and files count as the user's mistakes, because only the user's are used there."""
    from kvcompress.loading import ModelUnavailableError

    try:
        yield
    except (ValueError, ModelUnavailableError) as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        if error.filename is None:
            raise
        raise UsageError(f"{error.filename}: {error.strerror}") from error


def is_default(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "DEFAULT"


def parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def count(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"a length must be a number of tokens, got {text!r}") from None


def as_budget(text: str) -> int | float:
    """A count of tokens if it is written as an integer, else a fraction."""
    try:
        return Budget.parse(text).amount
    except ValueError as error:
        raise UsageError(str(error)) from None


def as_object(option: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UsageError(f'{option} must be a JSON object such as {{"data": "/folder"}}, got {text!r}')
    return found


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise UsageError(f"--seed must be a number from 0 to 2**32 - 1, got {seed}")


def unescaped(text: str) -> str:
    """Turns \\n, which a shell passes as two characters, into a line break."""
    return text.replace("\\n", "\n")


def check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"cannot write to the folder {folder}: {error.strerror}") from None


def gibibytes(size: int) -> str:
    value = size / 2**30
    return f"{value:.3f}" if value < 1 else f"{value:.1f}"


def show_table(table: "Table") -> None:
    """Prints a table in which no word is cut: in a terminal that is too narrow, cells are broken between words, then
    there are no lines between columns, and if that is not enough, its rows are longer."""
    from rich import box
    from rich.cells import cell_len
    from rich.console import Console
    from rich.measure import Measurement

    console = Console()

    def width() -> int:
        return Measurement.get(console, console.options.update(max_width=10_000), table).maximum

    if width() > console.width:
        natural = [max(map(cell_len, map(str, (column.header, *column.cells)))) for column in table.columns]
        for column in table.columns:
            words = [word for cell in (column.header, *column.cells) for word in str(cell).split()]
            column.width = max(map(cell_len, words), default=0)
        _widen(table.columns, natural, console.width - width())
    if width() > console.width:
        table.box, table.show_edge, table.padding = box.SIMPLE_HEAD, False, (0, 0)
    console.width = max(console.width, width())
    console.print(table)


def _widen(columns: "list[Column]", natural: list[int], spare: int) -> None:
    """Gives columns that are narrower than what they hold the width that is left, the same to each."""
    while spare > 0 and (
        narrow := [one for one, full in zip(columns, natural, strict=True) if (one.width or 0) < full]
    ):
        for column in narrow[:spare]:
            column.width = (column.width or 0) + 1
        spare -= len(narrow)
