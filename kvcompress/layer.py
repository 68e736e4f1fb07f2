"""The cache layer contract of transformers, written once: subclasses say how to store and how to attend."""

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvcompress import hf
from kvcompress.kernels.attention import causal_attention
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.sparse_attention import sparse_attention
from kvcompress.storage.chunks import attend_in_chunks, ends_of
from kvcompress.storage.clock import TokenClock
from kvcompress.storage.distances import attend_by_distance
from kvcompress.storage.padding import PaddingRecord, pads_first, reordered
from kvcompress.storage.segment import EMPTY, Segment
from kvcompress.storage.transform_coding import Coding, Places


@contextlib.contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Within it, new tensors can be written to by any later forward, even if the caller runs in inference_mode."""
    # a graph of torch.compile writes to tensors that exist, and cannot ask for the mode
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextlib.contextmanager
def as_stored() -> Iterator[None]:
    """For code that changes what a cache holds: ordinary tensors, in their own dtypes even under autocast."""
    if torch.compiler.is_compiling():
        yield
        return
    accelerator = torch.accelerator.current_accelerator()
    with contextlib.ExitStack() as stack:
        stack.enter_context(ordinary_tensors())
        for kind in {"cpu", "cpu" if accelerator is None else accelerator.type}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@torch.compiler.disable
def _untraced(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Calls a function outside of torch.compile's graph."""
    return function(*args, **kwargs)


