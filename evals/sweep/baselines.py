"""What a sweep can compare: the registry's methods, transformers' own caches, and layers that share storage.

    dynamic                 DynamicCache: every token, unchanged; with sliding layers if the model has them
    quanto:bits=4, 2        QuantizedCache on optimum-quanto
    hqq:bits=4, 1, 2, 3, 8  QuantizedCache on hqq
    fp8                     QuantizedCache in 8-bit floating point, which transformers 5.17 does not have

A QuantizedCache reads its first forward unquantised and packs again whenever there are `residual` newer tokens; by
default 64, with groups of 64. StaticCache is left out: it holds what DynamicCache does, in slots of which some are
empty. All report their memory as ours do.

    swiftkv                 SwiftKVCache, for a converted model; bits=4 packs what the groups share
    across:share=2          AcrossKVCache, on any model: a diagnostic
"""

import contextlib
import copy
import functools
import hashlib
import importlib.util
import inspect
import sys
from collections import ChainMap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, QuantizedCache

from kvcompress import AcrossKVCache, GEARCache, Policy, SwiftKVCache, registry
from kvcompress.memory import MemoryReport, full_cache_bytes, storage_bytes
from kvcompress.policies.method import is_own
from kvcompress.registry import Listed, Method
from kvcompress.swiftkv.cache import SharedStorageCache

_PACKAGES = {"quanto": "optimum.quanto", "hqq": "hqq"}
_PROJECTS = {"quanto": "optimum-quanto", "hqq": "hqq"}
# the axes along which each groups within a token, as the other methods do
_AXES = {"quanto": 0, "hqq": 1}


class _Measured(Cache):
    """What the evals need of a cache, in addition to what transformers needs."""

    # [batch, kv_heads, tokens, head_dim] and dtype of the last keys, and head_dim of the values
    _came: tuple[torch.Size, torch.dtype, int] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self._came = key_states.shape, key_states.dtype, value_states.shape[-1]
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def memory(self) -> MemoryReport:
        """Bytes of the live storages behind everything that the layers hold; a padded column counts as a token kept."""
        members: dict[str, list[Tensor]] = {}
        layers: list[Any] = list(self.layers)
        for layer in layers:
            for name, value in vars(layer).items():
                members.setdefault(name.lstrip("_"), []).extend(_tensors(value))
        by_component, by_device = storage_bytes(members)
        full = elements = 0
        kept = []
        if self._came is not None:
            (batch, heads, _, head_dim), dtype, of_values = self._came
            for layer in layers:
                window = getattr(layer, "sliding_window", None)
                seen = int(layer.get_seq_length())
                size = full_cache_bytes(seen, window, (batch, heads, head_dim), of_values, dtype)
                full, elements = full + size, elements + size // dtype.itemsize
                held = seen if window is None else min(seen, window)
                kept.append(torch.full((batch, heads), held))
        return MemoryReport(by_component, by_device, full, elements, int(self.get_seq_length()), kept)

    def clone(self) -> Self:
        """An independent copy; packed tensors are shared, as they are replaced and never written to."""
        packed = (part for layer in self.layers for part in _tensors(vars(layer), whole=True) if _is_packed(part))
        return copy.deepcopy(self, {id(part): part for part in packed})


class MeasuredDynamicCache(_Measured, DynamicCache):
    """transformers' DynamicCache."""


class MeasuredQuantizedCache(_Measured, QuantizedCache):
    """transformers' QuantizedCache, which can also select sequences of a batch, and repeat them."""

    def batch_select_indices(self, indices: Tensor) -> None:
        for layer in self.layers:
            # the layers' own method would not change packed keys and values; a reordering does
            owner = next(kind for kind in type(layer).__mro__ if "reorder_cache" in vars(kind))
            if "Quantized" not in owner.__name__:
                raise NotImplementedError(
                    "the QuantizedCache of this transformers cannot select sequences of a batch: read one at a time"
                )
            layer.reorder_cache(indices)  # type: ignore[arg-type]
        if self._came is not None:
            shape, dtype, of_values = self._came
            self._came = torch.Size((len(indices), *shape[1:])), dtype, of_values

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._came is not None:
            self.batch_select_indices(torch.arange(self._came[0][0]).repeat_interleave(repeats))


def _is_packed(item: Any) -> bool:
    """True for a tensor that wraps others."""
    return isinstance(item, Tensor) and hasattr(item, "__tensor_flatten__")


