"""Slots of which each KV head has as many as it needs: what is held is what is kept.

A tensor of all heads must be as wide as the longest, and where one head keeps ten times as much as another most of it
would be empty. So keys and values lie in rows one after another, head by head, heads of equal capacity side by side:
those are one tensor again, and every operation on slots runs once for each capacity, without a loop over heads. So do
log-weights, where there are any. Positions and scores are small, and as wide as the longest head. On a GPU one kernel
attends to all heads (kernels/ragged.py), and only sums and maxima of columns run once for each capacity.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvcompress.kernels.attention import slot_attention
from kvcompress.kernels.column_sums import slot_column_maxima, slot_column_sums
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.common.split_attention import Extents, splits_in_triton
from kvcompress.kernels.common.torch_attention import slots_seen
from kvcompress.kernels.decode import slot_probabilities
from kvcompress.kernels.ragged import by_column, padded, ragged_attention, ragged_decode_attention
from kvcompress.storage.segment import EMPTY
from kvcompress.storage.slots import SlotSegment


@dataclass(frozen=True)
class Bucket:
    """Heads of equal capacity.

    first: their first slot in `keys`. start, stop: their places in `order`. capacity: slots of each.
    """

    first: int
    start: int
    stop: int
    capacity: int

    @property
    def heads(self) -> int:
        return self.stop - self.start

    def rows_of(self, x: Tensor, each: int = 1) -> Tensor:
        """What these heads have of the rows of all, one for `each` slots, as [heads, 1, rows of a head, ...]."""
        own = x.narrow(0, self.first // each, self.heads * self.capacity // each)
        return own.view(self.heads, 1, -1, *x.shape[1:])


class Fitted(NamedTuple):
    """What was fitted to slots, then to a chunk's tokens.

    values: [batch, kv_heads, slots + tokens, head_dim]. log_weights: [batch, kv_heads, slots + tokens] float32.
    changed: [batch, kv_heads, slots + tokens] bool, which values are not those they had.
    """

    values: Tensor
    log_weights: Tensor
    changed: Tensor


class RaggedSlots(SlotSegment):
    """Slots whose number differs from head to head.

    keys, values: [slots of all heads, head_dim]. positions, scores: [batch, kv_heads, most slots of a head], EMPTY and
    of no meaning from a head's capacity on. spare: as in SlotSegment. capacities: [batch, kv_heads] int64, slots of a
    head, of which one at least is free where single tokens are put. log_weights: [slots of all heads] float32, what
    attention adds to logits; None for slots that have none. starts: [batch, kv_heads] int64, a head's
    first slot in `keys`. order: [heads of all sequences] int64, their numbers in the order in which they lie there.
    """

    tensor_names = (*SlotSegment.tensor_names, "log_weights", "capacities", "starts", "order")

    log_weights: Tensor | None
    capacities: Tensor
    starts: Tensor
    order: Tensor
    buckets: tuple[Bucket, ...]

    def __init__(self, key: Tensor, value: Tensor, slots: int, has_bias: bool = False) -> None:
        super().__init__(key, value, slots)
        self.log_weights = torch.zeros_like(self.scores).flatten() if has_bias else None
        self._lay_out(torch.full(key.shape[:2], self.slots))
        self._flatten()

    def _flatten(self) -> None:
        """Makes rows of what SlotSegment lays out by head."""
        self.keys, self.values = self.keys.flatten(0, 2), self.values.flatten(0, 2)

    def _lay_out(self, capacities: Tensor) -> None:
        """Says where the slots of each head are; capacities: [batch, kv_heads] int64 on the CPU."""
        order = capacities.flatten().argsort(stable=True)
        sizes = capacities.flatten()[order]
        starts = torch.empty_like(order)
        starts[order] = sizes.cumsum(0) - sizes
        device = self.positions.device
        self.capacities, self.starts, self.order = (
            x.to(device) for x in (capacities, starts.view_as(capacities), order)
        )
        buckets, first, start = [], 0, 0
        for capacity, heads in itertools.groupby(sizes.tolist()):
            count = len(list(heads))
            buckets.append(Bucket(first, start, start + count, capacity))
            first, start = first + count * capacity, start + count
        self.buckets = tuple(buckets)

    def _set(self, tensors: dict[str, Tensor]) -> None:
        super()._set(tensors)
        self._lay_out(self.capacities.cpu())
        if "bias" in tensors:
            # files of before December 2026 have log-weights as wide as the longest head
            self.weigh(tensors["bias"])

    @property
    def slots(self) -> int:
        """How many slots the longest head has, with the free one."""
        return self.positions.shape[2]

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """The log-weights by head, [batch, kv_heads, most slots]: a copy, with 0 from a head's capacity on."""
        return None if self.log_weights is None else by_column(self.log_weights, self._extents(), self.slots)

    def weigh(self, bias: Tensor) -> None:
        """Sets the log-weights, [batch, kv_heads, most slots] float32; not read from a head's capacity on."""
        self.log_weights = self._by_row(bias)

    def _by_row(self, x: Tensor) -> Tensor:
        """What each slot has of [batch, kv_heads, most slots], in the order of the rows, [slots of all heads]."""
        within = torch.arange(self.slots, device=x.device) < self.capacities[..., None]
        return x.flatten(0, 1)[self.order][within.flatten(0, 1)[self.order]]

    def _rows(self) -> dict[str, Tensor]:
        """What slots hold of their tokens, [slots of all heads, ...] each."""
        return {"keys": self.keys, "values": self.values}

    def _set_rows(self, rows: dict[str, Tensor]) -> None:
        """Puts what `_rows` gives in its place, of other slots."""
        self.keys, self.values = rows["keys"], rows["values"]

    def _as_rows(self, key: Tensor | None, value: Tensor, heads: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """Tokens as slots hold them, by the names of `_rows`.

        Args:
            key, value: [tokens, head_dim]; no keys: of values alone. heads: sequence and KV head of each, [tokens].
        """
        return {"values": value} if key is None else {"keys": key, "values": value}

    def as_held(self, key: Tensor, positions: Tensor) -> Tensor:
        """The keys of a chunk as `contents` would give them; key, positions: as `refill` takes them next."""
        return key

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        weights, starts = self.log_weights, change(self.starts)
        for name in ("positions", "scores", "spare"):
            setattr(self, name, change(getattr(self, name)))
        self._lay_out(change(self.capacities).cpu())
        sizes = self.capacities.flatten()[self.order]
        # in the new order of slots, where each one was
        moved = (starts - self.starts).flatten()[self.order].repeat_interleave(sizes)
        source = torch.arange(len(moved), device=moved.device) + moved
        self._take(source)
        self.log_weights = None if weights is None else weights[source]

    def _take(self, source: Tensor) -> None:
        """Makes slots of those there were, whole heads one after another: which, [slots of all heads] int64."""
        self.keys, self.values = self.keys[source], self.values[source]

    def rotated_keys(self) -> Tensor:
        return self.contents()[0]

    def _rotated_rows(self) -> Tensor:
        """The keys as queries see them, [slots of all heads, head_dim]."""
        return self.keys

    def contents(self) -> tuple[Tensor, Tensor]:
        """Keys and values, [batch, kv_heads, most slots, head_dim]: a copy, with 0 from a head's capacity on."""
        keys, values, _ = padded(self._rotated_rows(), self.values, self._extents(), self.positions)
        return keys, values

    def like(self) -> tuple[Tensor, Tensor]:
        return tuple(x.new_empty(*self.starts.shape, 0, x.shape[-1]) for x in (self.keys, self.values))  # type: ignore[return-value]

    def _stored(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
        """By capacity: the heads' places in `order`, their keys and values, [heads, 1, capacity, head_dim], and their
        log-weights, [heads, 1, capacity]."""
        stored = self._rotated_rows(), self.values, self.log_weights
        for bucket in self.buckets:
            keys, values, weights = (None if x is None else bucket.rows_of(x) for x in stored)
            assert keys is not None
            assert values is not None
            yield slice(bucket.start, bucket.stop), keys, values, weights

    def _parts(
        self, query: Tensor, query_positions: Tensor
    ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]]:
        """By capacity: the heads' places in `order`, their queries [heads, group, queries, head_dim], keys and values
        [heads, 1, capacity, head_dim], log-weights and positions [heads, 1, capacity], and positions of the queries
        [heads, queries]."""
        queries, positions = self._by_place(query), self._by_place(self.positions)
        at = self._of_queries(query_positions)
        for heads, keys, values, weights in self._stored():
            yield heads, queries[heads], keys, values, weights, positions[heads, :, : keys.shape[2]], at[heads]

    def _of_queries(self, query_positions: Tensor) -> Tensor:
        """Positions of queries, [batch, queries] or [1, queries], for each head in the order in which the slots lie."""
        batch, kv_heads = self.starts.shape
        return query_positions.expand(batch, -1)[self.order // kv_heads]

    def _by_place(self, x: Tensor) -> Tensor:
        """[batch, heads, ...] as [heads of all sequences, group, ...], in the order in which the slots lie."""
        return x.reshape(self.order.numel(), -1, *x.shape[2:]).index_select(0, self.order)

    def _by_head(self, parts: list[Tensor], like: torch.Size) -> Tensor:
        """What is had of each bucket, [heads, group, ...], as [batch, heads, ...]."""
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return torch.empty_like(whole).index_copy_(0, self.order, whole).view(*like[:2], *whole.shape[2:])

    def _columns_by_head(self, parts: list[Tensor]) -> Tensor:
        """What the slots of each bucket received, [heads, 1, capacity], as [batch, kv_heads, most slots]."""
        columns = self.slots
        return self._by_head(
            [torch.nn.functional.pad(part, (0, columns - part.shape[-1])) for part in parts], self.starts.shape
        )

    def _extents(self) -> Extents:
        return Extents(self.starts, self.capacities)

    def attend(self, query: Tensor, query_positions: Tensor, spec: LogitSpec) -> tuple[Tensor, Tensor]:
        if splits_in_triton(query, self.keys, self.values):
            at = query_positions.expand(len(query), -1)
            keys, weights = self._rotated_rows(), self.log_weights
            return ragged_attention(query, keys, self.values, self._extents(), self.positions, at, spec, weights)
        if query.shape[2] == 1:
            return self._attend_once(query, query_positions, spec)
        outs, lses = [], []
        for _, queries, keys, values, weights, positions, at in self._parts(query, query_positions):
            out, lse = slot_attention(queries, keys, values, positions, at, spec, weights)
            outs.append(out)
            lses.append(lse)
        return self._by_head(outs, query.shape), self._by_head(lses, query.shape)

    def decode(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        if self.log_weights is not None:
            raise NotImplementedError("slots with log-weights take no tokens one by one")
        return super().decode(*args, **options)

    def decode_again(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        query_positions: Tensor,
        spec: LogitSpec,
        sink_logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not splits_in_triton(query, self.keys, self.values):
            return self._decode_in_pytorch(query, query_positions, spec, sink_logits)
        at = query_positions.expand(len(query), -1)
        keys, extents = self._rotated_rows(), self._extents()
        return ragged_decode_attention(query, keys, self.values, extents, self.positions, at, spec, sink_logits)

    def _attend_once(self, query: Tensor, query_positions: Tensor, spec: LogitSpec) -> tuple[Tensor, Tensor]:
        """`attend` of one query of each head: two products per capacity, and all between at once."""
        logits = spec.cap_(self._logits_of_one(query, spec))
        for heads, _, _, weights in self._stored():
            if weights is not None:
                logits[heads, :, : weights.shape[2]] += weights
        # read only where there is a window
        at = query_positions if spec.window is None else self._of_queries(query_positions)
        seen = slots_seen(self._by_place(self.positions), at, spec.window)[:, 0]
        lse = logits.masked_fill_(~seen, -torch.inf).logsumexp(-1, keepdim=True)
        # a query that sees nothing has weights of 0
        weights = logits.sub_(lse.masked_fill(lse == -torch.inf, 0.0)).exp_()
        out = self._by_head(self._times_values(weights), query.shape)[:, :, None]
        return out.to(query.dtype), self._by_head([lse.float()], query.shape)

    def _logits_of_one(self, query: Tensor, spec: LogitSpec) -> Tensor:
        """Scaled products of one query of each head, [heads of all sequences, group, most slots]; what is behind a
        head's end is of no meaning."""
        queries = self._by_place(query.to(torch.promote_types(query.dtype, torch.float32)) * spec.scale)[:, :, 0]
        logits = queries.new_zeros(*queries.shape[:2], self.slots)
        for heads, keys, _, _ in self._stored():
            logits[heads, :, : keys.shape[2]] = queries[heads].bmm(keys[:, 0].to(queries.dtype).mT)
        return logits

    def _times_values(self, weights: Tensor) -> list[Tensor]:
        """Sums of values, [heads, group, head_dim] by capacity; weights: [heads of all sequences, group, slots]."""
        return [
            weights[heads, :, : values.shape[2]].bmm(values[:, 0].to(weights.dtype))
            for heads, _, values, _ in self._stored()
        ]

    def _decode_in_pytorch(
        self, query: Tensor, query_positions: Tensor, spec: LogitSpec, sink_logits: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Two products per capacity; all between is small, and done at once for all heads."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        of_sinks = None
        if sink_logits is not None:
            of_sinks = self._by_place(sink_logits.to(dtype).expand(len(query), -1))[:, None, :, None]
        logits = self._logits_of_one(query, spec)
        # read only where there is a window
        at = query_positions if spec.window is None else self._of_queries(query_positions)
        probabilities = slot_probabilities(logits[:, None], self._by_place(self.positions), at, spec, of_sinks)[:, 0]
        out = self._by_head(self._times_values(probabilities), query.shape)[:, :, None]
        return out.to(query.dtype), self._by_head([probabilities.sum(1, keepdim=True).float()], self.starts.shape)

    def decode_and_evict(self, *args: Any, **options: Any) -> Tensor:
        raise NotImplementedError("a step of ragged slots is not one op")

    def column_sums(self, query: Tensor, query_positions: Tensor, lse: Tensor, spec: LogitSpec) -> Tensor:
        return self._weighted(self._columns(slot_column_sums, query, query_positions, lse, spec))

    def column_maxima(self, query: Tensor, query_positions: Tensor, lse: Tensor, spec: LogitSpec) -> Tensor:
        return self._weighted(self._columns(slot_column_maxima, query, query_positions, lse, spec))

    def column_squares(self, query: Tensor, query_positions: Tensor, lse: Tensor, spec: LogitSpec) -> Tensor:
        squares = self._columns(slot_column_sums, query, query_positions, 2 * lse, spec.doubled())
        return self._weighted(squares, 2)

    def _weighted(self, received: Tensor, power: int = 1) -> Tensor:
        """What slots received by their logits alone, to such a power, with their log-weights."""
        bias = self.bias
        return received if bias is None else received * (power * bias).exp()

    def _columns(
        self, op: Callable[..., Tensor], query: Tensor, query_positions: Tensor, lse: Tensor, spec: LogitSpec
    ) -> Tensor:
        lses = self._by_place(lse)
        return self._columns_by_head(
            [
                op(queries, keys, positions, at, lses[heads], spec)
                for heads, queries, keys, _, _, positions, at in self._parts(query, query_positions)
            ]
        )

    def _write(self, key: Tensor, value: Tensor) -> None:
        free = self.starts + self.spare
        self.keys[free], self.values[free] = key[:, :, 0], value[:, :, 0]

    def grow(self, slots: int) -> None:
        raise NotImplementedError("ragged slots take room head by head: call `resize`")

    def resize(self, capacities: Tensor) -> None:
        """Gives each head another number of slots, [batch, kv_heads] int64 on the CPU, more than it holds tokens."""
        kept = self.positions != EMPTY
        self.refill(*self.like(), self.positions[..., :0], self.scores, kept, capacities)

    def refill(
        self,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        scores: Tensor,
        kept: Tensor,
        capacities: Tensor,
        fitted: Fitted | None = None,
    ) -> None:
        """Keeps some of the slots and of a chunk's tokens, in new slots.

        Args:
            key, value, positions, scores, kept: as in `replace`.
            capacities: [batch, kv_heads] int64 on the CPU, slots of each head, more than it keeps.
            fitted: values and log-weights in place of those they have.
        """
        old, starts, held, bias = self.slots, self.starts, self._rows(), self.bias
        capacities = self._rounded(capacities)
        columns = int(capacities.max())
        # those kept, in order; of the others as many as there are columns
        order = kept.to(torch.uint8).argsort(dim=-1, stable=True, descending=True)[..., :columns]
        there = kept.gather(-1, order)
        places = torch.cat([self.positions, positions], -1).gather(-1, order)
        missing = (0, max(0, columns - order.shape[-1]))
        self.positions = torch.nn.functional.pad(places.masked_fill(~there, EMPTY), missing, value=EMPTY)
        self.scores = torch.nn.functional.pad(scores.gather(-1, order).masked_fill(~there, 0.0), missing)
        self._lay_out(capacities)
        if bias is not None:
            bias = torch.cat([bias, torch.zeros_like(scores[..., old:])], -1) if fitted is None else fitted.log_weights
            self.weigh(torch.nn.functional.pad(bias.gather(-1, order).masked_fill(~there, 0.0), missing))
        row, head, column = there.nonzero(as_tuple=True)
        source, target = order[row, head, column], self.starts[row, head] + column
        of_slots, of_chunk = source < old, source >= old
        fed = row[of_chunk], head[of_chunk], source[of_chunk] - old
        rows, chunk = {}, self._as_rows(key[fed], value[fed], fed[:2])
        matched, anew = {}, target[:0]
        if fitted is not None:
            is_new = fitted.changed[row, head, source]
            anew, heads = target[is_new], (row[is_new], head[is_new])
            matched = self._as_rows(None, fitted.values[(*heads, source[is_new])], heads)
        for name, stored in held.items():
            slots = stored.new_zeros(int(capacities.sum()), *stored.shape[1:])
            slots[target[of_slots]] = stored[(starts[row, head] + source)[of_slots]]
            slots[target[of_chunk]] = chunk[name]
            if name in matched:
                slots[anew] = matched[name]
            rows[name] = slots
        self._set_rows(rows)
        self.spare = self.positions.argmin(-1)

    def _rounded(self, capacities: Tensor) -> Tensor:
        """So many slots of each head as there can be, at least these."""
        return capacities

    def replace(self, key: Tensor, value: Tensor, positions: Tensor, scores: Tensor, kept: Tensor) -> None:
        raise NotImplementedError("ragged slots are laid out anew: call `refill`")

    @staticmethod
    def nbytes_for(batch: int, kv_heads: int, head_dim: int, itemsize: int, slots: int, has_bias: bool = False) -> int:
        """Bytes of so many slots per head on average, and where they lie."""
        of_slots = SlotSegment.nbytes_for(batch, kv_heads, head_dim, itemsize, slots)
        return of_slots + batch * kv_heads * (slots * 4 * has_bias + 3 * 8)
