"""Any cache as the prefix of any tree: what it holds is attended to as it holds it, whatever happens to the rows."""

import pytest
import torch

from kvcompress import (
    AcrossKVCache,
    AttentionMatchingCache,
    DenseCache,
    EvictingCache,
    GEARCache,
    HydragenCache,
    KIVICache,
    PrefixStore,
    ShadowKVCache,
    SwiftKVCache,
    convert,
)
from kvcompress.policies.gear import GEAR
from kvcompress.policies.h2o import H2O
from kvcompress.policies.kvzip import KVzip
from kvcompress.policies.snapkv import SnapKV
from kvcompress.policies.tova import TOVA
from tests.contract.caches import SHADOW
from tests.contract.drive import feed, full, generate
from tests.contract.models import build, left_padded, places, prompt, tiny
from tests.contract.test_memory import storages

PREFIX = prompt(75, seed=3)[0]
SUFFIX = prompt(7, 3, seed=11)
PACKED = GEAR(bits=4, group_size=8)


def evicting(policy, budget=16, **settings):
    return lambda model: EvictingCache(model, policy=policy, budget=budget, **settings)


DONORS = {
    "h2o": evicting(H2O()),
    "snapkv": evicting(SnapKV(window=3, recent=3, kernel=3)),
    "tova": evicting(TOVA()),
    "kvzip": evicting(KVzip(sinks=1, chunk=7, prompt=(5, 6))),
    "kvzip, heads compete": evicting(KVzip(sinks=1, chunk=30), allocation="global"),
    "attention matching": lambda model: AttentionMatchingCache(model, budget=16, sinks=1, chunk=30, queries=20),
    "packed slots": evicting(H2O(sinks=1), packed=PACKED),
    "gear": lambda model: GEARCache(model, bits=3, buffer=8, group_size=8, rank=2, rank_decode=1, outliers=0.05),
    "gear, nothing packed": lambda model: GEARCache(model, buffer=128),
    "kivi": lambda model: KIVICache(model, buffer=8, group_size=8),
    "shadowkv": lambda model: ShadowKVCache(model, **SHADOW | {"budget": 10_000}),
    "across": lambda model: AcrossKVCache(model, share=2, skip_from=1),
    "across gear": lambda model: AcrossKVCache(
        model, share=2, skip_from=1, storage=lambda model: GEARCache(model, buffer=8, group_size=8)
    ),
}
every_donor = pytest.mark.parametrize("name", DONORS)


def filled(name, model, prefix=PREFIX):
    """A cache of this kind that was fed the prefix, at once and then by steps."""
    cache = DONORS[name](model)
    feed(model, cache, prefix[None, :-3])
    for token in prefix[-3:]:
        feed(model, cache, token[None, None])
    return cache


def covered(cache, ids):
    return cache.cover(torch.ones_like(ids))


def step(model, cache, ids):
    return feed(model, cache, ids, covered(cache, ids))


# docs: `from_cache` takes any other cache of one sequence but a rerotated one as the prefix, with its slots, codes or
@pytest.mark.filterwarnings("ignore:AcrossKVCache")
@every_donor
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_a_suffix_sees_what_the_other_cache_holds(name, family):
    if family != "llama" and name.startswith("across"):
        pytest.skip("layers of several kinds share no storage")
    model = tiny(family)
    donor = filled(name, model)
    plain = donor.clone()
    cache = HydragenCache.from_cache(donor)
    if name == "across":
        # two storages for three layers; of what follows each layer has its own
        assert cache.memory().by_component["prefix_keys"] == 2 * 75 * 2 * 16 * 4
        assert torch.isfinite(step(model, cache, SUFFIX)).all()
        return
    logits = step(model, cache, SUFFIX)
    if not name.startswith("across"):
        for row in range(3):
            # one forward: what it brings is whole there too
            wanted = feed(model, plain.clone(), SUFFIX[row][None])[0]
            torch.testing.assert_close(logits[row], wanted, rtol=1e-4, atol=2e-4)
    assert cache.memory().total_bytes == sum(storages(cache).values())
    for now, layer in zip(cache.memory().tokens_kept, plain.layers, strict=True):
        assert torch.equal(now, layer.tokens_kept().expand_as(now) + 7)