def _tensors(item: Any, whole: bool = False) -> Iterator[Tensor]:
    """Every tensor inside; a packed one is taken apart, or yielded whole."""
    if isinstance(item, dict):
        item = list(item.values())
    if isinstance(item, list | tuple):
        for part in item:
            yield from _tensors(part, whole)
    elif _is_packed(item) and not whole:
        for name in item.__tensor_flatten__()[0]:
            yield from _tensors(getattr(item, name))
    elif isinstance(item, Tensor):
        yield item


def installed(name: str) -> bool:
    """Whether the packages that a baseline needs, besides transformers, are installed."""
    package = _PACKAGES.get(name)
    try:
        return package is None or importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def _dynamic(model: PreTrainedModel, budget: int | float, settings: dict[str, Any]) -> Any:
    return MeasuredDynamicCache(config=model.config, **settings)


def _quantized(backend: str) -> Any:
    def quantized(
        model: PreTrainedModel, *, bits: int = 4, group_size: int = 64, residual: int = 64
    ) -> MeasuredQuantizedCache:
        if not installed(backend):
            raise ValueError(
                f"the method {backend} needs the package {_PROJECTS[backend]}, which is not installed: pip install "
                f"{_PROJECTS[backend]}"
            )
        axis = _AXES[backend]
        return MeasuredQuantizedCache(
            backend, model.config, nbits=bits, axis_key=axis, axis_value=axis, q_group_size=group_size,
            residual_length=residual,
        )  # fmt: skip

    return lambda model, budget, settings: quantized(model, **settings)


def _sharing(kind: type[SharedStorageCache]) -> Any:
    def sharing(model: PreTrainedModel, budget: int | float, settings: dict[str, Any]) -> Any:
        settings = dict(settings)
        if "bits" in settings:
            settings["storage"] = functools.partial(GEARCache, bits=settings.pop("bits"))
        return kind(model, **settings)

    return sharing


def _fp8(model: PreTrainedModel, budget: int | float, settings: dict[str, Any]) -> Any:
    return MeasuredQuantizedCache("fp8", model.config, **settings)


BASELINES: dict[str, Listed] = {
    method.name: method
    for method in (
        Method("dynamic", "transformers' DynamicCache", _dynamic, takes_budget=False),
        Method("quanto", "transformers' QuantizedCache, optimum-quanto", _quantized("quanto"), takes_budget=False),
        Method("hqq", "transformers' QuantizedCache, hqq", _quantized("hqq"), takes_budget=False),
        Method("fp8", "transformers' QuantizedCache, 8-bit floats", _fp8, takes_budget=False),
    )
}
SHARING: dict[str, Listed] = {
    method.name: method
    for method in (
        Method(
            "swiftkv",
            "a converted model's groups of layers, each stored once",
            _sharing(SwiftKVCache),
            takes_budget=False,
        ),
        Method("across", "groups of layers on one storage, on any model", _sharing(AcrossKVCache), takes_budget=False),
    )
}
METHODS: Mapping[str, Listed] = ChainMap(SHARING, BASELINES, registry.METHODS)

parse = functools.partial(registry.parse, methods=METHODS)
canonical = functools.partial(registry.canonical, methods=METHODS)


def source(spec: str) -> dict[str, str]:
    """What decides a point besides the name of its method: for a class of one's own, a hash of its module's text; of
    files that its settings name, a hash of what is in them.

    Empty for kvcompress's own methods without files, and where the text is not known.
    """
    return _module(spec) | _files(spec)


def _files(spec: str) -> dict[str, str]:
    # a setting is a path where there is such a file
    paths = [Path(value) for part in spec.split(":") if (value := part.partition("=")[2]) and Path(value).is_file()]
    digest = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in paths))
    return {"files": digest.hexdigest()[:16]} if paths else {}


def _module(spec: str) -> dict[str, str]:
    with contextlib.suppress(ValueError, OSError, TypeError):
        kind = parse(spec)[0].kind
        theirs = [each for each in (kind or object).__mro__ if not is_own(each) and issubclass(each, Policy | Cache)]
        modules = dict.fromkeys(sys.modules[each.__module__] for each in theirs if each.__module__ != Cache.__module__)
        texts = [inspect.getsource(module) for module in modules]
        return {"source": hashlib.sha256("".join(texts).encode()).hexdigest()[:16]} if texts else {}
    return {}


def build(spec: str, model: PreTrainedModel, budget: int | float | None = None) -> Any:
    """A new cache, ours or transformers'; as `registry.build`."""
    return registry.build(spec, model, budget, methods=METHODS)
