"""One forward of a SwiftKV model: later layers whose keys and values come from one layer's input (arXiv:2410.03960).

    x = RMSNorm_swift(h_l)        K_j = RoPE(Wk_j x),  V_j = Wv_j x        for every later layer j >= l

h_l is the residual stream that enters layer l, the first of the later ones. Because no later key or value depends on
what the later layers compute, only the positions whose logits are asked for have to run them; the others stop at l.
AcrossKV: in a group of later layers only the first has Wk and Wv; the others attend to its keys and values.

With `own_last`, positions that run the later layers have K_j and V_j of what enters layer j, by the family's own
projections; the others have those above.

With `skip_between`, positions that do not run the later layers skip a span before them too, layers a to b - 1, in the
same way, and go on at layer b from a linear stand-in for them:

    x = RMSNorm_between(h_a)      K_j = RoPE(Wk_j x),  V_j = Wv_j x  for a <= j < b,      h_b = h_a + W x + c

`SingleInput` is the state of one such forward. The model passes it to its layers as the keyword `single_input`, layer l
fills it and narrows the residual stream, and every later attention takes its keys and values from it. A span has a
state of its own, and its last layer widens the residual stream again.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvcompress import hf
from kvcompress.cache import CompressedCache
from kvcompress.caches.dense import DenseLayer
from kvcompress.hf.families import ALL_ATTENTION_FUNCTIONS, GradientCheckpointingLayer
from kvcompress.kernels.bulk_kv import bulk_key_values

# attention functions that take a mask [batch, 1, queries, keys] or none; others need the last queries, in order
_TAKES_ROWS = ("sdpa", "eager", hf.IMPLEMENTATION, f"{hf.IMPLEMENTATION}_eager")

# what only the teacher needs of an attention
_TEACHER = ("q_proj", "k_proj", "v_proj", "qkv_proj", "q_norm", "k_norm")


class Between(nn.Module):
    """What stands in for a span of layers where tokens skip them, [batch, tokens, hidden_size] to the same."""

    def __init__(self, norm: nn.Module, hidden: int, start: int, stop: int) -> None:
        """
        Args:
            norm: of what enters the span.
            hidden: hidden_size.
            start, stop: the span's first layer, and the one behind it.
        """
        super().__init__()
        self.start, self.stop = start, stop
        self.norm = norm
        self.map = nn.Linear(hidden, hidden)

    def forward(self, entering: Tensor, normed: Tensor) -> Tensor:
        """
        Args:
            entering: what enters the span. normed: the norm's output for it.
        """
        moved: Tensor = self.map(normed).to(entering.device)
        return entering + moved


class SingleInput:
    """What the later layers of one forward share, or the layers of a span before them.

    asked: [batch, positions] int64, the columns whose output is wanted; None for all.
    running: those of which it is asked that they run the later layers, the wanted ones last; None for all.
    """

    def __init__(
        self,
        norm: nn.Module,
        leaders: "Sequence[SingleInputAttention]",
        first: int,
        share: int,
        asked: Tensor | None,
        visible: Tensor | None,
        given: hf.Cache | None,
        own_last: int = 0,
        stand_in: Between | None = None,
        between: "SingleInput | None" = None,
    ) -> None:
        """
        Args:
            norm: the later layers' common norm.
            leaders: the attention of each group's first layer.
            first: the index of the first later layer.
            share: layers per group.
            asked: as above.
            visible: [batch, columns] padding mask of at least the forward's columns, or None.
            given: the cache that the model was given, or None.
            own_last: as many tokens up to the first wanted one, at least, run the later layers, and all that do have
                queries, keys and values of their own; 0: none has.
            stand_in: of a span, what stands in for it where tokens skip it; None for the later layers.
            between: the state of the span that is skipped before the later layers, or None.
        """
        self.given = given
        # the cache that reached the later layers
        self.cache: hf.Cache | None = None
        self.norm = norm
        self.leaders = leaders
        self.first = first
        self.share = share
        self.asked = asked
        self.running = asked
        self.own_last = own_last
        self.between = between
        self._stand_in = stand_in
        self.visible = visible
        # columns that run the later layers, [batch, positions]; None for all
        self.rows: Tensor | None = None
        self.columns = 0
        # tokens that the cache held before
        self._past = 0
        self._entering: Tensor | None = None
        self._normed: Tensor | None = None
        # cosines and sines of the positions that continue, by the layers' kind of attention
        self._narrow: dict[str | None, tuple[Tensor, Tensor]] = {}
        self._writes_at_once = False
        self._leader: tuple[Tensor, Tensor] | None = None
        self._bulk: dict[int, tuple[Tensor, Tensor]] = {}
        self._masks: dict[int, tuple[Any, Any]] = {}

    def of(self, layer: int) -> "SingleInput":
        """The state of the span that a layer is in, or of the later layers."""
        return self if self.between is None or layer >= self.first else self.between

    def enter(self, hidden: Tensor, mask: Any, cache: hf.Cache | None, implementation: str) -> Tensor:
        """Takes layer l's input [batch, columns, hidden_size], and returns what continues, [batch, positions, ...].

        Args:
            mask: the one that transformers made for the layer.
            cache: the forward's cache, or None.
            implementation: the name of the attention function.

        Raises:
            RuntimeError: the model was given a cache that has not reached the layer.
        """
        self.check_reached(self.given, cache)
        self.cache = cache
        self._entering = hidden
        self._normed = self._leader = None
        self._narrow, self._bulk = {}, {}
        self.columns = hidden.shape[1]
        self._writes_at_once = self._in_bulk(cache)
        if self.asked is not None and self.own_last:
            # so many up to the first that is wanted: what follows it, such as a draft, counts for none of them
            wanted = self.asked.shape[1]
            count = min(self.own_last + wanted - 1, self.columns)
            last = last_columns(count, self.visible, len(hidden), self.columns, self.asked.device)
            if torch.equal(last[:, -wanted:], self.asked):
                self.running = last
            else:
                self.running = torch.cat([last[:, -min(self.own_last, count) :], self.asked], 1)
        self.rows = self._which(mask, cache, implementation)
        if cache is not None and self.rows is not None:
            self._past = int(cache.get_seq_length(self.first))
        return hidden if self.rows is None else _at(hidden, self.rows)

    def leaves_at(self, layer: int) -> bool:
        """True for the last layer of a span."""
        return self._stand_in is not None and layer == self._stand_in.stop - 1

    def leave(self, hidden: Tensor) -> Tensor:
        """The span's output for all columns, [batch, columns, hidden_size], of that for those that ran it, [batch,
        positions, hidden_size]."""
        if self.rows is None:
            return hidden
        assert self._stand_in is not None
        assert self._entering is not None
        skipped = self._stand_in(self._entering, self._common()).to(hidden.device)
        return skipped.scatter(1, self.rows.to(hidden.device)[..., None].expand_as(hidden), hidden.to(skipped.dtype))

    def check_reached(self, given: hf.Cache | None, found: hf.Cache | None) -> None:
        """
        Raises:
            RuntimeError: a cache that the model was given, or made, has not reached the later layers.
        """
        if given is not None and found is not given:
            raise RuntimeError(
                f"the model has a {type(given).__name__}, but its layer {self.first} was given "
                f"{'no cache' if found is None else f'a {type(found).__name__}'}: this transformers passes a cache to "
                "its layers in a way that kvcompress does not know; run the model with use_cache=False"
            )

    def _in_bulk(self, cache: Any) -> bool:
        """True if all later keys and values can be written into the cache's layers at once."""
        hidden = self._entering
        assert hidden is not None
        if not isinstance(cache, CompressedCache) or self.columns == 1 or torch.is_grad_enabled():
            return False
        if torch.is_autocast_enabled(hidden.device.type) or torch.compiler.is_compiling():
            return False
        projections = [p for a in self.leaders for p in (a.k_proj_swiftkv, a.v_proj_swiftkv)]
        plain = all(
            type(p) is nn.Linear and p.weight.dtype == hidden.dtype and p.weight.device == hidden.device
            for p in projections
        )
        layers = [cache.layers[a.layer_idx] for a in self.leaders]
        # a cache for another batch is refused by its layers, with their own message
        fits = all(layer.kv_shape is None or layer.kv_shape[0] == len(hidden) for layer in layers)
        return plain and fits and all(type(layer) is DenseLayer for layer in layers)

    def _project_at_once(self, attention: "SingleInputAttention", turns: tuple[Tensor, Tensor]) -> None:
        """Makes the keys and values of every group whose layers have these cosines and sines, in the memory where the
        cache will keep them."""
        of_kind = [a for a in self.leaders if a.kind == attention.kind and a.is_plain(turns)]
        x = self._common()
        cache: Any = self.cache
        kv_heads = _local(attention.k_proj_swiftkv.weight).shape[0] // attention.head_dim
        places = {a.layer_idx: cache.layers[a.layer_idx].room(x, kv_heads, attention.head_dim) for a in of_kind}
        keys, values = zip(*places.values(), strict=True)
        keyed, valued = ([getattr(a, f"{name}_proj_swiftkv") for a in of_kind] for name in "kv")
        has_bias = keyed[0].bias is not None
        bulk_key_values(
            x,
            [_local(p.weight) for p in keyed],
            [_local(p.weight) for p in valued],
            *turns,
            keys,
            values,
            key_biases=[_local(p.bias) for p in keyed] if has_bias else None,
            value_biases=[_local(p.bias) for p in valued] if has_bias else None,
            norms=[_local(a.k_norm_swiftkv.weight) for a in of_kind] if attention.norms else None,
            epsilon=attention.config.rms_norm_eps,
        )
        self._bulk |= places

    def _common(self) -> Tensor:
        """The common input of the later layers, [batch, columns, hidden_size]."""
        assert self._entering is not None
        if self._normed is None:
            self._normed = self.norm(self._entering).to(self._entering.device)
        return self._normed

    def _which(self, mask: Any, cache: Any, implementation: str) -> Tensor | None:
        """The columns that run the later layers, [batch, positions]; None for all of them."""
        asked, columns = self.running, self.columns
        if asked is None:
            return None
        compressed = isinstance(cache, CompressedCache)
        takes_rows = implementation in _TAKES_ROWS and not compressed
        if takes_rows and (mask is None or (isinstance(mask, Tensor) and mask.dim() == 4)):
            return asked
        if not (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2)):
            return None
        first = int(asked.amin())
        if compressed:
            watched = cache.queries_watched(self.first)
            if watched is None:
                return None
            first = min(first, self._watched_from(watched))
        if first == 0:
            return None
        return torch.arange(first, columns, device=asked.device).expand(asked.shape[0], -1)

    def _watched_from(self, watched: int) -> int:
        """The first column among each row's last `watched` tokens."""
        if self.visible is None:
            return max(0, self.columns - watched)
        visible = self.visible[:, -self.columns :].bool()
        from_end = visible.flip(-1).cumsum(-1).flip(-1)
        is_watched = visible & (from_end <= watched)
        return int(is_watched.any(0).to(torch.uint8).argmax()) if bool(is_watched.any()) else self.columns

    def narrowed(self, turns: tuple[Tensor, Tensor], kind: str | None) -> tuple[Tensor, Tensor]:
        """Of cosines and sines [batch or 1, columns, rotary_dim] of layers of a kind, those of the positions that
        continue, [batch or 1, positions, rotary_dim]."""
        rows = self.rows
        if rows is None:
            return turns
        if kind not in self._narrow:
            cos, sin = (_at(turn.expand(len(rows), -1, -1), rows) for turn in turns)
            self._narrow[kind] = cos, sin
        return self._narrow[kind]

    def mask(self, mask: Any, keys: int, device: torch.device) -> Any:
        """The layer's mask for the positions that continue and this many keys, on this device."""
        # for the last columns, in order, the attention function needs no mask
        if self.rows is not self.running or self.rows is None:
            return mask
        known = self._masks.get(keys)
        if known is None or known[0] is not mask:
            self._masks[keys] = known = mask, self._made(mask, keys)
        made = known[1]
        return None if made is None else made.to(device)

    def _made(self, mask: Tensor | None, keys: int) -> Tensor | None:
        assert self.rows is not None
        if mask is not None:
            rows = self.rows.to(mask.device)[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
            return mask.expand(len(self.rows), -1, -1, -1).gather(2, rows)
        # transformers makes no mask if everything is causal and nothing padded
        # a static cache has room for more keys than there are, a window holds less than was seen
        last = self.rows + min(keys - self.columns, self._past)
        if bool((last == keys - 1).all()):
            return None
        return (torch.arange(keys, device=last.device) <= last[..., None])[:, None]

    def key_value(
        self,
        attention: "SingleInputAttention",
        turns: tuple[Tensor, Tensor],
        cache: Any,
        device: torch.device,
        own: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A later layer's keys and values, [batch, kv_heads, tokens, head_dim], with those of the cache.

        Args:
            turns: the layer's cosines and sines of all columns, [batch or 1, columns, rotary_dim].
            device: the layer's, as the model may be spread over several.
            own: those that the positions which continue have of their own, [batch, kv_heads, positions, head_dim].
        """
        if own is not None and self.rows is None:
            return own if cache is None else cache.update(*own, attention.layer_idx)
        is_source = (attention.layer_idx - self.first) % self.share == 0
        recomputed = attention.recomputes
        if is_source or recomputed:
            source = attention if is_source else attention.kv_source()
            if self._writes_at_once and source.layer_idx not in self._bulk and source.is_plain(turns):
                self._project_at_once(source, turns)
            made = self._bulk.get(source.layer_idx)
            self._leader = self._project(source, turns, recomputed, device) if made is None else made
        assert self._leader is not None
        key, value = self._leader
        if own is not None:
            key, value = self._with_own(attention, own)
        if cache is None or (not is_source and not isinstance(cache, CompressedCache)):
            # with a cache of transformers, the group attends to what its first layer's update returned
            return key.to(device), value.to(device)
        given = cache.update(key, value, attention.layer_idx)
        if is_source and not isinstance(cache, CompressedCache):
            self._leader = given
        return given

    def _with_own(self, attention: "SingleInputAttention", own: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer, in which positions that continue have their own."""
        assert self._leader is not None
        assert self.rows is not None
        at = self.rows[:, None, :, None].to(own[0].device)
        in_place = attention.layer_idx in self._bulk
        put = Tensor.scatter_ if in_place else Tensor.scatter
        key, value = (
            put(each, 2, at.expand(-1, mine.shape[1], -1, mine.shape[3]), mine.to(each.dtype))
            for each, mine in zip(self._leader, own, strict=True)
        )
        return key, value

    def _project(
        self, attention: "SingleInputAttention", turns: tuple[Tensor, Tensor], fresh: bool, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        if fresh:
            # with gradient checkpointing, a layer's own graph must hold everything that it trains
            self._normed = None
        key, value = attention.project(self._common().to(device))
        return attention.rotated(key, turns, device), value

    def answer(self, hidden: Tensor) -> Tensor:
        """The wanted columns, [batch, asked, hidden_size], of the model's output [batch, positions, hidden_size]."""
        if self.asked is None:
            return hidden
        if self.rows is None:
            return _at(hidden, self.asked)
        if self.rows is self.running:
            return hidden[:, -self.asked.shape[1] :]
        return _at(hidden, self.asked - self.rows[:, :1])


class SingleInputAttention(nn.Module):
    """The attention of a later layer, on top of its family's: its own query, keys and values of the common input.

    Without a `single_input` it is the family's attention, unchanged: the teacher.
    """

    layer_idx: int
    head_dim: int
    scaling: float
    attention_dropout: Any
    config: Any
    o_proj: Any
    q_proj_swiftkv: Any
    k_proj_swiftkv: Any
    v_proj_swiftkv: Any
    q_norm_swiftkv: Any
    k_norm_swiftkv: Any
    # the family's own: how it applies rotary embeddings, attends without kernels, and what it calls a softcap
    rotate: Callable[..., tuple[Tensor, Tensor]]
    eager: Callable[..., Any]
    softcap: str | None
    recomputes = False

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self._lead: tuple[SingleInputAttention, ...] = ()
        self.kind = hf.layer_kind(config, layer_idx)
        # queries and keys may be normalised, each head or all of them as one
        self.norms = hasattr(self, "q_norm")
        is_source = (layer_idx - config.num_key_value_layers) % config.key_value_group_size == 0
        is_between = layer_idx < config.num_key_value_layers
        # what runs a span before the later layers always has queries of its own
        names = [*("kv" if is_between else "qkv" if is_source else "q")]
        for name in names:
            own, rows = projection(self, name)
            added = nn.Linear(own.in_features, rows.stop - rows.start, bias=own.bias is not None)
            setattr(self, f"{name}_proj_swiftkv", added)
            if self.norms and name != "v":
                setattr(self, f"{name}_norm_swiftkv", copy.deepcopy(getattr(self, f"{name}_norm")))
        if not config.swiftkv_teacher:
            for name in _TEACHER:
                if hasattr(self, name):
                    setattr(self, name, None)

    def follow(self, kv_source: "SingleInputAttention") -> None:
        """Makes this the attention of a layer that attends to another's keys and values."""
        # inside a tuple it is not registered as a submodule
        self._lead = (kv_source,)

    def kv_source(self) -> "SingleInputAttention":
        """The attention whose keys and values this one attends to."""
        return self._lead[0] if self._lead else self

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, not yet rotated, and values of the common input [batch, tokens, hidden_size], each [batch, kv_heads,
        tokens, head_dim]."""
        norm = self.k_norm_swiftkv if self.norms else None
        return self._in_heads(self.k_proj_swiftkv(x), norm), self._in_heads(self.v_proj_swiftkv(x))

    def _in_heads(self, x: Tensor, norm: Any = None) -> Tensor:
        """[batch, tokens, heads * head_dim] as [batch, heads, tokens, head_dim], normalised as the family does."""
        if norm is not None and norm.weight.numel() != self.head_dim:
            x = norm(x)
        heads = x.view(*x.shape[:-1], -1, self.head_dim)
        if norm is not None and norm.weight.numel() == self.head_dim:
            heads = norm(heads)
        return heads.transpose(1, 2)

    def rotated(self, x: Tensor, turns: tuple[Tensor, Tensor], device: torch.device) -> Tensor:
        """Queries or keys [batch, heads, tokens, head_dim] rotated by cosines and sines [batch or 1, tokens,
        rotary_dim], if the layer has positions."""
        if not getattr(self, "use_rope", True):
            return x
        cos, sin = (turn.to(device) for turn in turns)
        return self.rotate(x, x[:, :0], cos, sin)[0]

    def is_plain(self, turns: tuple[Tensor, Tensor]) -> bool:
        """Whether bulk_key_values makes the same keys: all of a head rotated, and if normalised, head by head."""
        if not getattr(self, "use_rope", True) or turns[0].shape[-1] != self.head_dim:
            return False
        norm = self.k_norm_swiftkv if self.norms else None
        # Gemma's norms call it eps, and add 1 to their weights
        return norm is None or (norm.weight.numel() == self.head_dim and hasattr(norm, "variance_epsilon"))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Any,
        *args: Any,
        single_input: SingleInput | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The family's forward, which takes a cache under the family's name for it."""
        if single_input is None:
            if not self.config.swiftkv_teacher:
                raise ValueError(
                    f"layer {self.layer_idx} cannot run as the teacher: the checkpoint was published without the "
                    "teacher's query, key and value projections"
                )
            return super().forward(hidden_states, position_embeddings, attention_mask, *args, **kwargs)
        cache = hf.take_cache(kwargs, args)
        shape = hidden_states.shape[:-1]
        if single_input.own_last:
            query = self._in_heads(self._by_family("q", hidden_states), getattr(self, "q_norm", None))
        else:
            query = self._in_heads(self.q_proj_swiftkv(hidden_states), self.q_norm_swiftkv if self.norms else None)
        device = query.device
        query = self.rotated(query, single_input.narrowed(position_embeddings, self.kind), device)
        own = self._own(hidden_states, single_input, position_embeddings) if single_input.own_last else None
        key, value = single_input.key_value(self, position_embeddings, cache, device, own)
        if single_input.rows is not None:
            # those of all columns
            kwargs.pop("position_ids", None)
        if self.softcap is not None:
            kwargs["softcap"] = getattr(self, self.softcap)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(str(hf.attention_name(self)), self.eager)
        out, weights = attend(
            self,
            query,
            key,
            value,
            single_input.mask(attention_mask, key.shape[2], device),
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self._window(),
            **kwargs,
        )
        return self.o_proj(out.reshape(*shape, -1).contiguous()), weights

    def _own(self, hidden: Tensor, single_input: SingleInput, turns: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The family's own keys and values of what enters the layer, [batch, positions, hidden_size]."""
        key = self._in_heads(self._by_family("k", hidden), getattr(self, "k_norm", None))
        value = self._in_heads(self._by_family("v", hidden))
        return self.rotated(key, single_input.narrowed(turns, self.kind), key.device), value

    def _by_family(self, name: str, hidden: Tensor) -> Tensor:
        """The family's own queries, keys or values ("q", "k", "v") of [batch, positions, hidden_size]."""
        module, rows = projection(self, name)
        made: Tensor = module(hidden)[..., rows]
        return made

    def _window(self) -> int | None:
        # Mistral's config has one window, Qwen's one per layer
        if hasattr(self, "sliding_window"):
            return self.sliding_window  # type: ignore[return-value]
        return getattr(self.config, "sliding_window", None)


class SingleInputLayer(GradientCheckpointingLayer):
    """A later decoder layer, on top of its family's; the first one narrows the residual stream. Of a span before them,
    the last one widens it again."""

    def forward(
        self, hidden_states: Tensor, *args: Any, single_input: SingleInput | None = None, **kwargs: Any
    ) -> Tensor:
        if single_input is None:
            return super().forward(hidden_states, *args, **kwargs)
        attention: Any = self.self_attn
        attention.recomputes = self.gradient_checkpointing and self.training
        state = single_input.of(attention.layer_idx)
        if attention.layer_idx == state.first:
            hidden_states = state.enter(
                hidden_states,
                kwargs.get("attention_mask"),
                hf.cache_in((*args, *kwargs.values())),
                str(hf.attention_name(attention)),
            )
        hidden_states = super().forward(hidden_states, *args, single_input=state, **kwargs)
        return state.leave(hidden_states) if state.leaves_at(attention.layer_idx) else hidden_states


def projection(attention: Any, name: str) -> tuple[Any, slice]:
    """A family's projection to queries, keys or values ("q", "k", "v"), and which of its outputs they are."""
    own = getattr(attention, f"{name}_proj", None)
    if own is not None:
        return own, slice(0, own.out_features)
    # Phi-3 has one for all three
    heads, kv_heads, head_dim, *_ = hf.layer_heads(attention.config)[hf.layer_of(attention)]
    start = {"q": 0, "k": heads, "v": heads + kv_heads}[name]
    return attention.qkv_proj, slice(start * head_dim, (start + (heads if name == "q" else kv_heads)) * head_dim)


def last_columns(count: int, mask: Any, batch: int, columns: int, device: torch.device) -> Tensor:
    """The last `count` columns of each row, [batch, count] int64; of one that ends in padding, those before it.

    Args:
        mask: [batch, columns or more] padding mask, or anything else for none.
    """
    last = torch.full((batch,), columns - 1, device=device)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        visible = mask[:, -columns:].bool().to(device)
        trailing = visible.flip(-1).to(torch.uint8).argmax(-1)
        last = torch.where(visible.any(-1), last - trailing, last)
    return (last[:, None] - torch.arange(count - 1, -1, -1, device=device)).clamp(min=0)


def _local(parameter: Tensor) -> Tensor:
    """This process's part of a parameter that a tensor-parallel model splits."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def _at(x: Tensor, columns: Tensor) -> Tensor:
    return x.gather(1, columns.to(x.device)[..., None].expand(-1, -1, x.shape[-1]))
