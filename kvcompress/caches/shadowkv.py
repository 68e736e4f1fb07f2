"""ShadowKV (arXiv:2410.21465): keeps everything, reads little.

Keys stay on the device as low-rank coefficients without rotation; values are moved off it. Each decode step picks, per
KV head, the chunks whose landmarks its query scores highest, rebuilds their keys and fetches their values, and attends
to those, the outliers and the newest tokens. Nothing is evicted, so what a later question needs is still there.

Where we depart from the paper: sequences that the budget would read whole stay dense; generated tokens are folded into
chunks once there are many; the low-rank space is fitted again when keys leave it; a forward of many tokens reads all
chunks; selected chunks stay in place in an unordered buffer. On a tensor-parallel model each process factorises the
keys of its own heads, with its share of the rank; its errors differ from those of one space for all heads.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import hf
from kvcompress.cache import CompressedCache
from kvcompress.caches.budget import Budget
from kvcompress.caches.dense import DenseLayer
from kvcompress.caches.spans import Spans, attend_ahead
from kvcompress.hf.tensor_parallel import TPGroup
from kvcompress.kernels.attention import causal_attention
from kvcompress.kernels.merge import joint_output, output_of
from kvcompress.layer import AttentionInput, CompressedLayer, ForwardStep
from kvcompress.policies.shadowkv import ShadowKV
from kvcompress.storage.low_rank import ShadowSegment
from kvcompress.storage.offload import check_host
from kvcompress.storage.padding import PaddingRecord
from kvcompress.storage.room import make_room_for_one, reserve_tail
from kvcompress.storage.rope import Rope
from kvcompress.storage.segment import Segment


class ShadowStep(ForwardStep):
    """A forward: a single token is stored by the first query that attends, several when it ends.

    counts: real tokens of each sequence, [batch] on the CPU; None where all are.
    """

    def __init__(self, layer: "ShadowLayer", x: AttentionInput, counts: Tensor | None) -> None:
        super().__init__(x)
        assert layer.segment is not None
        self.layer, self.counts = layer, counts
        self.segment: ShadowSegment = layer.segment
        self.is_stored = False
        self.spans = Spans.of(x)

    def attend(self, x: AttentionInput) -> Tensor:
        if x.tokens == 1:
            again, self.is_stored = self.is_stored, True
            return output_of(*self.layer._read(x, self.segment, again), x.sinks)
        answers = [causal_attention(x.query, x.key, x.value, x.spec, x.visible), *attend_ahead(x, self.spans)]
        if bool((self.segment.lengths > 0).any()):
            answers.append(self.layer._read(x, self.segment))
        return joint_output(answers, x.sinks)

    def commit(self) -> None:
        if self.input.tokens > 1:
            self.layer._store(self.input, self.segment, self.counts)


class ShadowLayer(CompressedLayer):
    """One layer's segment, which decides when to fold its tail.

    A fold is done at the start of a forward, so that what the last one fed can be taken back. Only a long tail, as
    after a prompt, is folded at once; but not while the past is recorded, as generate asks when it drafts: a forward
    may then end in drafts of any length, and its tokens stay in the tail until the next one.
    """

    is_croppable = True
    is_compileable = True
    takes_spans = True
    # tokens that may come before a fold can be due; less than 0 where that is not known
    _patience = -1
    # whether steps are compiled, and those that may come until there is more to make ready
    _reserves = False
    _steps_ready = 0

    def __init__(
        self,
        padding: PaddingRecord,
        settings: ShadowKV,
        budget: int | float,
        host: str,
        rope: Rope | None,
        is_first: bool = False,
    ) -> None:
        """
        Args:
            budget: tokens selected per sequence and KV head, or a fraction of the first forward's real tokens.
            host: where values go, as OffloadedPages takes it.
            rope: the layer's rotary embedding, None if it has none.
            padding, is_first: as in CompressedLayer.
        """
        super().__init__(padding, None, is_first)
        self.settings = settings
        self.budget = budget
        self.host = host
        self.rope = rope
        self.segment: ShadowSegment | None = None

    @property
    def queries_watched(self) -> int | None:  # type: ignore[override]
        # so many read every chunk, and fewer choose those that they read: as if all queries were there
        return 0 if self.segment is None else self.settings.select_queries + 1

    def segments(self) -> list[Segment]:
        return [] if self.segment is None else [self.segment]

    def counters(self) -> dict[str, Tensor]:
        if self.segment is None:
            return {}
        segment = self.segment
        counters = {"counters": segment.fetched, "marks": segment.marks, "page table": segment.host.addresses}
        counters |= {} if self.clock.tensor is None else {"seen": self.clock.tensor}
        return counters if self.rope is None else counters | {"inv_freq": self.rope.inv_freq}

    def fetched_bytes(self) -> int:
        if self.segment is None:
            return 0
        values = self.segment.values
        return int(self.segment.fetched[0]) * self.settings.chunk * values.shape[3] * values.element_size()

    @property
    def fetching_forwards(self) -> int:  # type: ignore[override]
        # each layer that shares the tokens reads them
        return 0 if self.segment is None else int(self.segment.fetched[1]) // (1 + self.kv_consumers)

    def is_traceable(self, tokens: int) -> bool:
        # what lies in a file is collected by the host
        reads_files = self.host != "pinned" and self.is_initialized and self.device.type == "cuda"
        return self.segment is not None and tokens == 1 and self._reserves and not reads_files

    def reserve(self, steps: int | None = None) -> None:
        """Makes ready for so many steps that are compiled, which fold nothing; None: until the next fold is due."""
        self._reserves, self._steps_ready = True, 0
        segment = self.segment
        if segment is None:
            return
        self._fold_when_due()
        folding = self.settings.local_chunks * self.settings.chunk + self.settings.fold
        longest = torch.where(segment.folded > 0, folding, self._dense_tokens()) + 1
        reserve_tail(segment, max(int(longest.max()), int(segment.tails().max()) + (steps or 0)))
        self._steps_ready = self._patience + 1

    def forward_comes(self) -> None:
        """Called by generate before a forward, outside of what it compiles."""
        if self._reserves and self.segment is not None:
            if not self._steps_ready:
                self.reserve()
            self._steps_ready -= 1

    def _begin(self, chunk: AttentionInput) -> ForwardStep:
        if torch.compiler.is_compiling():
            # when a fold is due the host must look
            self._patience = -1
            return ShadowStep(self, chunk, None)
        counts = self._counts(chunk)
        if counts is None and not (chunk.tokens == 1 and chunk.query.is_cuda):
            chunk = dataclasses.replace(chunk, visible=None)
        if self.segment is None:
            self._new_segment(chunk, counts)
        assert self.segment is not None
        self._fold_when_due()
        self._patience -= chunk.tokens
        if chunk.tokens == 1:
            make_room_for_one(self.segment)
        return ShadowStep(self, chunk, counts)

    def _counts(self, chunk: AttentionInput) -> Tensor | None:
        """Real tokens of each sequence, [batch] on the CPU, where not all are; not asked for where one token comes to a
        segment on a GPU, as to look is to wait."""
        if chunk.tokens == 1 and chunk.query.is_cuda and self.segment is not None:
            return None
        known = self.padding.counts(chunk.visible)
        return None if known is None else torch.tensor(known)

    def _store(self, chunk: AttentionInput, segment: ShadowSegment, counts: Tensor | None) -> None:
        """Stores several tokens; counts: as in ShadowStep."""
        fresh = torch.full_like(segment.lengths, chunk.tokens) if counts is None else counts
        overdue, was_empty = self._overdue(fresh), segment.lengths == 0
        due = (overdue > self.settings.fold) | (was_empty & (overdue > 0))
        folding = torch.zeros_like(fresh) if self.record_past else self._chunks(due, fresh)
        segment.append(chunk.key, chunk.value, chunk.visible, counts, folding)
        self._patience, self._steps_ready = -1, 0

    def _read(self, chunk: AttentionInput, segment: ShadowSegment, again: bool = False) -> tuple[Tensor, Tensor]:
        """Attention to what the segment holds, and its log-sum-exp; one token goes into the tail first, unless it is
        there `again`."""
        if chunk.tokens == 1:
            return segment.decode(chunk.query, chunk.key, chunk.value, chunk.spec, chunk.visible, again)
        queries = chunk.queries
        positions = torch.zeros(chunk.query.shape[0], queries, dtype=torch.int32, device=chunk.query.device)
        visible = None if chunk.visible is None else chunk.visible[:, -queries:]
        return segment.attend(chunk.query, positions, chunk.spec, visible)

    def _new_segment(self, chunk: AttentionInput, counts: Tensor | None) -> None:
        batch = chunk.key.shape[0]
        real = torch.full((batch,), chunk.tokens) if counts is None else counts
        tokens = torch.full_like(real, self.budget) if isinstance(self.budget, int) else (self.budget * real).long()
        limits = (tokens // self.settings.chunk).clamp(min=1)
        self.segment = ShadowSegment(self.settings, self.rope, self.host, chunk.key, chunk.value, limits)
        self._begin_counting()
        # generate compiles the decode step on a GPU
        self._reserves |= chunk.key.is_cuda

    def _begin_counting(self) -> None:
        assert self.segment is not None
        seen = self.clock.seen
        counted = torch.full((), seen, dtype=torch.int64, device=self.segment.keys.device)
        torch._dynamo.mark_static_address(counted, guard=False)
        self.clock.count_on(counted, seen)
        self._patience, self._steps_ready = -1, 0

    def _overdue(self, fresh: Tensor | int = 0) -> Tensor:
        """By how many tokens each tail is too long, [batch] int64 on the CPU, once it has `fresh` more."""
        segment, settings = self.segment, self.settings
        assert segment is not None
        folding = settings.local_chunks * settings.chunk + settings.fold
        dense = segment.lengths - self._dense_tokens()
        return fresh + torch.where(segment.folded > 0, segment.tails() - folding, dense)

    def _dense_tokens(self) -> Tensor:
        """Tokens up to which each sequence stays dense, [batch] int64 on the CPU."""
        segment, settings = self.segment, self.settings
        assert segment is not None
        return settings.dense_tokens(segment.limits).clamp(min=(settings.local_chunks + 1) * settings.chunk - 1)

    def _chunks(self, due: Tensor, fresh: Tensor | int = 0) -> Tensor:
        """How many chunks to fold where a fold is due, [batch] int64 on the CPU, with `fresh` more tokens in a tail."""
        assert self.segment is not None
        whole = (self.segment.tails() + fresh) // self.settings.chunk - self.settings.local_chunks
        return whole.clamp(min=0) * due

    def _fold_when_due(self) -> None:
        """Folds where tails are too long; looks only where one may be."""
        assert self.segment is not None
        if self._patience < 0:
            overdue = self._overdue()
            if bool((overdue > 0).any()):
                self.segment.fold(self._chunks(overdue > 0))
                overdue = self._overdue()
            self._patience = -int(overdue.max())

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        super().map_tensors(change)
        self._patience, self._steps_ready = -1, 0

    def _remap(self, remap: Tensor) -> None:
        assert self.segment is not None
        self.segment.hide(remap)
        self._patience, self._steps_ready = -1, 0

    def _removed(self, tokens: int) -> Tensor:
        """How many of the last columns are real tokens, for each sequence, [batch] int64 on the CPU."""
        assert self.segment is not None
        real = self.padding.real_of_last(tokens, self.clock.seen)
        return torch.full_like(self.segment.lengths, tokens) if real is None else torch.tensor(real)

    def check_crop(self, tokens: int) -> None:
        if tokens > self.clock.seen:
            raise ValueError(f"crop can take back {self.clock.seen} tokens here, got {tokens}")
        if tokens and self.segment is not None and bool((self._removed(tokens) > self.segment.tails()).any()):
            raise ValueError(
                f"ShadowKV can take back only tokens that are not folded, here {int(self.segment.tails().min())}, "
                f"got {tokens}; call activate_past_recording() before they are fed, clone() the cache first, or use "
                "DenseCache"
            )

    def _crop(self, tokens: int) -> None:
        assert self.segment is not None
        self.segment.drop_last(self._removed(tokens))

    def reset(self) -> None:
        super().reset()
        self.segment = None

    def dump(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, facts = ({}, {}) if self.segment is None else self.segment.dump()
        return tensors, super().dump()[1] | facts

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        super().restore(tensors, facts)
        if tensors:
            self.segment = ShadowSegment.load(tensors, facts, settings=self.settings, rope=self.rope, host=self.host)
            self.lazy_initialization(self.segment.keys, self.segment.values)
            self._begin_counting()


def selected_budget(amount: int | float, chunk: int) -> Budget:
    """A budget of tokens that a step selects, at least a chunk of them."""
    return Budget(amount, chunk, f"one chunk = {chunk} tokens", "the first forward")


class ShadowKVCache(CompressedCache):
    """Low-rank keys on the device, values on the host, fetched as needed: `ShadowKVCache(model, budget=2048)`."""

    serves_chunks = True

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        budget: int | float = 2048,
        rank: int | None = None,
        chunk: int = 8,
        outlier_chunks: int = 48,
        local_chunks: int = 4,
        host: str = "pinned",
        fold: int = 256,
        dense_below: int | None = None,
        select_queries: int = 64,
        drift: float = ShadowKV.drift,
        group: Literal["max", "mean", "sum"] = "max",
    ) -> None:
        """
        Args:
            model: the model the cache will be used with.
            budget: tokens selected per sequence and KV head in each step: a count, or a fraction of the real tokens of
                the first forward. Outliers and the newest tokens are read in addition.
            host: "pinned" (page-locked memory if there is a GPU, else plain memory), or "mmap:" and a folder, for files
                that are deleted with the cache.
            rank, chunk, outlier_chunks, local_chunks, fold, dense_below, select_queries, drift, group: as in
                kvcompress.policies.shadowkv.ShadowKV.

        Raises:
            ValueError: a setting is out of range, the model is unsupported, or its rotary embedding cannot be undone.
        """
        self.settings = ShadowKV(
            rank, chunk, outlier_chunks, local_chunks, fold, dense_below, select_queries, drift, group
        )
        self.budget = selected_budget(budget, chunk).amount
        self.host = check_host(host)
        super().__init__(model)

    def _layer(self, index: int, window: int | None) -> CompressedLayer:
        if window is not None:
            sliding = DenseLayer(self.padding, window, is_first=index == self.attending[0])
            sliding.reserves_on_gpu = True
            return sliding
        model = self._model()
        assert model is not None
        settings, ranks, widths = self.settings, TPGroup.of(model), hf.key_widths(hf.text_config(model))
        if settings.rank is not None and settings.rank <= max(widths.values()):
            # narrower layers keep their keys whole
            settings = dataclasses.replace(settings, rank=min(settings.rank, widths[index]))
        if ranks is not None and settings.rank is not None:
            # each process factorises the keys of its own heads; together they keep as many numbers as one would
            settings = dataclasses.replace(settings, rank=max(1, settings.rank // ranks.size))
        return ShadowLayer(
            self.padding, settings, self.budget, self.host, Rope.of(model, index), is_first=index == self.attending[0]
        )

    def _settings(self) -> dict[str, Any]:
        return {"budget": self.budget, "host": self.host, **dataclasses.asdict(self.settings)}
