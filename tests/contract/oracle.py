"""The oracle: full attention, in plain torch, with the tokens that a cache dropped masked out.

A `Transcript` writes down every forward that goes through a cache: what was fed, with which padding mask, and which
tokens each layer and KV head held before it. From that follows who may see whom, for all tokens of the conversation:

    query i sees token j   iff   j is not padding, and
                                 i and j were fed together and j <= i,   or   j was held when i was fed

(and i - j < window on a sliding layer, i and j counted without padding). One forward over the whole conversation,
without any cache, under that mask must give the logits that the cache gave one by one.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache

from kvcompress.hf import cache_in
from tests.contract.models import is_shared

# what a cache holds in a layer: [batch, kv_heads, places] bool, or None for every token seen
Kept = list[Tensor | None]
# keys and values as a cache gives them, by layer, and log-weights [batch, kv_heads, places, 1] that attention adds to
# logits, if there are any; None for all as they were fed
Decoded = list[tuple[Tensor | None, ...]]


@dataclass
class Forward:
    """One call of the model.

    ids: [batch, queries]. visible: [batch, seen + queries] bool, the padding as this forward was told.
    position_ids: [batch, queries]. kept: for each layer the columns held before it, [batch, kv_heads, seen] bool,
    or None for all. decoded: for each layer the keys and values a lossy cache gives for them, or None.
    logits: [batch, the last queries, vocabulary]. filler: [batch, queries] bool, what rows that have ended were fed
    while others went on, to a cache that evicts: padding, whatever the mask says; None for none.
    """

    ids: Tensor
    visible: Tensor
    position_ids: Tensor
    kept: Kept
    decoded: Decoded | None
    logits: Tensor
    filler: Tensor | None = None

    @property
    def queries(self) -> int:
        return self.ids.shape[1]

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.ids, self.visible, self.position_ids = map(change, (self.ids, self.visible, self.position_ids))
        self.kept = [None if kept is None else change(kept) for kept in self.kept]
        if self.decoded is not None:
            self.decoded = [tuple(x if x is None else change(x) for x in pair) for pair in self.decoded]
        self.logits = change(self.logits)
        self.filler = None if self.filler is None else change(self.filler)


@dataclass
class Transcript:
    """All forwards of one cache, in order, rows as the cache has them now.

    spoiled: [batch] bool, rows that were fed what is not a number, whatever was taken back since; None for none.
    """

    forwards: list[Forward] = field(default_factory=list)
    spoiled: Tensor | None = None

    @property
    def seen(self) -> int:
        return sum(forward.queries for forward in self.forwards)

    @property
    def fed(self) -> list[int]:
        """Tokens fed by each forward."""
        return [forward.queries for forward in self.forwards]

    @property
    def ids(self) -> Tensor:
        """All that was fed, [batch, tokens]."""
        return torch.cat([forward.ids for forward in self.forwards], 1)

    @property
    def visible(self) -> Tensor:
        """The padding mask as it stands, [batch, tokens] bool."""
        return self.forwards[-1].visible

    @property
    def filler(self) -> Tensor:
        """What rows that had ended were fed, [batch, tokens] bool."""
        parts = [
            each.visible.new_zeros(each.ids.shape) if each.filler is None else each.filler for each in self.forwards
        ]
        return torch.cat(parts, 1)

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        for forward in self.forwards:
            forward.map_rows(change)
        self.spoiled = None if self.spoiled is None else change(self.spoiled)

    def crop(self, tokens: int) -> None:
        while tokens:
            last = self.forwards[-1]
            if last.queries <= tokens:
                tokens -= last.queries
                self.forwards.pop()
                continue
            last.ids, last.visible = last.ids[:, :-tokens], last.visible[:, :-tokens]
            last.position_ids, last.logits = last.position_ids[:, :-tokens], last.logits[:, :-tokens]
            last.filler = None if last.filler is None else last.filler[:, :-tokens]
            tokens = 0


def holders(cache: Any) -> list[Any]:
    """For each layer of a model, the one of the cache that holds what it attends to."""
    return [getattr(layer, "kv_source", layer) for layer in cache.layers]


@contextmanager
def recording(
    model: PreTrainedModel,
    cache: Cache,
    kept: Callable[[Cache], Kept],
    decoded: Callable[[Cache], Decoded] | None = None,
    transcript: Transcript | None = None,
    during: str | None = None,
) -> Iterator[Transcript]:
    """Writes down the forwards of a model through a cache, and follows its rows where the cache moves them.

    Args:
        kept: reads which places (tokens of the row itself, padding not counted) each layer holds.
        decoded: reads what the cache gives for keys and values, by place too, where it is not what it was fed; NaN
            where it is.
        transcript: an earlier one of this cache, to go on with.
        during: the method by which a layer attends to what it holds. `kept` and `decoded` are read right after it,
            because the queries choose what it attends to; else they are read before the forward.
    """
    transcript = Transcript() if transcript is None else transcript
    before: dict[str, Any] = {}
    # which layers attend by each layer's method, in order, and how many have
    readers: dict[int, list[int]] = {}
    for index, layer in enumerate(holders(cache)):
        readers.setdefault(id(layer), []).append(index)
    read: dict[int, int] = {}

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if cache_in(kwargs.values()) is not cache:
            return
        assert cache.get_seq_length() == transcript.seen, "get_seq_length() must count the tokens seen"
        if during is not None:
            ids = args[0] if args else kwargs["input_ids"]
            before["visible"] = _visible(kwargs.get("attention_mask"), ids, transcript)[:, : transcript.seen]
            read.clear()
            before["kept"] = [None] * len(cache.layers)
            before["decoded"] = None
            if decoded is not None and transcript.forwards:
                before["decoded"] = [(None, None)] * len(cache.layers)
            return
        before["kept"] = _columns(kept(cache), transcript.visible) if transcript.forwards else []
        before["decoded"] = None
        if decoded is not None and transcript.forwards:
            place = _places(transcript.visible)
            before["decoded"] = [_take_pair(pair, place) for pair in decoded(cache)]

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if cache_in(kwargs.values()) is not cache:
            return
        ids = args[0] if args else kwargs["input_ids"]
        filler = _filler(model, cache, ids, transcript)
        visible = _visible(kwargs.get("attention_mask"), ids, transcript)
        if filler is not None:
            visible[:, -ids.shape[1] :] &= ~filler
        position_ids = kwargs.get("position_ids")
        if position_ids is None:
            position_ids = transcript.seen + torch.arange(ids.shape[1], device=ids.device)[None].expand_as(ids)
        transcript.forwards.append(
            Forward(
                ids,
                visible,
                position_ids.expand_as(ids),
                before["kept"],
                before["decoded"],
                output.logits.detach(),
                filler,
            )
        )

    def notice(index: int) -> None:
        layer = cache.layers[index]
        attend = getattr(layer, during, None)
        if attend is None:
            return

        def both(*args: Any, **kwargs: Any) -> Any:
            answer = attend(*args, **kwargs)
            left = readers[id(layer)][read.get(index, 0) :]
            read[index] = read.get(index, 0) + 1
            if transcript.forwards:
                visible = before["visible"]
                columns = _columns(kept(cache)[index : index + 1], visible)[0]
                pair = None if decoded is None else _take_pair(decoded(cache)[index], _places(visible))
                for reader in left:
                    before["kept"][reader] = columns
                    if pair is not None:
                        before["decoded"][reader] = pair
            return answer

        setattr(cache.layers[index], during, both)

    def follow(name: str, change: Callable[..., None]) -> None:
        method = getattr(cache, name)

        def both(*args: Any, **kwargs: Any) -> None:
            method(*args, **kwargs)
            change(*args, **kwargs)

        setattr(cache, name, both)

    follow("reorder_cache", lambda beam_idx: transcript.map_rows(lambda rows: rows[beam_idx]))
    follow("batch_select_indices", lambda indices: transcript.map_rows(lambda rows: rows[indices]))
    follow(
        "batch_repeat_interleave", lambda repeats: transcript.map_rows(lambda rows: rows.repeat_interleave(repeats, 0))
    )
    follow("crop", lambda tokens_to_remove: transcript.crop(-tokens_to_remove))
    for index in range(len(cache.layers) if during else 0):
        notice(index)
    hooks = [
        model.register_forward_pre_hook(enter, with_kwargs=True),
        model.register_forward_hook(leave, with_kwargs=True),
    ]
    try:
        yield transcript
    finally:
        for hook in hooks:
            hook.remove()
        for name in ("reorder_cache", "batch_select_indices", "batch_repeat_interleave", "crop"):
            delattr(cache, name)
        for layer in cache.layers if during else ():
            vars(layer).pop(during, None)


def assert_equals_oracle(model: PreTrainedModel, transcript: Transcript, **tolerance: float) -> None:
    """Every logit of every real token is what full attention gives with the dropped tokens masked out.

    What is not a number is so in both. In a row that was fed such a token it may reach tokens that do not see it, as
    zero times NaN does with the full cache.
    """
    # float32 sums of other order, through three layers of large weights
    tolerance = tolerance or {"rtol": 1e-4, "atol": 2e-4}
    expected = oracle_logits(model, transcript)
    start = 0
    for index, forward in enumerate(transcript.forwards):
        stop = start + forward.queries
        judged = forward.logits.shape[1]
        real = forward.visible[:, stop - judged : stop]
        if transcript.spoiled is None:
            assert torch.isfinite(forward.logits).all(), f"forward {index} gave what is not a number"
        else:
            assert torch.isfinite(forward.logits[~transcript.spoiled]).all(), f"forward {index}: NaN left its row"
            lost = expected[:, stop - judged : stop].isnan() & ~forward.logits.isnan()
            assert not lost[real].any(), f"forward {index} gave numbers where there are none"
            real = real & ~forward.logits.isnan().all(-1)
        torch.testing.assert_close(
            forward.logits[real].to(expected.dtype),
            expected[:, stop - judged : stop][real],
            msg=lambda text, index=index: f"forward {index} (of {transcript.fed} tokens): {text}",
            **tolerance,
        )
        start = stop


def oracle_of(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model that attends as the oracle does."""
    judge = copy.deepcopy(model)
    judge.set_attn_implementation("oracle")
    return judge


