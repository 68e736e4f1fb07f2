"""Plays a case, and judges it.

Every copy of the cache that a case makes goes on by itself. At the end, and before one is reset, each is judged:

    the oracle            its logits are those of full attention over what it says it kept
    the bytes             memory() reports the live storages, and no more tokens than the budget
    the same cache, fed   one that is fed its transcript straight through, and one that is fed a single row of it
                          without its padding, keep the same tokens (evicting caches)

The last could fail where two scores are equal up to rounding; a case that fails there is played again in float64, and
fails if it fails again.
"""

import copy
import random
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import EvictingCache, dense, shared
from tests.contract.drive import assert_same_state, feed, generate
from tests.contract.models import DEVICE, PAD, VOCABULARY, tiny
from tests.contract.oracle import Transcript, assert_equals_oracle
from tests.contract.test_memory import storages
from tests.fuzz.cases import Call, Case

TOKENS, ROWS, COPIES = 90, 6, 3


class KeptDifferentlyError(AssertionError):
    """Two caches that saw the same keep different tokens; rounding may be why."""


@dataclass
class Live:
    """A cache, what went through it, and whether tokens were taken back or hidden later, or more than a window can."""

    cache: Any
    transcript: Transcript = field(default_factory=Transcript)
    cropped: bool = False
    hidden: bool = False
    short: bool = False
    # tokens fed since the mask last changed; a transcript knows no older mask
    since_hidden: int = TOKENS


def play(case: Case) -> None:
    """Raises what goes wrong."""
    slack = dense.SLACK if case.slack is None else case.slack
    with patch.object(dense, "SLACK", slack), patch.object(shared, "SLACK", slack):
        try:
            _Game(case, torch.float32).play()
        except KeptDifferentlyError:
            _Game(case, torch.float64).play()


