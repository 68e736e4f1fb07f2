"""Whether kvcompress works here, with one model: every cache against the same model run without any cache.

Two rows of random tokens, of different lengths and with a common beginning, are read, continued by a few single tokens,
and fed a second turn: each row alone, both as a left-padded batch, and by `generate` with either name of the cache's
argument. What must hold depends on the cache:

    every token kept      the logits of the model without a cache, to float tolerance
    tokens evicted        those of the model with each layer's attention to what was evicted masked out, head by head;
                          as many tokens kept as the budget says; fewer bytes than the full cache
    tokens packed         the prompt's logits exact, as it attends to itself unpacked; then lost / worth within a bound,
                          and in the first layer, which is fed what the full cache is, codes near what they stand for
    selected (ShadowKV)   the prompt's logits exact; all of them where all chunks are selected at full rank
    layers shared         on a converted model its own logits; elsewhere, at share 1, those of the full cache
    all                   a padded row is as the row alone; all that is fed is seen; memory() is what live tensors hold

    worth = KL(with the prompt || without it)    lost = KL(without a cache || with it), both means over what follows it

An evicting or selecting cache must also equal the full cache where its budget is above the length, and a packing one
lose next to nothing at 8 bits.
"""

import contextlib
import functools
import itertools
import linecache
import traceback
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, DynamicCache, PreTrainedConfig, PreTrainedModel

from kvcompress import hf, loading, plan, registry
from kvcompress.cache import CompressedCache
from kvcompress.caches.evicting import EvictingCache
from kvcompress.caches.evicting_layer import EvictingLayer
from kvcompress.caches.quantized import GEARCache
from kvcompress.caches.shadowkv import ShadowKVCache
from kvcompress.hf import judge, small
from kvcompress.loading import ModelUnavailableError
from kvcompress.prefix.store import PrefixStore
from kvcompress.registry import Listed, Method
from kvcompress.swiftkv.cache import AcrossKVCache, SwiftKVCache
from kvcompress.swiftkv.model import SwiftKVModel, convert, first_later

FULL = "DynamicCache"
# tokens that evicting caches keep; more than all that is fed
_BUDGET, _ROOM = 48, 320
# what the rows begin with, how long they are, and what they are then fed: single tokens, a second turn, single tokens
_DOCUMENT, _PROMPTS, _FED = 64, (200, 153), (1, 1, 1, 9, 1, 1)
_GENERATED = 4
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
# settings with which texts as short as these do what long ones do
_SHORT: dict[str, dict[str, Any]] = {
    "kvzip": {"chunk": 64},
    "shadowkv": {"outlier_chunks": 2, "local_chunks": 2, "fold": 8},
}

_EXACT = (torch.float32, torch.float64)

Outcome = Literal["OK", "REFUSED", "FAULT"]


@dataclass(frozen=True)
class Checked:
    """What came of one cache.

    outcome: OK; REFUSED: the model has what the cache does not serve, and it said so; FAULT: it went wrong.
    reason: of a refusal or a fault, in one line.
    difference: the largest seen between logits that must be equal, over the largest logit; None: none were compared.
    lost: by a packing cache, as a share of what the prompt is worth; None for others.
    trace: of a refusal or a fault.
    """

    cache: str
    outcome: Outcome
    reason: str = ""
    difference: float | None = None
    lost: float | None = None
    trace: str = ""


class _Fault(Exception):  # noqa: N818 (it is what a check finds, told in the words of a report)
    """A promise that a cache does not keep."""