@functools.cache
def _oracle_of_shared(model: PreTrainedModel) -> PreTrainedModel:
    """The same of one that no test changes, without the hooks that a test may have put there for a while."""
    judge = oracle_of(model)
    for module in judge.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return judge


@torch.no_grad()
def oracle_logits(model: PreTrainedModel, transcript: Transcript) -> Tensor:
    """The logits of one forward over all of a transcript's tokens, [batch, tokens, vocabulary]."""
    if model.config._attn_implementation == "oracle":
        judge = model
    else:
        judge = _oracle_of_shared(model) if is_shared(model) else oracle_of(model)
    global _transcript
    _transcript = transcript
    try:
        position_ids = torch.cat([forward.position_ids for forward in transcript.forwards], 1)
        return judge(input_ids=transcript.ids, position_ids=position_ids, use_cache=False).logits
    finally:
        _transcript = None


_transcript: Transcript | None = None


def _oracle_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    assert _transcript is not None
    group = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    outs, start = [], 0
    for forward in _transcript.forwards:
        stop = start + forward.queries
        keys, values = key[:, :, :stop], value[:, :, :stop]
        log_weights = None
        if forward.decoded is not None and start:
            of_keys, of_values, *more = forward.decoded[module.layer_idx]
            keys, values = _given(of_keys, keys), _given(of_values, values)
            log_weights = more[0] if more else None
        chunk = _chunk_of(module)
        sees = _sees(forward, module.layer_idx, start, key.shape[1], sliding_window, chunk).repeat_interleave(group, 1)
        keys, values = (x.float().repeat_interleave(group, 1) for x in (keys, values))
        logits = query[:, :, start:stop].float() @ keys.mT * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if log_weights is not None:
            logits[..., : log_weights.shape[2]] += log_weights.repeat_interleave(group, 1).mT
        logits = logits.masked_fill(~sees, -torch.inf)
        if s_aux is not None:
            logits = torch.cat([logits, s_aux.float()[None, :, None, None].expand(*logits.shape[:3], 1)], -1)
        # a query that sees nothing, as padding may, attends to nothing
        weights = logits.softmax(-1)[..., :stop].masked_fill(~sees.any(-1, keepdim=True), 0.0)
        # a value that is not a number is so to those that see it
        spoiled = values.isnan().any(-1)
        out = weights @ values.masked_fill(spoiled[..., None], 0.0)
        outs.append(out.masked_fill((sees & spoiled[:, :, None]).any(-1)[..., None], torch.nan).to(query.dtype))
        start = stop
    return torch.cat(outs, 2).transpose(1, 2).contiguous(), None


