"""GEAR and KIVI: every token is kept, in two to eight bits per element (arXiv:2403.05527, arXiv:2402.02750).

The newest tokens wait, each by itself in 8 bits (storage/packed_tail.py) or as they came. As soon as there are `buffer`
of them they are packed, once and for all (policies/gear.py says how, storage/quantized_blocks.py where). Attention
reads the codes: nothing is expanded in memory. A forward attends to its own tokens exactly; they are packed when it
ends.

Drafts of assisted and prompt-lookup decoding of any length can be taken back (caches/quantized_layer.py). A layer with
a sliding window can take back 32 tokens of a prompt's own forward, or as many as generate drafts after it.
"""

import dataclasses
import os
from typing import Any, Self

from transformers import PreTrainedModel

from kvcompress import hf
from kvcompress.cache import CompressedCache
from kvcompress.caches.basis import Basis
from kvcompress.caches.index_beside import IndexBeside
from kvcompress.caches.quantized_latents import LatentQuantizedLayer
from kvcompress.caches.quantized_layer import IndexedQuantizedLayer, QuantizedLayer
from kvcompress.layer import CompressedLayer, as_stored
from kvcompress.policies.gear import GEAR, OLDER_FILES, Backbone, preset


class GEARCache(CompressedCache):
    """Every token, in a few bits per element: `GEARCache(model, bits=3)`.

    The defaults are what lost least at equal measured bits (README); the papers' settings have names:
    `GEARCache.preset(model, "gear")`.
    """

    serves_chunks = True

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        bits: int = GEAR.bits,
        group_size: int = GEAR.group_size,
        rank: int = GEAR.rank,
        rank_decode: int = GEAR.rank_decode,
        outliers: float = GEAR.outliers,
        buffer: int = GEAR.buffer,
        backbone: Backbone = GEAR.backbone,
        value_bits: int | None = GEAR.value_bits,
        sinks: int = GEAR.sinks,
        hadamard: bool = GEAR.hadamard,
        centred: bool | None = GEAR.centred,
        unbiased: bool | None = GEAR.unbiased,
        basis: Basis | str | os.PathLike[str] | None = None,
        tail_bits: int | None = GEAR.tail_bits,
    ) -> None:
        """
        Args:
            model: the model the cache will be used with.
            bits: bits per code: 2, 3, 4 or 8.
            value_bits: bits per code of values; None for what loses least with `bits`: one less for 3 and 4.
            sinks: how many first tokens are never packed, also of a prompt that is shorter.
            group_size: elements that share a scale and a zero point: tokens of a channel for keys, channels of a token
                for values; a power of two, at most `buffer`.
            rank: rank of the correction for what a prompt packs; 0 for none.
            rank_decode: the same for what decoding packs, a block at a time.
            outliers: share of the elements kept in 16 bits, 0 to 1; of each vector (a channel of a block, or a token of
                a head), rounded up to equally many at either end, so that 0.02 of 64 are 2, or 3.1 %.
            buffer: tokens packed at a time, a power of two; fewer newest tokens than that wait for it.
            tail_bits: bits per code of tokens that wait, each packed by itself: 8, or None to leave them as they came.
            backbone: "kivi", or "whole", whose groups are whole blocks of a channel and whole heads of a token.
            hadamard: rotate values by a Hadamard matrix with random signs before they are packed (arXiv:2404.00456).
            centred: rotate keys too, around the mean of their block, and let codes stand for levels around 0, without
                zero points; None: with 2 bits and no outliers.
            unbiased: choose scales so that products with keys vary as they did and averages of values are right, and
                not so that each number is near; None: up to 4 bits, without outliers and rank.
            basis: pack keys in directions that were calibrated for this model, of all heads together, before RoPE: a
                `Basis`, or the path of its file (`kvcompress calibrate`). `bits` is then what a number of a key gets on
                average: 2, 3 or 4. Loses least, and each step decodes all keys anew (kernels/calibrated.py).

        Raises:
            ValueError: a setting out of range, or a model that kvcompress does not support; with
                a basis, one of another model, or settings that it does not go with.
            TypeError: basis is neither a Basis nor a path.
        """
        self.settings = GEAR(
            bits=bits,
            group_size=group_size,
            rank=rank,
            rank_decode=rank_decode,
            outliers=outliers,
            buffer=buffer,
            backbone=backbone,
            value_bits=value_bits,
            sinks=sinks,
            hadamard=hadamard,
            centred=centred,
            unbiased=unbiased,
            tail_bits=tail_bits,
        )
        # the digest of the basis; the model keeps it
        self.basis = None
        if basis is not None:
            self.settings = self.settings.calibrated()
            self.basis = Basis.given(basis, model).digest
        for head_dim, value_dim in hf.packed_widths(hf.text_config(model)):
            self.settings.codings(head_dim, max(rank, rank_decode), value_dim)
        super().__init__(model)

    @classmethod
    def preset(
        cls,
        model: PreTrainedModel,
        name: str,
        *,
        basis: Basis | str | os.PathLike[str] | None = None,
        **changes: Any,
    ) -> "GEARCache":
        """A cache with the settings of a preset (policies/gear.py), and changes to them.

        Raises:
            ValueError: there is no preset of this name.
        """
        return GEARCache(model, **dataclasses.asdict(preset(name, **changes)), basis=basis)

    def check_model(self, decoder: Any) -> None:
        super().check_model(decoder)
        model = self._model()
        if self.basis is not None and model is not None and decoder is not hf.decoder_of(model):
            raise ValueError(
                f"this {type(self).__name__} packs in a basis of the {type(model).__name__} that it was built for, and "
                f"another model uses it, a {type(decoder).__name__}: build one for that model, with its own basis"
            )

    @as_stored()
    def fill(self, full: hf.Cache) -> Self:
        """Packs what a full cache holds, as if this one had been fed it at once: `GEARCache(model).fill(cache)`.

        Args:
            full: a DynamicCache of the same model that has seen no padding; it is not changed.

        Raises:
            ValueError: this cache is not empty, or the other one does not hold every token of every layer.
        """
        if self.get_seq_length():
            raise ValueError(f"fill needs an empty cache, this one has seen {self.get_seq_length()} tokens")
        if len(self.attending) < len(self.layers) or self.states:
            raise ValueError(
                "fill takes keys and values alone, of all layers, and some layers of this model keep states, or no "
                "keys and values of their own"
            )
        if len(full.layers) != len(self.layers):
            raise ValueError(f"the model has {len(self.layers)} layers, but the cache to fill from {len(full.layers)}")
        tokens = int(full.get_seq_length())
        held: list[tuple[Any, Any]] = [
            (getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in full.layers
        ]
        for index, (keys, _) in enumerate(held):
            if keys is None or keys.dim() != 4 or keys.shape[2] != tokens or not tokens:
                found = None if keys is None else list(keys.shape)
                raise ValueError(
                    f"fill takes every token of every layer: layer {index} should hold keys [batch, kv_heads, "
                    f"tokens={tokens}, head_dim], got {found}"
                )
        indexed = [hf.index_keys(layer) for layer in full.layers]
        for index, (own, keys) in enumerate(zip(self.layers, indexed, strict=True)):
            if own.index_dim and (keys is None or keys.shape[1] != tokens):
                found = None if keys is None else list(keys.shape)
                raise ValueError(
                    f"fill takes every token of every layer: layer {index} should hold index keys [batch, "
                    f"tokens={tokens}, width={own.index_dim}], got {found}"
                )
        for layer, pair, index_keys in zip(self.layers, held, indexed, strict=True):
            assert isinstance(layer, QuantizedLayer)
            layer.fill(*pair)
            if isinstance(layer, IndexBeside) and layer.index_dim and index_keys is not None:
                layer.hold_index(index_keys[:, None].to(layer.dtype), None)
        self.first_layer.indexer_position_ids = hf.index_positions(full.layers[self.attending[0]])
        return self

    def _check_latents(self, name: str) -> None:
        if self.basis is not None:
            raise ValueError(
                f"{name} has multi-head latent attention, and a basis is one of keys in many heads: leave basis out"
            )

    def _check_biases(self, name: str) -> None:
        if self.basis is not None:
            raise ValueError(
                f"{name} adds biases to its logits that depend on queries and distances, which a basis was not "
                "calibrated for: leave basis out"
            )

    def _check_blocks(self, name: str) -> None:
        if self.basis is not None:
            raise ValueError(
                f"{name} chooses what tokens attend to by an indexer, which a basis was not calibrated for: leave "
                "basis out"
            )

    def _layer(self, index: int, window: int | None) -> CompressedLayer:
        codec = None
        model = self._model()
        assert model is not None
        if self.basis is not None:
            codec = Basis.known(self.basis, model).codec(model, index, self.settings.bits)
        config = hf.text_config(model)
        kind = IndexedQuantizedLayer if self.scores_blocks else QuantizedLayer
        kind = kind if hf.latent_rank(config) is None else LatentQuantizedLayer
        layer = kind(self.padding, self.settings, window, index == self.attending[0], codec)
        if isinstance(layer, LatentQuantizedLayer):
            layer.width = hf.latent_part(config, index)
        return layer

    def _settings(self) -> dict[str, Any]:
        # a file names the basis, and does not hold it
        named = {} if self.basis is None else {"basis": self.basis}
        return dataclasses.asdict(self.settings) | named

    @classmethod
    def _rebuild(cls, model: PreTrainedModel, settings: dict[str, Any]) -> Self:
        cache = cls.__new__(cls)
        settings = OLDER_FILES | settings
        if settings.get("basis") is not None:
            settings["basis"] = Basis.known(settings["basis"], model)
        GEARCache.__init__(cache, model, **settings)
        return cache


class KIVICache(GEARCache):
    """Codes and scales alone (arXiv:2402.02750): `KIVICache(model, bits=2)`.

    Values are packed in blocks, like keys; the paper's own code moves its window of full values by one token per step.
    """

    def __init__(self, model: PreTrainedModel, *, bits: int = 2, group_size: int = 32, buffer: int = 128) -> None:
        """
        Args:
            model: the model the cache will be used with.
            bits, group_size, buffer: as in GEARCache.
        """
        super().__init__(
            model,
            bits=bits,
            value_bits=bits,
            group_size=group_size,
            buffer=buffer,
            rank=0,
            rank_decode=0,
            sinks=0,
            hadamard=False,
            centred=False,
            unbiased=False,
            tail_bits=None,
        )