def check(
    model: PreTrainedModel,
    caches: Sequence[str] | None = None,
    tell: Callable[[Checked], None] = lambda checked: None,
) -> list[Checked]:
    """Runs caches on a model, and compares what they give with the model run without a cache.

        for checked in check(model, ["h2o", "gear:bits=2"]):
            print(checked.cache, checked.outcome, checked.reason)

    The last row is of transformers' own DynamicCache, unless all caches refuse the model: where that is at fault,
    nothing above it can be trusted. The model's attention is as it was afterwards. `small_model` makes a model that is
    checked in seconds.

    Args:
        caches: as the registry writes them, and `across`, `swiftkv` and `prefix`; None for all, and variants.
        tell: is called with each result as it comes.

    Raises:
        ValueError: an unknown cache.
    """
    specs = list(default_caches() if caches is None else caches)
    asked = [(spec, *registry.parse(spec, known_caches())) for spec in specs]
    if own := [spec for spec, _, settings in asked if "budget" in settings]:
        raise ValueError(f"a check gives caches its own budgets: leave budget= out of {', '.join(own)}")
    attention = hf.attention_name(model)
    subject = _Subject(model)
    rows: list[Checked] = []
    try:
        for spec, method, settings in asked:
            rows.append(_checked(spec, method, settings, subject))
            tell(rows[-1])
        if any(row.outcome != "REFUSED" for row in rows):
            rows.append(_checked(FULL, None, {}, subject))
            tell(rows[-1])
    finally:
        if attention is not None and attention != hf.attention_name(model):
            model.set_attn_implementation(attention)
    return rows


def known_caches() -> dict[str, Listed]:
    """The registry's methods, and those that only a check builds."""
    more = (
        Method(
            "across", "layers that share storage, on a model that was not trained for it", _across, takes_budget=False
        ),
        Method("swiftkv", "the cache of a converted model", _swiftkv, takes_budget=False),
        Method("prefix", "a document kept by a PrefixStore", _prefix, takes_budget=False),
    )
    return {**registry.METHODS, **{method.name: method for method in more}}


def default_caches() -> list[str]:
    """Every cache, and those settings that run other code."""
    return [*registry.METHODS, "h2o:rerotated=true", "h2o:bits=4", "across", "swiftkv", "prefix"]


def _across(model: PreTrainedModel, budget: int | float, settings: dict[str, Any]) -> CompressedCache:
    return AcrossKVCache(model, **{"share": _share(model.config), **settings})


def _swiftkv(model: PreTrainedModel, budget: int | float, settings: dict[str, Any]) -> CompressedCache:
    return SwiftKVCache(model, **settings)


def _prefix(model: PreTrainedModel, budget: int | float, settings: dict[str, Any]) -> CompressedCache:
    store = PrefixStore(model, **settings)
    document = _rows(model)[0][:_DOCUMENT]
    store.prefix(document)
    return store.prefix(document)


def _share(config: PreTrainedConfig) -> int:
    """The fewest later layers, two or more, that a group may have."""
    layers = hf.sizes(config).layers
    later = layers - first_later(0.5, layers)
    return next((share for share in range(2, later + 1) if later % share == 0), 1)


def _checked(spec: str, method: Method | None, settings: dict[str, Any], subject: "_Subject") -> Checked:
    inspection = _Inspection(subject, method, settings)
    outcome: Outcome = "OK"
    reason = trace = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inspection.run()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        if inspection.may_refuse and _is_refusal(error, inspection.building):
            outcome, reason = "REFUSED", lines[0]
        else:
            said = lines[0] if isinstance(error, _Fault) else f"{type(error).__name__}: {lines[0]}"
            outcome, reason = "FAULT", f"{inspection.whose}{inspection.stage}: {said}"
        trace = "".join(traceback.format_exception(error))
    return Checked(spec, outcome, reason, inspection.difference, inspection.lost, trace)


def _is_refusal(error: Exception, building: bool) -> bool:
    """True for what kvcompress itself raised about the model, and did not stumble over."""
    if not isinstance(error, ValueError | TypeError) or error.__traceback__ is None:
        return False
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    module = frame.f_globals.get("__name__", "")
    raised = linecache.getline(frame.f_code.co_filename, line).lstrip().startswith("raise ")
    # once built, only what stands between a model and its cache knows what else the model asks for
    ours = module.startswith("kvcompress.") and not module.startswith("kvcompress.kernels.")
    return raised and (ours if building else module.startswith(f"{hf.__name__}."))