@pytest.mark.filterwarnings("ignore:AcrossKVCache")
@every_donor
@pytest.mark.parametrize("way", ["steps", "push", "fork", "repeat", "clone", "save", "reorder"])
def test_whatever_happens_to_the_rows_the_answer_stays(name, way, tmp_path):
    model = tiny()
    donor = filled(name, model)
    cache = HydragenCache.from_cache(donor)
    wanted = step(model, cache.clone(), SUFFIX)[:, 4:]
    if way == "push":
        cache.push(SUFFIX[:, :2])
        cache.push(SUFFIX[:, 2:4])
        assert len(cache.tree.nodes) == 7
    else:
        step(model, cache, SUFFIX[:, :4])
    rest, order = SUFFIX[:, 4:], torch.arange(3)
    if way == "fork":
        cache, order = cache.fork(2), order.repeat_interleave(2)
    elif way == "repeat":
        cache.batch_repeat_interleave(2)
        order = order.repeat_interleave(2)
    elif way == "clone":
        cache = cache.clone()
    elif way == "reorder":
        order = torch.tensor([2, 0, 0])
        cache.reorder_cache(order)
    elif way == "save":
        before = {layer: [x.shape for x in node] for layer, node in enumerate(cache.memory().tokens_kept)}
        cache.save(tmp_path / "cache")
        loaded = HydragenCache.load(tmp_path / "cache", model)
        assert before == {layer: [x.shape for x in node] for layer, node in enumerate(loaded.memory().tokens_kept)}
        # a second time, from what was loaded
        loaded.save(tmp_path / "again")
        cache = HydragenCache.load(tmp_path / "again", model)
    for column in range(3):
        logits = step(model, cache, rest[order, column : column + 1])
        torch.testing.assert_close(logits[:, 0], wanted[order, column], rtol=1e-4, atol=2e-4)
    assert cache.memory().total_bytes == sum(storages(cache).values())


@pytest.mark.parametrize("name", ["gear", "kivi", "across gear"])
@pytest.mark.filterwarnings("ignore:AcrossKVCache")
def test_a_tail_that_is_empty_when_it_becomes_a_prefix_takes_no_memory(name):
    model = tiny()
    # whole blocks of 8, behind the first tokens that GEAR keeps apart
    donor = filled(name, model, PREFIX[:64] if name == "kivi" else PREFIX[:68])
    assert not any(any(layer.tail.held) for layer in donor.layers if hasattr(layer, "tail"))
    cache = HydragenCache.from_cache(donor)
    assert cache.memory().total_bytes == sum(storages(cache).values())
    step(model, cache, SUFFIX)
    assert cache.memory().total_bytes == sum(storages(cache).values())


ROOMY = {
    "h2o": evicting(H2O(), 1000),
    "attention matching": lambda model: AttentionMatchingCache(model, budget=1000),
    "packed slots": evicting(H2O(), 1000, packed=GEAR(bits=8, group_size=8, outliers=0.2)),
    "gear": lambda model: GEARCache(model, buffer=256, tail_bits=None),
    "shadowkv": lambda model: ShadowKVCache(model, **SHADOW | {"budget": 10_000, "rank": 32}),
}


@pytest.mark.parametrize("name", ROOMY)
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_prompts_of_any_length_go_on_from_what_another_cache_holds(name, settings):
    model = tiny("llama", dtype=torch.float64)
    donor = ROOMY[name](model)
    feed(model, donor, PREFIX[None])
    ids, mask = left_padded([torch.cat([PREFIX, own[: 2 + 2 * row]]) for row, own in enumerate(SUFFIX)])
    torch.manual_seed(3)
    wanted = full(model, ids, mask, max_new_tokens=6, **settings)
    torch.manual_seed(3)
    cache = HydragenCache.from_cache(donor)
    out = generate(model, cache, ids, mask, max_new_tokens=6, **settings)
    if name != "packed slots":
        assert torch.equal(out, wanted)
    else:
        assert out.shape == wanted.shape


@pytest.mark.parametrize("name", ["h2o", "attention matching", "gear", "kivi", "packed slots", "shadowkv"])
def test_tokens_fed_again_see_no_further_than_themselves(name):
    """Row 0 is shorter: of what it is fed, the first tokens lie in the node already."""
    model = tiny()
    donor = (ROOMY | {"kivi": lambda model: KIVICache(model, bits=8, buffer=8, group_size=8)})[name](model)
    feed(model, donor, PREFIX[None])
    cache = HydragenCache.from_cache(donor)
    ids, mask = left_padded([PREFIX, torch.cat([PREFIX, SUFFIX[0]])])
    logits = feed(model, cache, ids[:, 75:], mask)
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask, position_ids=places(mask), use_cache=False).logits[:, 75:]
    # codes of 8 bits are near enough to tell one token's sight from another's
    bound = 2e-4 if name in ("h2o", "attention matching", "gear", "shadowkv") else 0.3
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=bound)