@dataclass(frozen=True)
class AttentionInput:
    """The tokens of one forward in one layer.

    query: [batch, heads, queries, head_dim], of the last tokens; in most models of all of them.
    key, value: [batch, kv_heads, tokens, head_dim].
    visible: [batch, tokens] bool, False for padding; None if nothing is padded.
    spec: how logits are computed, with the layer's window. sinks: [heads] or, beside biases, [batch, heads, queries],
    extra logits that belong to no token.
    spans: [batch, tokens] integers, where tokens of an equal one but 0 see one another both ways; None if none do.
    index: [batch, 1, tokens, width], by which an indexer scores the tokens; None if there is none.
    chosen: [batch, queries, choices] int32, positions of the tokens, held and fed, that each query sees, -1 for none;
        where KV heads hold different tokens [batch, kv_heads, queries, choices]. None: all that precede it. places:
        positions of the tokens fed, [batch, tokens] int32, -1 for padding; given with `chosen`.
    biases: [batch, heads, queries, extent], of logits, by distance (storage/distances.py); None if there are none.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    visible: Tensor | None
    spec: LogitSpec
    sinks: Tensor | None
    spans: Tensor | None = None
    index: Tensor | None = None
    chosen: Tensor | None = None
    places: Tensor | None = None
    biases: Tensor | None = None

    @property
    def stored_key(self) -> Tensor:
        """The keys as latents and slots are held: with those of an indexer behind them, in each KV head."""
        if self.index is None:
            return self.key
        return torch.cat([self.key, self.index.expand(-1, self.key.shape[1], -1, -1)], -1)

    @property
    def tokens(self) -> int:
        return self.key.shape[2]

    @property
    def queries(self) -> int:
        return self.query.shape[2]

    @property
    def real_tokens(self) -> int | Tensor:
        """How many tokens each sequence has, padding not counted, [batch]; a number if nothing is padded."""
        if self.visible is None:
            return self.tokens
        return self.visible[:, 0] if self.tokens == 1 else self.visible.sum(-1)


class ForwardStep:
    """A forward through one layer: its queries attend, and those of layers that share the tokens; then it commits.

    input: the tokens, as the layer stores them.
    """

    def __init__(self, x: AttentionInput) -> None:
        self.input = x

    def attend(self, x: AttentionInput) -> Tensor:
        """Attention to everything held and to the step's tokens, [batch, heads, queries, head_dim].

        Args:
            x: the step's tokens, with these or other queries; it may be called several times before `commit`.
        """
        raise NotImplementedError

    def commit(self) -> None:
        """Ends the forward: stores or encodes the tokens to keep, and drops the others."""
        raise NotImplementedError


class CompressedLayer(hf.PlacesTold, hf.CacheLayerMixin):
    """One layer's storage. `update` takes in the new tokens, `attend` stores them and computes attention.

    Subclasses define `_begin`, or the whole of `_attend`, and `segments`, and the sizes that depend on how they store.
    """

    supports_early_init = False
    # how many of a forward's last queries it needs, if a model does not run them all; None for all
    queries_watched: int | None = None
    # whether its tokens may see later ones of their spans
    takes_spans = False
    # whether its logits have biases by distance
    has_biases = False
    # last layer of the cache
    is_last = False
    # width of the latents that it holds, which are keys and values in one; None for keys and values
    latent_rank: int | None = None
    # numbers that it is given of a token's values, in one KV head
    value_width = 0
    # width of the keys that it holds for an indexer to score, and of those that a full cache holds; 0 for none
    index_dim = full_index_dim = 0
    # whether its queries see what an indexer chooses, its own or another layer's
    is_indexed = False
    # whether feeding it tokens makes it drop others
    evicts = False
    # whether its window is a chunk: a token sees none of an earlier one
    is_chunked = False
    # whether its window counts columns: padding is then moved before all other tokens of a forward
    pads_first = False
    # forwards that read what is offloaded
    fetching_forwards = 0
    # those of a layer that keeps states, which its cache sees to
    states: hf.States | None = None
    # transformers' name; generate unsets it if it records by itself
    record_past = False

    def __init__(self, padding: PaddingRecord, window: int | None = None, is_first: bool = False) -> None:
        """
        Args:
            padding: the cache's record of padding.
            window: sliding window in tokens, None for full attention.
            is_first: the first layer of the cache, which reads the mask for all.
        """
        super().__init__()
        self.padding = padding
        self.window = window
        self.is_first = is_first
        self.is_sliding = window is not None
        self.pending_kv: tuple[Tensor, Tensor] | None = None
        # layers that attend to what this one holds, and below, the step they wait to attend to and how many still wait
        self.kv_consumers = 0
        self._step: ForwardStep | None = None
        self._query_order: Tensor | None = None
        self._waiting = 0
        # if these differ between layers, a forward was interrupted; compiled forwards are not counted
        self.forwards_begun = self.forwards_ended = 0
        self.kv_shape: tuple[int, int, int] | None = None
        self.clock = TokenClock()
        self._module: weakref.ref[torch.nn.Module] | None = None

    def belongs_to(self, module: torch.nn.Module, is_watched: bool) -> None:
        """Raises ValueError where this attention module of a model is not the one that filled the layer.

        Args:
            is_watched: the forward is one that the cache was told of, and would have refused.
        """
        if self._step is not None or (self._module is not None and self._module() is module):
            # while the step waits, this is a layer that shares the tokens
            return
        if not is_watched and self._module is not None and int(self.get_seq_length()):
            self.pending_kv = None
            raise ValueError(
                f"a {type(module).__name__} attends to what the attention of another model stored here: use one cache "
                "per model; save() and load(path, model) carry what it has seen to another model with the same weights"
            )
        self._module = weakref.ref(module)

    @property
    def kv_heads(self) -> int:
        """KV heads of what the layer was given."""
        assert self.kv_shape is not None
        return self.kv_shape[1]

    @property
    def is_awaited(self) -> bool:
        """Whether a forward has not come yet to all layers that share its tokens."""
        return self._waiting > 0

    def segments(self) -> list[Segment]:
        """The segments that the layer holds."""
        raise NotImplementedError

    def reaches(self, positions: Tensor) -> Tensor:
        """Of queries at these positions, those from which the window of what precedes a forward is counted back."""
        if not self.is_chunked:
            return positions
        assert self.window is not None
        return ends_of(positions, self.window)

    def attend_causally(self, x: AttentionInput, places: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of a forward's tokens to one another, and the log-sum-exp; places: [batch or 1, tokens], their
        positions."""
        if x.chosen is not None:
            assert x.places is not None
            return sparse_attention(x.query, x.key, x.value, x.places, x.chosen, x.spec)
        if x.biases is not None:
            if x.visible is not None:
                places = places.masked_fill(~x.visible, EMPTY)
            columns = self.padding.columns(places)
            own = columns[:, -x.queries :]
            return attend_by_distance(x.query, x.key, x.value, columns[:, None], own, x.spec, x.biases)
        if not self.is_chunked:
            return causal_attention(x.query, x.key, x.value, x.spec, x.visible)
        assert self.window is not None
        return attend_in_chunks(x.query, x.key, x.value, x.spec, x.visible, places, self.window)

    def _begin(self, x: AttentionInput) -> ForwardStep:
        """The step of a forward, before any query has attended."""
        raise NotImplementedError

    def _end(self, step: ForwardStep) -> None:
        """After every query of a forward has attended."""
        step.commit()

    def _attend(self, x: AttentionInput) -> Tensor:
        """Stores the tokens, and returns their attention to held and new tokens, [batch, heads, queries, head_dim]."""
        x, order = self._with_pads_first(x)
        step = self._begin(x)
        out = _restore_query_order(step.attend(x), order)
        if self.kv_consumers:
            self._step, self._query_order, self._waiting = step, order, self.kv_consumers
        else:
            self._end(step)
        return out

    def _with_pads_first(self, x: AttentionInput) -> tuple[AttentionInput, Tensor | None]:
        """A forward's tokens with padding before all others, and its queries' new order; None if it did not change."""
        if not self.pads_first or self.window is None or x.tokens == 1 or x.visible is None or x.biases is not None:
            return x, None
        order = pads_first(x.visible)
        if order is None:
            return x, None
        own = pads_first(x.visible[:, -x.queries :])
        query, key, value = reordered(x.query, own), reordered(x.key, order), reordered(x.value, order)
        visible, spans = x.visible.gather(1, order), None if x.spans is None else x.spans.gather(1, order)
        return dataclasses.replace(x, query=query, key=key, value=value, visible=visible, spans=spans), own

    def attend_again(self, query: Tensor, spec: LogitSpec, sinks: Tensor | None) -> Tensor:
        """The attention of a layer that shares these tokens, in the same forward, as `attend` returns it."""
        if torch.compiler.is_compiling():
            return _untraced(self.attend_again, query, spec, sinks)
        step, order = self._step, self._query_order
        if step is None:
            raise RuntimeError(
                "a layer that shares another's tokens ran without it: the layers of a group must run in order, once "
                "per forward"
            )
        # a model spread over devices may split a group
        there, sinks = step.input.key.device, None if sinks is None else sinks.to(step.input.key.device)
        asked = reordered(query.to(there, step.input.key.dtype), order)
        asking = dataclasses.replace(step.input, query=asked, spec=spec, sinks=sinks)
        with as_stored():
            out = _restore_query_order(step.attend(asking), order).to(query.device, query.dtype)
            self._waiting -= 1
            if not self._waiting:
                self._step = self._query_order = None
                self._end(step)
        return out

    def _remap(self, remap: Tensor) -> None:
        """Moves the held tokens to other positions, [batch, past tokens] int32, with EMPTY for those to drop."""
        raise NotImplementedError

    def tokens_kept(self) -> Tensor:
        """Tokens held per sequence and KV head, [batch, kv_heads] int64."""
        first, *others = (segment.kept() for segment in self.segments())
        return sum(others, start=first)

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replaces each tensor that has the batch as its first dimension by `change(tensor)`."""
        for segment in self.segments():
            segment.map_tensors(change)

    def counters(self) -> dict[str, Tensor]:
        """Small tensors that belong to the layer but to no segment, by name."""
        return {}

    def statistics(self) -> dict[str, Tensor]:
        """What the layer's policy stores about whole sequences, by name."""
        return {}

    def constants(self) -> dict[str, list[Tensor]]:
        """What the layer computes with that no token changes, and other caches of the model may share, by component."""
        return {}

    def fetched_bytes(self) -> int:
        """Bytes that were off the device and moved to it, since the layer was built or loaded."""
        return 0

    def plain_tokens(self) -> dict[str, Places] | None:
        """Which of the tensors that `dump` returns are keys and values of tokens, by name, and of which tokens; None
        if the layer holds tokens in a form of its own."""
        return None

    def note_codings(self, codings: dict[str, Coding]) -> None:
        """Called after `restore` with how some of its tensors were coded in the file, by name."""

    def dump(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `restore` needs: tensors, and facts that JSON can hold. The base's: the clock."""
        return {}, {"seen": self.clock.seen}

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Restores a state that `dump` returned. The base's: the clock."""
        self.clock.begin_at(facts["seen"])

    # models of transformers before 5.24 take states from their layer

    @property
    def conv_states(self) -> dict[int, Tensor | None]:
        return self._held_states().conv_states

    @property
    def recurrent_states(self) -> dict[int, Tensor | None]:
        return self._held_states().recurrent_states

    def _held_states(self) -> Any:
        if self.states is None:
            raise AttributeError(f"this {type(self).__name__} keeps no states")
        return self.states.held

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.kv_shape = (key_states.shape[0], key_states.shape[1], key_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keeps the new tokens, [batch, kv_heads, tokens, head_dim], until `attend`; returns the key with its tag.

        Of latents it is given those, [batch, 1, tokens, rank], and what is shared of keys; it keeps both as keys, whose
        first numbers are the values.
        """
        given = key_states, value_states
        if self.latent_rank is not None:
            key_states = torch.cat(given, -1)
            value_states = key_states[..., : self.latent_rank]
        # what is held changes between the steps that a graph serves
        if not (self.is_initialized if torch.compiler.is_compiling() else self.segments()):
            dtype, device = key_states.dtype, key_states.device.type
            if torch.is_autocast_enabled(device) and dtype != torch.float64:
                # the dtype in which attention would take them
                dtype = torch.get_autocast_dtype(device)
            self.lazy_initialization(key_states.to(dtype), value_states.to(dtype))
        if self.kv_shape != (key_states.shape[0], key_states.shape[1], key_states.shape[-1]):
            raise ValueError(
                f"the cache holds [batch, kv_heads, head_dim] = {list(self.kv_shape or ())}, "
                f"got keys of shape {list(key_states.shape)}; use one cache per batch, or cache.reset()"
            )
        # a cache keeps the dtype that it was filled in
        key_states = key_states.detach().to(self.dtype)
        value_states = value_states.detach().to(self.dtype)
        if self.latent_rank is not None:
            value_states = key_states[..., : self.latent_rank]
        self.pending_kv = key_states, value_states
        return hf.tag_key(given[0], self), given[1]

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
        """The attention output for the tokens that `update` took in, [batch, heads, queries, head_dim].

        Called again by the layers that share these tokens, once by each, with their queries.

        Args:
            query: [batch, heads, queries, head_dim], of the last of those tokens.
            visible: [batch, tokens seen or tokens taken in] bool padding mask, or None.
            spec: how logits are made; its window is the layer's.
            spans: of the same tokens as `visible`, as in AttentionInput, or None.
            choice: what an indexer chooses, or has chosen in an earlier layer; None for a layer without one.
            sinks, biases: as in AttentionInput.
        """
        if self.pending_kv is None and self._step is not None:
            return self.attend_again(query, spec, sinks)
        if self.pending_kv is None:
            raise RuntimeError(
                "a layer attends twice to keys that it gave to its cache once, which kvcompress does not support; run "
                "the model without this cache"
            )
        if spans is not None and not self.takes_spans:
            self.pending_kv = None
            raise ValueError(
                "tokens of a span, such as an image, see one another both ways here, which this cache does not serve; "
                "use DenseCache, GEARCache, ShadowKVCache or one that evicts"
            )
        if self.is_indexed and (choice is None or spans is not None):
            self.pending_kv = None
            raise ValueError(
                "a layer's indexer chooses what its tokens attend to; here it gave no choice that kvcompress knows, or "
                "tokens of a span, such as an image, are to see one another both ways, which cannot be combined"
            )
        rest: dict[str, Any] = {
            "sinks": sinks,
            "position_ids": position_ids,
            "spans": spans,
            "choice": choice,
            "biases": biases,
        }
        if torch.compiler.is_compiling():
            if not self.is_traceable(self.pending_kv[0].shape[2]):
                return _untraced(self.attend, query, visible, spec, **rest)
            return self._attend_pending(query, visible, spec, **rest)
        with as_stored():
            out = self._attend_pending(query.to(self.dtype), visible, spec, **rest)
            return out.to(query.dtype)

    def is_traceable(self, tokens: int) -> bool:
        """Whether torch.compile can trace a forward of so many tokens into one graph."""
        return False

    def reserve(self, steps: int | None) -> None:
        """Makes ready for so many steps that are compiled, now and after the next forward; None: it chooses."""

    def forward_comes(self) -> None:
        """Called by generate before a forward, outside of what it compiles."""

    def _attend_pending(
        self,
        query: Tensor,
        visible: Tensor | None,
        spec: LogitSpec,
        sinks: Tensor | None,
        position_ids: Tensor | None,
        spans: Tensor | None,
        choice: hf.Choice | None,
        biases: Tensor | None,
    ) -> Tensor:
        assert self.pending_kv is not None
        key, value = self.pending_kv
        tokens = key.shape[2]
        if not torch.compiler.is_compiling():
            if self.is_first:
                told = self.padding.take_told(tokens)
                position_ids = told if position_ids is None else position_ids
                self.padding.read(visible, key.shape[0], int(self.get_seq_length()), tokens, position_ids)
            if self.padding.remap is not None:
                self._remap(self.padding.remap.to(key.device))
            self.forwards_begun += 1
        fresh = self.padding.fresh_of(visible, tokens)
        spans = None if spans is None else spans[:, -tokens:]
        x = AttentionInput(query, key, value, fresh, spec, sinks, spans, biases=biases)
        out = self._attend(x if choice is None else self._chosen(x, choice))
        self.pending_kv = None
        self.clock.advance(tokens)
        if not torch.compiler.is_compiling():
            self.forwards_ended = self.forwards_begun
            if self.is_last:
                self.padding.remap = self.padding.before = self.padding.ended = None
        return out

    def _chosen(self, x: AttentionInput, choice: hf.Choice) -> AttentionInput:
        """A forward's tokens with what an indexer chooses for them, of those held and of themselves."""
        past, held, lengths = self._scored(x)
        batch, heads = past.shape[:2]
        if x.visible is None:
            places = lengths[:, None] + torch.arange(x.tokens, dtype=torch.int32, device=x.key.device)
        else:
            places = lengths[:, None] + x.visible.cumsum(-1, dtype=torch.int32) - 1
            places = places.masked_fill(~x.visible, EMPTY)
        index, there = None, x.key.device
        if self.index_dim:
            every = torch.cat([held, places[:, None].expand(-1, heads, -1)], -1).flatten(0, 1)
            given = choice.choose(past.flatten(0, 1), every, self.padding.columns_fed)
            index = given.detach().to(there, self.dtype)[:, None]
            if index.shape[-1] != self.index_dim:
                raise ValueError(
                    f"an indexer gave keys of {index.shape[-1]} numbers, where the model's config says {self.index_dim}"
                )
        chosen = None if choice.positions is None else choice.positions.to(there)
        if chosen is not None and len(chosen) > batch:
            chosen = chosen.unflatten(0, (batch, heads))
        return dataclasses.replace(x, index=index, chosen=chosen, places=places)

    def _scored(self, x: AttentionInput) -> tuple[Tensor, Tensor, Tensor]:
        """What an indexer is to score beside a forward's tokens: the index keys held, [batch, 1, held, width], where KV
        heads hold different tokens of each; places of their tokens, [batch, 1 or kv_heads, held] int32, EMPTY for none;
        and how many real tokens rows have seen, [batch] int32."""
        batch, device = x.key.shape[0], x.key.device
        positions = torch.empty(batch, 1, 0, dtype=torch.int32, device=device)
        return x.key.new_empty(batch, 1, 0, self.index_dim), positions, positions.new_zeros(batch)

    def get_seq_length(self) -> int:
        """Tokens seen, kept or not."""
        return self.clock.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        if torch.compiler.is_compiling() and query_length == 1:
            # the mask of one token depends on no length, and a length would be compiled in
            return hf.ONE_TOKEN, 0
        kind = hf.TokensIndexed if self.is_indexed else hf.TokensSeen
        return kind(self.get_seq_length() + query_length), 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        """Forgets everything but the settings, and frees the memory."""
        self.pending_kv = self._step = self._query_order = None
        self._waiting = 0
        self.record_past = False
        self.forwards_begun = self.forwards_ended = 0
        self.is_initialized = False
        self.kv_shape = None
        self.clock = TokenClock()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, got {tokens_to_remove}")
        if tokens_to_remove and self.is_initialized:
            self._crop(-tokens_to_remove)
            self.clock.advance(tokens_to_remove)

    def activate_past_recording(self) -> None:
        """Makes a layer that takes tokens back keep all tokens of a forward removable until the next forward.

        generate calls it when it drafts: any forward, even the prompt's, may then end in drafts of any length.
        """
        self.record_past = True

    def check_crop(self, tokens: int) -> None:
        """Raises ValueError if the last tokens cannot be taken back exactly."""

    def _crop(self, tokens: int) -> None:
        """Takes back the last tokens, which the clock still counts."""
        raise NotImplementedError

    def offload(self) -> None:
        raise NotImplementedError(
            f"{type(self).__name__} cannot be offloaded layer by layer; ShadowKVCache keeps values off the device"
        )

    prefetch = offload

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)
        if self.kv_shape is not None and self.kv_shape[0]:
            for segment in self.segments():
                segment.trim()

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.kv_shape is not None:
            self.map_tensors(lambda tensor: tensor.repeat_interleave(repeats, 0))
            self.kv_shape = (self.kv_shape[0] * repeats, *self.kv_shape[1:])

    def _select(self, rows: Tensor) -> None:
        if self.kv_shape is not None:
            self.map_tensors(lambda tensor: tensor[rows.to(tensor.device)])
            batch = int(rows.sum()) if rows.dtype == torch.bool else len(rows)
            self.kv_shape = (batch, *self.kv_shape[1:])


class NoTokensLayer(CompressedLayer):
    """A layer that keeps no keys and values: all it knows of tokens is how many another layer has seen."""

    def __init__(self, padding: PaddingRecord) -> None:
        super().__init__(padding)
        # set once all layers are built
        self.attending: CompressedLayer = self

    def segments(self) -> list[Segment]:
        return []

    def plain_tokens(self) -> dict[str, Places]:
        return {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise ValueError(
            "a layer gave keys and values to its cache that by the model's config does not attend; kvcompress does not "
            "support this model"
        )

    def get_seq_length(self) -> int:
        return self.attending.get_seq_length()


class SharingLayer(NoTokensLayer):
    """A layer that keeps no keys and values because its model lets it attend to those of an earlier one."""

    def __init__(self, kv_source: CompressedLayer) -> None:
        super().__init__(kv_source.padding)
        self.window, self.is_sliding = kv_source.window, kv_source.is_sliding
        self.kv_source = self.attending = kv_source
        self.is_croppable = kv_source.is_croppable
        kv_source.kv_consumers += 1


def _restore_query_order(out: Tensor, order: Tensor | None) -> Tensor:
    """An output with its queries back in their original order; order: [batch, queries], None if unchanged."""
    return out if order is None else reordered(out, order.argsort(-1))