class _Subject:
    """A model, what it is fed, and what it gives without a cache."""

    # columns at which forwards end
    stops = tuple(itertools.accumulate(_FED, initial=_PROMPTS[0]))

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @functools.cached_property
    def rows(self) -> list[Tensor]:
        """What each row is fed, [tokens]."""
        return _rows(self.model)

    @functools.cached_property
    def batch(self) -> tuple[Tensor, Tensor]:
        """The rows padded on the left: ids and mask, [batch, columns]."""
        return _padded(self.rows, _pad(self.model))

    @functools.cached_property
    def judge(self) -> PreTrainedModel:
        """The model without a cache, whose attention takes a mask for each head."""
        return judge.judge_of(self.model)

    @functools.cached_property
    def converted(self) -> "_Subject":
        """The same of the model as SwiftKV has it."""
        if isinstance(self.model, SwiftKVModel):
            return self
        return _Subject(convert(self.model, share=_share(self.model.config)))

    @functools.cached_property
    def truth(self) -> list[Tensor]:
        """Of each row the logits without a cache, [tokens, vocabulary]."""
        return [self.without_cache(row) for row in self.rows]

    @functools.cached_property
    def first_layer(self) -> list[tuple[Tensor, Tensor]]:
        """Of each row the keys and values that the first layer is fed, [kv_heads, tokens, head_dim]."""
        fed = []
        for row in self.rows:
            # without a config it keeps what has left a window
            cache: Any = DynamicCache()
            with torch.no_grad():
                self.judge(row[None], use_cache=True, **hf.cache_argument(self.judge, cache))
            fed.append((cache.layers[0].keys[0], cache.layers[0].values[0]))
        return fed

    @functools.cached_property
    def worth(self) -> float:
        """What the prompt is worth to what follows it, in nats a token."""
        follows = sum(_FED)
        without = [self.without_cache(row[-follows:]) for row in self.rows]
        worth = torch.stack(
            [_divergence(known[-follows:], bare) for known, bare in zip(self.truth, without, strict=True)]
        )
        # a model that does not listen to its prompt could not be checked by what it says
        return max(float(worth.mean()), 1e-4)

    @torch.no_grad()
    def without_cache(self, row: Tensor, allowed: list[Tensor] | None = None) -> Tensor:
        """The logits of one row [tokens] without a cache, [tokens, vocabulary].

        Args:
            allowed: for each layer who may attend to whom beside what the model forbids, [kv_heads, tokens, tokens].
        """
        with contextlib.ExitStack() as stack:
            for layer, seen in enumerate(allowed or ()):
                stack.enter_context(judge.forbidden(self.judge, layer, ~seen))
            return self.judge(row[None], use_cache=False).logits[0]


