"""Compacts what a cache holds already: a text is read after it, and what the text looks up stays, fitted to answer for
all (Attention Matching, arXiv:2602.16284).

The tokens held are in slots, with their log-weights: what they are worth, and what is fitted, is attention with these.
What the heads keep, and how it is fitted, is as after a prompt (caches/reconstruction.py, caches/matching.py), except
that there are no new tokens to choose from.
"""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import hf
from kvcompress.cache import CompressedCache
from kvcompress.caches.answers import AnsweringLayer
from kvcompress.caches.budget import Allocation, Budget
from kvcompress.caches.dense import DenseLayer
from kvcompress.caches.evicting_layer import EvictingLayer, RerotatedLayer
from kvcompress.caches.evicting_step import ChunkStep, EvictingStep, Ranking
from kvcompress.caches.matching import match
from kvcompress.caches.reconstruction import Waiting, choose, read_rows
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.layer import AttentionInput, CompressedLayer, as_stored
from kvcompress.policies.policy import SecondReading
from kvcompress.storage.dense import DenseSegment
from kvcompress.storage.ragged import Fitted, RaggedSlots
from kvcompress.storage.segment import EMPTY


class CompactionStep(ChunkStep):
    """A step that brings no tokens: some of those in slots stay, fitted.

    whole: sequences whose text is all that they have seen, [batch] bool. Heads that hold all of it are fitted as after
    a prompt, each chunk to its own queries; others hold one block. rests: sequences that keep all, [batch] bool.
    """

    def __init__(self, layer: AnsweringLayer, whole: Tensor, rests: Tensor) -> None:
        assert isinstance(layer.slots, RaggedSlots)
        key, value = layer.slots.like()
        EvictingStep.__init__(self, layer, AttentionInput(key, key, value, None, LogitSpec(1.0), None))
        self.is_first, self.attention, self.whole, self.rests = False, None, whole, rests

    def rank(self, attention: Tensor | None) -> Ranking:
        assert attention is not None
        positions = self.slots.positions
        return Ranking(positions[..., :0], positions, attention, self._worth(attention, positions))

    def _at_rest(self) -> Tensor:
        return self.rests

    def keep(self, ranking: Ranking) -> None:
        layer, slots, x, kept = self.layer, self.slots, self.input, self._kept(ranking)
        assert isinstance(layer, AnsweringLayer)
        assert isinstance(slots, RaggedSlots)
        asked, spec = layer.take_asked()
        fitted = None
        if asked:
            bias = slots.bias
            assert bias is not None
            keys, values = slots.contents()
            fresh, bias = match(asked, keys, values, bias, self._blocks(slots), kept, spec)
            fitted = Fitted(fresh, bias, (fresh != values).any(-1))
        capacities = layer._capacities(kept.sum(-1))
        slots.refill(x.key, x.value, ranking.places, ranking.scores, kept, capacities, fitted)
        layer._mark_static()

    def _blocks(self, slots: RaggedSlots) -> Tensor:
        """What is fitted together, as `match` takes it, [batch, kv_heads, slots] int64."""
        how, held = self.layer.policy.rereads, slots.positions != EMPTY
        assert how is not None
        holds_all = held.sum(-1) == self.layer.lengths[:, None]
        by_chunk = (self.whole[:, None] & holds_all)[..., None]
        return torch.where(by_chunk, 1 + slots.positions // how.chunk, 0).masked_fill(~held, -1).long()


def texts(input_ids: Tensor, attention_mask: Tensor | None, batch: int) -> list[list[int]]:
    """The tokens of each sequence without padding.

    Raises:
        TypeError: they are no tensor of integers, or the mask is no tensor.
        ValueError: they are not [batch, tokens], or a row has fewer than two.
    """
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        kind = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise TypeError(f"input_ids must be a tensor of token ids, int64 or int32, got {kind}")
    if input_ids.dim() != 2 or len(input_ids) != batch:
        raise ValueError(f"input_ids must be [batch={batch}, tokens], got {list(input_ids.shape)}")
    if attention_mask is None:
        rows = input_ids.tolist()
    elif not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor like input_ids, got {attention_mask!r}")
    elif attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must be like input_ids, {list(input_ids.shape)}, got {list(attention_mask.shape)}"
        )
    else:
        shown = attention_mask.to(input_ids.device) != 0
        rows = [row[own].tolist() for row, own in zip(input_ids, shown, strict=True)]
    for number, row in enumerate(rows):
        if len(row) < 2:
            raise ValueError(f"a text of at least 2 tokens is read for each row, row {number} has {len(row)}")
    return rows


