"""The base of every kvcompress cache: what does not depend on how a layer stores its tokens."""

import copy
import dataclasses
import html
import json
import os
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, Self, SupportsIndex

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import hf
from kvcompress.layer import CompressedLayer, NoTokensLayer, SharingLayer, as_stored, ordinary_tensors
from kvcompress.memory import MemoryReport, full_cache_bytes, storage_bytes
from kvcompress.policies.method import is_own
from kvcompress.policies.settings import names_settings
from kvcompress.storage.classes import class_name, is_named
from kvcompress.storage.durable import write_whole
from kvcompress.storage.frames import TRANSFORM
from kvcompress.storage.padding import PaddingRecord
from kvcompress.storage.tensor_file import TensorFile, write_tensors
from kvcompress.storage.transform_coding import Coding

if TYPE_CHECKING:
    from kvcompress.caches.basis import Basis
    from kvcompress.caches.transform_codec import Codec, Encoder

# in files, what the names of states begin with
_STATES = "states."
# attributes that a forward sets
_OF_FORWARDS = ("fillers", "for_prompts", "_states_change")
_INTERRUPTED = "an earlier forward through this cache was interrupted, and its layers disagree: call cache.reset()"
_FORMAT = "kvcompress-cache-2"
# with tensors that are encoded
_ENCODED_FORMAT = "kvcompress-cache-3"
# without fingerprint and checksums
_FIRST_FORMAT = "kvcompress-cache-1"


