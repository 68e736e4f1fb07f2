"""What each kind of cache promises; a `Fault` says which promise is broken."""

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from kvcompress import hf
from kvcompress.cache import CompressedCache
from kvcompress.caches.evicting import EvictingCache
from kvcompress.caches.evicting_layer import EvictingLayer
from kvcompress.caches.quantized import GEARCache
from kvcompress.caches.quantized_latents import LatentQuantizedLayer
from kvcompress.caches.shadowkv import ShadowKVCache
from kvcompress.check.held_tokens import HeldTokens, overlap
from kvcompress.check.outcome import Fault
from kvcompress.check.subject import DOCUMENT, FED, PROMPTS, Subject, divergence, pads_before
from kvcompress.swiftkv.cache import AcrossKVCache

# the budget of evicting caches; one above the length of everything fed
BUDGET, ROOM = 48, 320
# allowed difference of logits, over the largest logit: sums in another order are far below, a missing token above
_TOLERANCE = 1e-3
# allowed KL, over what the prompt is worth, between a padded row and the row alone, where rounding may change a choice;
# in half precision also for what must be exact
_SAME = 0.1
# what codes of so many bits may lose of the worth. How much they lose depends on how sharply a model attends; code that
# reads them wrongly shows at 8 bits
_LOST = {2: 1.0, 3: 0.8, 4: 0.6, 8: 0.05}
# allowed error of keys and values in codes of so many bits, over their norm: twice what is measured; another token's
# have an error of 1.4
_MISSED = {2: 0.8, 3: 0.4, 4: 0.2, 8: 0.01}
_EXACT = (torch.float32, torch.float64)


class Promises:
    """Compares a cache with the model run without one.

    difference, lost: as in `Checked`, so far.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.difference: float | None = None
        self.lost: float | None = None

    def check_logits(self, cache: Any, held: HeldTokens, logits: Tensor, rows: list[int], first: int) -> None:
        """Compares logits [batch, columns from `first` on, vocabulary] with those of the rows without a cache."""
        subject = self.subject
        for place, index in enumerate(rows):
            row, pads = subject.rows[index], pads_before(index) if len(rows) > 1 else 0
            prompt = PROMPTS[index]
            # with a prefix, a shorter row is fed part of it again, without effect
            at = max(first - pads, DOCUMENT if first else 0)
            got, truth = logits[place, at + pads - first :], subject.truth[index]
            if not bool(torch.isfinite(got).all()):
                raise Fault("some logits are not finite numbers")
            if isinstance(cache, EvictingCache):
                self._check_count(cache, held, place, pads)
            if isinstance(cache, EvictingCache) and not (cache.rerotated or cache.packed or _fits(cache)):
                masked = subject.without_cache(row, held.allowed(place, pads, len(row)))
                self.check_equal(got, masked, prompt)
            elif isinstance(cache, EvictingCache | GEARCache | ShadowKVCache):
                self.check_equal(got[:prompt], truth[:prompt], prompt)
                if isinstance(cache, GEARCache) or getattr(cache, "packed", None):
                    self._check_codes(cache, place, index)
                if isinstance(cache, GEARCache):
                    self.check_lost(got[prompt:], truth[prompt:], short_bits(cache))
            elif not isinstance(cache, AcrossKVCache):
                self.check_equal(got, truth[at:], prompt - at)

    def check_equal(self, got: Tensor, truth: Tensor, prompt: int) -> None:
        """Raises if logits [tokens, vocabulary] differ; the first `prompt` tokens are the prompt's."""
        single = sum(1 for _ in itertools.takewhile(lambda fed: fed == 1, FED))
        ends = [("the prompt", prompt), ("single tokens", prompt + single), ("second turn", len(truth))]
        start = 0
        for name, end in ends:
            end = min(end, len(truth))
            if end <= start:
                continue
            part, wanted = got[start:end].float(), truth[start:end].float()
            difference = float((part - wanted).abs().max() / truth.abs().max())
            self.difference = max(self.difference or 0.0, difference)
            if got.dtype in _EXACT:
                wrong = not difference <= _TOLERANCE
            else:
                wrong = not float(divergence(wanted, part)) <= _SAME * self.subject.worth
            if wrong:
                raise Fault(f"{name}: logits differ by {difference:.1e} of the largest, where they must be equal")
            start = end

    def check_lost(self, got: Tensor, truth: Tensor, bits: int) -> None:
        """Raises if logits [tokens, vocabulary] after a prompt lost more than codes of so many bits may."""
        lost = float(divergence(truth, got)) / self.subject.worth
        self.lost = max(self.lost or 0.0, lost)
        most = _LOST[bits]
        if bits == max(_LOST) and hf.has_experts(hf.decoder_config(self.subject.model)):
            # a token near the edge between two experts goes to the other
            most *= 2
        if not lost <= most:
            raise Fault(f"codes of {bits} bits lose {lost:.0%} of what the prompt is worth, more than {most:.0%}")

    def _check_codes(self, cache: Any, place: int, index: int) -> None:
        """Raises if the first layer's codes of a row do not decode to what the layer was fed; values that were fitted
        stand for others as well."""
        most = _MISSED[short_bits(cache)]
        is_fitted = isinstance(cache, EvictingCache) and _fits(cache)
        for keys, values, positions in _stored(cache.first_layer):
            held = positions[place] >= 0  # [kv_heads, tokens]
            for name, said, fed in zip(
                ("keys", "values"), (keys[place], values[place]), self.subject.first_layer[index], strict=True
            ):
                if name == "values" and is_fitted:
                    continue
                at = positions[place].clamp(min=0)[..., None].expand(-1, -1, fed.shape[-1])
                wanted = fed.gather(1, at)[held].float()
                missed = float((said.float()[held] - wanted).norm() / wanted.norm().clamp(min=1e-6))
                if not missed <= most:
                    raise Fault(f"{name} of layer 0 are off by {missed:.0%} of their norm, more than {most:.0%}")

    def check_row(self, padded: Tensor, alone: Tensor) -> None:
        """Raises if a row of the batch gets other logits, [columns, vocabulary], than the row alone."""
        follows = sum(FED)
        apart = float(divergence(alone[-follows:], padded[-follows:])) / self.subject.worth
        # two that lose something may lose different things
        if not apart <= _SAME + (self.lost or 0.0):
            raise Fault(f"it differs from the row alone by {apart:.0%} of what the prompt is worth")

    def check_kept(self, batch: HeldTokens, alone: HeldTokens, index: int) -> None:
        """Raises if a padded row keeps other tokens than the row alone, except a few that rounding may change."""
        least = 1 - _SAME if self.subject.model.dtype in _EXACT else 0.5
        for (_, padded), (_, wanted) in zip(batch.forwards, alone.forwards, strict=True):
            shares = [overlap(one[index], own[0]) for one, own in zip(padded, wanted, strict=True)]
            if min(shares) < least:
                layer = shares.index(min(shares))
                raise Fault(f"layer {layer} keeps {shares[layer]:.0%} of the tokens that it keeps of the row alone")

    def _check_count(self, cache: EvictingCache, held: HeldTokens, row: int, pads: int) -> None:
        """Raises if the number of tokens kept of a row after any forward is not what the budget says."""
        before = answers = 0
        for stop, positions in held.forwards:
            tokens = stop - pads
            # what is fed one token at a time may stay on top of the budget
            answers, before = answers + 1 if _keeps_answers(cache) and stop == before + 1 else 0, stop
            most = BUDGET + answers
            kept = [(each[row] >= 0).sum(-1).float() for each in positions]
            if cache.allocation != "uniform":
                if sum(float(each.mean()) for each in kept) > most * len(kept):
                    raise Fault(f"layers keep more than the {most} tokens of the budget on average")
                continue
            for index, each in zip(cache.attending, kept, strict=True):
                layer = cache.layers[index]
                least = min(BUDGET, tokens) if layer.window is None else 1
                if each.max() > most or each.min() < least:
                    span = f"{each.min():.0f} to {each.max():.0f}"
                    raise Fault(f"layer {index} keeps {span} of {tokens} tokens, with a budget of {BUDGET}")

    def check_memory(self, cache: CompressedCache) -> None:
        """Raises if `memory()` does not report what the cache holds, or an evicting cache holds too much."""
        report, held = cache.memory(), _live_bytes(cache)
        if report.total_bytes != held:
            raise Fault(f"memory() reports {report.total_bytes} bytes, but the live tensors hold {held}")
        windows = [layer.window for layer in cache.layers if layer.window is not None]
        if isinstance(cache, EvictingCache) and min(windows, default=ROOM) > BUDGET:
            # a policy's statistics of the queries do not grow with the text
            slots = held - report.by_component.get("statistics", 0)
            if slots >= report.full_bytes:
                raise Fault(f"slots take {slots} bytes, the full cache {report.full_bytes}")

    def check_seen(self, cache: Any, fed: int) -> None:
        seen = int(cache.get_seq_length())
        if seen != fed:
            raise Fault(f"{fed} tokens were fed, but the cache has seen {seen}")


