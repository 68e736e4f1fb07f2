"""The base of every kvcompress cache: what does not depend on how a layer stores its tokens."""

import copy
import json
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import hf
from kvcompress.layer import CompressedLayer
from kvcompress.memory import MemoryReport, full_cache_bytes, storage_bytes
from kvcompress.padding import PaddingRecord

_FORMAT = "kvcompress-cache-1"


class CompressedCache(hf.AttendingCache):
    """A transformers Cache whose layers attend by themselves.

    Building one selects kvcompress's attention function in the model, which passes on every call that does not
    come through a kvcompress cache. Subclasses build their layers in `_layer`.
    """

    layers: list[CompressedLayer]  # type: ignore[assignment]

    def __init__(self, model: PreTrainedModel) -> None:
        """
        Args:
            model: the model the cache will be used with.

        Raises:
            ValueError: the model has something kvcompress does not handle; it is named.
        """
        config = hf.text_config(model)
        windows = hf.attention_windows(config)
        hf.select_attention(model)
        hf.watch_forwards(model)
        self._model = weakref.ref(model)
        self.padding = self._record()
        super().__init__(layers=[self._layer(index, window, len(windows)) for index, window in enumerate(windows)])
        self.layers[-1].ends = True

    def _record(self) -> PaddingRecord:
        return PaddingRecord()

    def _layer(self, index: int, window: int | None, layers: int) -> CompressedLayer:
        raise NotImplementedError

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if not torch.compiler.is_compiling():
            self._check_attention(layer_idx)
            if layer_idx == 0 and self.layers[0].forwards_begun != self.layers[-1].forwards_ended:
                raise RuntimeError(
                    "an earlier forward through this cache was interrupted, and its layers disagree: call cache.reset()"
                )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _check_attention(self, layer_idx: int) -> None:
        """Raises RuntimeError where this forward would not come back to the layers through the attention function."""
        model = self._model()
        chosen = None if model is None else hf.attention_name(model)
        if (chosen is not None and not chosen.startswith(hf.IMPLEMENTATION)) or (
            layer_idx and self.layers[layer_idx - 1].in_hand is not None
        ):
            raise RuntimeError(
                f"the model's attention implementation is {chosen!r}, not the one this cache selected when it was "
                "built; build the cache anew, with the model that uses it, or call "
                f"model.set_attn_implementation({hf.IMPLEMENTATION!r})"
            )

    def queries_watched(self, first: int) -> int | None:
        """How many of a forward's last queries the layers from `first` on must be given; None for all."""
        watched = [layer.queries_watched for layer in self.layers[first:]]
        return None if None in watched else max((count for count in watched if count is not None), default=0)

    @property
    def batch_size(self) -> int:
        """Sequences held, -1 before the first forward."""
        shape = self.layers[0].kv_shape
        return -1 if shape is None else shape[0]

    def memory(self) -> MemoryReport:
        """Bytes of the live storages by component and device, tokens kept, and what the full cache would take."""
        members: dict[str, list[Tensor]] = {}
        tiers: dict[str, list[Tensor]] = {}
        full = elements = fetched = 0
        for layer in self.layers:
            for segment in layer.segments():
                for name, tensor in segment.tensors().items():
                    members.setdefault(segment.component(name), []).append(tensor)
                for name, (tier, tensors) in segment.offloaded().items():
                    members.setdefault(name, []).extend(tensors)
                    tiers.setdefault(tier, []).extend(tensors)
            fetched += layer.fetched_bytes()
            members.setdefault("counters", []).extend(layer.counters().values())
            members.setdefault("statistics", []).extend(layer.statistics().values())
            if layer.kv_shape is not None:
                size = full_cache_bytes(int(layer.get_seq_length()), layer.window, layer.kv_shape, layer.dtype)
                full, elements = full + size, elements + size // layer.dtype.itemsize
        if self.padding.visible is not None:
            members["padding"] = [self.padding.visible]
        by_component, by_device = storage_bytes(members)
        kept = [layer.tokens_kept() for layer in self.layers if layer.segments()]
        return MemoryReport(
            by_component,
            by_device,
            full,
            elements,
            int(self.get_seq_length()),
            kept,
            storage_bytes(tiers)[0],
            max(layer.fetching_forwards for layer in self.layers),
            fetched,
        )

    def reset(self) -> None:
        """Forgets everything seen, and frees the memory."""
        super().reset()
        self.padding.visible = None

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Takes back the last tokens, exactly, in every layer or in none.

        Args:
            tokens_to_remove: minus the number of tokens, as transformers passes it: 5.17 as a tensor of one element.

        Raises:
            ValueError: the cache cannot take them back; nothing has changed.
        """
        tokens_to_remove = int(tokens_to_remove)
        for layer in self.layers:
            layer.check_crop(-tokens_to_remove)
        super().crop(tokens_to_remove)
        self.padding.crop(-tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._map_padding(lambda visible: visible[beam_idx.to(visible.device)])

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_padding(lambda visible: visible[indices.to(visible.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_padding(lambda visible: visible.repeat_interleave(repeats, 0))

    def _map_padding(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.padding.visible is not None:
            self.padding.visible = change(self.padding.visible)

    def clone(self) -> Self:
        """An independent copy: continuing one leaves the other as it is."""
        return copy.deepcopy(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the cache to one safetensors file, with the settings it was built with."""
        tensors: dict[str, Tensor] = {}
        layers: list[dict[str, Any]] = []
        for index, layer in enumerate(self.layers):
            state, facts = layer.dump()
            tensors |= {f"layers.{index}.{name}": tensor.contiguous() for name, tensor in state.items()}
            layers.append(facts)
        if self.padding.visible is not None:
            tensors["padding"] = self.padding.visible
        facts = {"cache": type(self).__name__, "settings": self._settings(), "layers": layers}
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        save_file(tensors, partial, metadata={"format": _FORMAT, "facts": json.dumps(facts)})
        partial.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: PreTrainedModel) -> Self:
        """A cache as `save` wrote it, for the model it was filled by, on the devices of the model's layers.

        Raises:
            ValueError: the file is not a cache of this class, or its layers are not the model's.
        """
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"{path} is not a saved kvcompress cache (format {_FORMAT!r}), got {metadata}")
            facts = json.loads(metadata["facts"])
            if facts["cache"] != cls.__name__:
                raise ValueError(f"{path} holds a {facts['cache']}; load it with {facts['cache']}.load")
            cache = cls._rebuild(model, facts["settings"])
            if len(cache.layers) != len(facts["layers"]):
                raise ValueError(
                    f"{path} holds {len(facts['layers'])} layers, {type(model).__name__} has {len(cache.layers)}"
                )
            names: Sequence[str] = list(file.keys())
            for index, layer in enumerate(cache.layers):
                prefix, device = f"layers.{index}.", hf.layer_device(model, index)
                mine = [name for name in names if name.startswith(prefix)]
                state = {name[len(prefix) :]: file.get_tensor(name).to(device) for name in mine}
                layer.restore(state, facts["layers"][index])
            visible = file.get_tensor("padding").to(hf.input_device(model)) if "padding" in names else None
            cache.padding.visible = visible
        return cache

    def _settings(self) -> dict[str, Any]:
        """What `_rebuild` needs to build this cache again, as JSON can carry it."""
        return {}

    @classmethod
    def _rebuild(cls, model: PreTrainedModel, settings: dict[str, Any]) -> Self:
        return cls(model, **settings)
