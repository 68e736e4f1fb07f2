"""What each cache would need for a model, a context and a batch, from the model's config alone.

    full cache   = layers x 2 x kv_heads x head_dim x tokens x bytes of the dtype, each layer with its own heads
    slots        = budget + 1 per KV head: keys and values, and 8 bytes for position and score; packed slots have codes,
                   scales and outliers, and 4 x head_dim bytes per KV head for centre and spread of the keys' channels;
                   plus the policy's state (policies/policy.py); where heads compete for the budget, as many on average,
                   32 bytes per KV head for where they lie, and 4 more per token with a log-weight; with a profile, as
                   many as each head's share allows; packed ones of heads that differ come in blocks of 16; positions
                   and scores are as wide as the longest head, which is more where heads compete, and not foreseen
    gear, kivi   = blocks of codes, scales, outliers and factors (policies/gear.py), the first tokens as they came, and
                   a tail of one block, in 8 bits each by itself, or as they came too
    shadowkv     = on the device: low-rank keys, landmarks, and the selected, outlier and newest tokens
                   (policies/shadowkv.py); the values of all tokens are on the host

On sliding layers `tokens` and `budget` are at most the window. Weights are counted exactly, on the meta device.

Of a hybrid, layers that keep states add these, whatever the context.

A forward over c tokens of a prompt (all of them, or a chunk) takes for each, on top of the cache, which has then taken
in the layers before, what the model's layers are found to take when they run without numbers (hf/working.py). For
Llama's, in numbers of the dtype, that is the larger of

    MLP          4 hidden + 2 head_dim + 3 intermediate: the embedding, the layer's input, residual and norm; cosines
                 and sines; gate, up and their product
    attention    2 hidden + 2 head_dim + 4 heads x head_dim + 3.5 kv_heads x head_dim: queries while they are rotated,
                 then they and the output; keys and values as they came, and for the cache

which is also what is told of models whose layers do not run so (of transformers' own, those with Mamba 1). kvzip and
attention_matching, which read a prompt twice, hold the keys and values of all tokens of the forward, in all layers,
until the second reading ends; then attention_matching also some queries of all layers, and what one layer's fit
multiplies, if its heads keep about alike: where they compete, a fit may take more. Not counted: the logits of the last
token, the workspaces of kernels, and what a GPU needs before anything runs.
"""

import bisect
import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from kvcompress import hf, loading, registry
from kvcompress.caches.allotment import Allotment
from kvcompress.caches.basis import Basis
from kvcompress.caches.budget import COMPETING, Budget
from kvcompress.caches.dense import SLACK
from kvcompress.caches.evicting import kept_budget
from kvcompress.caches.matching import TILE
from kvcompress.caches.profile import Profile, heads_that_share
from kvcompress.caches.quantized_layer import DRAFT
from kvcompress.caches.shadowkv import selected_budget
from kvcompress.policies.gear import GEAR, preset
from kvcompress.policies.policy import Policy, SecondReading
from kvcompress.policies.shadowkv import ShadowKV
from kvcompress.prefix.segments import SuffixSegment
from kvcompress.storage.dense import DenseSegment
from kvcompress.storage.key_codec import CalibratedScheme, KeyCodec, scheme_for
from kvcompress.storage.low_rank import ShadowSegment
from kvcompress.storage.offload import ADDRESSES
from kvcompress.storage.packed_tail import PackedTail
from kvcompress.storage.quantized_blocks import QuantizedBlocks
from kvcompress.storage.quantized_slots import QuantizedSlots
from kvcompress.storage.ragged import RaggedSlots
from kvcompress.storage.ragged_packed import BLOCK, RaggedPackedSlots
from kvcompress.storage.slots import SlotSegment
from kvcompress.storage.tail import TailSegment

# a context or a batch of more is a slip of the pen
MOST_TOKENS = 2**27
_OWN = ("none", "hydragen", "gear", "kivi", "shadowkv")


