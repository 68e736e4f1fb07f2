"""One forward of a SwiftKV model: later layers whose keys and values come from one layer's input (arXiv:2410.03960).

    x = RMSNorm_swift(h_l)        K_j = RoPE(Wk_j x),  V_j = Wv_j x        for every later layer j >= l

h_l is the residual stream that enters layer l, the first of the later ones. Because no later key or value depends on
what the later layers compute, only the positions whose logits are asked for have to run them; the others stop at l.
AcrossKV: in a group of later layers only the first has Wk and Wv; the others attend to its keys and values.

`SingleInput` is the state of one such forward. The model passes it to its layers as the keyword `single_input`, layer l
fills it and narrows the residual stream, and every later attention takes its keys and values from it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvcompress import hf
from kvcompress.cache import CompressedCache
from kvcompress.caches.dense import DenseLayer

# eager_attention_forward is also found by kvcompress.hf in the module of an attention class
from kvcompress.hf.families import (
    ALL_ATTENTION_FUNCTIONS,
    GradientCheckpointingLayer,
    eager_attention_forward,
    rotate_half,
)
from kvcompress.kernels.bulk_kv import bulk_key_values

# attention functions that take a mask [batch, 1, queries, keys] or none; others need the last queries, in order
_TAKES_ROWS = ("sdpa", "eager", hf.IMPLEMENTATION, f"{hf.IMPLEMENTATION}_eager")


class SingleInput:
    """What the later layers of one forward share.

    asked: [batch, positions] int64, the columns whose output is wanted; None for all.
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
        """
        self.given = given
        # the cache that reached the later layers
        self.cache: hf.Cache | None = None
        self.norm = norm
        self.leaders = leaders
        self.first = first
        self.share = share
        self.asked = asked
        self.visible = visible
        # columns that run the later layers, [batch, positions]; None for all
        self.rows: Tensor | None = None
        self.columns = 0
        self._entering: Tensor | None = None
        self._normed: Tensor | None = None
        self._turns: tuple[Tensor, Tensor] | None = None
        self._narrow: tuple[Tensor, Tensor] | None = None
        self._leader: tuple[Tensor, Tensor] | None = None
        self._bulk: dict[int, tuple[Tensor, Tensor]] = {}
        self._masks: dict[int, tuple[Any, Any]] = {}

    def enter(
        self, hidden: Tensor, turns: tuple[Tensor, Tensor], mask: Any, cache: hf.Cache | None, implementation: str
    ) -> Tensor:
        """Takes layer l's input [batch, columns, hidden_size], and returns what continues, [batch, positions, ...].

        Args:
            turns: cosines and sines of all columns, [batch or 1, columns, rotary_dim].
            mask: the one that transformers made for the layer.
            cache: the forward's cache, or None.
            implementation: the name of the attention function.

        Raises:
            RuntimeError: the model was given a cache that has not reached the layer.
        """
        self.check_reached(self.given, cache)
        self.cache = cache
        self._entering, self._turns = hidden, turns
        self._normed = self._leader = None
        self.columns = hidden.shape[1]
        self._bulk = self._project_at_once(cache) if self._in_bulk(cache) else {}
        self.rows = self._which(mask, cache, implementation)
        if self.rows is None:
            self._narrow = turns
            return hidden
        cos, sin = (_at(turn.expand(hidden.shape[0], -1, -1), self.rows) for turn in turns)
        self._narrow = cos, sin
        return _at(hidden, self.rows)

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

    def _project_at_once(self, cache: Any) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values of every group's first layer, by its index, in the memory where the cache will keep them."""
        if not self.leaders:
            return {}
        assert self._turns is not None
        assert self._entering is not None
        self._normed = x = self.norm(self._entering).to(self._entering.device)
        one = self.leaders[0]
        kv_heads = _local(one.k_proj_swiftkv.weight).shape[0] // one.head_dim
        places = {a.layer_idx: cache.layers[a.layer_idx].room(x, kv_heads, one.head_dim) for a in self.leaders}
        keys, values = zip(*places.values(), strict=True)
        keyed, valued = ([getattr(a, f"{name}_proj_swiftkv") for a in self.leaders] for name in "kv")
        has_bias = keyed[0].bias is not None
        bulk_key_values(
            x,
            [_local(p.weight) for p in keyed],
            [_local(p.weight) for p in valued],
            *self._turns,
            keys,
            values,
            key_biases=[_local(p.bias) for p in keyed] if has_bias else None,
            value_biases=[_local(p.bias) for p in valued] if has_bias else None,
            norms=[_local(a.k_norm_swiftkv.weight) for a in self.leaders] if one.norms else None,
            epsilon=one.config.rms_norm_eps,
        )
        return places

    def _which(self, mask: Any, cache: Any, implementation: str) -> Tensor | None:
        """The columns that run the later layers, [batch, positions]; None for all of them."""
        asked, columns = self.asked, self.columns
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

    @property
    def narrow(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions that continue, [batch or 1, positions, rotary_dim]."""
        assert self._narrow is not None
        return self._narrow

    def mask(self, mask: Any, keys: int, device: torch.device) -> Any:
        """The layer's mask for the positions that continue and this many keys, on this device."""
        # for the last columns, in order, the attention function needs no mask
        if self.rows is not self.asked or self.rows is None:
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
        last = self.rows + (keys - self.columns)
        if bool((last == keys - 1).all()):
            return None
        return (torch.arange(keys, device=last.device) <= last[..., None])[:, None]

    def key_value(self, attention: "SingleInputAttention", cache: Any, device: torch.device) -> tuple[Tensor, Tensor]:
        """A later layer's keys and values, [batch, kv_heads, tokens, head_dim], with those of the cache.

        device: the layer's, as the model may be spread over several.
        """
        is_source = (attention.layer_idx - self.first) % self.share == 0
        recomputed = attention.recomputes
        if is_source or recomputed:
            source = attention if is_source else attention.kv_source()
            made = self._bulk.get(source.layer_idx)
            self._leader = self._project(source, recomputed, device) if made is None else made
        assert self._leader is not None
        key, value = self._leader
        if cache is None or (not is_source and not isinstance(cache, CompressedCache)):
            # with a cache of transformers, the group attends to what its first layer's update returned
            return key.to(device), value.to(device)
        given = cache.update(key, value, attention.layer_idx)
        if is_source and not isinstance(cache, CompressedCache):
            self._leader = given
        return given

    def _project(self, attention: "SingleInputAttention", fresh: bool, device: torch.device) -> tuple[Tensor, Tensor]:
        assert self._entering is not None
        assert self._turns is not None
        # with gradient checkpointing, a layer's own graph must hold everything that it trains
        if fresh or self._normed is None:
            self._normed = self.norm(self._entering)
        key, value = attention.project(self._normed.to(device))
        cos, sin = (turn.to(device) for turn in self._turns)
        return rotated(key, cos, sin), value

    def answer(self, hidden: Tensor) -> Tensor:
        """The wanted columns, [batch, asked, hidden_size], of the model's output [batch, positions, hidden_size]."""
        if self.asked is None:
            return hidden
        if self.rows is None:
            return _at(hidden, self.asked)
        if self.rows is self.asked:
            return hidden
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
    recomputes = False

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self._lead: tuple[SingleInputAttention, ...] = ()
        # Qwen3 normalises queries and keys per head
        self.norms = hasattr(self, "q_norm")
        is_source = (layer_idx - config.num_key_value_layers) % config.key_value_group_size == 0
        names = [*("qkv" if is_source else "q")]
        for name in names:
            projection: Any = getattr(self, f"{name}_proj")
            added = nn.Linear(projection.in_features, projection.out_features, bias=projection.bias is not None)
            setattr(self, f"{name}_proj_swiftkv", added)
            if self.norms and name != "v":
                norm: Any = getattr(self, f"{name}_norm")
                setattr(self, f"{name}_norm_swiftkv", type(norm)(self.head_dim, eps=config.rms_norm_eps))
        if not config.swiftkv_teacher:
            for name in ("q_proj", "k_proj", "v_proj", *(("q_norm", "k_norm") if self.norms else ())):
                setattr(self, name, None)

    def follow(self, kv_source: "SingleInputAttention") -> None:
        """Makes this the attention of a layer that attends to another's keys and values."""
        # inside a tuple it is not registered as a submodule
        self._lead = (kv_source,)

    def kv_source(self) -> "SingleInputAttention":
        """The attention whose keys and values this one attends to."""
        return self._lead[0] if self._lead else self

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, not yet rotated, and values of the common input [batch, tokens, hidden_size]."""
        shape = (*x.shape[:-1], -1, self.head_dim)
        key, value = self.k_proj_swiftkv(x).view(shape), self.v_proj_swiftkv(x).view(shape)
        if self.norms:
            key = self.k_norm_swiftkv(key)
        return key.transpose(1, 2), value.transpose(1, 2)

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
        query = self.q_proj_swiftkv(hidden_states).view(*shape, -1, self.head_dim)
        if self.norms:
            query = self.q_norm_swiftkv(query)
        device = query.device
        query = rotated(query.transpose(1, 2), *(turn.to(device) for turn in single_input.narrow))
        key, value = single_input.key_value(self, cache, device)
        if single_input.rows is not None:
            # those of all columns
            kwargs.pop("position_ids", None)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(str(hf.attention_name(self)), eager_attention_forward)
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

    def _window(self) -> int | None:
        # Mistral's config has one window, Qwen's one per layer
        if hasattr(self, "sliding_window"):
            return self.sliding_window  # type: ignore[return-value]
        return getattr(self.config, "sliding_window", None)


class SingleInputLayer(GradientCheckpointingLayer):
    """A later decoder layer, on top of its family's; the first one narrows the residual stream."""

    def forward(
        self, hidden_states: Tensor, *args: Any, single_input: SingleInput | None = None, **kwargs: Any
    ) -> Tensor:
        if single_input is None:
            return super().forward(hidden_states, *args, **kwargs)
        attention: Any = self.self_attn
        attention.recomputes = self.gradient_checkpointing and self.training
        if attention.layer_idx == single_input.first:
            hidden_states = single_input.enter(
                hidden_states,
                kwargs["position_embeddings"],
                kwargs.get("attention_mask"),
                hf.cache_in((*args, *kwargs.values())),
                str(hf.attention_name(attention)),
            )
        return super().forward(hidden_states, *args, single_input=single_input, **kwargs)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys [batch, heads, tokens, head_dim] rotated by cosines and sines [batch or 1, tokens, head_dim]."""
    return x * cos[:, None] + rotate_half(x) * sin[:, None]


def _local(parameter: Tensor) -> Tensor:
    """This process's part of a parameter that a tensor-parallel model splits."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def _at(x: Tensor, columns: Tensor) -> Tensor:
    return x.gather(1, columns.to(x.device)[..., None].expand(-1, -1, x.shape[-1]))