class _Inspection:
    """One cache on one model.

    stage: where the check is. building: until the first cache is there. may_refuse: until a first forward went well.
    """

    def __init__(self, subject: _Subject, method: Method | None, settings: dict[str, Any]) -> None:
        self.subject = subject
        self.method = method
        self.settings = settings
        self.stage = "building the cache"
        # where it is another cache's than the one asked for
        self.whose = ""
        self.building = self.may_refuse = True
        self.difference: float | None = None
        self.lost: float | None = None

    def run(self) -> None:
        if self.method is None:
            self._alone_and_padded(self.subject.judge, self._full)
            return
        if self.method.name == "swiftkv":
            self.subject = self.subject.converted
        cache = self._alone_and_padded(self.subject.model, self._build)
        self._generate(self._build)
        self._give_room(cache)
        if isinstance(cache, SwiftKVCache):
            # a converted model has code of its own for any cache
            self.whose = f"{FULL}, "
            self._alone_and_padded(self.subject.model, self._full)
            self._generate(self._full)

    def _alone_and_padded(self, model: PreTrainedModel, build: Callable[[], Any]) -> Any:
        """Feeds each row alone, then both as a batch; gives back a cache that was used."""
        subject = self.subject
        alone: list[tuple[Tensor, _Follower]] = []
        for index, row in enumerate(subject.rows):
            cache = build()
            self.building, self.stage, follower = False, f"row {index + 1} alone", _Follower(cache)
            stops = [stop - _pads(index) for stop in subject.stops]
            first, logits = self._feed(model, cache, row[None], None, stops, follower)
            self._judge(cache, follower, logits, [index], first)
            alone.append((logits[0], follower))

        self.stage = "padded batch"
        cache = build()
        follower = _Follower(cache)
        first, logits = self._feed(model, cache, *subject.batch, subject.stops, follower)
        self._judge(cache, follower, logits, [0, 1], first)
        for index, (wanted, kept) in enumerate(alone):
            self.stage = f"padded batch, row {index + 1}"
            self._compare_rows(logits[index], wanted)
            self._compare_kept(follower, kept, index)
        if isinstance(cache, CompressedCache):
            self.stage = "memory"
            self._weigh(cache)
        return cache

    # the steps

    def _build(self, budget: int = _BUDGET, **changes: Any) -> Any:
        assert self.method is not None
        settings = {**_SHORT.get(self.method.name, {}), **self.settings, **changes}
        return self.method.build(self.subject.model, budget, settings)

    def _full(self) -> Any:
        return DynamicCache(config=self.subject.model.config)

    @torch.no_grad()
    def _feed(
        self,
        model: PreTrainedModel,
        cache: Any,
        ids: Tensor,
        mask: Tensor | None,
        stops: Sequence[int],
        follower: "_Follower | None" = None,
    ) -> tuple[int, Tensor]:
        """Feeds columns up to each stop; the first column that was fed, and the logits from there on.

        Args:
            ids, mask: [batch, columns]; None: no padding, and the model finds positions by itself.
        """
        first = int(cache.get_seq_length())
        logits: list[Tensor] = []
        for stop in stops:
            start = int(cache.get_seq_length())
            known: dict[str, Any] = {}
            if mask is not None:
                places = (mask[:, :stop].cumsum(-1) - 1).clamp(min=0)[:, start:]
                known = {"attention_mask": mask[:, :stop], "position_ids": places}
            logits.append(model(ids[:, start:stop], use_cache=True, **known, **hf.cache_argument(model, cache)).logits)
            self._check_seen(cache, stop)
            self.may_refuse = False
            if follower is not None:
                follower.note(cache, stop)
        return first, torch.cat(logits, 1)

    def _check_seen(self, cache: Any, fed: int) -> None:
        seen = int(cache.get_seq_length())
        if seen != fed:
            raise _Fault(f"{fed} tokens were fed, and the cache has seen {seen}")

    def _judge(self, cache: Any, follower: "_Follower", logits: Tensor, rows: list[int], first: int) -> None:
        """Compares logits [batch, columns from `first` on, vocabulary] with those of the rows without a cache."""
        subject = self.subject
        for place, index in enumerate(rows):
            row, pads = subject.rows[index], _pads(index) if len(rows) > 1 else 0
            prompt = _PROMPTS[index]
            # where a prefix was given, a shorter row is fed some of it again, for nothing
            at = max(first - pads, _DOCUMENT if first else 0)
            got, truth = logits[place, at + pads - first :], subject.truth[index]
            if not bool(torch.isfinite(got).all()):
                raise _Fault("logits that are not finite numbers")
            if isinstance(cache, EvictingCache):
                self._count(cache, follower, place, pads)
            if isinstance(cache, EvictingCache) and not (cache.rerotated or cache.packed):
                masked = subject.without_cache(row, follower.allowed(place, pads, len(row)))
                self._compare(got, masked, prompt)
            elif isinstance(cache, EvictingCache | GEARCache | ShadowKVCache):
                self._compare(got[:prompt], truth[:prompt], prompt)
                if isinstance(cache, GEARCache) or getattr(cache, "packed", None):
                    self._compare_codes(cache, place, index)
                if isinstance(cache, GEARCache):
                    self._lose(got[prompt:], truth[prompt:], _bits(cache))
            elif not isinstance(cache, AcrossKVCache):
                self._compare(got, truth[at:], prompt - at)

    def _compare(self, got: Tensor, truth: Tensor, prompt: int) -> None:
        """Raises where logits [tokens, vocabulary] differ, whose first `prompt` tokens are the prompt's."""
        single = sum(1 for _ in itertools.takewhile(lambda fed: fed == 1, _FED))
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
                wrong = not float(_divergence(wanted, part)) <= _SAME * self.subject.worth
            if wrong:
                raise _Fault(f"{name}: logits differ by {difference:.1e} of the largest, where they must be equal")
            start = end

    def _lose(self, got: Tensor, truth: Tensor, bits: int) -> None:
        """Raises where logits [tokens, vocabulary] after a prompt lost more than codes of so many bits may."""
        lost = float(_divergence(truth, got)) / self.subject.worth
        self.lost = max(self.lost or 0.0, lost)
        if not lost <= _LOST[bits]:
            raise _Fault(
                f"codes of {bits} bits lose {lost:.0%} of what the prompt is worth, more than {_LOST[bits]:.0%}"
            )

    def _compare_codes(self, cache: Any, place: int, index: int) -> None:
        """Raises where the first layer's codes of a row of the cache do not stand for what the layer was fed."""
        most = _MISSED[_bits(cache)]
        for keys, values, positions in _stored(cache.layers[0]):
            held = positions[place] >= 0  # [kv_heads, tokens]
            for name, said, fed in zip(
                ("keys", "values"), (keys[place], values[place]), self.subject.first_layer[index], strict=True
            ):
                at = positions[place].clamp(min=0)[..., None].expand(-1, -1, fed.shape[-1])
                wanted = fed.gather(1, at)[held].float()
                missed = float((said.float()[held] - wanted).norm() / wanted.norm().clamp(min=1e-6))
                if not missed <= most:
                    raise _Fault(f"{name} of layer 0 are missed by {missed:.0%} of their norm, more than {most:.0%}")

    def _compare_rows(self, padded: Tensor, alone: Tensor) -> None:
        """Raises where a row of the batch, [columns, vocabulary], is told other things than the row alone."""
        follows = sum(_FED)
        apart = float(_divergence(alone[-follows:], padded[-follows:])) / self.subject.worth
        # two that lose something may lose different things
        if not apart <= _SAME + (self.lost or 0.0):
            raise _Fault(f"it differs from the row alone by {apart:.0%} of what the prompt is worth")

    def _compare_kept(self, batch: "_Follower", alone: "_Follower", index: int) -> None:
        """Raises where a padded row keeps other tokens than the row alone, but for a few that rounding turned over."""
        least = 1 - _SAME if self.subject.model.dtype in _EXACT else 0.5
        for (_, padded), (_, wanted) in zip(batch.forwards, alone.forwards, strict=True):
            shares = [_overlap(held[index], own[0]) for held, own in zip(padded, wanted, strict=True)]
            if min(shares) < least:
                layer = shares.index(min(shares))
                raise _Fault(f"layer {layer} keeps {shares[layer]:.0%} of the tokens that it keeps of the row alone")

    def _count(self, cache: EvictingCache, follower: "_Follower", row: int, pads: int) -> None:
        """Raises where the number of tokens kept of a row after any forward is not what the budget says."""
        for stop, held in follower.forwards:
            tokens = stop - pads
            kept = [(places[row] >= 0).sum(-1).float() for places in held]
            if cache.allocation != "uniform":
                if sum(float(each.mean()) for each in kept) > _BUDGET * len(kept):
                    raise _Fault(f"layers keep more than the budget of {_BUDGET} tokens on average")
                continue
            for index, (layer, each) in enumerate(zip(cache.layers, kept, strict=True)):
                least = min(_BUDGET, tokens) if layer.window is None else 1
                if each.max() > _BUDGET or each.min() < least:
                    span = f"{each.min():.0f} to {each.max():.0f}"
                    raise _Fault(f"layer {index} keeps {span} of {tokens} tokens, with a budget of {_BUDGET}")

    def _weigh(self, cache: CompressedCache) -> None:
        """Raises where `memory()` does not tell what the cache holds, or an evicting cache holds too much."""
        report, held = cache.memory(), _live_bytes(cache)
        if report.total_bytes != held:
            raise _Fault(f"memory() tells {report.total_bytes} bytes, and the live tensors hold {held}")
        windows = [layer.window for layer in cache.layers if layer.window is not None]
        if isinstance(cache, EvictingCache) and min(windows, default=_ROOM) > _BUDGET:
            # what a policy knows of the queries does not grow with the text
            slots = held - report.by_component.get("statistics", 0)
            if slots >= report.full_bytes:
                raise _Fault(f"slots take {slots} bytes, the full cache {report.full_bytes}")

    def _generate(self, build: Callable[[], Any]) -> None:
        """Compares what `generate` gets from a cache, under each name, with what the same tokens get fed by hand."""
        model: Any = self.subject.model
        prompt, fed = _PROMPTS[0], _PROMPTS[0] + _GENERATED - 1
        ids, mask = (part[:, :prompt] for part in self.subject.batch)
        mask_after = torch.cat([mask, mask.new_ones(len(mask), _GENERATED)], 1)
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
                pad_token_id=_pad(model),
                disable_compile=True,
                return_dict_in_generate=True,
                output_logits=True,
                **{spelling: cache},
            )
            # the last token is not fed
            self._check_seen(cache, fed)
            generated = tuple(out.sequences[:, prompt:].flatten().tolist())
            if generated not in by_hand:
                stops = list(range(prompt, fed + 1))
                by_hand[generated] = self._feed(model, build(), out.sequences, mask_after, stops)[1]
            wanted = by_hand[generated][:, -_GENERATED:]
            for row in range(len(ids)):
                got = torch.stack([step[row] for step in out.logits])  # [generated, vocabulary]
                self._compare(got.to(wanted), wanted[row], 1)

    def _give_room(self, cache: Any) -> None:
        """Compares a cache that has room for everything with none."""
        subject = self.subject
        _, kv_heads, head_dim = hf.head_counts(subject.model.config)
        roomy = f"budget {_ROOM}, above the length"
        changes: dict[str, dict[str, Any]] = {}
        if isinstance(cache, EvictingCache):
            changes = {roomy: {}, f"8 bits, {roomy}": {"bits": 8}} if cache.packed else {roomy: {}}
        elif isinstance(cache, GEARCache):
            changes = {"8 bits": {"bits": 8, "value_bits": 8}}
        elif isinstance(cache, ShadowKVCache):
            changes = {"all chunks selected at full rank": {"rank": kv_heads * head_dim, "dense_below": 0}}
        elif isinstance(cache, AcrossKVCache):
            changes = {"share 1": {"share": 1}}
        for self.stage, change in changes.items():
            other = self._build(_ROOM, **change)
            _, logits = self._feed(subject.model, other, *subject.batch, subject.stops)
            for index, (truth, prompt) in enumerate(zip(subject.truth, _PROMPTS, strict=True)):
                got = logits[index, _pads(index) :]
                if isinstance(other, GEARCache) or getattr(other, "packed", None):
                    self._compare(got[:prompt], truth[:prompt], prompt)
                    self._lose(got[prompt:], truth[prompt:], _bits(other))
                else:
                    self._compare(got, truth, prompt)


