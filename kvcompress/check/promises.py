"""What each kind of cache promises; a `Fault` says what is not kept."""

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from kvcompress.cache import CompressedCache
from kvcompress.caches.evicting import EvictingCache
from kvcompress.caches.evicting_layer import EvictingLayer
from kvcompress.caches.quantized import GEARCache
from kvcompress.caches.shadowkv import ShadowKVCache
from kvcompress.check.held_tokens import HeldTokens, overlap
from kvcompress.check.outcome import Fault
from kvcompress.check.subject import DOCUMENT, FED, PROMPTS, Subject, divergence, pads_before
from kvcompress.swiftkv.cache import AcrossKVCache

# tokens that evicting caches keep; more than all that is fed
BUDGET, ROOM = 48, 320
# largest difference of logits over the largest logit: sums in other order are far below, one token too few above
_TOLERANCE = 1e-3
# the same, in what the prompt is worth, for a padded row and the row alone, where rounding may turn a choice over; in
# half precision also for what must be exact
_SAME = 0.1
# what codes of so many bits may lose of the worth. How much they do differs with how sharply a model attends; what
# reads them wrongly shows at 8 bits
_LOST = {2: 1.0, 3: 0.8, 4: 0.6, 8: 0.05}
# by how much codes of so many bits may miss keys and values, over their norm: twice what is measured; another token's
# are missed by 1.4
_MISSED = {2: 0.8, 3: 0.4, 4: 0.2, 8: 0.01}
_EXACT = (torch.float32, torch.float64)


class Promises:
    """What is compared with the model run without a cache.

    difference, lost: as `Checked` has them, so far.
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
            # where a prefix was given, a shorter row is fed some of it again, for nothing
            at = max(first - pads, DOCUMENT if first else 0)
            got, truth = logits[place, at + pads - first :], subject.truth[index]
            if not bool(torch.isfinite(got).all()):
                raise Fault("logits that are not finite numbers")
            if isinstance(cache, EvictingCache):
                self._check_count(cache, held, place, pads)
            if isinstance(cache, EvictingCache) and not (cache.rerotated or cache.packed):
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
        """Raises where logits [tokens, vocabulary] differ, whose first `prompt` tokens are the prompt's."""
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
        """Raises where logits [tokens, vocabulary] after a prompt lost more than codes of so many bits may."""
        lost = float(divergence(truth, got)) / self.subject.worth
        self.lost = max(self.lost or 0.0, lost)
        if not lost <= _LOST[bits]:
            raise Fault(
                f"codes of {bits} bits lose {lost:.0%} of what the prompt is worth, more than {_LOST[bits]:.0%}"
            )

    def _check_codes(self, cache: Any, place: int, index: int) -> None:
        """Raises where the first layer's codes of a row of the cache do not stand for what the layer was fed."""
        most = _MISSED[short_bits(cache)]
        for keys, values, positions in _stored(cache.layers[0]):
            held = positions[place] >= 0  # [kv_heads, tokens]
            for name, said, fed in zip(
                ("keys", "values"), (keys[place], values[place]), self.subject.first_layer[index], strict=True
            ):
                at = positions[place].clamp(min=0)[..., None].expand(-1, -1, fed.shape[-1])
                wanted = fed.gather(1, at)[held].float()
                missed = float((said.float()[held] - wanted).norm() / wanted.norm().clamp(min=1e-6))
                if not missed <= most:
                    raise Fault(f"{name} of layer 0 are missed by {missed:.0%} of their norm, more than {most:.0%}")

    def check_row(self, padded: Tensor, alone: Tensor) -> None:
        """Raises where a row of the batch, [columns, vocabulary], is told other things than the row alone."""
        follows = sum(FED)
        apart = float(divergence(alone[-follows:], padded[-follows:])) / self.subject.worth
        # two that lose something may lose different things
        if not apart <= _SAME + (self.lost or 0.0):
            raise Fault(f"it differs from the row alone by {apart:.0%} of what the prompt is worth")

    def check_kept(self, batch: HeldTokens, alone: HeldTokens, index: int) -> None:
        """Raises where a padded row keeps other tokens than the row alone, but for a few that rounding turned over."""
        least = 1 - _SAME if self.subject.model.dtype in _EXACT else 0.5
        for (_, padded), (_, wanted) in zip(batch.forwards, alone.forwards, strict=True):
            shares = [overlap(one[index], own[0]) for one, own in zip(padded, wanted, strict=True)]
            if min(shares) < least:
                layer = shares.index(min(shares))
                raise Fault(f"layer {layer} keeps {shares[layer]:.0%} of the tokens that it keeps of the row alone")

    def _check_count(self, cache: EvictingCache, held: HeldTokens, row: int, pads: int) -> None:
        """Raises where the number of tokens kept of a row after any forward is not what the budget says."""
        for stop, positions in held.forwards:
            tokens = stop - pads
            kept = [(each[row] >= 0).sum(-1).float() for each in positions]
            if cache.allocation != "uniform":
                if sum(float(each.mean()) for each in kept) > BUDGET * len(kept):
                    raise Fault(f"layers keep more than the budget of {BUDGET} tokens on average")
                continue
            for index, (layer, each) in enumerate(zip(cache.layers, kept, strict=True)):
                least = min(BUDGET, tokens) if layer.window is None else 1
                if each.max() > BUDGET or each.min() < least:
                    span = f"{each.min():.0f} to {each.max():.0f}"
                    raise Fault(f"layer {index} keeps {span} of {tokens} tokens, with a budget of {BUDGET}")

    def check_memory(self, cache: CompressedCache) -> None:
        """Raises where `memory()` does not tell what the cache holds, or an evicting cache holds too much."""
        report, held = cache.memory(), _live_bytes(cache)
        if report.total_bytes != held:
            raise Fault(f"memory() tells {report.total_bytes} bytes, and the live tensors hold {held}")
        windows = [layer.window for layer in cache.layers if layer.window is not None]
        if isinstance(cache, EvictingCache) and min(windows, default=ROOM) > BUDGET:
            # what a policy knows of the queries does not grow with the text
            slots = held - report.by_component.get("statistics", 0)
            if slots >= report.full_bytes:
                raise Fault(f"slots take {slots} bytes, the full cache {report.full_bytes}")

    def check_seen(self, cache: Any, fed: int) -> None:
        seen = int(cache.get_seq_length())
        if seen != fed:
            raise Fault(f"{fed} tokens were fed, and the cache has seen {seen}")


def short_bits(cache: Any) -> int:
    """Of the shorter codes of a packing cache."""
    if isinstance(cache, EvictingCache):
        assert cache.packed is not None
        return cache.packed.bits
    return min(coding.bits for coding in cache.settings.codings(cache.layers[0].kv_shape[2], 0))


def _stored(layer: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What a packing layer holds, unpacked: keys, values [batch, kv_heads, tokens, head_dim] and places in their
    sequences [batch, kv_heads, tokens] int64, -1 where there is none."""
    if isinstance(layer, EvictingLayer):
        assert layer.slots is not None
        return [(*layer.slots.contents(), layer.slots.positions.long())]
    parts = [(part.keys, part.values, part.positions) for part in (layer.tail, layer.first) if part is not None]
    parts += [(*part.decoded(), part.positions[:, 0]) for part in layer._packed()]
    return [(keys, values, at[:, None].expand(keys.shape[:3]).long()) for keys, values, at in parts]


def _live_bytes(cache: Any) -> int:
    """Bytes of every storage that an object holds on to; models are referred to, not held."""
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
