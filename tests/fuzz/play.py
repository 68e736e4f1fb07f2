"""Plays a case, and judges it.

Every copy of the cache that a case makes goes on by itself. At the end, and before one is reset, each is judged:

    the oracle            its logits are those of full attention over what it says it kept
    the bytes             memory() reports the live storages, and no more tokens than the budget
    the same cache, fed   one that is fed its transcript straight through, and one that is fed a single row of it
                          without its padding, keep the same tokens (evicting caches)

What is not a number is none to the oracle either, for all whom it reaches, and has no say in what is kept. What ran
under autocast is judged within the rounding of bfloat16; what it keeps is not compared. The last check could fail where
two scores are equal up to rounding; a case that fails there is played again in float64, and fails if it fails again.
"""

import copy
import dataclasses
import functools
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, PreTrainedModel

from kvcompress import EvictingCache, HydragenCache, ShadowKVCache
from kvcompress.caches import dense
from kvcompress.prefix import layer as prefix_layer
from tests.contract.caches import LARGE, SHADOW, Entry, by_name, everything
from tests.contract.drive import assert_same_state, feed, generate
from tests.contract.models import DEVICE, END, IN_NODES, PAD, VOCABULARY, left_padded, places, tiny
from tests.contract.oracle import Forward, Transcript, assert_equals_oracle, holders, oracle_of
from tests.contract.test_memory import storages
from tests.fuzz.cases import Call, Case

TOKENS, ROWS, COPIES = 90, 6, 3
# tokens that end a row, no two in one row alike; and one that is not a number
ENDS, NO_NUMBER = tuple(range(END - 7, END + 1)), 1
# of bfloat16, through three layers of large weights
ROUNDED = {"rtol": 0.1, "atol": 0.8}


class KeptDifferentlyError(AssertionError):
    """Two caches that saw the same keep different tokens; rounding may be why."""


# of the shared models, whose embeddings spoil what is to be spoiled
_oracle_of = functools.cache(oracle_of)


@dataclass
class Live:
    """A cache, what went through it, and whether tokens were taken back or hidden later, or more than a window can.

    entry: how it is read. ahead: how far the model's positions are ahead of the places of a row's tokens, [batch]; None
    where they are those. rounded: a forward ran in few bits.
    """

    cache: Any
    entry: Entry
    transcript: Transcript = field(default_factory=Transcript)
    cropped: bool = False
    hidden: bool = False
    short: bool = False
    # tokens fed since the mask last changed; a transcript knows no older mask
    since_hidden: int = TOKENS
    ahead: Tensor | None = None
    rounded: bool = False

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.transcript.map_rows(change)
        self.ahead = None if self.ahead is None else change(self.ahead)


def play(case: Case) -> None:
    """Raises what goes wrong."""
    slack = dense.SLACK if case.slack is None else case.slack
    with patch.object(dense, "SLACK", slack), patch.object(prefix_layer, "SLACK", slack):
        try:
            _Game(case, torch.float32).play()
        except KeptDifferentlyError:
            _Game(case, torch.float64).play()


class _Ends(LogitsProcessor):
    """Rows of a batch that say an end, each at its own length; at: [batch] of (length, token), or None."""

    def __init__(self, at: list[tuple[int, int] | None]) -> None:
        self.at = at

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for row, end in zip(scores, self.at, strict=True):
            if end is not None and end[0] == input_ids.shape[1]:
                row[:] = -torch.inf
                row[end[1]] = 0.0
        return scores


