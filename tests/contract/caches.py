"""Every cache that signs the contract: one line each, which says what the cache promises."""

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvcompress import (
    GEAR,
    H2O,
    Basis,
    DenseCache,
    EvictingCache,
    GEARCache,
    H2OCache,
    HydragenCache,
    Policy,
    Profile,
    ShadowKVCache,
    SnapKV,
    measure_basis,
    registry,
)  # fmt: skip
from kvcompress.caches.evicting import Shared
from kvcompress.hf import key_widths, layer_heads
from kvcompress.kernels.common.split_attention import Extents
from kvcompress.kernels.ragged import by_column
from kvcompress.storage.quantized_slots import PackedSlots
from kvcompress.storage.rerotated import RaggedRerotatedSlots, RerotatedSlots
from tests.contract.oracle import Decoded, Kept, Transcript, holders, recording

BUDGET = 8
LARGE = 10_000
# every policy that is registered, with settings for few tokens
POLICIES: dict[str, Policy] = {
    name: method.kind(**{setting: values[0] for setting, values in method.tried.items()})
    for name, method in registry.METHODS.items()
    if method.kind is not None and issubclass(method.kind, Policy)
}
# sequences stay dense up to 16 tokens, and fold four chunks of the 20 that most tests feed
SHADOW: dict[str, Any] = {
    "budget": 4, "rank": 12, "chunk": 2, "outlier_chunks": 2, "local_chunks": 4, "fold": 12, "select_queries": 6,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A cache and what it promises.

    make: makes one for a model; tests call `build`.
    exact: it equals the full cache, to float tolerance.
    croppable: it takes back tokens exactly; else it must refuse and stay as it was.
    compileable: its decode step compiles to one graph.
    between_folds: the same cache, where steps that are not compiled would change what it holds otherwise than these do.
    packs_between: it packs between compiled steps, where `forward_comes` is called as generate does.
    roomy: the same cache with more room than any test fills; it must equal the full cache.
    budget: the most tokens it may keep a layer, sequence and KV head, given the layer and the real tokens seen.
    kept: which places each layer holds, for the oracle.
    decoded: what a cache gives for the keys and values it was fed, by place, [batch, kv_heads, seen, head_dim] of
        each layer, for the oracle; None where it gives them back as they were.
    dtype: in which two of its runs can be compared; codes turn over at the rounding errors of float32.
    during: the method by which its layers attend to what they hold, for a cache whose queries choose what they attend
        to: `kept` and `decoded` are then read right after it.
    refuses: model types it does not serve; a test elsewhere sees it refuse them.
    competes: its heads keep different numbers of tokens, and the budget on average.
    keeps_answers: what it is fed one token at a time stays, on top of the budget, until several tokens are fed.
    shares: it stores what rows have in common once, in tensors called prefix_*.
    of_one_model: it refuses another model than the one it was built for, also when it is empty.
    """

    name: str
    make: Callable[[PreTrainedModel], Any]
    kept: Callable[[Cache], Kept]
    exact: bool = False
    croppable: bool = False
    compileable: bool = False
    between_folds: Callable[[PreTrainedModel], Any] | None = None
    packs_between: bool = False
    roomy: Callable[[PreTrainedModel], Any] | None = None
    budget: Callable[[int, int], int] | None = None
    decoded: Callable[[Cache], Decoded] | None = None
    dtype: torch.dtype = torch.float32
    during: str | None = None
    refuses: tuple[str, ...] = ()
    competes: bool = False
    keeps_answers: bool = False
    shares: bool = False
    of_one_model: bool = False

    def recording(
        self, model: PreTrainedModel, cache: Any, transcript: Transcript | None = None
    ) -> AbstractContextManager[Transcript]:
        """`oracle.recording` of such a cache."""
        return recording(model, cache, self.kept, self.decoded, transcript, self.during)

    def build(self, model: PreTrainedModel) -> Any:
        if model.config.model_type in self.refuses:
            pytest.skip(f"{self.name} does not serve {model.config.model_type}")
        return self.make(model)


def everything(cache: Any) -> Kept:
    """A cache that holds all it has seen."""
    return [None for _ in cache.layers]


def slots(cache: Any) -> Kept:
    """What lies in the slots of an evicting cache, and what was decoded after that where it stays."""
    kept: Kept = []
    for layer in holders(cache):
        positions = layer.held_positions().long()
        held = torch.zeros(*positions.shape[:2], layer.get_seq_length() + 1, dtype=torch.bool, device=positions.device)
        # an empty slot points past the end
        held.scatter_(2, positions.masked_fill(positions < 0, held.shape[-1] - 1), True)
        kept.append(held[..., :-1])
    return kept


def closed_up(cache: Any) -> Decoded:
    """Keys of a cache with rolled positions, turned to where the newest query, at its true position, finds them:
    the tokens a head keeps stand before it without gaps."""
    decoded: Decoded = []
    for layer, kept in zip(holders(cache), slots(cache), strict=True):
        assert kept is not None
        stored, positions = layer.slots, layer.slots.positions.long()
        places = kept.shape[-1]
        # rolled slots give their keys out for another query than the newest
        contents = stored.contents()
        if isinstance(stored, RaggedRerotatedSlots):
            contents = by_column(stored.keys, Extents(stored.starts, stored.capacities), stored.slots), contents[1]
        elif isinstance(stored, RerotatedSlots):
            contents = stored.keys, stored.values
        at = positions.masked_fill(positions < 0, places)[..., None]
        keys, values = (
            held.new_zeros(*held.shape[:2], places + 1, held.shape[3]).scatter_(2, at.expand_as(held), held)[
                :, :, :places
            ]
            for held in contents
        )
        if isinstance(stored, RerotatedSlots):
            newer = kept.flip(-1).cumsum(-1).flip(-1)
            keys = layer.rope.rotate(keys.float(), layer.lengths[:, None, None] - newer).to(keys.dtype)
        decoded.append((keys, values))
    return decoded


def fitted(cache: Any) -> Decoded:
    """Values and log-weights of the slots of a cache that fits them, and keys where they are packed; what was decoded
    after that is as it was fed."""
    decoded: Decoded = []
    for layer in holders(cache):
        slots, seen = layer.slots, layer.get_seq_length()
        is_packed = isinstance(slots, PackedSlots)
        if slots.bias is None and not is_packed:
            decoded.append((None, None))
            continue
        at = slots.positions.masked_fill(slots.positions < 0, seen).long()[..., None]
        keys, values = (
            held.new_full((*at.shape[:2], seen + 1, held.shape[3]), torch.nan).scatter_(2, at.expand_as(held), held)
            for held in slots.contents()
        )
        of_keys = keys[:, :, :-1] if is_packed else None
        if slots.bias is None:
            decoded.append((of_keys, values[:, :, :-1]))
            continue
        weights = slots.bias.new_zeros(*at.shape[:2], seen + 1, 1).scatter_(2, at, slots.bias[..., None])
        decoded.append((of_keys, values[:, :, :-1], weights[:, :, :-1]))
    return decoded


def unpacked(cache: Any) -> Decoded:
    """What the codes of a packing cache stand for, beside what is not packed yet."""
    decoded: Decoded = []
    for layer in holders(cache):
        tail = layer.tail
        parts = [(*part.contents(), part.positions) for part in (tail, layer.first) if part is not None]
        parts += [(*part.decoded(), part.positions[:, 0]) for part in layer._packed()]
        keys, values = (
            x.new_zeros(*x.shape[:2], layer.get_seq_length() + 1, x.shape[3], dtype=torch.float32)
            for x in tail.contents()
        )
        for key, value, positions in parts:
            # what is not there goes past the end
            at = positions.masked_fill(positions < 0, layer.get_seq_length()).long()[:, None, :, None]
            keys.scatter_(2, at.expand_as(key), key.float())
            values.scatter_(2, at.expand_as(value), value.float())
        decoded.append((keys[:, :, :-1], values[:, :, :-1]))
    return decoded


_bases: weakref.WeakKeyDictionary[PreTrainedModel, Basis] = weakref.WeakKeyDictionary()


def basis_of(model: PreTrainedModel) -> Basis:
    """A basis of random tokens, measured once for a model."""
    if model not in _bases:
        few = min(500, model.config.vocab_size)
        ids = torch.randint(1, few, (8, 70), generator=torch.Generator().manual_seed(0))
        _bases[model] = measure_basis(model, [ids])
    return _bases[model]


def _packing(name: str, is_calibrated: bool = False, **settings: Any) -> Entry:
    def build(model: PreTrainedModel, buffer: int = 8, **changes: Any) -> GEARCache:
        basis = basis_of(model) if is_calibrated else None
        return GEARCache(model, buffer=buffer, basis=basis, **{"group_size": 8, **settings, **changes})

    return Entry(
        name,
        build,
        kept=everything,
        croppable=True,
        compileable=True,
        packs_between=True,
        # with tokens that wait as they came
        roomy=lambda model: build(model, 256, tail_bits=None),
        decoded=unpacked,
        dtype=torch.float64,
        of_one_model=is_calibrated,
        refuses=("gemma3n_text",) if is_calibrated else (),
    )


def attended(cache: Any) -> Kept:
    """What ShadowKV's layers attended to last: the tokens in the buffer, or all where there were many queries."""
    kept: Kept = []
    for layer in holders(cache):
        segment = getattr(layer, "segment", None)
        # while layers that share the tokens attend, they are in the step
        fed = None if layer.pending_kv is None else layer.pending_kv[0]
        fed = layer._step.input.key if fed is None and layer._step is not None else fed
        reads_all = fed is not None and fed.shape[2] > SHADOW["select_queries"]
        if segment is None or (reads_all and bool((segment.folded > 0).any())):
            kept.append(None)
            continue
        places, seen = _shadow_places(layer), layer.get_seq_length()
        positions = segment.positions.long()
        known = places.gather(1, positions.clamp(min=0).flatten(1)).view_as(positions)
        at = torch.where((positions < 0) | (known < 0) | (known >= seen), seen, known)
        held = torch.zeros(*positions.shape[:2], seen + 1, dtype=torch.bool, device=positions.device)
        kept.append(held.scatter_(2, at, True)[..., :-1])
    return kept


def rebuilt(cache: Any) -> Decoded:
    """Keys of ShadowKV's folded tokens, from their coefficients; all that is exact is as it was fed."""
    decoded: Decoded = []
    for layer in holders(cache):
        segment, seen = getattr(layer, "segment", None), layer.get_seq_length()
        if segment is None:
            decoded.append((None, None))
            continue
        batch, kv_heads, _, head_dim = segment.keys.shape
        keys = torch.full((batch, kv_heads, seen + 1, head_dim), torch.nan, dtype=layer.dtype, device=layer.device)
        tokens = segment.coefficients.shape[1]
        if tokens:
            index = torch.arange(tokens, device=layer.device)
            flat = segment.coefficients.float() @ segment.basis.float()
            low_rank = flat.unflatten(2, (kv_heads, head_dim)).transpose(1, 2)
            if layer.rope is not None:
                low_rank = layer.rope.rotate(low_rank, index[None, None])
            folded = index < (segment.folded * segment.settings.chunk)[:, None].to(layer.device)
            at = torch.where(folded, _shadow_places(layer)[:, :tokens], seen)
            is_open = segment.is_open.repeat_interleave(segment.settings.chunk, 2)
            low_rank = low_rank.masked_fill(~is_open[..., None], torch.nan)
            at = at.masked_fill(at < 0, seen)[:, None, :, None].expand_as(low_rank)
            keys.scatter_(2, at, low_rank.to(layer.dtype))
        decoded.append((keys[:, :, :seen], None))
    return decoded


def _shadow_places(layer: Any) -> torch.Tensor:
    """The place of each token a ShadowKV layer has counted, [batch, tokens]; -1 for those that became padding."""
    segment = layer.segment
    count = max(int(segment.lengths.max()), segment.coefficients.shape[1]) + 1
    hidden = torch.zeros(len(segment.lengths), count, dtype=torch.bool, device=segment.keys.device)
    if segment.hidden is not None:
        hidden[:, : segment.hidden.shape[1]] = segment.hidden
    return ((~hidden).cumsum(-1) - 1).masked_fill(hidden, -1)


def _shadow(name: str, promises: dict[str, Any], **settings: Any) -> Entry:
    return Entry(
        name,
        lambda model: ShadowKVCache(model, **SHADOW | settings),
        kept=attended,
        decoded=rebuilt,
        croppable=True,
        compileable=True,
        between_folds=lambda model: ShadowKVCache(model, **SHADOW | settings | {"fold": 300, "dense_below": 0}),
        during="_read",
        **promises,
    )


def _evicting(
    name: str,
    policy: Policy,
    budget: int | float = BUDGET,
    rerotated: bool = False,
    packed: GEAR | None = None,
    allocation: Shared | Callable[[PreTrainedModel], Shared] = "uniform",
    **promises: Any,
) -> Entry:
    def build(model: PreTrainedModel, budget: int | float = budget) -> EvictingCache:
        shared = allocation(model) if callable(allocation) else allocation
        return EvictingCache(model, policy=policy, budget=budget, rerotated=rerotated, packed=packed, allocation=shared)

    def limit(layer: int, tokens: int) -> int:
        return budget if isinstance(budget, int) else max(policy.least_budget(), int(budget * tokens))

    if policy.rereads is not None:
        # many maxima are nearly 1, and rounding errors of float32 order them; equations pass errors on, larger
        promises = {"dtype": torch.float64, **promises}
    return Entry(
        name,
        build,
        kept=slots,
        compileable=True,
        roomy=None if packed else lambda model: build(model, LARGE if isinstance(budget, int) else 1.0),
        budget=limit,
        **promises,
    )


def uneven(model: PreTrainedModel) -> Profile:
    """A profile of shares that differ in and between layers, of all but models of a single head."""
    every = layer_heads(model.config)
    layers, kv_heads = len(every), every[0].kv_heads
    shares = itertools.islice(itertools.cycle([2.0, 6.0, 3.0, 5.0, 6.0, 2.0]), layers * kv_heads)
    return Profile.of(model, torch.tensor([*shares]).view(layers, kv_heads))


def _pyramid(layer: int, tokens: int) -> int:
    # two tokens for each of three layers, and 1.95, 1 and 0.05 times what is left of the budget
    return (14, 8, 2)[layer]


def _whole(model: PreTrainedModel, **settings: Any) -> ShadowKVCache:
    whole = {"budget": LARGE, "rank": max(key_widths(model.config).values(), default=None), "dense_below": 0}
    return ShadowKVCache(model, **SHADOW | whole | settings)


ENTRIES = [
    Entry("dense", DenseCache, kept=everything, exact=True, croppable=True),
    Entry(
        "hydragen",
        # whatever two rows begin with lies in a node
        lambda model: HydragenCache(model, min_tokens=1),
        refuses=("gemma3n_text", "llama4_text"),
        kept=everything,
        exact=True,
        croppable=True,
        compileable=True,
        shares=True,
    ),
    Entry(
        "h2o",
        lambda model: H2OCache(model, budget=BUDGET),
        kept=slots,
        compileable=True,
        roomy=lambda model: H2OCache(model, budget=LARGE),
        budget=lambda layer, tokens: BUDGET,
    ),
    _evicting("h2o_fraction", H2O(sinks=1), 0.5),
    Entry(
        "h2o_pyramid",
        lambda model: EvictingCache(model, policy=H2O(), budget=BUDGET, allocation="pyramid"),
        kept=slots,
        compileable=True,
        roomy=lambda model: EvictingCache(model, policy=H2O(), budget=LARGE, allocation="pyramid"),
        budget=_pyramid,
    ),
    *(_evicting(name, policy) for name, policy in POLICIES.items() if name not in ("h2o", "attention_matching")),
    _packing("gear", bits=4, rank=3, rank_decode=2, outliers=0.1),
    _packing("gear_whole", bits=2, rank=2, rank_decode=2, outliers=0.05, backbone="whole", hadamard=False),
    _packing("gear_centred", bits=2, rank=2, rank_decode=2, backbone="whole"),
    _packing("gear_basis", is_calibrated=True, bits=3),
    _packing("kivi", bits=3, outliers=0.0, tail_bits=None),
    _shadow("shadowkv", {"roomy": lambda model: ShadowKVCache(model, **SHADOW | {"budget": LARGE})}),
    dataclasses.replace(
        _shadow("shadowkv_whole", {"exact": True}),
        make=_whole,
        between_folds=lambda model: _whole(model, fold=300),
    ),
    _evicting("h2o_packed", H2O(sinks=1), packed=GEAR(bits=3, group_size=8), decoded=closed_up, dtype=torch.float64),
    _evicting("h2o_heads", H2O(recent=2), allocation="heads", competes=True),
    _evicting(
        "h2o_packed_heads",
        H2O(sinks=1, recent=2),
        packed=GEAR(bits=3, group_size=8),
        allocation="heads",
        competes=True,
        decoded=closed_up,
        dtype=torch.float64,
    ),
    _evicting("kvzip_global", POLICIES["kvzip"], allocation="global", competes=True),
    _evicting(
        "kvzip_answers",
        dataclasses.replace(POLICIES["kvzip"], keeps_answers=True),
        allocation="global",
        competes=True,
        keeps_answers=True,
    ),
    _evicting(
        "attention_matching",
        POLICIES["attention_matching"],
        allocation="global",
        decoded=fitted,
        competes=True,
        keeps_answers=True,
    ),
    _evicting(
        "attention_matching_packed",
        POLICIES["attention_matching"],
        packed=GEAR(bits=4, group_size=8),
        allocation="global",
        decoded=fitted,
        # answers are packed when several tokens are fed, before these attend to them
        during="_begin",
        competes=True,
        keeps_answers=True,
    ),
    _evicting("h2o_rolled", H2O(), rerotated=True, decoded=closed_up, refuses=("opt",)),
    _evicting(
        "h2o_rolled_heads",
        H2O(recent=2),
        rerotated=True,
        allocation="heads",
        competes=True,
        decoded=closed_up,
        refuses=("opt",),
    ),
    Entry(
        "h2o_pinned",
        lambda model: H2OCache(model, budget=BUDGET, pin=[(3, 4), (7, 7)]),
        kept=slots,
        compileable=True,
        roomy=lambda model: H2OCache(model, budget=LARGE, pin=[(3, 4), (7, 7)]),
        budget=lambda layer, tokens: BUDGET,
    ),
    _evicting("h2o_profile", H2O(sinks=1), allocation=uneven, competes=True, refuses=("gemma4_text", "mimo_v2_flash")),
    _evicting("criticalkv", SnapKV(window=3, recent=3, kernel=3, second_stage=0.5)),
]

by_name = {entry.name: entry for entry in ENTRIES}

# one for each way to hold tokens and to choose them, or for several that meet in one; what the others, its variants,
# change is a score or a setting, and by default they meet the tests in which it counts
KINDS = (
    "dense",
    "hydragen",
    "h2o",
    "snapkv",
    "gear",
    "shadowkv",
    "h2o_packed_heads",
    "attention_matching",
)

# steps of this one are compiled once it has taken room for them
RESERVED = dataclasses.replace(ENTRIES[0], name="dense_reserved", compileable=True)


def caches(*names: str, also: tuple[Entry, ...] = ()) -> pytest.MarkDecorator:
    """These caches by default, and the others too where slow tests run."""
    return _entries((*ENTRIES, *also), [*names, *(entry.name for entry in also)], pytest.mark.slow)


def those(promise: Callable[[Entry], Any]) -> pytest.MarkDecorator:
    """The caches that promise something: one of each kind by default, or all where none of `KINDS` does; the others too
    where variants run."""
    found = [entry for entry in ENTRIES if promise(entry)]
    default = {entry.name for entry in found} & {*KINDS} or [entry.name for entry in found]
    return _entries(found, default, pytest.mark.variant)


def all_those(promise: Callable[[Entry], Any]) -> pytest.MarkDecorator:
    """All caches that promise something, by default."""
    return _entries([entry for entry in ENTRIES if promise(entry)], [*by_name], pytest.mark.variant)


def _entries(entries: Iterable[Entry], default: Collection[str], mark: pytest.MarkDecorator) -> pytest.MarkDecorator:
    """Those that are not in `default` are marked."""
    return pytest.mark.parametrize(
        "entry",
        [pytest.param(entry, marks=() if entry.name in default else mark, id=entry.name) for entry in entries],
    )


# one of each kind by default, and the others too where variants run
every_cache = those(lambda entry: True)
# all by default: for tests of what a score or a setting can break
every_variant = all_those(lambda entry: True)


def every_variant_with(name: str, first: Any, *others: Any) -> pytest.MarkDecorator:
    """All caches with one value of a parameter, and one of each kind with the others; all where variants run."""
    cases = [
        pytest.param(
            entry,
            value,
            marks=() if value == first or entry.name in KINDS else pytest.mark.variant,
            id=f"{value}-{entry.name}",
        )
        for value in (first, *others)
        for entry in ENTRIES
    ]
    return pytest.mark.parametrize(("entry", name), cases)