def check_ended(cache: CompressedCache) -> None:
    """Raises ValueError if a cache holds nothing; RuntimeError: a forward was interrupted."""
    if not int(cache.get_seq_length()):
        raise ValueError(f"this {type(cache).__name__} is empty: feed it tokens first")
    cache.check_whole()
    if any(layer.pending_kv is not None for layer in cache.layers):
        raise RuntimeError("an earlier forward through this cache was interrupted within a layer: call cache.reset()")
    for layer in cache.layers:
        if isinstance(layer, AnsweringLayer):
            layer._check_ended()


def hold_no_more(layers: Sequence[AnsweringLayer], budget: Budget) -> Tensor:
    """Of which sequences no head holds more tokens than a budget allows, however layers and heads share it, [batch]
    bool on the CPU."""
    amount = budget.amount
    most = torch.stack([layer.tokens_of_all_heads().amax(1).cpu() for layer in layers]).amax(0)
    return most <= amount if isinstance(amount, int) else torch.full_like(most, amount == 1.0, dtype=torch.bool)


def granted(layers: Sequence[AnsweringLayer], budget: Budget, allocation: Allocation) -> list[Tensor]:
    """How many tokens heads may keep on average, [batch] int32 of each layer.

    Args:
        budget: a fraction is one of the tokens held: by all layers where they compete, else by each.

    Raises:
        ValueError: a fraction leaves nothing to choose, in no layer and sequence.
    """
    amount = budget.amount
    if isinstance(amount, int):
        counts = [int(each.amount) for each in budget.per_layer(allocation, len(layers))]
        return [torch.full_like(layer.limits, count) for layer, count in zip(layers, counts, strict=True)]
    held = [layer.tokens_of_all_heads() for layer in layers]
    means = [kept.double().mean(-1) for kept in held]
    if allocation == "global":
        there = means[0].device
        mean = torch.cat([kept.to(there) for kept in held], 1).double().mean(-1)
        means = [mean.to(each.device) for each in means]
    # a whole is all of it, and rounding makes nothing more
    found = [(amount * mean - 1e-6).ceil().int() for mean in means]
    most = max(int(tokens.max()) for tokens in found)
    if most < budget.least:
        of = max(int(mean.max()) for mean in means)
        raise ValueError(
            f"a budget of {amount:g} of {of} tokens held is {most}, and must be at least {budget.explained}"
        )
    return [tokens.clamp(min=budget.least) for tokens in found]