class _Game:
    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.case = case
        self.model: PreTrainedModel = tiny(
            case.family, **case.sizes, **({"dtype": dtype} if dtype.itemsize > 4 else {})
        )
        self.lives = [Live(case.entry.make(self.model), case.entry)]

    def play(self) -> None:
        settings = self.model.generation_config
        ends = list(ENDS) if self.case.ends else settings.eos_token_id
        with patch.object(settings, "eos_token_id", ends), patch.object(settings, "pad_token_id", PAD):
            handle = self.model.get_input_embeddings().register_forward_hook(_spoil)
            try:
                self._play()
            finally:
                handle.remove()

    def _play(self) -> None:
        for call in self.case.calls:
            rng = random.Random(call.seed)
            live = rng.choice(self.lives)
            self._do(call, rng, live)
            self._is_consistent(live)
        for live in self.lives:
            self._judge(live, random.Random(self.case.seed))

    def _do(self, call: Call, rng: random.Random, live: Live) -> None:
        if call.name == "reset":
            self._judge(live, rng)
            live.cache.reset()
            assert live.cache.get_seq_length() == 0
            assert live.cache.memory().total_bytes == 0
            entry = by_name["hydragen"] if isinstance(live.cache, HydragenCache) else live.entry
            self._put(live, Live(live.cache, entry))
        elif call.name in ("clone", "save", "fork"):
            # outside of any recording, whose notes a copy would share
            self._fork(call, rng, live)
        elif call.name in ("push", "pop", "share"):
            getattr(self, f"_{call.name}")(rng, live)
        else:
            with self._mode(rng, live), live.entry.recording(self.model, live.cache, live.transcript):
                getattr(self, f"_{call.name}")(rng, live)

    @contextmanager
    def _mode(self, rng: random.Random, live: Live | None = None) -> Iterator[None]:
        """The modes of torch that a call is made in."""
        with ExitStack() as modes:
            if rng.random() < self.case.inference:
                modes.enter_context(torch.inference_mode())
            if live is not None and rng.random() < self.case.autocast:
                modes.enter_context(torch.autocast(DEVICE, torch.bfloat16))
                # which leaves float64 as it is
                live.rounded = self.model.dtype == torch.float32
            yield

    # what a case can do

    def _feed(self, rng: random.Random, live: Live, past: Tensor | None = None) -> None:
        tokens = min(rng.choice([1, 2, 3, 5, 8, 13, 20, 34]), TOKENS - live.transcript.seen)
        if tokens < 1:
            return
        if _holds_nodes_only(live) and live.cache.batch_size * 2 <= ROWS and rng.random() < 0.5:
            past = None if past is None else past.repeat_interleave(2, 0)
            live.map_rows(lambda rows: rows.repeat_interleave(2, 0))
        ids = self._fresh(rng, live, tokens)
        shown = _padding(rng, *ids.shape)
        self._spoil_one(rng, live, ids, shown)
        self._run(rng, live, ids, self._mask(live, shown, past))

    def _decode(self, rng: random.Random, live: Live) -> None:
        finished = rng.choice([0.0, 0.0, 0.3])
        by_mask = rng.random() < 0.4
        for _ in range(min(rng.randint(1, 10), TOKENS - live.transcript.seen)):
            ids = self._fresh(rng, live, 1)
            shown = torch.tensor([[rng.random() >= finished] for _ in range(len(ids))], device=DEVICE)
            filled = self._end(rng, live, ids, shown, by_mask) if self.case.ends else []
            self._spoil_one(rng, live, ids, shown)
            mask = self._mask(live, shown)
            if filled and not by_mask:
                # who feeds filler shows it too
                mask[filled, :-1] |= live.transcript.filler[filled].long()
            self._run(rng, live, ids, mask)

    def _end(self, rng: random.Random, live: Live, ids: Tensor, shown: Tensor, by_mask: bool) -> list[int]:
        """Ends rows, [batch, 1], and goes on with those that have ended as `generate` does; the latter rows."""
        over = [row for row in range(len(ids)) if live.transcript.forwards and _is_over(live, row)]
        filled = [row for row in over if rng.random() < 0.75]
        if len(filled) == len(ids):
            filled = []
        for row in range(len(ids)):
            had = live.transcript.ids[row].tolist() if live.transcript.forwards else []
            ends = [end for end in ENDS if end not in had]
            if row in filled:
                ids[row], shown[row] = PAD, not by_mask
            elif len(ids) > 1 and ends and rng.random() < 0.25:
                ids[row], shown[row] = rng.choice(ends), True
        return filled

    def _spoil_one(self, rng: random.Random, live: Live, ids: Tensor, shown: Tensor) -> None:
        """Makes one of new tokens that are shown one that is not a number."""
        row, column = rng.randrange(len(ids)), rng.randrange(ids.shape[1])
        if not self.case.spoils or rng.random() < 0.7 or not shown[row, column] or ids[row, column] in (PAD, *ENDS):
            return
        ids[row, column] = NO_NUMBER
        if ids.shape[1] > 1 or live.entry.decoded is not None:
            # zero times NaN is NaN: tokens fed together, or packed together, do not come clean when it is taken back
            spoiled = torch.zeros(len(ids), dtype=torch.bool, device=DEVICE)
            spoiled[row] = True
            before = live.transcript.spoiled
            live.transcript.spoiled = spoiled if before is None else before | spoiled

    def _run(self, rng: random.Random, live: Live, ids: Tensor, mask: Tensor) -> None:
        """A forward of new tokens [batch, tokens], at the positions where the case has them."""
        counted, (batch, tokens) = places(mask)[:, -ids.shape[1] :], ids.shape
        gaps = torch.zeros_like(counted)
        if self.case.positions != "counted":
            self._shift(rng, live, batch)
            if self.case.positions == "gaps" and rng.random() < 0.4 and int(live.ahead.max()) < 350:
                for row, shown in enumerate((mask[:, -tokens:].bool() & (ids != PAD)).tolist()):
                    column = rng.randrange(tokens)
                    if shown[column] and rng.random() < 0.7:
                        gaps[row, column:] = rng.randint(1, 12)
            counted = counted + live.ahead[:, None]
        shown = mask[:, -tokens:].bool()
        # behind a token of the row
        known = mask[:, :-tokens].bool().any(1) | (shown & (gaps == 0)).any(1)
        try:
            feed(self.model, live.cache, ids, mask, counted + gaps)
            served = not bool((known & (gaps[:, -1] > 0)).any()) or not live.cache.padding.needs_even_positions
            assert served, "a cache that takes rotations back took a gap for none"
        except ValueError as error:
            # one that takes rotations back serves no gaps; nodes stand where they were counted
            if gaps.any() and "comes next" in str(error) and live.cache.padding.needs_even_positions:
                gaps = torch.zeros_like(counted)
            elif live.ahead is not None and "follow those that the cache holds" in str(error):
                gaps, live.ahead = torch.zeros_like(counted), torch.zeros_like(live.ahead)
                counted = places(mask)[:, -tokens:]
            else:
                raise
            assert live.cache.get_seq_length() == live.transcript.seen
            feed(self.model, live.cache, ids, mask, counted)
        if live.ahead is not None:
            live.ahead = live.ahead + gaps[:, -1]
        live.since_hidden += tokens

    def _shift(self, rng: random.Random, live: Live, batch: int) -> None:
        if live.ahead is None:
            live.ahead = torch.tensor([rng.choice([0, rng.randint(1, 60)]) for _ in range(batch)], device=DEVICE)

    def _generate(self, rng: random.Random, live: Live) -> None:
        """A turn: new tokens after all that was fed, and an answer."""
        tokens, answer = rng.randint(1, 20), rng.randint(1, 8)
        if tokens + answer > TOKENS - live.transcript.seen or _spoiled(live.transcript) is not None:
            # what is no number chooses no token
            return
        ids = self._fresh(rng, live, tokens)
        if self.case.positions != "counted":
            self._shift(rng, live, len(ids))
        if live.ahead is not None and bool(live.ahead.any()) and _holds_nodes_only(live):
            # refused, as a forward is
            return
        mask = self._mask(live, _padding(rng, *ids.shape, rng.choice(["none", "left"])))
        settings: dict[str, Any] = {}
        if not live.transcript.forwards and len(ids) <= 3:
            settings["num_beams"] = rng.choice([1, 2])
        if rng.random() < 0.3:
            settings["prefill_chunk_size"] = rng.randint(1, tokens)
        if live.transcript.forwards:
            ids = torch.cat([live.transcript.ids, ids], 1)
            settings.pop("prefill_chunk_size", None)
        if live.ahead is not None:
            settings["position_ids"] = places(mask) + live.ahead[:, None]
        if self.case.ends and settings.get("num_beams", 1) == 1:
            settings["logits_processor"] = [_Ends([self._says_end(rng, row, answer) for row in ids])]
        before = live.transcript.seen
        how = {"no_repeat_ngram_size": 1, "suppress_tokens": [PAD, NO_NUMBER, *ENDS], "max_new_tokens": answer}
        generate(self.model, live.cache, ids, mask.long(), **how, **settings)
        live.since_hidden += live.transcript.seen - before
        if live.ahead is not None and len(live.ahead) < live.cache.batch_size:
            live.ahead = live.ahead.repeat_interleave(live.cache.batch_size // len(live.ahead))

    def _says_end(self, rng: random.Random, row: Tensor, answer: int) -> tuple[int, int] | None:
        ends = [end for end in ENDS if end not in row.tolist()]
        return (len(row) + rng.randrange(answer), rng.choice(ends)) if ends and rng.random() < 0.5 else None

    def _hide(self, rng: random.Random, live: Live) -> None:
        """A new mask makes padding of tokens that were none: what a row of a batch was given while it waited."""
        layers = live.cache.layers
        if not live.transcript.forwards or live.entry.name.startswith("h2o_rolled"):
            # the oracle reads where rolled tokens stand before it knows which of them the mask hides
            return
        if all(layer.get_seq_length() == 0 for layer in layers):
            return
        if _holds_nodes_only(live):
            # a mask that shows less says that the rest comes again
            return
        past = live.transcript.visible.clone()
        newest = rng.randint(1, past.shape[1])
        if self.case.ends and rng.random() < 0.6:
            past &= live.transcript.ids != PAD
        else:
            for row in past:
                if rng.random() < 0.6:
                    row[-newest:] &= torch.tensor([rng.random() < 0.3 for _ in range(newest)], device=row.device)
        live.hidden = live.hidden or not torch.equal(past, live.transcript.visible)
        live.since_hidden, seen = 0, live.transcript.seen
        with warnings.catch_warnings(record=True) as told:
            # whatever this process does with warnings
            warnings.simplefilter("always")
            try:
                self._feed(rng, live, past)
            except ValueError as error:
                # what another cache holds for all of its rows
                if live.entry.name != "shared" or "cannot be cropped" not in str(error):
                    raise
                assert live.cache.get_seq_length() == seen
        live.short = live.short or any("gone since" in str(warning.message) for warning in told)

    def _reorder_cache(self, rng: random.Random, live: Live) -> None:
        if live.transcript.forwards:
            batch = live.cache.batch_size
            self._move(live, "reorder_cache", torch.tensor([rng.randrange(batch) for _ in range(batch)], device=DEVICE))

    def _batch_select_indices(self, rng: random.Random, live: Live) -> None:
        if not live.transcript.forwards:
            return
        batch = live.cache.batch_size
        rows = [rng.randrange(batch) for _ in range(rng.randint(1, batch))]
        if rng.random() < 0.3:
            indices = torch.tensor([row in rows for row in range(batch)], device=DEVICE)
        else:
            indices = torch.tensor(rows, device=DEVICE)
        self._move(live, "batch_select_indices", indices)

    def _move(self, live: Live, method: str, indices: Tensor) -> None:
        getattr(live.cache, method)(indices)
        if live.ahead is not None:
            live.ahead = live.ahead[indices]

    def _batch_repeat_interleave(self, rng: random.Random, live: Live) -> None:
        if live.transcript.forwards and live.cache.batch_size * 2 <= ROWS:
            repeats = rng.choice([1, 2, 2])
            live.cache.batch_repeat_interleave(repeats)
            if live.ahead is not None:
                live.ahead = live.ahead.repeat_interleave(repeats)

    def _crop(self, rng: random.Random, live: Live) -> None:
        seen = live.transcript.seen
        most = min(seen, live.since_hidden) - 1
        if most < 1:
            return
        tokens = min(rng.choice([0, 1, 1, 2, 4, 9, 30]), most)
        before = [None if kept is None else kept.clone() for kept in live.entry.kept(live.cache)]
        try:
            live.cache.crop(-tokens)
        except ValueError:
            # dense caches without windows give everything back
            assert live.entry.name != "dense" or any(layer.window for layer in live.cache.layers)
            assert tokens
            assert live.cache.get_seq_length() == seen
            for kept, was in zip(live.entry.kept(live.cache), before, strict=True):
                assert (kept is None and was is None) or torch.equal(kept, was)
            return
        assert live.entry.croppable or not tokens, "took back what was evicted"
        assert live.cache.get_seq_length() == seen - tokens
        live.since_hidden -= tokens
        live.cropped = live.cropped or tokens > 0

    def _fork(self, call: Call, rng: random.Random, live: Live) -> None:
        """A copy, which goes on beside the first where there is room for it, and in its place where not."""
        copies = 1
        with self._mode(rng):
            if call.name == "clone":
                # a copy of a copy, whose first goes
                cache = live.cache
                for _ in range(rng.choice([1, 1, 2, 4])):
                    cache = copy.deepcopy(cache) if rng.random() < 0.3 else cache.clone()
            elif call.name == "fork":
                if not live.transcript.forwards:
                    return
                copies = rng.choice([1, 2]) if live.cache.batch_size * 2 <= ROWS else 1
                cache = live.cache.fork(copies)
            else:
                cache = live.cache
                with tempfile.TemporaryDirectory() as folder:
                    for path in (Path(folder) / name for name in rng.choice(["a", "a", "ab"])):
                        cache.save(path)
                        cache = type(cache).load(path, self.model)
        if live.transcript.forwards and call.name != "fork":
            assert_same_state(live.entry, cache, live.cache)
            # a file has no tables of a tree's rows, and none of the pages that only rows now gone used
            assert cache.memory().device_bytes <= live.cache.memory().device_bytes
            assert cache.memory().total_bytes <= live.cache.memory().total_bytes
        other = copy.copy(live)
        other.cache, other.transcript = cache, copy.deepcopy(live.transcript)
        other.map_rows(lambda rows: rows.repeat_interleave(copies, 0))
        self._add(rng, live, other)

    def _add(self, rng: random.Random, live: Live, other: Live) -> None:
        if len(self.lives) < COPIES:
            self.lives.append(other)
        else:
            self._judge(live, rng)
            self._put(live, other)

    def _put(self, live: Live, other: Live) -> None:
        self.lives[next(index for index, each in enumerate(self.lives) if each is live)] = other

    # prefixes

    def _push(self, rng: random.Random, live: Live) -> None:
        """A level of a tree, whose tokens run without anybody seeing their logits."""
        rows = len(live.transcript.ids) if live.transcript.forwards else self.case.batch
        tokens = min(rng.randint(1, 9), TOKENS - live.transcript.seen)
        if not self._has_levels(live) or tokens < 1:
            return
        self._judge(live, rng)
        if live.transcript.forwards and rows * 2 <= ROWS and rng.random() < 0.4:
            live.map_rows(lambda rows: rows.repeat_interleave(2, 0))
        ids = self._fresh(rng, live, tokens)
        shown = _padding(rng, *ids.shape, rng.choice(["none", "left"]))
        with self._mode(rng, live):
            live.cache.push(ids, shown.long())
        held = [[] for _ in ids] if not live.transcript.forwards else _rows(live.transcript)
        _lay_out(live, [had + row[real].tolist() for had, row, real in zip(held, ids, shown, strict=True)])

    def _pop(self, rng: random.Random, live: Live) -> None:
        if not self._has_levels(live) or not live.transcript.forwards or not live.cache.tree.nodes:
            return
        self._judge(live, rng)
        with self._mode(rng):
            live.cache.pop()
        lengths = live.cache.tree.lengths()
        if any(lengths):
            _lay_out(live, [row[:length] for row, length in zip(_rows(live.transcript), lengths, strict=True)])
        else:
            live.cache.reset()
            self._put(live, Live(live.cache, live.entry))

    def _has_levels(self, live: Live) -> bool:
        """Whether a level can be added and taken back: tokens that were hidden were seen by others."""
        return live.entry.name == "hydragen" and live.ahead is None and not live.hidden and not live.short

    def _share(self, rng: random.Random, live: Live) -> None:
        """A cache whose rows begin with a prefix: what prompts have in common, or what another cache holds."""
        other = Live(None, by_name["hydragen"])
        with self._mode(rng, other):
            if self.case.entry.name == "hydragen":
                self._share_prompts(rng, other)
            elif self.case.family in IN_NODES and not self.case.entry.name.startswith("h2o_rolled"):
                self._share_cache(rng, other)
        if other.cache is not None:
            self._add(rng, live, other)

    def _share_prompts(self, rng: random.Random, live: Live) -> None:
        ids = self._fresh(rng, live, rng.randint(2, 24))
        # some begin as the first does, and all end apart
        rows = [rng.choice([row, torch.cat([ids[0, : rng.randint(1, ids.shape[1])], row[-1:]])]) for row in ids]
        ids, mask = left_padded([row[: max(1, rng.randint(len(row) // 2, len(row)))] for row in rows])
        copies = rng.choice([1, 1, 2])
        live.cache = HydragenCache(self.model, ids, mask, copies=copies, min_tokens=rng.choice([1, 1, 4]))
        seen = int(live.cache.get_seq_length())
        if seen:
            live.transcript.forwards.append(_unseen(ids[:, :seen], mask[:, :seen], live.cache))
            live.map_rows(lambda rows: rows.repeat_interleave(copies, 0))
            ids, mask = ids.repeat_interleave(copies, 0), mask.repeat_interleave(copies, 0)
        with live.entry.recording(self.model, live.cache, live.transcript):
            feed(self.model, live.cache, ids[:, seen:], mask)

    def _share_cache(self, rng: random.Random, live: Live) -> None:
        """What a cache of the case's kind holds of one sequence is the prefix of several."""
        entry = self.case.entry
        donor = entry.make(self.model)
        if entry.name.startswith("shadowkv"):
            # which chunks are read depends on who asks; here all are
            settings = SHADOW | self.case.settings | {"budget": LARGE}
            donor, entry = ShadowKVCache(self.model, **settings), dataclasses.replace(entry, kept=everything)
        fed = [rng.randint(2, 30), *[1] * rng.randint(0, 4)]
        with entry.recording(self.model, donor, live.transcript):
            for tokens in fed:
                feed(self.model, donor, self._fresh(rng, live, tokens, 1))
        held, decoded = entry.kept(donor), None if entry.decoded is None else entry.decoded(donor)
        held = [None if each is None else each.clone() for each in held]
        live.cache = HydragenCache.from_cache(donor, min_tokens=rng.choice([1, 5]))

        def grown(cache: Any, tensor: Tensor | None, value: Any) -> Tensor | None:
            """What is known of the prefix's tokens, [1, kv_heads, tokens, ...], of all tokens of any row."""
            if tensor is None:
                return None
            more = int(cache.get_seq_length()) - tensor.shape[2]
            return torch.cat([tensor, tensor.new_full((1, tensor.shape[1], more, *tensor.shape[3:]), value)], 2)

        live.entry = Entry(
            "shared",
            self.case.entry.make,
            kept=lambda cache: [grown(cache, each, True) for each in held],
            croppable=True,
            decoded=decoded
            # keys, values and, where they are fitted, log-weights
            and (lambda cache: [tuple(map(grown, [cache] * 3, each, (torch.nan, torch.nan, 0.0))) for each in decoded]),
        )
        copies = rng.randint(1, 3)
        live.map_rows(lambda rows: rows.repeat_interleave(copies, 0))
        ids = self._fresh(rng, live, rng.randint(1, 9))
        shown = _padding(rng, *ids.shape, rng.choice(["none", "left"]))
        with live.entry.recording(self.model, live.cache, live.transcript):
            feed(self.model, live.cache, ids, self._mask(live, shown))

    # what is fed

    def _fresh(self, rng: random.Random, live: Live, tokens: int, batch: int | None = None) -> Tensor:
        """Tokens [batch, tokens] that no row has had; some rows begin alike."""
        past = live.transcript.ids.tolist() if live.transcript.forwards else [[]] * (batch or self.case.batch)
        together = rng.choice([0, 0, tokens // 2, tokens])
        rows: list[list[int]] = []
        for had in past:
            taken = {PAD, NO_NUMBER, *ENDS, *had}
            common = [token for token in rows[0][:together] if token not in taken] if rows else []
            left = [token for token in range(VOCABULARY) if token not in taken and token not in common]
            rows.append([*common, *rng.sample(left, tokens - len(common))])
        return torch.tensor(rows, device=DEVICE)

    def _mask(self, live: Live, shown: Tensor, past: Tensor | None = None) -> Tensor:
        if not live.transcript.forwards:
            return shown.long()
        past = live.transcript.visible if past is None else past
        if self.case.shows_filler and not live.cache.padding.needs_even_positions:
            past = past | live.transcript.filler
        return torch.cat([past, shown], 1).long()

    # what must hold

    def _is_consistent(self, live: Live) -> None:
        """What costs little to check, after each call."""
        live = live if live in self.lives else self.lives[-1]
        cache, transcript = live.cache, live.transcript
        assert cache.get_seq_length() == transcript.seen
        if not transcript.forwards:
            return
        assert cache.batch_size == len(transcript.ids)
        assert {int(layer.get_seq_length()) for layer in cache.layers} == {transcript.seen}

    def _judge(self, live: Live, rng: random.Random) -> None:
        if not live.transcript.forwards:
            return
        report = live.cache.memory()
        assert report.total_bytes == sum(storages(live.cache).values()), "memory() is not what lives"
        assert report.tokens_seen == live.transcript.seen
        spoiled = live.transcript.spoiled
        live.transcript.spoiled = _spoiled(live.transcript)
        if not live.short:
            assert_equals_oracle(_oracle_of(self.model), live.transcript, **(ROUNDED if live.rounded else {}))
        if isinstance(live.cache, EvictingCache):
            self._keeps_its_budget(live)
            if not live.rounded:
                self._keeps_what_it_would_fed_straight(live)
                self._keeps_what_a_row_alone_does(live, rng)
        live.transcript.spoiled = spoiled

    def _keeps_its_budget(self, live: Live) -> None:
        cache = live.cache
        if not isinstance(cache.budget, int) or cache.allocation != "uniform":
            return
        attending = [cache.layers[index] for index in cache.attending]
        if any(layer.keeps_answers for layer in attending):
            # on top of the budget
            return
        real = live.transcript.visible.sum(-1)[:, None]
        for layer, kept in zip(attending, cache.memory().tokens_kept, strict=True):
            if layer.window is not None or live.hidden:
                assert (kept <= real.clamp(max=cache.budget)).all(), "more than the budget"
            else:
                assert torch.equal(kept, real.clamp(max=cache.budget).expand_as(kept)), "not the budget"

    def _keeps_what_it_would_fed_straight(self, live: Live) -> None:
        straight = live.entry.make(self.model)
        for forward in live.transcript.forwards:
            feed(self.model, straight, forward.ids, forward.visible.long(), forward.position_ids)
        # what is not a number is chosen by nothing
        whole = slice(None) if live.transcript.spoiled is None else ~live.transcript.spoiled
        self._keep_the_same(live, straight, whole, whole, "straight through")

    def _keeps_what_a_row_alone_does(self, live: Live, rng: random.Random) -> None:
        forwards = live.transcript.forwards
        row = rng.randrange(len(forwards[0].ids))
        if live.hidden or (live.transcript.spoiled is not None and live.transcript.spoiled[row]):
            # tokens hidden later were seen by others
            return
        alone = live.entry.make(self.model)
        for forward in forwards:
            shown = forward.visible[row, -forward.queries :]
            if shown.any():
                at = forward.position_ids[row, shown][None]
                feed(self.model, alone, forward.ids[row, shown][None], position_ids=at)
        if forwards and alone.get_seq_length():
            self._keep_the_same(live, alone, slice(row, row + 1), slice(None), f"row {row} alone")

    def _keep_the_same(self, live: Live, other: Any, rows: Any, other_rows: Any, how: str) -> None:
        pairs = zip(holders(live.cache), live.entry.kept(live.cache), live.entry.kept(other), strict=True)
        for index, (layer, kept, wanted) in enumerate(pairs):
            assert kept is not None
            assert wanted is not None
            places = wanted.shape[-1]
            kept, wanted = kept[rows], wanted[other_rows]
            if layer.window is not None:
                # what has left the window is seen by nobody, and goes when its room is needed
                place = torch.arange(kept.shape[-1], device=kept.device)
                reach = ~layer.out_of_sight(place, layer.lengths[rows, None, None])
                kept, wanted = kept & reach, wanted & reach[..., :places]
            if not torch.equal(kept[..., :places], wanted) or kept[..., places:].any():
                raise KeptDifferentlyError(f"layer {index}: other tokens than a cache that was fed {how}")


def _spoil(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """A hook of a model's embeddings: one of its tokens is not a number."""
    ids = args[0]
    return output.masked_fill((ids == NO_NUMBER)[..., None], torch.nan) if (ids == NO_NUMBER).any() else output


def _spoiled(transcript: Transcript) -> Tensor | None:
    """Rows that hold what is not a number, or were spoiled for good, [batch] bool; None for none."""
    if not transcript.forwards:
        return None
    rows = (transcript.ids == NO_NUMBER).any(1)
    rows = rows if transcript.spoiled is None else rows | transcript.spoiled
    return rows if bool(rows.any()) else None


def _is_over(live: Live, row: int) -> bool:
    """Whether a row has said an end, and nothing since."""
    return int(live.transcript.ids[row, -1]) in (PAD, *ENDS)


def _holds_nodes_only(live: Live) -> bool:
    """Whether no row has a token of its own: a forward may then bring several rows for each."""
    cache = live.cache
    return isinstance(cache, HydragenCache) and bool(cache.tree.nodes) and not cache.padding.columns_fixed


def _rows(transcript: Transcript) -> list[list[int]]:
    """The tokens of each row, without padding."""
    return [row[shown].tolist() for row, shown in zip(transcript.ids, transcript.visible, strict=True)]


def _lay_out(live: Live, rows: list[list[int]]) -> None:
    """Writes a transcript anew: these tokens of each row, padded on the left, ran unseen."""
    ids, mask = left_padded([torch.tensor(row, dtype=torch.long, device=DEVICE) for row in rows])
    live.transcript.forwards = [_unseen(ids, mask, live.cache)]


def _unseen(ids: Tensor, mask: Tensor, cache: Any) -> Forward:
    """Tokens [batch, tokens] that ran without anybody seeing their logits."""
    logits = torch.empty(len(ids), 0, VOCABULARY, device=DEVICE)
    return Forward(ids, mask.bool(), places(mask), [None] * len(cache.layers), None, logits)


def _padding(rng: random.Random, batch: int, tokens: int, style: str | None = None) -> Tensor:
    """Which of new tokens are shown, [batch, tokens] bool: padded on the left, the right, in between, or whole rows."""
    shown = torch.ones(batch, tokens, dtype=torch.bool, device=DEVICE)
    style = style or rng.choice(["none", "none", "left", "left", "right", "between", "anywhere", "row"])
    for row in shown:
        first, last = sorted((rng.randint(0, tokens), rng.randint(0, tokens)))
        if style == "left":
            row[: rng.randint(0, tokens - 1)] = False
        elif style == "right":
            row[rng.randint(1, tokens) :] = False
        elif style == "between":
            row[first:last] = False
        elif style == "anywhere":
            row &= torch.tensor([rng.random() < 0.6 for _ in range(tokens)], device=DEVICE)
        elif style == "row" and rng.random() < 0.5:
            row[:] = False
    return shown