class _Game:
    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.case, self.entry = case, case.entry
        self.model: PreTrainedModel = tiny(
            case.family, **case.sizes, **({"dtype": dtype} if dtype.itemsize > 4 else {})
        )
        self.lives = [Live(self.entry.make(self.model))]

    def play(self) -> None:
        for call in self.case.calls:
            rng = random.Random(call.seed)
            live = rng.choice(self.lives)
            self._do(call, rng, live)
            self._is_consistent(live)
        for live in self.lives:
            self._judge(live, random.Random(self.case.seed))

    def _do(self, call: Call, rng: random.Random, live: Live) -> None:
        if call.name == "clone" or call.name == "save":
            # outside of any recording, whose notes a copy would share
            self._fork(call, live)
        elif call.name == "reset":
            self._judge(live, rng)
            live.cache.reset()
            assert live.cache.get_seq_length() == 0
            assert live.cache.memory().total_bytes == 0
            self.lives[self.lives.index(live)] = Live(live.cache)
        else:
            with self.entry.recording(self.model, live.cache, live.transcript):
                getattr(self, f"_{call.name}")(rng, live)

    # what a case can do

    def _feed(self, rng: random.Random, live: Live, past: Tensor | None = None) -> None:
        tokens = min(rng.choice([1, 2, 3, 5, 8, 13, 20, 34]), TOKENS - live.transcript.seen)
        if tokens < 1:
            return
        ids = self._fresh(rng, live, tokens)
        feed(self.model, live.cache, ids, self._mask(live, _padding(rng, *ids.shape), past))
        live.since_hidden += tokens

    def _decode(self, rng: random.Random, live: Live) -> None:
        finished = rng.choice([0.0, 0.0, 0.3])
        for _ in range(min(rng.randint(1, 10), TOKENS - live.transcript.seen)):
            ids = self._fresh(rng, live, 1)
            shown = torch.tensor([[rng.random() >= finished] for _ in range(len(ids))], device=DEVICE)
            feed(self.model, live.cache, ids, self._mask(live, shown))
            live.since_hidden += 1

    def _generate(self, rng: random.Random, live: Live) -> None:
        """A turn: new tokens after all that was fed, and an answer."""
        tokens, answer = rng.randint(1, 20), rng.randint(1, 8)
        if tokens + answer > TOKENS - live.transcript.seen:
            return
        ids = self._fresh(rng, live, tokens)
        mask = self._mask(live, _padding(rng, *ids.shape, rng.choice(["none", "left"])))
        settings: dict[str, Any] = {}
        if not live.transcript.forwards and len(ids) <= 3:
            settings["num_beams"] = rng.choice([1, 2])
        if rng.random() < 0.3:
            settings["prefill_chunk_size"] = rng.randint(1, tokens)
        if live.transcript.forwards:
            ids = torch.cat([live.transcript.ids, ids], 1)
            settings.pop("prefill_chunk_size", None)
        before = live.transcript.seen
        how = {"no_repeat_ngram_size": 1, "suppress_tokens": [PAD], "max_new_tokens": answer}
        generate(self.model, live.cache, ids, mask.long(), **how, **settings)
        live.since_hidden += live.transcript.seen - before

    def _hide(self, rng: random.Random, live: Live) -> None:
        """A new mask makes padding of tokens that were none: what a row of a batch was given while it waited."""
        layers = live.cache.layers
        if not live.transcript.forwards or self.entry.name == "h2o_rolled":
            # the oracle reads where rolled tokens stand before it knows which of them the mask hides
            return
        if all(layer.get_seq_length() == 0 for layer in layers):
            return
        past = live.transcript.visible.clone()
        newest = rng.randint(1, past.shape[1])
        for row in past:
            if rng.random() < 0.6:
                row[-newest:] &= torch.tensor([rng.random() < 0.3 for _ in range(newest)], device=row.device)
        live.hidden = live.hidden or not torch.equal(past, live.transcript.visible)
        live.since_hidden = 0
        with warnings.catch_warnings(record=True) as told:
            # whatever this process does with warnings
            warnings.simplefilter("always")
            self._feed(rng, live, past)
        live.short = live.short or any("gone since" in str(warning.message) for warning in told)

    def _reorder_cache(self, rng: random.Random, live: Live) -> None:
        if live.transcript.forwards:
            batch = live.cache.batch_size
            live.cache.reorder_cache(torch.tensor([rng.randrange(batch) for _ in range(batch)], device=DEVICE))

    def _batch_select_indices(self, rng: random.Random, live: Live) -> None:
        if not live.transcript.forwards:
            return
        batch = live.cache.batch_size
        rows = [rng.randrange(batch) for _ in range(rng.randint(1, batch))]
        if rng.random() < 0.3:
            live.cache.batch_select_indices(torch.tensor([row in rows for row in range(batch)], device=DEVICE))
        else:
            live.cache.batch_select_indices(torch.tensor(rows, device=DEVICE))

    def _batch_repeat_interleave(self, rng: random.Random, live: Live) -> None:
        if live.transcript.forwards and live.cache.batch_size * 2 <= ROWS:
            live.cache.batch_repeat_interleave(rng.choice([1, 2, 2]))

    def _crop(self, rng: random.Random, live: Live) -> None:
        seen = live.transcript.seen
        most = min(seen, live.since_hidden) - 1
        if most < 1:
            return
        tokens = min(rng.choice([0, 1, 1, 2, 4, 9, 30]), most)
        before = [None if kept is None else kept.clone() for kept in self.entry.kept(live.cache)]
        try:
            live.cache.crop(-tokens)
        except ValueError:
            # dense caches without windows give everything back
            assert self.entry.name != "dense" or any(layer.window for layer in live.cache.layers)
            assert tokens
            assert live.cache.get_seq_length() == seen
            for kept, was in zip(self.entry.kept(live.cache), before, strict=True):
                assert (kept is None and was is None) or torch.equal(kept, was)
            return
        assert self.entry.croppable or not tokens, "took back what was evicted"
        assert live.cache.get_seq_length() == seen - tokens
        live.since_hidden -= tokens
        live.cropped = live.cropped or tokens > 0

    def _fork(self, call: Call, live: Live) -> None:
        """A copy, which goes on beside the first where there is room for it, and in its place where not."""
        if call.name == "clone":
            cache = live.cache.clone()
        else:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "cache"
                live.cache.save(path)
                cache = type(live.cache).load(path, self.model)
        if live.transcript.forwards:
            assert_same_state(self.entry, cache, live.cache)
            # a file has no tables of a tree's rows, and none of the pages that only rows now gone used
            assert cache.memory().device_bytes <= live.cache.memory().device_bytes
            assert cache.memory().total_bytes <= live.cache.memory().total_bytes
        other = copy.copy(live)
        other.cache, other.transcript = cache, copy.deepcopy(live.transcript)
        if len(self.lives) < COPIES:
            self.lives.append(other)
        else:
            self._judge(live, random.Random(call.seed))
            self.lives[self.lives.index(live)] = other

    # what is fed

    def _fresh(self, rng: random.Random, live: Live, tokens: int) -> Tensor:
        """Tokens [batch, tokens] that no row has had; some rows begin alike."""
        past = live.transcript.ids.tolist() if live.transcript.forwards else [[] for _ in range(self.case.batch)]
        together = rng.choice([0, 0, tokens // 2, tokens])
        rows: list[list[int]] = []
        for had in past:
            taken = {PAD, *had}
            common = [token for token in rows[0][:together] if token not in taken] if rows else []
            left = [token for token in range(VOCABULARY) if token not in taken and token not in common]
            rows.append([*common, *rng.sample(left, tokens - len(common))])
        return torch.tensor(rows, device=DEVICE)

    def _mask(self, live: Live, shown: Tensor, past: Tensor | None = None) -> Tensor:
        if not live.transcript.forwards:
            return shown.long()
        return torch.cat([live.transcript.visible if past is None else past, shown], 1).long()

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
        if not live.short:
            assert_equals_oracle(self.model, live.transcript)
        if isinstance(live.cache, EvictingCache):
            self._keeps_its_budget(live)
            self._keeps_what_it_would_fed_straight(live)
            self._keeps_what_a_row_alone_does(live, rng)

    def _keeps_its_budget(self, live: Live) -> None:
        cache = live.cache
        if not isinstance(cache.budget, int) or cache.allocation != "uniform":
            return
        real = live.transcript.visible.sum(-1)[:, None]
        for layer, kept in zip(cache.layers, cache.memory().tokens_kept, strict=True):
            if layer.window is not None or live.hidden:
                assert (kept <= real.clamp(max=cache.budget)).all(), "more than the budget"
            else:
                assert torch.equal(kept, real.clamp(max=cache.budget).expand_as(kept)), "not the budget"

    def _keeps_what_it_would_fed_straight(self, live: Live) -> None:
        straight = self.entry.make(self.model)
        for forward in live.transcript.forwards:
            feed(self.model, straight, forward.ids, forward.visible.long())
        self._keep_the_same(live.cache, straight)

    def _keeps_what_a_row_alone_does(self, live: Live, rng: random.Random) -> None:
        forwards = live.transcript.forwards
        row = rng.randrange(len(forwards[0].ids))
        if live.hidden:
            # tokens hidden later were seen by others
            return
        alone = self.entry.make(self.model)
        for forward in forwards:
            shown = forward.visible[row, -forward.queries :]
            if shown.any():
                feed(self.model, alone, forward.ids[row, shown][None])
        if forwards and alone.get_seq_length():
            self._keep_the_same(live.cache, alone, row)

    def _keep_the_same(self, cache: Any, other: Any, row: int | None = None) -> None:
        rows = slice(None) if row is None else slice(row, row + 1)
        how = "straight through" if row is None else f"row {row} alone"
        pairs = zip(cache.layers, self.entry.kept(cache), self.entry.kept(other), strict=True)
        for index, (layer, kept, wanted) in enumerate(pairs):
            assert kept is not None
            assert wanted is not None
            places = wanted.shape[-1]
            kept = kept[rows]
            if layer.window is not None:
                # what has left the window is seen by nobody, and goes when its room is needed
                place = torch.arange(kept.shape[-1], device=kept.device)
                reach = (layer.lengths[rows, None, None] - layer.window) < place
                kept, wanted = kept & reach, wanted & reach[..., :places]
            if not torch.equal(kept[..., :places], wanted) or kept[..., places:].any():
                raise KeptDifferentlyError(f"layer {index}: other tokens than a cache that was fed {how}")


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