@dataclass(frozen=True)
class Shape:
    """What a config says that memory depends on. windows: each layer's sliding window, None for full attention.
    layers: the heads of each. linear: how many of the parameters can be quantised, those of linear layers but the head.
    dtype: the checkpoint's, if the config says. config: the decoder's; None: a forward takes what Llama's takes."""

    name: str
    parameters: int
    windows: tuple[int | None, ...]
    layers: tuple[hf.LayerHeads, ...]
    hidden: int
    intermediate: int
    longest: int | None
    linear: int = 0
    dtype: torch.dtype | None = None
    config: PreTrainedConfig | None = field(default=None, repr=False, compare=False)
    _found: dict[tuple[str, torch.dtype], int | None] = field(default_factory=dict, repr=False, compare=False)

    def working(self, dtype: torch.dtype) -> int:
        """Bytes that a forward takes per token, beside weights and cache."""
        found = self._of_config(hf.working_bytes, dtype)
        if found is not None:
            return found
        mlp = 4 * self.hidden + 3 * self.intermediate
        attention = (2 * self.hidden + 4 * own.heads * own.head_dim + 7 * own.key_width // 2 for own in self.layers)
        turns = 2 * max(own.head_dim for own in self.layers)
        return dtype.itemsize * (max(mlp, *attention) + turns)

    @property
    def token(self) -> int:
        """How many numbers keys and values of a token have, in all layers."""
        return sum(own.token for own in self.layers)

    def each(self) -> Iterable[tuple[hf.LayerHeads, int | None]]:
        """The heads of each layer, and its window."""
        return zip(self.layers, self.windows, strict=True)

    def each_evicting(self) -> Iterable[tuple[hf.LayerHeads, int | None]]:
        """The same of a cache that evicts: each layer holds index keys for the indexer that chooses for it."""
        width = max(own.index_dim for own in self.layers)
        return ((own._replace(index_dim=0 if window else width), window) for own, window in self.each())

    @property
    def scores_blocks(self) -> bool:
        """Whether indexers score blocks of tokens, beside keys and values of many heads."""
        return self.config is not None and hf.block_of(self.config) is not None

    def states(self, dtype: torch.dtype) -> int:
        """Bytes of the states of all layers, per sequence."""
        return self._of_config(hf.state_bytes, dtype) or 0

    def _of_config(self, find: Callable[[PreTrainedConfig, torch.dtype], int | None], dtype: torch.dtype) -> int | None:
        """What is found of the config, once for each dtype."""
        if self.config is None:
            return None
        name = (find.__name__, dtype)
        if name not in self._found:
            self._found[name] = find(self.config, dtype)
        return self._found[name]

    def weights(self, dtype: torch.dtype, bits: int | None = None) -> int:
        """Bytes of the weights in a dtype; with 8 or 4 bits, those of linear layers but the head in these, as
        bitsandbytes has them: of 4 bits, every 64 have a float32 scale (of 8 bits each row, which is not counted)."""
        if bits is None:
            return self.parameters * dtype.itemsize
        scales = 4 * (self.linear // 64) if bits == 4 else 0
        return (self.parameters - self.linear) * dtype.itemsize + self.linear * bits // 8 + scales


@dataclass(frozen=True)
class Need:
    """Bytes that one cache needs.

    cache: after prefill. prefill: what it held at most on top of weights and cache. fixed: what of the cache does not
    grow with the batch. chunk: how many tokens of the prompt a forward reads; None: all.
    """

    method: str
    budget: int | None
    weights: int
    cache: int
    full_cache: int
    prefill: int
    fixed: int = 0
    chunk: int | None = None

    @property
    def peak(self) -> int:
        """Weights, cache, and what prefill holds on top of them."""
        return self.weights + self.cache + self.prefill


def read_shape(name: str | None) -> Shape:
    """The shape of a model: a hub id, a local folder or .gguf file, or None for the default model.

    Raises:
        ModelUnavailableError: there is no such config.
        ValueError: kvcompress does not support this kind of model.
    """
    config = loading.read_config(name)
    hf.check_served(config, config.model_type)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return shape_of(model, name or loading.DEFAULT_PACKAGE)


def shape_of(model: PreTrainedModel, name: str = "") -> Shape:
    """The shape of a model that is there, on the meta device or with its weights."""
    config = model.config.get_text_config(decoder=True)
    kinds, every, sizes = hf.layer_kinds(config), hf.layer_heads(config), hf.sizes(config)
    windows = tuple(kind.window for kind in kinds if kind.attends)
    layers = tuple(own for own, kind in zip(every, kinds, strict=True) if kind.attends)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    head = model.get_output_embeddings()
    linear = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )
    return Shape(
        name or model.name_or_path or type(model).__name__,
        parameters,
        windows,
        layers,
        sizes.hidden,
        sizes.intermediate,
        sizes.longest,
        linear,
        config.dtype if isinstance(config.dtype, torch.dtype) else None,
        config,
    )


def make_plan(
    shape: Shape,
    methods: Iterable[str],
    context: int,
    batch: int,
    budget: int | float,
    dtype: torch.dtype,
    *,
    chunk: int | None = None,
    weight_bits: int | None = None,
) -> list[Need]:
    """What each method's cache needs.

    Args:
        methods: specs of the registry.
        context: tokens that each sequence will have in the end.
        budget: tokens kept per KV head, or a fraction of the context.
        dtype: of weights that are not quantised, and of keys and values.
        chunk: tokens of the prompt in a forward, `prefill_chunk_size` of `generate`; None: all.
        weight_bits: 8 or 4 if linear layers are quantised, else None.

    Raises:
        TypeError: a size that is no whole number.
        ValueError: a size below 1 or above MOST_TOKENS, an unknown method, a budget that its cache refuses, or a cache
            of somebody's own, whose sizes are not known.
    """
    for size_name, size in (("context", context), ("batch", batch), ("chunk", 1 if chunk is None else chunk)):
        if isinstance(size, bool) or not hasattr(size, "__index__"):
            raise TypeError(f"{size_name} must be a whole number, got {size!r}")
        if size < 1:
            raise ValueError(f"{size_name} must be at least 1, got {size}")
        if size > MOST_TOKENS:
            raise ValueError(f"{size_name} must be at most {MOST_TOKENS}, got {size}")
    if weight_bits not in (None, 4, 8):
        raise ValueError(f"weight_bits must be 4, 8 or None, got {weight_bits}")
    Budget(budget)
    weights = shape.weights(dtype, weight_bits)
    item = dtype.itemsize
    full = sum(batch * item * own.token * min(context, window or context) for own, window in shape.each())
    fed = context if chunk is None else min(chunk, context)
    working, states = shape.working(dtype), batch * shape.states(dtype)
    # positions of three axes, which indexers of blocks turn keys by
    told = 3 * 4 * batch * context if shape.scores_blocks else 0
    needs = []
    for spec in methods:
        kept, cache, fixed, policy = _held(shape, spec, context, fed, batch, budget, item)
        cache += told
        peak = cache + working * batch * fed
        if policy is not None and policy.rereads is not None:
            peak = _peak_of_two_readings(shape, policy.rereads, batch, fed, item, cache, fed < context, working)
        needs.append(Need(spec, kept, weights, cache + states, full + states, max(0, peak - cache), fixed, chunk))
    return needs


class _Held(NamedTuple):
    """What a cache holds of a context. kept: tokens per KV head, None for all. fixed: bytes of `cache` that do not grow
    with the batch. policy: of a cache that evicts."""

    kept: int | None
    cache: int
    fixed: int = 0
    policy: Policy | None = None


def _held(shape: Shape, spec: str, context: int, fed: int, batch: int, budget: int | float, item: int) -> _Held:
    """What a method's cache holds of a context that came so many tokens at a time; ValueError as `make_plan`."""
    method, settings = registry.parse(spec)
    if not is_sized(method):
        raise ValueError(f"plan knows the sizes of policies and of kvcompress's own caches, not of {method.name}")
    amount = settings.pop("budget", budget)
    if method.name in ("gear", "kivi"):
        named = settings.pop("preset", "default" if method.name == "gear" else method.name)
        path = settings.pop("basis", None)
        codes = preset(named, **settings)
        schemes: list[CalibratedScheme | None] = [None] * len(shape.windows)
        if path is not None:
            codes = codes.calibrated()
            schemes = _schemes(shape, Basis.load(path), codes.bits)
        cache = fixed = 0
        for (given, window), scheme in zip(shape.each(), schemes, strict=True):
            own = given.packed
            cache += _packed(own, codes, context, window, batch, item, scheme)
            fixed += 0 if scheme is None else KeyCodec.nbytes_for(scheme, own.key_width, item)
        return _Held(None, cache, fixed)
    if method.name in ("none", "hydragen"):
        # HydragenCache keeps the ids that it compares prompts with
        ids, storage = (4 * batch * context, SuffixSegment) if method.name == "hydragen" else (0, DenseSegment)
        rooms = (own.token * storage.room_after(_in_window(context, fed, window), fed) for own, window in shape.each())
        return _Held(None, ids + batch * item * sum(rooms))
    if method.name == "shadowkv":
        chosen = ShadowKV(**{name: value for name, value in settings.items() if name != "host"})
        kept = selected_budget(amount, chosen.chunk).tokens(context)
        widths = [own.key_width for own, window in shape.each() if window is None]
        if chosen.rank is not None and widths:
            # narrower layers keep their keys whole
            chosen.rank_of(max(widths))
        cache = sum(
            batch * item * own.token * _in_window(context, fed, window)
            if window
            else _shadow(own, chosen, kept, context, batch, item)
            for own, window in shape.each()
        )
        return _Held(kept, cache)
    policy, of_cache = registry.policy_of(method, settings)
    kept, packed = kept_budget(amount, policy).tokens(context), of_cache.get("packed")
    allocation = of_cache.get("allocation") or policy.allocates
    if isinstance(allocation, Profile):
        cache = _allotted(shape, allocation, amount, kept, context, batch, item, policy, packed)
    else:
        competes = allocation in COMPETING
        cache = sum(
            _slots(own, kept, batch, item, policy, packed, competes, window) for own, window in shape.each_evicting()
        )
    rotates = policy.uses_rotary or of_cache.get("rerotated", False)
    for own in shape.layers:
        cache += batch * policy.state_bytes(own.heads, own.head_dim) + rotates * 4 * (own.head_dim // 2)
    return _Held(kept, cache, policy=policy)


def _in_window(context: int, fed: int, window: int | None) -> int:
    """The most tokens that a dense layer keeps of a context: on a sliding layer some more than its window, in steps."""
    if window is None:
        return context
    most = window - 1 + 2 * SLACK
    if context < most:
        return context
    return window - 1 + SLACK if fed == context else most


def _peak_of_two_readings(
    shape: Shape, how: SecondReading, batch: int, fed: int, item: int, after: int, in_chunks: bool, working: int
) -> int:
    """Bytes of caches whose tokens are read twice, and of the forwards, at most: in the first or second reading, or
    while what is kept is chosen and fitted. after: bytes of what is kept. in_chunks: they are there beforehand.
    working: bytes of a forward per token."""
    before = after if in_chunks else 0
    # with positions and scores
    waiting = batch * fed * (shape.token * item + 8 * sum(own.kv_heads for own in shape.layers))
    again = min(fed, how.chunk) + len(how.prompt)
    numbers = sum(own.heads * (own.head_dim * item + 4) for own, window in shape.each() if window is None)
    asked = batch * _asked(how, fed) * numbers
    fit = 0
    if how.fits:
        # of one layer: all candidates' keys and values, and values again; of a block, what a tile of queries gives all
        # tokens and those that stay, and Gram matrices of the latter
        kept = after // (batch * (shape.token * item + 12 * sum(own.kv_heads for own in shape.layers)))
        stay = kept * again // (fed + kept) if in_chunks else kept * again // fed
        largest, most = max(own.token for own in shape.layers), max(own.kv_heads for own in shape.layers)
        fit = 3 * batch * (fed + kept * in_chunks) * largest * item
        fit += 4 * batch * most * (TILE * (3 * again + 2 * stay) + 4 * stay * stay)
    first = before + waiting + working * batch * fed
    # beside what the first has returned
    second = before + waiting + asked + working * batch * again + batch * fed * shape.hidden * item
    return max(first, second, waiting + asked + after + fit)


def is_sized(method: registry.Listed) -> bool:
    """Whether the bytes of a method's cache are known: it follows a policy, or is one of kvcompress's own."""
    return method.kind is not None and (issubclass(method.kind, Policy) or method.name in _OWN)


def largest_batch(need: Need, batch: int, memory: int) -> int:
    """The largest batch that fits; everything but the weights and a basis grows with the batch."""
    free = memory - need.weights - need.fixed
    return max(0, free * batch // (need.cache - need.fixed + need.prefill))


def largest(fits: Callable[[int], bool], most: int = 2**31) -> int:
    """The largest number from 0 to `most` that fits, where all smaller ones do."""
    return bisect.bisect_right(range(1, most + 1), 0, key=lambda number: not fits(number))


def _slots(
    own: hf.LayerHeads,
    budget: int,
    batch: int,
    item: int,
    policy: Policy,
    packed: GEAR | None,
    competes: bool,
    window: int | None,
) -> int:
    """Bytes of one layer: its slots, one of them free, and counters per sequence and for all sequences."""
    budget = min(budget, window or budget)
    size, wide, counters = (batch, own.kv_heads, own.mean_dim), (batch, own.kv_heads, own.head_dim), batch * 3 * 4 + 8
    coding = None if packed is None else packed.per_token_scheme(own.head_dim, own.value_dim)
    # each head holds those of its own tokens
    index = batch * own.kv_heads * own.index_dim * item
    how = policy.rereads
    if competes or (how is not None and how.keeps_answers):
        counters += 4 * batch * own.kv_heads * competes
        # no more than the next query sees; where answers stay they go elsewhere, and no slot is free
        slots = min(budget, (window or budget + 1) - 1) + (how is None or not how.keeps_answers)
        fits = how is not None and how.fits > 0 and window is None
        if coding is not None:
            # of heads that differ, the last block is half full on average; where a window binds they do not
            differ = competes and (window is None or budget < window - 1)
            slots = slots + BLOCK // 2 if differ else RaggedPackedSlots.whole(slots)
            return RaggedPackedSlots.nbytes_for(*wide, coding, slots, fits, own.value_dim) + counters
        return RaggedSlots.nbytes_for(*size, item, slots, fits) + counters + slots * index
    if coding is not None:
        return QuantizedSlots.nbytes_for(*wide, coding, budget + 1, own.value_dim) + counters
    return SlotSegment.nbytes_for(*size, item, budget + 1) + counters + (budget + 1) * index


def _allotted(
    shape: Shape,
    profile: Profile,
    amount: int | float,
    kept: int,
    context: int,
    batch: int,
    item: int,
    policy: Policy,
    packed: GEAR | None,
) -> int:
    """Bytes of all layers whose heads have fixed shares of the budget: of each head its slots, and positions and scores
    as wide as the layer's longest head.

    Raises:
        ValueError: the profile is of a model of another size.
    """
    kv_heads = heads_that_share(shape.layers, shape.name)
    profile.check_size(len(shape.layers), kv_heads, shape.name)
    how, layers = policy.rereads, Allotment.of_layers(profile.shares)
    mean, length = torch.tensor([kept]), torch.tensor([context])
    # of the shares, and which kinds there are; then of each layer
    size = 8 * (len(layers) * kv_heads + 2 * len(layers[0].kinds))
    for allotment, (own, window) in zip(layers, shape.each_evicting(), strict=True):
        if isinstance(amount, float):
            counts = allotment.of_fraction(amount, mean, policy.least_budget())
        else:
            counts = allotment.of_count(mean, policy.least_budget(), length)
        has_free = how is None or not how.keeps_answers
        # where no slot is free, no more than the next query sees
        most = context if window is None else min(context, window - (not has_free))
        slots = [min(count, most) + has_free for count in counts[0].tolist()]
        fits = how is not None and how.fits > 0 and window is None
        if packed is None:
            of_heads = [
                RaggedSlots.nbytes_for(batch, 1, own.mean_dim, item, each, fits) + each * batch * own.index_dim * item
                for each in slots
            ]
        else:
            coding = packed.per_token_scheme(own.head_dim, own.value_dim)
            slots, wide = [*map(RaggedPackedSlots.whole, slots)], (batch, 1, own.head_dim)
            of_heads = [RaggedPackedSlots.nbytes_for(*wide, coding, each, fits, own.value_dim) for each in slots]
        unused = kv_heads * max(slots) - sum(slots)
        size += sum(of_heads) + batch * (unused * 8 + 4 * (2 + 2 * kv_heads)) + 8
    return size


def _asked(how: SecondReading, context: int) -> int:
    """Tokens whose queries are held until what is kept has been fitted to them, in a layer."""
    return sum(min(how.fits, context - start, how.chunk) for start in range(0, context, how.chunk))


def _packed(
    own: hf.LayerHeads,
    settings: GEAR,
    context: int,
    window: int | None,
    batch: int,
    item: int,
    scheme: CalibratedScheme | None = None,
) -> int:
    """Bytes of one layer of GEAR after a prefill of the whole context: blocks of codes, and the tail; with a scheme,
    of keys in a calibrated basis, which counts too."""
    block, heads = settings.buffer, (batch, own.kv_heads)
    sinks = settings.sinks if window is None else 0
    behind = max(0, context - sinks)
    full = behind // block if context > DRAFT else 0
    skipped = 0 if window is None else min(max(0, (context - window - DRAFT) // block), full)
    codings, widest = settings.codings(own.head_dim, settings.rank, own.value_dim), max(own.head_dim, own.value_dim)
    waits, room = settings.tail_coding(widest), max(block, behind - full * block)
    if waits is None:
        tail = TailSegment.nbytes_for(*heads, own.mean_dim, item, room)
    else:
        tail = PackedTail.nbytes_for(*heads, widest, waits, room)
    blocks = QuantizedBlocks.nbytes_for(*heads, own.head_dim, codings, block, full - skipped, scheme, own.value_dim)
    basis = 0 if scheme is None else KeyCodec.nbytes_for(scheme, own.key_width, item)
    # index keys are not packed
    index = batch * context * own.index_dim * item
    return blocks + basis + tail + TailSegment.nbytes_for(*heads, own.mean_dim, item, sinks) + index


def _schemes(shape: Shape, basis: Basis, bits: int) -> list[CalibratedScheme | None]:
    """How each layer's keys are packed; ValueError where the basis is of another model, as far as sizes tell."""
    sizes = [len(layer.keys.mean) for layer in basis.layers]
    expected = [own.key_width for own in shape.layers]
    if sizes != expected:
        raise ValueError(
            f"the basis must be of {len(expected)} layers with {expected[0]} numbers for a token's keys for "
            f"{shape.name}, got {len(sizes)} layers with {sizes[0] if sizes else 0}"
        )
    return [scheme_for(layer.keys.variances, bits) for layer in basis.layers]


def _shadow(own: hf.LayerHeads, settings: ShadowKV, budget: int, context: int, batch: int, item: int) -> int:
    """Bytes of one layer of ShadowKV on the device, after a prefill of the whole context."""
    if settings.rank is not None:
        settings = dataclasses.replace(settings, rank=min(settings.rank, own.key_width))
    size, selected = (batch, own.kv_heads, own.head_dim, own.value_dim), max(1, budget // settings.chunk)
    # what was fetched, and in how many forwards; tokens seen; addresses of slabs; frequencies
    beside = 3 * 8 + 8 * ADDRESSES + 4 * (own.head_dim // 2)
    return ShadowSegment.nbytes_for(*size, item, settings, selected, context) + beside