def _given(given: Tensor | None, fed: Tensor) -> Tensor:
    """Keys or values [batch, kv_heads, tokens, any] as they were fed, the first of them as the cache gives them."""
    if given is None:
        return fed
    first = fed[:, :, : given.shape[2]]
    # what was fed as no number is none, whatever it is stored as
    return torch.cat([given.where(~given.isnan() & ~first.isnan(), first), fed[:, :, given.shape[2] :]], 2)


def _chunk_of(module: nn.Module) -> int | None:
    """The size of the chunks that a module's layer attends in, None for other layers."""
    kinds = getattr(module.config, "layer_types", None) or []
    is_chunked = kinds and kinds[module.layer_idx] == "chunked_attention"
    return module.config.attention_chunk_size if is_chunked else None


def _sees(
    forward: Forward, layer: int, start: int, kv_heads: int, window: int | None, chunk: int | None = None
) -> Tensor:
    """Who sees whom, [batch, kv_heads, queries, start + queries] bool."""
    stop = start + forward.queries
    batch, device = forward.ids.shape[0], forward.ids.device
    query = torch.arange(start, stop, device=device)[:, None]
    column = torch.arange(stop, device=device)[None]
    sees = (column <= query).expand(batch, kv_heads, -1, -1).clone()
    if start and forward.kept[layer] is not None:
        sees[..., :start] &= forward.kept[layer][:, :, None]
    sees &= forward.visible[:, None, None, :]
    if window is not None:
        place = forward.visible.cumsum(-1)
        sees &= (place[:, start:, None] - place[:, None, :] < window)[:, None]
    if chunk is not None:
        of_chunk = (forward.visible.cumsum(-1) - 1) // chunk
        sees &= (of_chunk[:, start:, None] == of_chunk[:, None, :])[:, None]
    return sees


