"""AcrossKV: consecutive layers that share one storage of keys and values (arXiv:2410.03960).

    layers held = first + (layers - first) / share         share of the full cache's bytes = layers held / layers

The first layer of a group stores what it is fed, in the form of its storage; the others attend, with their own queries,
to what it attends to in the same forward. Tokens are evicted or packed only after the whole group has attended. A
policy that scores by attention sees the mean over the group's layers.
"""

import warnings
from collections.abc import Callable
from typing import Any, Self

from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import hf
from kvcompress.cache import CompressedCache
from kvcompress.caches.dense import DenseCache
from kvcompress.caches.evicting import EvictingCache
from kvcompress.caches.quantized import GEARCache
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.layer import CompressedLayer
from kvcompress.storage.classes import class_name, class_named
from kvcompress.storage.segment import Segment
from kvcompress.storage.transform_coding import Places
from kvcompress.swiftkv.conversion import first_later
from kvcompress.swiftkv.model import SwiftKVModel

# caches whose layers let other layers attend to what they hold
_STORAGES = (DenseCache, EvictingCache, GEARCache)
Storage = Callable[[PreTrainedModel], CompressedCache]


class FollowingLayer(CompressedLayer):
    """A layer that stores nothing and attends to another's tokens."""

    queries_watched = 0

    def __init__(self, kv_source: CompressedLayer) -> None:
        super().__init__(kv_source.padding, kv_source.window)
        self.kv_source = kv_source
        kv_source.kv_consumers += 1
        self.is_croppable = kv_source.is_croppable

    def segments(self) -> list[Segment]:
        return []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores nothing, as the group's first layer does; returns the key with its tag."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.pending_kv = (key_states, value_states)
        return hf.tag_key(key_states, self), value_states

    def attend(
        self,
        query: Tensor,
        visible: Tensor | None,
        spec: LogitSpec,
        *,
        sinks: Tensor | None,
        position_ids: Tensor | None,
        spans: Tensor | None = None,
        choice: hf.Choice | None = None,
        biases: Tensor | None = None,
    ) -> Tensor:
        """As CompressedLayer.attend, over what the group's first layer attended to."""
        self.forwards_begun += 1
        out = self.kv_source.attend_again(query, spec, sinks)
        self.pending_kv = None
        self.forwards_ended = self.forwards_begun
        return out

    def get_seq_length(self) -> int:
        return self.kv_source.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.kv_source.get_mask_sizes(query_length)

    def tokens_kept(self) -> Tensor:
        return self.kv_source.tokens_kept()

    def _crop(self, tokens: int) -> None:
        """Does nothing, as the group's first layer crops."""

    def plain_tokens(self) -> dict[str, Places]:
        return {}

    def dump(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {}

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        if self.kv_source.kv_shape is not None:
            self.kv_shape, self.is_initialized = self.kv_source.kv_shape, True
            self.dtype, self.device = self.kv_source.dtype, self.kv_source.device


class SharedStorageCache(CompressedCache):
    """A cache whose later layers share the storage of another cache's layers, group by group."""

    serves_chunks = True

    def __init__(
        self, model: PreTrainedModel, *, first: int, share: int, storage: Storage, shares_budget: bool = True
    ) -> None:
        """
        Args:
            model: the model the cache will be used with.
            first: the first layer of the first group.
            share: layers per group, a divisor of the number of layers from `first` on.
            storage: makes the cache whose layers the groups share: DenseCache, an evicting cache or a packing one.
            shares_budget: layers that store nothing get no part of the budget; False for files that are older.

        Raises:
            ValueError: the layers cannot be grouped like this, or the storage cannot be shared.
        """
        self._check_text(model)
        windows = hf.attention_windows(hf.text_config(model))
        self._check_model(model)
        if share < 1 or (len(windows) - first) % share:
            raise ValueError(
                f"share must divide the {len(windows) - first} later layers (of {len(windows)}, from layer {first}), "
                f"got {share}"
            )
        for start in range(first, len(windows), share):
            if len(set(windows[start : start + share])) > 1:
                raise ValueError(
                    f"layers {start} to {start + share - 1} have windows {windows[start : start + share]} and cannot "
                    "share storage; choose skip_from and share so that a group has one kind of attention"
                )
        self.first, self.share, self.shares_budget = first, share, shares_budget
        stored = storage(model)
        if not isinstance(stored, _STORAGES) or getattr(stored, "rerotated", False):
            rerotated = " with rerotated=True" if getattr(stored, "rerotated", False) else ""
            raise ValueError(
                f"layers can share the storage of {', '.join(kind.__name__ for kind in _STORAGES)}; "
                f"got {type(stored).__name__}{rerotated}"
            )
        if isinstance(stored, EvictingCache) and stored.policy.rereads is not None:
            raise ValueError(
                f"{type(stored.policy).__name__} reads tokens twice, which layers that share storage cannot; "
                "use another policy"
            )
        if isinstance(stored, EvictingCache) and shares_budget:
            stored.share_among(model, [*range(first), *range(first, len(windows), share)])
        self._stored = stored
        super().__init__(model)
        self._kind, self._of_storage = class_name(type(stored)), stored._settings()
        del self._stored

    def _check_text(self, model: PreTrainedModel) -> None:
        if hasattr(model, "config") and hf.is_multimodal(model):
            raise ValueError(f"{type(model).__name__} is multimodal; {type(self).__name__} serves text models")

    def _check_model(self, model: PreTrainedModel) -> None:
        if not hf.all_attend(model.config):
            raise ValueError(
                f"{type(model).__name__} has layers that keep states, or no keys and values of their own, and cannot "
                "share storage; use another cache"
            )

    def _record(self) -> Any:
        return self._stored.padding

    def _layer(self, index: int, window: int | None) -> CompressedLayer:
        within = (index - self.first) % self.share if index >= self.first else 0
        stored = self._stored.layers
        return FollowingLayer(stored[index - within]) if within else stored[index]

    def _settings(self) -> dict[str, Any]:
        return {
            "first": self.first,
            "share": self.share,
            "shares_budget": self.shares_budget,
            "storage": {"cache": self._kind, "settings": self._of_storage},
        }

    def _shown(self) -> dict[str, Any]:
        # of interest to files alone
        return {name: value for name, value in super()._shown().items() if name != "shares_budget"}

    @classmethod
    def _rebuild(cls, model: PreTrainedModel, settings: dict[str, Any]) -> Self:
        of_storage = settings["storage"]
        kind = class_named(CompressedCache, of_storage["cache"])
        cache = cls.__new__(cls)
        SharedStorageCache.__init__(
            cache,
            model,
            first=settings["first"],
            share=settings["share"],
            storage=lambda model: kind._rebuild(model, of_storage["settings"]),
            shares_budget=settings.get("shares_budget", False),
        )
        return cache


class SwiftKVCache(SharedStorageCache):
    """The cache of a SwiftKV model; each group of later layers stores tokens once: `SwiftKVCache(model)`."""

    def __init__(self, model: PreTrainedModel, *, storage: Storage = DenseCache) -> None:
        """
        Args:
            model: a SwiftKV model, from `convert` or loaded.
            storage: makes the cache whose layers the groups share: `lambda model: GEARCache(model, bits=4)`.

        Raises:
            ValueError: the model was not converted, or the storage cannot be shared.
        """
        if not isinstance(model, SwiftKVModel):
            raise ValueError(
                f"SwiftKVCache supports converted models, got {type(model).__name__}: "
                "convert it with kvcompress.convert(model), or see what sharing costs with AcrossKVCache"
            )
        config = model.config
        super().__init__(model, first=config.num_key_value_layers, share=config.key_value_group_size, storage=storage)


class AcrossKVCache(SharedStorageCache):
    """Layers that share storage on any model: `AcrossKVCache(model, share=2)`.

    On a model converted with the same groups this is SwiftKVCache. On any other it is a diagnostic, with a warning: the
    layers of a group attend to keys and values made for the first, which no model was trained for.
    """

    def __init__(
        self, model: PreTrainedModel, *, share: int = 2, skip_from: int | float = 0.5, storage: Storage = DenseCache
    ) -> None:
        """
        Args:
            model: the model the cache will be used with.
            share: layers per group.
            skip_from: first layer of the first group: its index, or a fraction of the layers; ignored for a converted
                model, which has its own.
            storage: as in SwiftKVCache.

        Raises:
            ValueError: the layers cannot be grouped like this, a converted model has other groups, or the storage
                cannot be shared.
        """
        config = hf.text_config(model)
        if isinstance(model, SwiftKVModel):
            if share != config.key_value_group_size:
                raise ValueError(
                    f"the model was converted with share={config.key_value_group_size}, got share={share}: "
                    "convert it anew"
                )
            first = config.num_key_value_layers
        else:
            first = first_later(skip_from, hf.sizes(config).layers)
            warnings.warn(
                f"AcrossKVCache on {type(model).__name__}, which was not trained to share keys and values between "
                "layers, is a diagnostic: expect poor text; kvcompress.convert and kvcompress distill make one that is",
                stacklevel=2,
            )
        super().__init__(model, first=first, share=share, storage=storage)