def test_the_cache_of_a_swiftkv_model_is_a_prefix():
    model = convert(build("llama", num_hidden_layers=4), skip_from=0.5, share=2)
    donor = SwiftKVCache(model)
    feed(model, donor, PREFIX[None])
    ids = torch.cat([PREFIX.expand(3, -1), SUFFIX], 1)
    assert torch.equal(generate(model, HydragenCache.from_cache(donor), ids), full(model, ids))


# docs: any other cache of one sequence but a rerotated one
def test_rolled_slots_are_refused_before_anything_runs():
    model = tiny()
    donor = EvictingCache(model, policy=H2O(), budget=16, rerotated=True)
    with pytest.raises(ValueError, match="has seen tokens"):
        HydragenCache.from_cache(donor)
    feed(model, donor, PREFIX[None])
    with pytest.raises(ValueError, match=r"rerotated=True.*RerotatedSlots.*without rerotated=True"):
        HydragenCache.from_cache(donor)
    assert torch.isfinite(feed(model, donor, SUFFIX[:1])).all()


def test_a_cache_of_its_own_kind_is_a_prefix_too():
    model = tiny()
    donor = HydragenCache(model)
    feed(model, donor, PREFIX[None])
    ids = torch.cat([PREFIX.expand(3, -1), SUFFIX], 1)
    assert torch.equal(generate(model, HydragenCache.from_cache(donor), ids), full(model, ids))


@pytest.mark.parametrize("name", ["h2o", "attention matching", "gear", "shadowkv"])
def test_what_is_coded_is_neither_cropped_nor_forgotten(name):
    model = tiny()
    cache = HydragenCache.from_cache(filled(name, model))
    step(model, cache, SUFFIX[:1])
    mask = torch.ones(1, 83, dtype=torch.long)
    mask[0, 5:9] = 0
    wanted = step(model, cache.clone(), SUFFIX[1:2, :1])
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-9)
    with pytest.raises(ValueError, match="cannot be cropped"):
        feed(model, cache, SUFFIX[:1, :1], mask)
    assert torch.equal(step(model, cache, SUFFIX[1:2, :1]), wanted)


def test_tokens_fed_again_see_log_weights():
    """Keys and values of a single layer follow from the tokens alone, so a mask can add the log-weights."""
    model = build("llama", num_hidden_layers=1)
    donor = AttentionMatchingCache(model, budget=1000)
    feed(model, donor, PREFIX[None])
    weights = torch.randn(75)
    slots = donor.layers[0].slots
    slots.weigh(weights[slots.positions.long()])
    cache = HydragenCache.from_cache(donor)
    ids, mask = left_padded([PREFIX, torch.cat([PREFIX, SUFFIX[0]])])
    logits = feed(model, cache, ids[:, 75:], mask)
    added = torch.full((2, 1, 82, 82), -torch.inf).triu(1)
    added[0, 0, 1:, 7:] += weights
    added[0, 0, 7:, :7] = -torch.inf
    added[1, 0, :, :75] += weights
    with torch.no_grad():
        wanted = model(ids, attention_mask=added, position_ids=places(mask), use_cache=False).logits[:, 75:]
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=2e-4)


# docs: can go on from it where it is the prefix of a `HydragenCache`
# docs: `put` stores a cache that you made yourself, also one that compresses
@pytest.mark.parametrize("way", ["compact", "from_cache"])
def test_a_compacted_cache_is_stored_and_continued_from(way, tmp_path):
    model = tiny()
    dense = DenseCache(model)
    feed(model, dense, PREFIX[None])
    if way == "compact":
        donor = AttentionMatchingCache(model, budget=40)
        feed(model, donor, PREFIX[None])
        donor.compact(PREFIX[None], budget=12)
    else:
        donor = AttentionMatchingCache.from_cache(dense, PREFIX[None], budget=12)
    wanted = [feed(model, donor.clone(), SUFFIX[row][None])[0] for row in range(3)]
    size = donor.memory().total_bytes
    store = PrefixStore(model)
    store.put(PREFIX, HydragenCache.from_cache(donor))
    store.save(tmp_path / "store")
    for prefixes in (store, PrefixStore.load(tmp_path / "store", model)):
        cache = prefixes.get(PREFIX)
        # and the document's tokens, which the store was told
        assert cache.memory().total_bytes <= size + 4 * len(PREFIX)
        for logits, each in zip(step(model, cache, SUFFIX), wanted, strict=True):
            torch.testing.assert_close(logits, each, rtol=1e-4, atol=2e-4)
