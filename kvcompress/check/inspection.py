"""One cache on one model: what it is fed, and when it is compared."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import hf
from kvcompress.cache import CompressedCache
from kvcompress.caches.evicting import EvictingCache
from kvcompress.caches.quantized import GEARCache
from kvcompress.caches.shadowkv import ShadowKVCache
from kvcompress.check.held_tokens import HeldTokens
from kvcompress.check.outcome import FULL
from kvcompress.check.promises import BUDGET, ROOM, Promises, short_bits
from kvcompress.check.subject import PROMPTS, Subject, pad_token, pads_before
from kvcompress.registry import Method
from kvcompress.swiftkv.cache import AcrossKVCache, SwiftKVCache

_GENERATED = 4
# settings with which texts as short as these take the paths of long ones
_SHORT: dict[str, dict[str, Any]] = {
    "kvzip": {"chunk": 64},
    "shadowkv": {"outlier_chunks": 2, "local_chunks": 2, "fold": 8},
}


class Inspection:
    """One cache on one model.

    stage: what is being checked. building: until the first cache is built. may_refuse: until a first forward succeeds.
    """

    def __init__(self, subject: Subject, method: Method | None, settings: dict[str, Any]) -> None:
        self.subject = subject
        self.method = method
        self.settings = settings
        self.stage = "building the cache"
        # names another cache than the one that was asked for, if that is at fault
        self.whose = ""
        self.building = self.may_refuse = True
        self.promises = Promises(subject)

    def run(self) -> None:
        if self.method is None:
            self._alone_and_padded(self.subject.judge, self._full)
            return
        if self.method.name == "swiftkv":
            self.subject = self.promises.subject = self.subject.converted
        cache = self._alone_and_padded(self.subject.model, self._build)
        self._generate(self._build)
        self._give_room(cache)
        if isinstance(cache, SwiftKVCache):
            # a converted model has its own code for any cache
            self.whose = f"{FULL}, "
            self._alone_and_padded(self.subject.model, self._full)
            self._generate(self._full)

    def _alone_and_padded(self, model: PreTrainedModel, build: Callable[[], Any]) -> Any:
        """Feeds each row alone, then both as a batch; returns a cache that was used."""
        subject = self.subject
        alone: list[tuple[Tensor, HeldTokens]] = []
        for index, row in enumerate(subject.rows):
            cache = build()
            self.building, self.stage, held = False, f"row {index + 1} alone", HeldTokens(cache)
            stops = [stop - pads_before(index) for stop in subject.stops]
            first, logits = self._feed(model, cache, row[None], None, stops, held)
            self.promises.check_logits(cache, held, logits, [index], first)
            alone.append((logits[0], held))

        self.stage = "padded batch"
        cache = build()
        held = HeldTokens(cache)
        first, logits = self._feed(model, cache, *subject.batch, subject.stops, held)
        self.promises.check_logits(cache, held, logits, [0, 1], first)
        for index, (wanted, kept) in enumerate(alone):
            self.stage = f"padded batch, row {index + 1}"
            self.promises.check_row(logits[index], wanted)
            self.promises.check_kept(held, kept, index)
        if isinstance(cache, CompressedCache):
            self.stage = "memory"
            self.promises.check_memory(cache)
        return cache

    def _build(self, budget: int = BUDGET, **changes: Any) -> Any:
        assert self.method is not None
        settings = {**_SHORT.get(self.method.name, {}), **self.settings, **changes}
        return self.method.build(self.subject.model, budget, settings)

    def _full(self) -> Any:
        return hf.full_cache(self.subject.model)

    @torch.no_grad()
    def _feed(
        self,
        model: PreTrainedModel,
        cache: Any,
        ids: Tensor,
        mask: Tensor | None,
        stops: Sequence[int],
        held: HeldTokens | None = None,
    ) -> tuple[int, Tensor]:
        """Feeds columns up to each stop; returns the first column that was fed, and the logits from there on.

        Args:
            ids, mask: [batch, columns]; no mask: no padding, and the model finds positions by itself if it can.
        """
        first = int(cache.get_seq_length())
        logits: list[Tensor] = []
        for stop in stops:
            start = int(cache.get_seq_length())
            known: dict[str, Any] = {}
            if mask is not None:
                places = (mask[:, :stop].cumsum(-1) - 1).clamp(min=0)[:, start:]
                known = {"attention_mask": mask[:, :stop], "position_ids": places.contiguous()}
            else:
                known = {name: each[:, start:] for name, each in self.subject.positions(stop).items()}
            logits.append(model(ids[:, start:stop], use_cache=True, **known, **hf.cache_argument(model, cache)).logits)
            self.promises.check_seen(cache, stop)
            self.may_refuse = False
            if held is not None:
                held.note(cache, stop)
        return first, torch.cat(logits, 1)

    def _generate(self, build: Callable[[], Any]) -> None:
        """Compares the logits of `generate`, with either argument name, with those of the same tokens fed by hand."""
        model: Any = self.subject.model
        prompt, fed = PROMPTS[0], PROMPTS[0] + _GENERATED - 1
        # multimodal models may count padding among their positions, or from 1, from which packed keys differ: the row
        # without any, at the positions that the model finds by itself
        rows = 1 if hf.is_multimodal(model) else None
        ids, mask = (part[:rows, :prompt] for part in self.subject.batch)
        mask_after = None if rows else torch.cat([mask, mask.new_ones(len(mask), _GENERATED)], 1)
        by_hand: dict[tuple[int, ...], Tensor] = {}
        for spelling in hf.CACHE_SPELLINGS:
            self.stage = f"generate({spelling}=...)"
            cache = build()
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=_GENERATED,
                min_new_tokens=_GENERATED,
                do_sample=False,
                num_beams=1,
                pad_token_id=pad_token(model),
                disable_compile=True,
                return_dict_in_generate=True,
                output_logits=True,
                **{spelling: cache},
            )
            # the last token is not fed
            self.promises.check_seen(cache, fed)
            generated = tuple(out.sequences[:, prompt:].flatten().tolist())
            if generated not in by_hand:
                stops = list(range(prompt, fed + 1))
                by_hand[generated] = self._feed(model, build(), out.sequences, mask_after, stops)[1]
            wanted = by_hand[generated][:, -_GENERATED:]
            for row in range(len(ids)):
                got = torch.stack([step[row] for step in out.logits])  # [generated, vocabulary]
                self.promises.check_equal(got.to(wanted), wanted[row], 1)

    def _give_room(self, cache: Any) -> None:
        """Compares a cache whose budget is above the length with the model without a cache."""
        subject = self.subject
        roomy = f"budget {ROOM}, above the length"
        changes: dict[str, dict[str, Any]] = {}
        if isinstance(cache, EvictingCache):
            changes = {roomy: {}, f"8 bits, {roomy}": {"bits": 8}} if cache.packed else {roomy: {}}
        elif isinstance(cache, GEARCache):
            # as many as there are
            bits = 8 if cache.basis is None else 4
            changes = {f"{bits} bits": {"bits": bits, "value_bits": 8}}
        elif isinstance(cache, ShadowKVCache):
            full = max(hf.key_widths(hf.decoder_config(subject.model)).values(), default=None)
            changes = {"all chunks selected at full rank": {"rank": full, "dense_below": 0}}
        elif isinstance(cache, AcrossKVCache):
            changes = {"share 1": {"share": 1}}
        for self.stage, change in changes.items():
            other = self._build(ROOM, **change)
            _, logits = self._feed(subject.model, other, *subject.batch, subject.stops)
            for index, (truth, prompt) in enumerate(zip(subject.truth, PROMPTS, strict=True)):
                got = logits[index, pads_before(index) :]
                if isinstance(other, GEARCache) or getattr(other, "packed", None):
                    self.promises.check_equal(got[:prompt], truth[:prompt], prompt)
                    self.promises.check_lost(got[prompt:], truth[prompt:], short_bits(other))
                else:
                    self.promises.check_equal(got, truth, prompt)
