"""Indexers, which choose what tokens attend to (DeepSeek Sparse Attention, arXiv:2512.02556).

Such a layer gives its cache one more key of each token, by which an indexer, a small attention without values, scores
all tokens for each query; the query attends to the best `index_topk`. Models run the indexer between the cache's update
and the attention function. With a cache of ours it is put off: what stands for its result goes on to the attention
function, and through it to the layer, which knows which tokens it holds, and has the model's own indexer score those,
some queries at a time.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcompress.hf.calls import AttendingCache, Shadow, cache_in
from kvcompress.hf.modules import attention_modules

# scores of the heads of an indexer that are made at a time
_MOST = 2**24
_EMPTY = -1
# the arguments of an indexer that have an element for each token, and in which dimension
_BY_TOKEN = {"hidden_states": 1, "q_resid": 1, "position_embeddings": -2, "position_ids": -1}


class Choice:
    """What a layer's indexer chooses in a forward. Layers without an indexer are given that of an earlier one, and take
    what it chose there, or ask it about their own tokens.

    positions: of the tokens that each query sees, [batch, queries, choices] int32, -1 for none; None where there are no
    more tokens than are chosen, and before `choose`.
    """

    positions: Tensor | None = None

    def __init__(self, indexer: nn.Module, arguments: dict[str, Any]) -> None:
        """
        Args:
            arguments: those that the model calls it with, by name.
        """
        self._indexer = indexer
        self._arguments: dict[str, Any] = arguments
        kind = arguments["hidden_states"].device.type
        self._autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

    @property
    def most(self) -> int:
        """How many tokens it chooses for a query."""
        found: int = self._indexer.index_topk  # type: ignore[assignment]
        return found

    def choose(self, past: Tensor, places: Tensor, columns: Callable[[Tensor], Tensor]) -> Tensor:
        """Chooses among a layer's tokens, and returns the index keys of the forward's tokens, [batch, tokens, width].

        Args:
            past: the index keys of the tokens held, [batch, held, width], in any order.
            places: positions of those held and then of the forward's, [batch, held + tokens] int32, -1 for no token.
            columns: tells in which column of all that were fed the token at a position came, of [batch, any].
        """
        kind, dtype, enabled = self._autocast
        with torch.no_grad(), torch.autocast(kind, dtype, enabled):
            return self._choose(past, places, columns)

    def _choose(self, past: Tensor, places: Tensor, columns: Callable[[Tensor], Tensor]) -> Tensor:
        hidden = self._arguments["hidden_states"]
        batch, tokens = hidden.shape[:2]
        # a layer that asks another's indexer may be on another device
        past, places = past.to(hidden.device), places.to(hidden.device)
        self.positions = None
        if places.shape[1] <= self.most:
            # scored against one of its own, as it must score something
            keys = _Keys(past, shown=1)
            self._run(slice(None), torch.ones(batch, 1, 1, dtype=torch.bool, device=hidden.device), keys)
            return keys.fresh()
        keys = _Keys(past)
        held, found = past.shape[1], []
        heads: Any = self._indexer
        block = max(1, _MOST // (batch * heads.n_heads * places.shape[1]))
        for start in range(0, tokens, block):
            stop = min(start + block, tokens)
            column = torch.arange(held + stop, device=places.device)
            # padding sees nothing, and nothing sees it
            own = torch.arange(held + start, held + stop, device=places.device)
            seen = (places[:, None, : held + stop] >= 0) & (column <= own[:, None]) & (places[:, own, None] >= 0)
            best = self._run(slice(start, stop), seen, keys).long()
            at = places[:, None, : held + stop].expand(-1, stop - start, -1).gather(2, best)
            at = at.masked_fill(~seen.gather(2, best), _EMPTY)
            found.append(nn.functional.pad(at, (0, self.most - at.shape[-1]), value=_EMPTY))
        self.positions = torch.cat(found, 1)
        return keys.fresh()

    def _run(self, tokens: slice, seen: Tensor, keys: "_Keys") -> Tensor:
        """The indexer's own forward for some of the tokens; seen: [batch, those, keys] bool."""
        arguments = {name: _part(name, value, tokens) for name, value in self._arguments.items()}
        cached = next(name for name, value in self._arguments.items() if isinstance(value, AttendingCache))
        arguments |= {"attention_mask": seen, cached: keys}
        indexer: Any = self._indexer
        chosen: Tensor = type(indexer).forward(indexer, **arguments)
        return chosen