def _keeps_answers(cache: EvictingCache) -> bool:
    """Whether tokens that are fed one at a time evict none."""
    return any(isinstance(layer, EvictingLayer) and layer.keeps_answers for layer in cache.layers)


def _fits(cache: EvictingCache) -> bool:
    """Whether what is kept is fitted to answer for all, and so not what it was."""
    how = cache.policy.rereads
    return how is not None and how.fits > 0


def short_bits(cache: Any) -> int:
    """Bits of the shorter codes of a packing cache."""
    if isinstance(cache, EvictingCache):
        assert cache.packed is not None
        return cache.packed.bits
    return min(coding.bits for coding in cache.settings.codings(cache.first_layer.packed_width, 0))


def _stored(layer: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What a packing layer holds, unpacked, as models give it: keys, values [batch, kv_heads, tokens, head_dim] and
    positions [batch, kv_heads, tokens] int64, -1 for no token."""
    if isinstance(layer, EvictingLayer):
        assert layer.slots is not None
        return [(*layer.slots.contents(), layer.slots.positions.long())]
    parts = [(*part.contents(), part.positions) for part in (layer.tail, layer.first) if part is not None]
    parts += [(*part.decoded(), part.positions[:, 0]) for part in layer._packed()]
    if isinstance(layer, LatentQuantizedLayer):
        parts = [(*layer.as_given(*sides), at) for *sides, at in parts]
    return [(keys, values, at[:, None].expand(keys.shape[:3]).long()) for keys, values, at in parts]


def _live_bytes(cache: Any) -> int:
    """Bytes of every storage that an object refers to, without those of models."""
    found: dict[tuple[str, int], int] = {}
    visited: set[int] = set()
    queue = [cache]
    while queue:
        thing = queue.pop()
        if id(thing) in visited or isinstance(thing, type | nn.Module | weakref.ref):
            continue
        visited.add(id(thing))
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            if storage.nbytes():
                found[str(thing.device), storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, dict):
            queue.extend(thing.values())
        elif isinstance(thing, list | tuple | set):
            queue.extend(thing)
        elif hasattr(thing, "__dict__") and not callable(thing):
            queue.extend(vars(thing).values())
    return sum(found.values())