class CompressedCache(hf.AttendingCache):
    """A transformers Cache whose layers compute attention themselves.

    Building one selects kvcompress's attention function in the model, which passes on every call that does not
    come through a kvcompress cache; `kvcompress.release(model)` undoes it.
    """

    # subclasses build their layers in `_layer`
    layers: list[CompressedLayer]  # type: ignore[assignment]
    # the decoder whose forward came last
    _filled_by: weakref.ref[Any] | None = None
    # a forward has begun that changes states, and has not ended
    _states_change = False
    # why it was chosen, if not by a user
    chosen: str | None = None
    # whether its layers can attend in chunks
    serves_chunks = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = names_settings(cls.__init__)  # type: ignore[method-assign]

    @names_settings
    def __init__(self, model: PreTrainedModel) -> None:
        """
        Args:
            model: the model the cache will be used with.

        Raises:
            ValueError: the model has something that kvcompress does not support; the message names it.
        """
        config = hf.text_config(model)
        kinds = hf.layer_kinds(config)
        # layers that keep keys and values, in the order of a forward, and the states of those that keep states
        self.attending = [index for index in hf.run_order(config) if kinds[index].attends]
        self.states = {index: hf.States(kind.states) for index, kind in enumerate(kinds) if kind.states}
        self._check_model(model)
        if hf.latent_rank(config) is not None:
            self._check_latents(type(model).__name__)
        has_biases = hf.has_biases(config)
        if has_biases:
            self._check_biases(type(model).__name__)
        self.scores_blocks = hf.block_of(config) is not None
        if self.scores_blocks:
            self._check_blocks(type(model).__name__)
        self._takes_one_mask = hf.takes_one_mask(model)
        self._repeats_keys = hf.repeats_keys(config)
        if not self.serves_chunks and any(kind.is_chunked for kind in kinds):
            raise ValueError(
                f"{type(model).__name__} has layers of chunked attention, which {type(self).__name__} does not serve; "
                "DenseCache does, and caches that evict, pack or select"
            )
        hf.select_attention(model)
        hf.watch_forwards(model)
        self._model = weakref.ref(model)
        self.padding = self._record()
        layers: list[CompressedLayer] = []
        for index, kind in enumerate(kinds):
            if kind.attends:
                layers.append(self._layer(index, kind.window))
            elif kind.kv_source is None:
                layers.append(NoTokensLayer(self.padding))
            else:
                layers.append(SharingLayer(layers[kind.kv_source]))
        super().__init__(layers=[*layers])
        self._all_in_order = self.attending == [*range(len(layers))]
        every, ranks = hf.layer_heads(config), hf.latent_ranks(config)
        for index in self.attending:
            layer = self.layers[index]
            layer.is_chunked = kinds[index].is_chunked
            layer.latent_rank, layer.value_width = ranks[index], every[index].value_dim
            layer.has_biases = has_biases
            layer.full_index_dim, layer.is_indexed = every[index].index_dim, kinds[index].is_indexed
            if layer.is_indexed:
                # a layer that evicts asks another's indexer about the tokens it holds itself
                layer.index_dim = hf.index_width(config) if layer.evicts else layer.full_index_dim
        self.take_states(self.states)
        self.last_layer.is_last = True
        for layer in self.layers:
            if isinstance(layer, NoTokensLayer) and not isinstance(layer, SharingLayer):
                layer.attending = self.first_layer
        self.padding.needs_even_positions = any(getattr(layer, "rope", None) is not None for layer in self.layers)
        self.padding.notes_shift = any(getattr(layer, "codec", None) is not None for layer in self.layers)

    def __repr__(self) -> str:
        """The settings it was built with, its model, and what it holds."""
        settings = ", ".join(f"{name}={value!r}" for name, value in self._shown().items())
        model = self._model()
        owner = "a model that is gone" if model is None else type(model).__name__
        rows = "empty" if self.batch_size < 0 else f"batch {self.batch_size}, {self.memory()}"
        why = "" if self.chosen is None else f"\nchosen: {self.chosen}"
        return f"{type(self).__name__}({settings})\nfor {owner}, {len(self.layers)} layers: {rows}{why}"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}</pre>"

    def _shown(self) -> dict[str, Any]:
        """The settings that `repr` shows."""
        return {name: value for name, value in self._settings().items() if not isinstance(value, dict)}

    def _record(self) -> PaddingRecord:
        return PaddingRecord()

    def _layer(self, index: int, window: int | None) -> CompressedLayer:
        """A layer that keeps keys and values, by its place in the model."""
        raise NotImplementedError

    def take_states(self, states: dict[int, hf.States]) -> None:
        """Takes these for the states of its layers, by layer."""
        self.states = states
        for index, layer in enumerate(self.layers):
            layer.states = states.get(index)

    def _check_model(self, model: PreTrainedModel) -> None:
        """Raises ValueError if this cache cannot be used with a model that others can: a hybrid, a multimodal one."""

    def _check_latents(self, name: str) -> None:
        """Raises ValueError if this cache cannot hold latents, which are both keys and values."""
        raise ValueError(
            f"{name} has multi-head latent attention, whose latents are both keys and values; {type(self).__name__} "
            "does not hold them, DenseCache and GEARCache do, and caches that evict"
        )

    def _check_biases(self, name: str) -> None:
        """Raises ValueError if this cache cannot serve logits with biases by distance."""
        raise ValueError(
            f"{name} adds biases to its logits that depend on queries and distances; {type(self).__name__} does not "
            "serve them, DenseCache and GEARCache do, and caches that evict"
        )

    def _check_blocks(self, name: str) -> None:
        """Raises ValueError if this cache cannot hold index keys beside keys and values of many heads."""
        raise ValueError(
            f"{name} chooses what tokens attend to by an indexer, which scores blocks of them; {type(self).__name__} "
            "does not hold its keys, DenseCache and GEARCache do, and caches that evict"
        )

    def awaits_attention(self) -> bool:
        return any(layer.pending_kv is not None for layer in self.layers)

    def untagged(self, layer_idx: int) -> CompressedLayer | None:
        layer = self.layers[layer_idx] if 0 <= layer_idx < len(self.layers) else None
        if isinstance(layer, SharingLayer):
            return layer.kv_source
        return layer if self._repeats_keys and layer is not None and layer.pending_kv is not None else None

    @property
    def first_layer(self) -> CompressedLayer:
        """The first layer that keeps keys and values."""
        return self.layers[self.attending[0]]

    @property
    def last_layer(self) -> CompressedLayer:
        """The last layer that keeps keys and values."""
        return self.layers[self.attending[-1]]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by the model's attention: gives a layer the keys and values of its new tokens."""
        if not torch.compiler.is_compiling():
            self._check_attention(layer_idx)
            if layer_idx == self.attending[0] and self._layers_disagree:
                raise RuntimeError(_INTERRUPTED)
        # before the first layer comes the last one of the previous forward; compiled steps check nothing else
        before = self.layers[layer_idx - 1 if self._all_in_order else self._before(layer_idx)]
        if before.pending_kv is not None and before is not self.layers[layer_idx]:
            raise RuntimeError(self._without_attention(self._before(layer_idx)))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _before(self, layer_idx: int) -> int:
        """The layer that attends before this one, in the previous forward for the first."""
        order = self.attending
        return order[order.index(layer_idx) - 1] if layer_idx in order else order[-1]

    # transformers' interface to states

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        held = self._states_of(layer_idx)
        return held.conv_states[state_idx] if held.has_previous_state[state_idx] else None

    @ordinary_tensors()
    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any) -> Tensor:
        return self._states_of(layer_idx).update_conv_state(conv_states.detach(), state_idx, **kwargs)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        held = self._states_of(layer_idx)
        return held.recurrent_states[state_idx] if held.has_previous_state[state_idx] else None

    @ordinary_tensors()
    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        return self._states_of(layer_idx).update_recurrent_state(recurrent_states.detach(), state_idx, **kwargs)

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        # without a convolution before it, nothing but the state tells that there is one
        return self._states_of(layer_idx).recurrent_states[0]

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        self.update_recurrent_state(linear_cache, layer_idx)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        if layer_idx is None:
            layer_idx = max(self.states, default=None)
            if layer_idx is None:
                return False
        held = self._states_of(layer_idx).has_previous_state
        return all(held.values()) if state_idx is None else held[state_idx]

    def is_recording_past(self, layer_idx: int) -> bool:
        return layer_idx in self.states and bool(self._states_of(layer_idx).record_past)

    def activate_past_recording(self) -> None:
        super().activate_past_recording()
        for states in self.states.values():
            states.held.record_past = True

    @property
    def is_linear(self) -> list[bool]:
        return [isinstance(layer, NoTokensLayer) for layer in self.layers]

    def _states_of(self, layer_idx: int) -> Any:
        if layer_idx not in self.states:
            raise ValueError(
                f"layer {layer_idx} asks its cache for states, but by the model's config it has none; kvcompress does "
                "not support this model"
            )
        return self.states[layer_idx].held

    @property
    def is_interrupted(self) -> bool:
        """Whether a forward through it ended between its layers."""
        return self._layers_disagree or self._states_change

    @property
    def _layers_disagree(self) -> bool:
        is_open = any(layer.is_awaited for layer in self.layers)
        return is_open or self.first_layer.forwards_begun != self.last_layer.forwards_ended

    def check_whole(self) -> None:
        """Raises RuntimeError if a forward was interrupted between layers."""
        if self.is_interrupted:
            raise RuntimeError(_INTERRUPTED)

    @ordinary_tensors()
    def forward_begins(self, decoder: Any, input_ids: Tensor | None) -> None:
        """Called by hooks before a forward: notes ended rows; ValueError if another model filled the cache."""
        self.check_model(decoder)
        self._filled_by = weakref.ref(decoder)
        model = self._model()
        if model is not None and any(layer.evicts for layer in self.layers):
            self.padding.note_fed(input_ids, *(self.fillers or hf.filler_tokens(model)))

    def check_given(self, fed: Tensor | None, attention_mask: Any, position_ids: Any) -> None:
        """Called by hooks before a forward, with what it is given.

        States change in the first layer, and others before the first that attends, which refuses what does not follow
        on: of a hybrid it is refused here, before anything has changed.

        Raises:
            ValueError: the mask or the positions do not follow on what was seen, or the batch is another one.
            RuntimeError: an earlier forward was interrupted.
        """
        if self._states_change:
            raise RuntimeError(_INTERRUPTED)
        # weak: a forward that is refused leaves them behind
        self.padding.told_positions = weakref.ref(position_ids) if isinstance(position_ids, Tensor) else None
        if not self.states or fed is None:
            return
        batch, tokens = fed.shape[:2]
        if self.batch_size not in (-1, batch):
            raise ValueError(f"the cache holds {self.batch_size} sequences, got {batch}; use one cache per batch")
        mask = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 else None
        if tokens > 1 and mask is None and isinstance(position_ids, Tensor) and bool((position_ids.diff() < 1).any()):
            # of a padded batch, whose mask comes to the layers in another way
            position_ids = None
        record = copy.copy(self.padding)
        record.read(None if mask is None else mask != 0, batch, int(self.get_seq_length()), tokens, position_ids)
        self._states_change = True

    def check_model(self, decoder: Any) -> None:
        """Raises ValueError if another model than this one has filled the cache."""
        model = self._model()
        filled_by = None if self._filled_by is None else self._filled_by()
        if filled_by is None and model is not None:
            filled_by = hf.decoder_of(model)
        if filled_by is not None and decoder is not filled_by and int(self.get_seq_length()):
            raise ValueError(
                f"this {type(self).__name__} was filled by another model than the {type(decoder).__name__} that now "
                "uses it: use one cache per model; save() and load(path, model) move a cache to another model with "
                "the same weights"
            )

    def forward_ended(self, decoder: Any, input_ids: Tensor | None) -> None:
        """Called by hooks after a forward; RuntimeError if a layer did not attend through the attention function."""
        for index, layer in enumerate(self.layers):
            if layer.pending_kv is not None:
                raise RuntimeError(self._without_attention(index))
        self._states_change = False

    @property
    def is_compileable(self) -> bool:
        # compiled steps know no choice of an indexer, and no biases
        by_layer = any(layer.is_indexed or layer.has_biases for layer in self.layers)
        return not self._takes_one_mask and not by_layer and super().is_compileable

    def is_traceable(self, tokens: int) -> bool:
        """Whether torch.compile can trace a forward of so many tokens into one graph."""
        return not self._repeats_keys and all(
            layer.is_traceable(tokens) and not layer.is_indexed for layer in self.layers
        )

    @as_stored()
    def reserve(self, steps: int | None = None) -> None:
        """Makes ready for steps that you compile: takes room, folds, packs; `generate` on a GPU does so by itself.

        Call it anew before they are used up, and after crop, a change of rows, or a forward that was not compiled.

        Args:
            steps: tokens per sequence that are to come. None: as many as the cache can make ready for at no great cost.

        Raises:
            ValueError: steps is less than 1.
        """
        if steps is not None and steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        for layer in self.layers:
            layer.reserve(steps)

    @as_stored()
    def forward_comes(self) -> None:
        for layer in self.layers:
            layer.forward_comes()

    def _check_attention(self, layer_idx: int) -> None:
        """Raises RuntimeError if this forward would not reach the layers through the attention function."""
        model = self._model()
        chosen = None if model is None else hf.attention_name(model)
        if chosen is not None and not chosen.startswith(hf.IMPLEMENTATION):
            raise RuntimeError(self._without_attention(layer_idx))

    def _without_attention(self, layer_idx: int) -> str:
        model = self._model()
        chosen = None if model is None else hf.attention_name(model)
        begins = (
            f"layer {layer_idx} of {type(model).__name__} gave its keys to {type(self).__name__}, but did not attend "
            "through it: "
        )
        if chosen is not None and chosen.startswith(hf.IMPLEMENTATION):
            return f"{begins}was it a layer of another model than the cache was built for? Build one cache per model"
        return (
            f"{begins}the model's attention implementation is {chosen!r}, not the {hf.IMPLEMENTATION!r} that this "
            "cache selected when it was built; build a new cache for the model that uses it, or call "
            f"model.set_attn_implementation({hf.IMPLEMENTATION!r})"
        )

    def prompt_begins(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """Called by generate; ValueError if the prompts hold no new token, or a row is padded on the right."""
        if attention_mask is not None and attention_mask.dim() == 2:
            behind = (attention_mask[:, -1] == 0) & (attention_mask != 0).any(1)
            if bool(behind.any()):
                raise ValueError(
                    f"generate continues from the last column, and row {int(behind.nonzero()[0])} of the prompts has "
                    "padding there; pad on the left (tokenizer.padding_side = 'left')"
                )
        seen = int(self.get_seq_length())
        if seen and input_ids.shape[1] <= seen:
            raise ValueError(
                f"the cache has seen {seen} tokens, but the prompts have {input_ids.shape[1]}: generate feeds only "
                "what comes after those seen. For another prompt, or the same one again, clone() the cache before each "
                "call, or reset() it"
            )

    def cover(self, mask: Tensor) -> Tensor:
        """The attention mask of all tokens, from the mask of the new ones.

        Args:
            mask: of the new tokens, [batch, new].

        Returns:
            [batch, tokens seen + new].
        """
        seen = int(self.get_seq_length())
        past = self.padding.visible
        past = mask.new_ones(1, seen) if past is None else past.to(mask)
        # compiled steps leave no record; all tokens that they fed are real
        past = torch.nn.functional.pad(past, (0, seen - past.shape[1]), value=1)
        return torch.cat([past.repeat_interleave(len(mask) // len(past), 0), mask], 1)

    def queries_watched(self, first: int) -> int | None:
        """Called by SwiftKV models: how many of the last queries the layers from `first` on need; None for all."""
        watched = [layer.queries_watched for layer in self.layers[first:]]
        return None if None in watched else max((count for count in watched if count is not None), default=0)

    @property
    def batch_size(self) -> int:
        """Number of sequences held, -1 before the first forward."""
        shape = self.first_layer.kv_shape
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
            for name, tensors in layer.constants().items():
                members.setdefault(name, []).extend(tensors)
            if layer.kv_shape is not None:
                seen, width = int(layer.get_seq_length()), layer.value_width
                size = full_cache_bytes(seen, layer.window, layer.kv_shape, width, layer.dtype)
                size += seen * layer.kv_shape[0] * layer.full_index_dim * layer.dtype.itemsize
                full, elements = full + size, elements + size // layer.dtype.itemsize
        for states in self.states.values():
            held = list(states.tensors().values())
            members.setdefault("states", []).extend(held)
            full += sum(tensor.nbytes for tensor in held)
            elements += sum(tensor.numel() for tensor in held)
        if self.padding.held():
            members["padding"] = self.padding.held()
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
        for states in self.states.values():
            states.reset()
        self.padding.restore({})
        self.fillers = None
        self._states_change = False

    @as_stored()
    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Removes the last tokens again, exactly, in every layer or in none.

        Args:
            tokens_to_remove: minus the number of tokens, as transformers passes it: 5.17 as a tensor of one element.

        Raises:
            ValueError: the cache cannot take them back; it is unchanged.
        """
        tokens_to_remove = int(tokens_to_remove)
        for layer in self.layers:
            layer.check_crop(-tokens_to_remove)
        if tokens_to_remove:
            for index, states in self.states.items():
                if not states.can_crop():
                    raise ValueError(
                        f"crop cannot take tokens back: layer {index} keeps states, which have them mixed in. clone() "
                        "the cache before what may be taken back"
                    )
        super().crop(tokens_to_remove)
        for states in self.states.values():
            if states.can_crop():
                states.held.crop(tokens_to_remove)
        self.padding.crop(-tokens_to_remove, int(self.get_seq_length()))

    @as_stored()
    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self._map_rows(lambda rows: rows[beam_idx.to(rows.device)])

    @as_stored()
    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_rows(lambda rows: rows[indices.to(rows.device)])

    @as_stored()
    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, 0))

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replaces what is held of rows beside the layers, each a tensor [batch, ...], by `change(tensor)`."""
        for states in self.states.values():
            states.map_tensors(change)
        self.padding.map_rows(change)

    def clone(self) -> Self:
        """An independent copy: continuing one leaves the other as it is."""
        return copy.deepcopy(self)

    @as_stored()
    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def __copy__(self) -> Self:
        copied = type(self).__new__(type(self))
        vars(copied).update(vars(self))
        return copied

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} cannot be pickled (by pickle, torch.save or multiprocessing): it belongs to a "
            f"model; call cache.save(path), and {type(self).__name__}.load(path, model) where it is needed"
        )

    def save(self, path: str | os.PathLike[str], *, codec: "Codec | None" = None) -> None:
        """Writes the cache to one safetensors file, with its settings and a fingerprint of its model.

        The file replaces an existing one only when it is complete. Layers are written one after another, so no second
        copy of the whole is made.

        Args:
            codec: "zstd": smaller without loss, float32 by a sixth, bfloat16 by a third, packed codes by little. A
                `TransformCodec`: keys and values in a few bits a number, for DenseCache, HydragenCache and layers that
                share their storage. Both need the extra `codec`. None: as it is in memory.

        Raises:
            ValueError: the model has been deleted, or the cache would not come back as it is: a class of your own has
                settings that a file cannot hold, or that `_settings` leaves out; or a codec is not for this cache.
            OSError: the file cannot be written; an existing one is still there.
            RuntimeError: a forward was interrupted.
            ImportError: the codec needs zstandard.
        """
        model = self._model()
        if model is None:
            raise ValueError("the cache's model has been deleted; save a cache while its model exists")
        self.check_whole()
        self._check_settings(model)
        path, fingerprint = Path(path), hf.Fingerprint.of(model)
        encoder = self._encoder(model, codec)

        def write(file: BinaryIO) -> str:
            self._to_file(file, fingerprint, encoder=encoder)
            return path.name

        write_whole(path.parent, path.name, write)

    def _encoder(self, model: PreTrainedModel, codec: "Codec | None") -> "Encoder | None":
        # it knows bases, which stand above
        from kvcompress.caches.transform_codec import encoder_of

        return encoder_of(self, model, codec)

    @as_stored()
    def _to_file(
        self,
        file: BinaryIO,
        fingerprint: hf.Fingerprint,
        beside: dict[str, Tensor] | None = None,
        encoder: "Encoder | None" = None,
    ) -> str:
        """Writes a file as `save` does, with the tensors in `beside` too, and returns its digest."""

        def parts() -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
            for index, layer in enumerate(self.layers):
                state, facts = layer.dump()
                if index in self.states:
                    held = self.states[index].tensors()
                    state = state | {f"{_STATES}{name}": tensor.contiguous() for name, tensor in held.items()}
                yield {f"layers.{index}.{name}": tensor for name, tensor in state.items()}, facts
            yield self.padding.tensors() | (beside or {}), {}

        facts = {
            "cache": class_name(type(self)),
            "settings": self._settings(),
            "layers": len(self.layers),
            "fingerprint": dataclasses.asdict(fingerprint),
        }
        if encoder is None:
            return write_tensors(file, _FORMAT, facts, parts)
        return write_tensors(file, _ENCODED_FORMAT, facts | encoder.facts, parts, encoder.encode)

    @classmethod
    @as_stored()
    def load(
        cls,
        path: str | os.PathLike[str],
        model: PreTrainedModel,
        *,
        host: str | None = None,
        basis: "Basis | str | os.PathLike[str] | None" = None,
    ) -> Self:
        """Reads a cache that `save` wrote, for the model that filled it, onto the devices of the model's layers.

        Args:
            host: for a cache that keeps values off the device, where to put them, as ShadowKVCache takes it; None for
                where they were.
            basis: for a cache that packs in a calibrated basis, or was coded by a `TransformCodec`, as files only name
                their basis: that, or the path of its file. None: one that this model was given before, or saved with.

        Raises:
            ValueError: the file is not a cache of this class, is damaged, was made with another model, or needs another
                basis; or `host` is invalid, or given for a cache that keeps nothing off the device.
            ImportError: the file was saved with a codec, and zstandard is not installed.
        """
        if basis is not None:
            from kvcompress.caches.basis import Basis

            # what the file names
            Basis.given(basis, model)
        with TensorFile(path) as file:
            if file.metadata.get("format") == _FIRST_FORMAT:
                warn_of_unchecked(path)
            return cls._from_file(file, model, hf.Fingerprint.of(model), host)

    @classmethod
    def _from_file(
        cls,
        file: TensorFile,
        model: PreTrainedModel,
        fingerprint: hf.Fingerprint,
        host: str | None = None,
    ) -> Self:
        """The cache in a file, for a model with this fingerprint."""
        path, given = file.path, file.metadata.get("format")
        if given not in (_FORMAT, _ENCODED_FORMAT, _FIRST_FORMAT):
            raise ValueError(f"{path} is not a saved kvcompress cache (format {_FORMAT!r}), got format {given!r}")
        if given != _FIRST_FORMAT and file.digest is None:
            raise file.damaged("it has no digest")
        facts = json.loads(file.metadata["facts"])
        if not is_named(cls, facts["cache"]):
            raise ValueError(f"{path} holds a {facts['cache']}; load it with {facts['cache']}.load")
        if given != _FIRST_FORMAT:
            hf.Fingerprint(**facts["fingerprint"]).check(fingerprint, str(path))
            of_layers: list[dict[str, Any]] = facts["parts"][: facts["layers"]]
        else:
            of_layers = facts["layers"]
        settings = facts["settings"]
        if host is not None:
            settings = _hosted(settings, host)
            if settings == _hosted(settings, None):
                raise ValueError(f"{path} holds a {cls.__name__} that keeps nothing on the host; got host={host!r}")
        decoder = None
        if any(file.codec(name) == TRANSFORM for name in file.names):
            from kvcompress.caches.transform_codec import Decoder

            decoder = Decoder.of(model, facts["basis"], str(path))
        cache = cls._rebuild(model, settings)
        if len(cache.layers) != len(of_layers):
            raise ValueError(f"{path} holds {len(of_layers)} layers, {type(model).__name__} has {len(cache.layers)}")
        for index, (layer, own) in enumerate(zip(cache.layers, of_layers, strict=True)):
            prefix, device = f"layers.{index}.", hf.layer_device(model, index)
            mine = [name for name in file.names if name.startswith(prefix)]
            codings: dict[str, Coding] = {}
            decode = None if decoder is None else decoder.of_layer(index, device, codings)
            tensors = {}
            for name in mine:
                own_name = name[len(prefix) :]
                tensors[own_name] = file.tensor(name, None if decode is None else decode(own_name)).to(device)
            states = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_STATES)}
            if index in cache.states:
                cache.states[index].restore({name.removeprefix(_STATES): states[name] for name in states})
            layer.restore(tensors, own)
            layer.note_codings(codings)
        rows = [name for name in file.names if name in PaddingRecord.names]
        cache.padding.restore({name: file.tensor(name).to(hf.input_device(model)) for name in rows})
        return cache

    def _settings(self) -> dict[str, Any]:
        """What `_rebuild` needs to build this cache again; JSON can hold it."""
        return {}

    def _parts_of_others(self) -> dict[str, Any]:
        """What may be of a class that is not kvcompress's, by name: objects whose settings `_settings` has to tell."""
        return {type(self).__name__: self}

    def _check_settings(self, model: PreTrainedModel) -> None:
        """Raises ValueError unless `_rebuild` makes the same of what a file holds of the settings."""
        parts = {name: part for name, part in self._parts_of_others().items() if not is_own(type(part))}
        if not parts:
            return
        try:
            again = self._rebuild(model, json.loads(json.dumps(self._settings())))
        except (TypeError, ValueError) as error:
            names = ", ".join(parts)
            raise ValueError(f"a file cannot hold the settings of {names}, to build it again: {error}") from error
        for name, part in parts.items():
            kept = _told(again._parts_of_others()[name])
            lost = [f"{each}={value!r}" for each, value in _told(part).items() if kept.get(each) != value]
            if lost:
                raise ValueError(
                    f"{name} would be loaded without {', '.join(lost)}: a cache's `_settings` must return them, and a "
                    "policy must be a dataclass whose fields are numbers, words, or tuples of them"
                )

    @classmethod
    def _rebuild(cls, model: PreTrainedModel, settings: dict[str, Any]) -> Self:
        return cls(model, **settings)


def _told(part: Any) -> dict[str, Any]:
    """What an object was told, by name: its fields, and those of its attributes that are plain values."""
    fields = [each.name for each in dataclasses.fields(part)] if dataclasses.is_dataclass(part) else []
    found = {name: getattr(part, name) for name in fields} | {
        name: value
        for name, value in getattr(part, "__dict__", {}).items()
        if name not in _OF_FORWARDS and _is_plain(value)
    }
    # not all can be compared, and NaN differs from itself
    return {name: value if _is_plain(value) and value == value else repr(value) for name, value in found.items()}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list | set | frozenset):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, bool | int | float | str | bytes)


def _hosted(settings: Any, host: str | None) -> Any:
    """The settings of a cache and of its prefixes, with another host wherever they name one."""
    if not isinstance(settings, dict):
        return settings
    return {name: host if name == "host" else _hosted(value, host) for name, value in settings.items()}


def warn_of_unchecked(path: str | os.PathLike[str]) -> None:
    """Warns of a file or folder in the first format, which does not say which model it is for."""
    warnings.warn(
        f"{path} was saved by an earlier kvcompress, without a fingerprint of its model or checksums: whether it is "
        "intact and belongs to the given model is not checked. Save it again",
        stacklevel=3,
    )