@torch.no_grad()
def compact(
    model: PreTrainedModel,
    layers: Sequence[AnsweringLayer],
    rows: list[list[int]],
    last_position: list[int] | None,
    how: SecondReading,
    all_compete: bool,
    tokens: list[Tensor] | None,
    rests: Tensor,
) -> None:
    """Reads a text after what the layers hold, and lets them choose from it.

    Args:
        model: a module that takes input_ids and a cache; it needs no head.
        rows: the text of each sequence.
        last_position: where the model has placed each sequence's last token, as far as it is known.
        how, all_compete: as in `read_again`.
        tokens: what heads may keep on average, [batch] int32 of each layer; None for the layers' own budgets.
        rests: which sequences keep all, [batch] bool.
    """
    lengths = layers[0].lengths.to(hf.input_device(model), torch.int64)
    whole = torch.tensor([len(row) for row in rows], device=lengths.device) == lengths
    starts = lengths
    if last_position is not None:
        # steps on a GPU are not followed, but positions never fall behind a count of tokens
        starts = lengths.maximum(lengths.new_tensor(last_position) + 1)
    with as_stored():
        for layer in layers:
            layer.take_answers()
            assert layer.slots is not None
            step = CompactionStep(layer, whole.to(layer.lengths.device), rests.to(layer.lengths.device))
            past = torch.zeros_like(layer.slots.scores)
            layer.waiting = Waiting(None, past, layer.lengths.clone(), step.whole, step)
    try:
        read_rows(model, layers, rows, starts, how)
        with as_stored(), contextlib.ExitStack() as stack:
            for index, layer in enumerate(layers):
                if tokens is not None:
                    stack.enter_context(layer.granting(tokens[index]))
                else:
                    # all rows have been fed a text
                    layer.follow_lengths(2)
            choose(layers, all_compete)
    finally:
        for layer in layers:
            layer.waiting = None


def copy_tokens(layers: Sequence[AnsweringLayer], other: CompressedCache) -> None:
    """Puts what another cache holds into the slots of empty layers.

    Raises:
        TypeError: some of it is not plain keys and values at their true positions.
    """
    if other.states:
        raise ValueError(
            f"{type(other).__name__} holds states of layers that do not attend, which are not in its tokens: feed the "
            "text to an AttentionMatchingCache"
        )
    seen, batch = int(other.get_seq_length()), other.batch_size
    real = other.padding.real_of_last(seen, seen) or [seen] * batch
    for layer, source in zip(layers, other.layers, strict=True):
        pieces = _held(source, real)
        if pieces is None:
            raise TypeError(
                "from_cache takes what a DenseCache holds, or an evicting cache that is not rerotated, got "
                f"{type(other).__name__} with a {type(source).__name__}"
            )
        key, value, places = (torch.cat([piece[part] for piece in pieces], 2) for part in range(3))
        bias = _log_weights(source, places)
        layer.take_in(seen, places.new_tensor(real), key, value, places, bias)


def _held(layer: CompressedLayer, real: list[int]) -> list[tuple[Tensor, Tensor, Tensor]] | None:
    """Keys and values [batch, kv_heads, any, head_dim] and positions [batch, kv_heads, any] of all that a layer holds;
    None: these are not what it holds.

    Args:
        real: how many real tokens each sequence has.
    """
    if type(layer) is DenseLayer and type(layer.dense) is DenseSegment:
        key, value, visible = layer.dense.held()
        shown = key.new_ones(len(real), key.shape[2], dtype=torch.bool) if visible is None else visible
        # on a sliding layer these are the last of each sequence
        behind = shown.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1)
        places = (behind.new_tensor(real)[:, None] - behind).masked_fill(~shown, EMPTY)
        return [(key, value, places[:, None].expand(-1, key.shape[1], -1))]
    if not isinstance(layer, EvictingLayer) or isinstance(layer, RerotatedLayer):
        return None
    assert layer.slots is not None
    pieces = [(*layer.slots.contents(), layer.slots.positions)]
    tail = layer.tail if isinstance(layer, AnsweringLayer) else None
    if tail is not None:
        used = max(tail.held)
        places = tail.positions[:, None, :used].expand(-1, tail.keys.shape[1], -1)
        pieces.append((tail.keys[:, :, :used], tail.values[:, :, :used], places))
    return pieces


def _log_weights(layer: CompressedLayer, places: Tensor) -> Tensor | None:
    """Of the tokens at these places that a layer holds, slots first, [batch, kv_heads, any] float32; None without."""
    slots = layer.slots if isinstance(layer, EvictingLayer) else None
    bias = slots.bias if isinstance(slots, RaggedSlots) else None
    return None if bias is None else torch.nn.functional.pad(bias, (0, places.shape[-1] - bias.shape[-1]))