def _part(name: str, value: Any, tokens: slice) -> Any:
    """What an indexer's argument is for some of the tokens."""
    if isinstance(value, tuple):
        return tuple(_part(name, each, tokens) for each in value)
    if name not in _BY_TOKEN or not isinstance(value, Tensor):
        return value
    index: list[Any] = [slice(None)] * value.dim()
    index[_BY_TOKEN[name]] = tokens
    return value[tuple(index)]


class PoolChoice(Choice):
    """What an indexer chooses that scores pools of neighbouring tokens, in the order of the text, padding apart."""

    @property
    def shown(self) -> Tensor:
        """Which of the forward's tokens are no padding, [batch, tokens] bool."""
        found: Tensor = self._arguments["attention_mask"]
        return found

    @property
    def most(self) -> int:
        heads: Any = self._indexer
        return super().most + (heads.index_kpool - 1 if heads.index_kpool_always_select_tail else 0)

    def _choose(self, past: Tensor, places: Tensor, columns: Callable[[Tensor], Tensor]) -> Tensor:
        heads: Any = self._indexer
        hidden = self._arguments["hidden_states"]
        batch, tokens = hidden.shape[:2]
        past, places = past.to(hidden.device), places.to(hidden.device)
        held, keys = past.shape[1], _Keys(past)
        block = max(1, _MOST // (batch * heads.n_heads * places.shape[1]))
        found = []
        for start in range(0, tokens, block):
            stop = min(start + block, tokens)
            keys.length = held + stop
            best = self._run(slice(start, stop), places[:, held + start : held + stop] >= 0, keys).long()
            at = places[:, None].expand(-1, stop - start, -1).gather(2, best.clamp(min=0)).masked_fill(best < 0, _EMPTY)
            found.append(nn.functional.pad(at, (0, self.most - at.shape[-1]), value=_EMPTY))
        # all pools of so few tokens are chosen, and what is in none
        is_all = places.shape[1] <= heads.index_topk and heads.index_kpool_always_select_tail
        self.positions = None if is_all else torch.cat(found, 1)
        return keys.fresh()


class BlockChoice(Choice):
    """What an indexer chooses that scores blocks of the tokens that a query may see, in the order of the text, beside
    keys and values of many heads (Qwen4).

    KV heads that hold tokens of their own come as so many sequences: [batch * heads, ...] in place of [batch, ...], and
    a block is of tokens that its head holds.
    """

    def __rand__(self, mask: Tensor) -> "BlockChoice":
        """What the model makes of its mask and this: the mask is in it already."""
        return self

    @property
    def shown(self) -> Tensor | None:
        """Which columns are no padding, [batch, columns] bool; None for all.

        Raises:
            ValueError: the mask is one of all queries and tokens.
        """
        mask: Tensor = self._arguments["attention_mask"]
        if mask.dtype != torch.bool or mask.shape[1:3] != (1, 1):
            raise ValueError(
                "kvcompress takes a padding mask [batch, tokens seen] or none, because it never builds a "
                f"queries x tokens mask; got a mask of shape {list(mask.shape)}"
            )
        return mask[:, 0, 0] if mask.shape[-1] else None

    @property
    def most(self) -> int:
        blocks: Any = self._indexer
        found: int = blocks.token_budget + blocks.compress_ratio - 1
        return found

    def _choose(self, past: Tensor, places: Tensor, columns: Callable[[Tensor], Tensor]) -> Tensor:
        hidden, blocks = self._arguments["hidden_states"], self._indexer
        batch, tokens = hidden.shape[:2]
        past, places = past.to(hidden.device), places.to(hidden.device)
        heads, held = len(past) // batch, past.shape[1]
        self.positions = None
        if places.shape[1] < blocks.token_budget + blocks.compress_ratio:  # type: ignore[operator]
            # all blocks of so few tokens are chosen, and what is in none
            return self._keys_alone()
        order = places[:, :held].argsort(-1)
        past = past.gather(1, order[..., None].expand_as(past))
        places = torch.cat([places[:, :held].gather(1, order), places[:, held:]], 1)
        at = columns(places.view(batch, -1)).view_as(places).clamp(min=0).long()[..., None]
        turns = []
        for angles in self._arguments["position_embeddings"]:
            each = angles.expand(batch, -1, -1).repeat_interleave(heads, 0)
            turns.append(each.gather(1, at.expand(-1, -1, each.shape[-1])))
        keys, found = _Keys(past), []
        block = max(1, _MOST // places.numel())
        for start in range(0, tokens, block):
            stop = min(start + block, tokens)
            column = torch.arange(held + stop, device=places.device)
            own = column[held + start :]
            # padding sees nothing, and nothing sees it
            seen = (places[:, None, : held + stop] >= 0) & (column <= own[:, None]) & (places[:, own, None] >= 0)
            best = self._forward(
                keys,
                hidden_states=hidden[:, start:stop].repeat_interleave(heads, 0),
                position_embeddings=tuple(each[:, : held + stop] for each in turns),
                attention_mask=seen[:, None],
            )[:, 0]
            # those that are chosen, before all others
            taken, column = best.to(torch.uint8).sort(dim=-1, descending=True, stable=True)
            taken, column = taken[..., : self.most], column[..., : self.most]
            at = places[:, None, : held + stop].expand(-1, stop - start, -1).gather(2, column)
            at = at.masked_fill(taken == 0, _EMPTY)
            found.append(nn.functional.pad(at, (0, self.most - at.shape[-1]), value=_EMPTY))
        self.positions = torch.cat(found, 1)
        return keys.fresh()[::heads]

    def _keys_alone(self) -> Tensor:
        """The index keys of the forward's tokens, and no scores."""
        try:
            self._forward(_NoScores())
        except _KeysGiven as given:
            return given.keys
        raise RuntimeError(f"{type(self._indexer).__name__} gave its cache no index keys")

    def _forward(self, keys: Any, **changed: Any) -> Tensor:
        """The indexer's own forward, with other arguments and what stands for its cache."""
        cached = next(name for name, value in self._arguments.items() if isinstance(value, AttendingCache))
        indexer: Any = self._indexer
        chosen: Tensor = type(indexer).forward(indexer, **self._arguments | changed | {cached: keys})
        return chosen


class _KeysGiven(Exception):  # noqa: N818 (it carries a result, and ends the forward early)
    """Ends an indexer's forward when it has given its keys, [batch, tokens, width]."""

    def __init__(self, keys: Tensor) -> None:
        super().__init__()
        self.keys = keys


class _NoScores:
    """What an indexer takes for its cache, of which nothing but the keys is wanted."""

    def update_indexer(self, keys: Tensor, layer_idx: int) -> Tensor:
        raise _KeysGiven(keys)


class _Keys:
    """What an indexer takes for its cache: the index keys of tokens held, and of those it has given so far.

    shown: how many of the latter it gets to score, and none of those held; None for all. length: how many there are,
    for indexers that ask their layer.
    """

    length = 0

    def __init__(self, past: Tensor, shown: int | None = None) -> None:
        self._parts = [past]
        self.shown = shown

    def update_indexer(self, keys: Tensor, layer_idx: int) -> Tensor:
        """Called by the indexer, with keys [batch, tokens, width]."""
        self._parts.append(keys)
        if self.shown is not None:
            return keys[:, : self.shown]
        return torch.cat([part.to(keys.dtype) for part in self._parts], 1)

    @property
    def layers(self) -> "_Layers":
        """What indexers ask for their layer."""
        return _Layers(self)

    def fresh(self) -> Tensor:
        """All that it has given, [batch, tokens, width]."""
        return torch.cat(self._parts[1:], 1)


class _Layers:
    """Stands for each layer of a cache that an indexer asks how many tokens it holds."""

    def __init__(self, keys: _Keys) -> None:
        self._length = keys.length

    def __getitem__(self, layer: int) -> "_Layers":
        return self

    @property
    def keys(self) -> Tensor:
        return torch.empty(1, 1, self._length, 0, device="meta")

    def get_seq_length(self) -> int:
        return self._length


class _PutOff(Shadow):
    """Shadows an indexer's forward: with a cache of ours, what it chooses is not known yet."""

    name = "forward"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(cache_in([*args, *kwargs.values()]), AttendingCache):
            return self.shadowed(*args, **kwargs)
        indexer = self.model
        # the model's own call names most of them by their place
        named = inspect.signature(type(indexer).forward).bind(indexer, *args, **kwargs).arguments
        kind = PoolChoice if getattr(indexer, "index_kpool", None) else Choice
        if hasattr(indexer, "compress_ratio"):
            kind = BlockChoice
        return kind(indexer, dict([*named.items()][1:]))


class _Mask(Shadow):
    """Shadows the method of an attention module that makes a mask of what its indexer chose."""

    name = "build_attention_mask_from_topk"

    def __call__(self, topk_indices: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(topk_indices, Choice):
            return topk_indices
        return self.shadowed(topk_indices, *args, **kwargs)


def only_chosen(mask: Tensor | None, indices: Any, key: Tensor) -> Tensor | None:
    """An attention mask [batch, 1, queries, tokens], bool or of numbers to add, that shows only what an indexer chose.

    Args:
        indices: [batch, queries, choices], columns of `key`; None: nothing was chosen.
    """
    if not isinstance(indices, Tensor):
        return mask
    if mask is None:
        raise ValueError(
            "an indexer chose what tokens attend to, and there is no mask to say so; got attention_mask=None"
        )
    hidden = torch.ones(*indices.shape[:2], key.shape[2], dtype=torch.bool, device=key.device)
    hidden = hidden.scatter_(2, indices.long(), False)[:, None]
    if mask.dtype == torch.bool:
        return mask & ~hidden
    return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)


def index_keys(layer: Any) -> Tensor | None:
    """The index keys in a layer of transformers' own cache, [batch, tokens, width]; None if it has none."""
    found: Tensor | None = getattr(layer, "indexer_keys", None)
    return found


class PlacesTold:
    """A layer of a cache whose first indexer rotates keys by the positions of all columns fed, which the model keeps
    there; the cache's record of padding has them."""

    padding: Any

    @property
    def indexer_position_ids(self) -> Tensor | None:
        """Of the columns seen, [axes, batch, columns] int64; None before the first."""
        told: Tensor | None = self.padding.told_of(int(self.get_seq_length()))  # type: ignore[attr-defined]
        return None if told is None else told.permute(2, 0, 1).long()

    @indexer_position_ids.setter
    def indexer_position_ids(self, positions: Tensor | None) -> None:
        # what other models keep of them
        if positions is not None:
            self.padding.axes = positions.permute(1, 2, 0).to(torch.int32)


def index_positions(layer: Any) -> Tensor | None:
    """The positions that an indexer's model keeps in a layer of transformers' own cache, [axes, batch, tokens] int64;
    None if it keeps none."""
    found: Tensor | None = getattr(layer, "indexer_position_ids", None)
    return found


def _shadows(model: PreTrainedModel) -> Iterator[tuple[Any, type[Shadow]]]:
    """The modules of which a method is shadowed, and by what."""
    for module in attention_modules(model):
        if hasattr(type(module), _Mask.name):
            yield module, _Mask
        indexer = getattr(module, "indexer", None)
        if isinstance(indexer, nn.Module):
            yield indexer, _PutOff


def put_off_indexers(model: PreTrainedModel) -> None:
    """Makes a model's indexers wait for what a cache of ours holds."""
    for module, kind in _shadows(model):
        if not isinstance(vars(module).get(kind.name), kind):
            setattr(module, kind.name, kind(module))


def run_indexers(model: PreTrainedModel) -> None:
    """Removes what `put_off_indexers` has put on a model's indexers."""
    for module, kind in _shadows(model):
        if isinstance(vars(module).get(kind.name), kind):
            delattr(module, kind.name)