def _columns(kept: Kept, visible: Tensor) -> Kept:
    """Places, padding not counted, as columns of what was fed, [batch, kv_heads, seen] bool."""
    place = _places(visible)
    columns: Kept = []
    for held in kept:
        if held is not None:
            held = _take(held[..., None], place)[..., 0] & visible[:, None]
        columns.append(held)
    return columns


def _places(visible: Tensor) -> Tensor:
    """The place in its own sequence of each column, [batch, seen]; of no meaning for padding."""
    return (visible.cumsum(-1) - 1).clamp(min=0)


def _take_pair(pair: tuple[Tensor | None, ...], place: Tensor) -> tuple[Tensor | None, ...]:
    return tuple(None if by_place is None else _take(by_place, place) for by_place in pair)


def _take(by_place: Tensor, place: Tensor) -> Tensor:
    """[batch or 1, kv_heads, places, any] in the order of the columns."""
    index = place[:, None, :, None].expand(-1, by_place.shape[1], -1, by_place.shape[3])
    return by_place.expand(len(place), -1, -1, -1).gather(2, index)


def _visible(mask: Any, ids: Tensor, transcript: Transcript) -> Tensor:
    # models with layers of several kinds are handed a mask for each kind
    if isinstance(mask, dict):
        mask = next((value for value in mask.values() if value is not None), None)
    past = transcript.visible if transcript.forwards else ids.new_zeros(ids.shape[0], 0, dtype=torch.bool)
    if mask is None:
        mask = torch.ones_like(ids)
    if mask.shape[1] == ids.shape[1]:
        mask = torch.cat([past, mask.bool()], 1)
    visible = mask.to(torch.bool, copy=True)
    if transcript.forwards:
        # who feeds filler shows it too, as generate does
        visible[:, : transcript.seen] &= ~transcript.filler
    return visible


def _filler(model: PreTrainedModel, cache: Any, ids: Tensor, transcript: Transcript) -> Tensor | None:
    """What a forward feeds to rows that have ended, [batch, queries] bool, where a cache evicts; None for none."""
    settings = model.generation_config
    pad, ends = getattr(cache, "fillers", None) or (settings.pad_token_id, settings.eos_token_id)
    if not ends or pad is None or ids.shape[1] != 1 or len(ids) == 1 or not transcript.forwards:
        return None
    if not any(layer.evicts for layer in cache.layers):
        return None
    over = torch.isin(transcript.ids[:, -1:], torch.tensor(ends, device=ids.device)) | transcript.filler[:, -1:]
    return over & (ids == pad)


AttentionInterface.register("oracle", _oracle_attention)
AttentionMaskInterface.register("oracle", lambda *args, **kwargs: None)