class _Follower:
    """Which tokens an evicting cache holds after each forward."""

    def __init__(self, cache: Any) -> None:
        self._follows = isinstance(cache, EvictingCache)
        # the columns fed, and of each layer the places of tokens held, [batch, kv_heads, slots], -1 for none
        self.forwards: list[tuple[int, list[Tensor]]] = []

    def note(self, cache: Any, stop: int) -> None:
        if self._follows:
            self.forwards.append((stop, [layer.slots.positions.clone().long() for layer in cache.layers]))

    def allowed(self, row: int, pads: int, tokens: int) -> list[Tensor]:
        """Who was held when whom was fed, of each layer, [kv_heads, tokens, tokens] bool."""
        layers = []
        for layer in range(len(self.forwards[0][1])):
            kv_heads = self.forwards[0][1][layer].shape[1]
            allowed = torch.ones(kv_heads, tokens, tokens, dtype=torch.bool)
            for (start, held), (stop, _) in itertools.pairwise(self.forwards):
                past, places = start - pads, held[layer][row].cpu()
                if bool((places >= past).any()):
                    raise _Fault(f"layer {layer} holds a token at place {int(places.max())} of {past} that were fed")
                there = torch.zeros(kv_heads, past + 1, dtype=torch.bool)
                # an empty slot points past the end
                there.scatter_(1, places.masked_fill(places < 0, past), True)
                allowed[:, past : stop - pads, :past] = there[:, None, :past]
            layers.append(allowed)
        return layers


