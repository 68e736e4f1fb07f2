"""Models that are checked in seconds: tiny ones of random weights."""

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from kvcompress import hf, loading
from kvcompress.check.typical import COMPLETED, TYPICAL
from kvcompress.hf import small
from kvcompress.loading import ModelUnavailableError


def small_model(name: str | None = None, device: torch.device | str = "cpu") -> PreTrainedModel:
    """A tiny model with random weights and the architecture of another: its kinds of layers and windows, head_dim,
    query heads per KV head, rotary embeddings, biases, softcaps.

    Args:
        name: a hub id, a local folder, a .gguf file or a model type such as qwen3; None for the default model, or a
            Llama if that is not installed.

    Raises:
        ModelUnavailableError: there is no such config, or no small model can be made of it.
        ValueError: it is of a kind that kvcompress does not support, such as an encoder-decoder, or
            torch has no such device here.
    """
    config = read_config(name)
    hf.check_served(config, config.model_type)
    loading.check_device(device)
    try:
        is_small = _is_type(name) and name in TYPICAL
        model: Any = small.random_model(config) if is_small else small.small_model(config)
        return model.to(device)
    except Exception as error:
        raise ModelUnavailableError(
            f"no small model could be made of {name or config.model_type} ({type(error).__name__}: "
            f"{loading.first_line(error)}); check the real one: --weights"
        ) from error


def read_config(name: str | None) -> PreTrainedConfig:
    """The config of a model, as `small_model` takes it, without its weights."""
    if name is None and not loading.has_default_model():
        name = "llama"
    if name is None or not _is_type(name):
        return loading.read_config(name)
    return hf.as_decoder(AutoConfig.for_model(name, **TYPICAL.get(name, COMPLETED.get(name, {}))))


def _is_type(name: str | None) -> bool:
    """Whether a name is that of a type of model, and no folder is called so."""
    return name is not None and name in CONFIG_MAPPING and not Path(name).is_dir()