# what is fed


def _pads(row: int) -> int:
    """Columns of padding before a row of the batch."""
    return _PROMPTS[0] - _PROMPTS[row]


def _rows(model: PreTrainedModel) -> list[Tensor]:
    """Two rows of tokens, one after the other in length, which begin alike."""
    device, vocabulary = hf.input_device(model), hf.sizes(model.config).vocabulary
    follows = sum(_FED)
    lengths = [prompt + follows for prompt in _PROMPTS]
    generator = torch.Generator().manual_seed(7)
    # no token twice, where there are enough: policies may score two of a kind alike up to rounding
    needed = sum(lengths) - _DOCUMENT
    drawn = torch.cat([torch.randperm(vocabulary, generator=generator) for _ in range(-(-needed // vocabulary))])
    start = _DOCUMENT
    rows = []
    for length in lengths:
        own = length - _DOCUMENT
        rows.append(torch.cat([drawn[:_DOCUMENT], drawn[start : start + own]]).to(device))
        start += own
    return rows


def _padded(rows: list[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """Rows as one batch padded on the left: ids and mask, [batch, columns]."""
    columns = max(map(len, rows))
    ids = torch.stack([torch.cat([row.new_full((columns - len(row),), pad), row]) for row in rows])
    mask = torch.stack([torch.cat([row.new_zeros(columns - len(row)), torch.ones_like(row)]) for row in rows])
    return ids, mask


def _pad(model: PreTrainedModel) -> int:
    pad = getattr(model.config, "pad_token_id", None)
    return pad if isinstance(pad, int) and 0 <= pad < hf.sizes(model.config).vocabulary else 0


# what is measured


def _divergence(truth: Tensor, got: Tensor) -> Tensor:
    """Mean KL divergence of logits [tokens, vocabulary] from the true ones, in nats a token."""
    true, said = (logits.float().log_softmax(-1) for logits in (truth, got.to(truth.device)))
    return (true.exp() * (true - said)).sum(-1).mean()


def _overlap(held: Tensor, wanted: Tensor) -> float:
    """Of the tokens wanted [kv_heads, slots], -1 for none, the share that is held."""
    pairs = zip(held.tolist(), wanted.tolist(), strict=True)
    sets = [({*one} - {-1}, {*other} - {-1}) for one, other in pairs]
    return sum(len(one & other) for one, other in sets) / max(1, sum(len(other) for _, other in sets))


def _bits(cache: Any) -> int:
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


# a model that is checked in seconds


def small_model(name: str | None = None, device: torch.device | str = "cpu") -> PreTrainedModel:
    """A tiny model of random weights, with the architecture of another: its kinds of layers and windows, head_dim,
    query heads a KV head, rotary embeddings, biases, softcaps.

    Args:
        name: a hub id, a local folder, a .gguf file or a model type such as qwen3; None for the default model, or a
            Llama where that is not installed.

    Raises:
        ModelUnavailableError: there is no such config, or no small model can be made of it.
        ValueError: it is of a kind that kvcompress does not serve, such as an encoder-decoder or a multimodal model, or
            torch knows no such device here.
    """
    config = read_config(name)
    hf.check_served(config, config.model_type)
    text = config.get_text_config(decoder=True)
    if text is not config:
        raise ValueError(
            f"{config.model_type} is multimodal; kvcompress serves text models: check its language model, "
            f"{text.model_type}"
        )
    loading._check_device(device)
    try:
        model: Any = small.small_model(config)
        return model.to(device)
    except Exception as error:
        raise ModelUnavailableError(
            f"no small model could be made of {name or config.model_type} ({type(error).__name__}: "
            f"{loading._first_line(error)}); check the real one: --weights"
        ) from error


def read_config(name: str | None) -> PreTrainedConfig:
    """The config of a model, as `small_model` takes it, without its weights."""
    if name is None:
        try:
            name = str(loading._bundled_gguf())
            loading._require("reading a .gguf file", "gguf")
        except ModelUnavailableError:
            name = "llama"
    if name.endswith(".gguf") and Path(name).is_file():
        loading._require("reading a .gguf file", "gguf")
        file = Path(name)
        try:
            return AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
        except (OSError, ValueError) as error:
            raise loading._explained(error, name, True) from error
    if name in CONFIG_MAPPING and not Path(name).is_dir():
        return AutoConfig.for_model(name)
    return plan._read_config(name)
