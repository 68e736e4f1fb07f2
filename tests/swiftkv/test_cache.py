"""Layers that share storage: every cache on converted models, and the bytes that sharing saves."""

import copy
import dataclasses
import warnings

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kvcompress import (
    AcrossKVCache,
    DenseCache,
    EvictingCache,
    GEARCache,
    HydragenCache,
    Profile,
    ShadowKVCache,
    SwiftKVCache,
)
from kvcompress.hf import cache_argument
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.policies.gear import GEAR
from kvcompress.policies.h2o import H2O
from kvcompress.policies.knorm import Knorm
from kvcompress.policies.snapkv import SnapKV
from kvcompress.policies.streaming_llm import StreamingLLM
from kvcompress.swiftkv.cache import FollowingLayer
from tests.contract.caches import by_name, every_cache
from tests.contract.drive import feed, generate
from tests.contract.models import DEVICE, build, left_padded, places, prompt
from tests.contract.oracle import assert_equals_oracle
from tests.swiftkv.test_model import CLOSE, FIRST, LAYERS, Counted, converted

SHARED = [
    "dense", "h2o", "h2o_fraction", "snapkv", "chunkkv", "tova", "streaming", "keydiff", "knorm", "expected", "gear",
    "gear_whole", "kivi", "h2o_packed",
]  # fmt: skip
# what does not look at every query leaves the prompt to skip
SKIPPING = {"dense", "snapkv", "chunkkv", "tova", "streaming", "keydiff", "knorm", "gear", "gear_whole", "kivi"}


def sharing(name):
    """The contract's entry of a cache, its storage shared by the groups of a converted model."""
    entry = by_name[name]
    return dataclasses.replace(
        entry,
        name=f"shared_{name}",
        make=lambda model: SwiftKVCache(model, storage=entry.make),
        compileable=False,
    )


def twice(entry, family, share, asked):
    """Left-padded rows through a new cache, and a second turn; asked: logits of the prompts."""
    model = converted(family, share, dtype=entry.dtype)
    cache = entry.build(model)
    ids, mask = left_padded([prompt(20)[0], prompt(13, seed=2)[0]])
    counted = Counted(model)
    with entry.recording(model, cache) as transcript:
        if asked == "all":
            feed(model, cache, ids, mask)
            for part in prompt(8, 2, seed=3).split([5, 1, 1, 1], 1):
                mask = torch.cat([mask, torch.ones_like(part)], 1)
                feed(model, cache, part, mask)
        else:
            out = generate(model, cache, ids, mask, max_new_tokens=4)
            more = torch.cat([out, prompt(5, 2, seed=3)], 1)
            mask = torch.cat([mask, torch.ones_like(more[:, ids.shape[1] :])], 1)
            generate(model, cache, more, mask, max_new_tokens=4)
    counted.close()
    assert_equals_oracle(model, transcript)
    return counted.columns


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "granite", "olmo2", "olmo3", "phi3", "smollm3"])
@pytest.mark.parametrize("name", ["dense", "h2o", "snapkv", "gear", "shadowkv"])
def test_converted_models_of_every_family_serve_caches_of_every_kind(family, name):
    for asked in ("all", "last"):
        twice(by_name[name], family, 1, asked)


# docs: run the later layers, under any cache
@every_cache
def test_every_cache_serves_a_converted_model(entry):
    for asked in ("all", "last"):
        twice(entry, "llama", 1, asked)


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize(("family", "share"), [("llama", 2), ("mistral", 4), ("qwen3", 2), ("gemma2", 2), ("phi3", 2)])
def test_a_group_attends_to_what_its_first_layer_holds(name, family, share):
    twice(sharing(name), family, share, "all")


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize(("family", "share"), [("llama", 2), ("mistral", 2)])
def test_the_prompt_skips_the_later_layers_wherever_the_storage_allows(name, family, share):
    columns = twice(sharing(name), family, share, "last")
    assert columns[0][0] == 20
    assert (columns[-1][0] < 20) == (name in SKIPPING)


@pytest.mark.parametrize(
    "policy", [StreamingLLM(sinks=2), Knorm(), SnapKV(window=3, recent=3, kernel=3), SnapKV(window=1, recent=1), H2O()]
)
@pytest.mark.parametrize("padded", ["not", "left", "right"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_skipping_changes_neither_what_is_kept_nor_the_logits(policy, padded, family):
    model = converted(family, 2)
    ids, mask = prompt(20, 2), torch.ones(2, 20, dtype=torch.long, device=DEVICE)
    if padded != "not":
        ids, mask = left_padded([prompt(20)[0], prompt(13, seed=2)[0]])
    if padded == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    caches = [SwiftKVCache(model, storage=lambda m: EvictingCache(m, policy=policy, budget=8)) for _ in range(2)]
    with torch.no_grad():
        how = {"attention_mask": mask, "position_ids": places(mask)}
        whole = model(ids, **how, **cache_argument(model, caches[0])).logits
        last = model(ids, **how, **cache_argument(model, caches[1]), logits_to_keep=1).logits
        real = mask.cumsum(-1).argmax(-1)
        torch.testing.assert_close(last[:, 0], whole[torch.arange(2), real], **CLOSE)
        for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
            if not isinstance(one, FollowingLayer):
                for held, wanted in zip(kept(other), kept(one), strict=True):
                    assert torch.equal(held, wanted)
        mask = torch.cat([mask, mask[:, :1] * 0 + 1], 1)
        one, other = (feed(model, cache, prompt(1, 2), mask) for cache in caches)
        torch.testing.assert_close(one, other, **CLOSE)


def kept(layer):
    """The positions in the slots, in order, [batch, kv_heads, slots]."""
    return layer.slots.positions.sort(-1).values


# README: | `convert(model)` + `SwiftKVCache` | every token; later layers in groups that share K and V
@pytest.mark.parametrize("share", [1, 2, 4])
def test_the_bytes_are_those_of_the_layers_that_store(share):
    model = converted("llama", share)
    cache = SwiftKVCache(model)
    with torch.no_grad():
        model(prompt(20, 2), **cache_argument(model, cache))
    report = cache.memory()
    stored = FIRST + (LAYERS - FIRST) // share
    of_a_layer = 2 * 2 * 2 * 16 * 20 * 4
    assert report.total_bytes == stored * of_a_layer
    assert report.by_component == {"keys": stored * of_a_layer // 2, "values": stored * of_a_layer // 2}
    assert report.full_bytes == LAYERS * of_a_layer
    assert report.ratio == stored / LAYERS
    live = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors(cache)}
    assert sum(live.values()) == report.total_bytes
    assert len(report.tokens_kept) == stored


def tensors(holder, known=None):
    """All tensors that hang on an object's attributes."""
    known = {} if known is None else known
    if id(holder) in known or isinstance(holder, torch.nn.Module | type):
        return
    known[id(holder)] = holder
    if isinstance(holder, Tensor):
        yield holder
    elif isinstance(holder, dict):
        for value in holder.values():
            yield from tensors(value, known)
    elif isinstance(holder, list | tuple):
        for value in holder:
            yield from tensors(value, known)
    elif hasattr(holder, "__dict__"):
        yield from tensors(vars(holder), known)


# README: | `AcrossKVCache` | every token; a group of layers shares one storage (dense, evicting or packed) |
# docs: run the later layers, under any cache, with the same numbers as if all positions did
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_shadowkv_skips_and_chooses_the_chunks_that_it_would_choose_if_all_ran(family):
    model = converted(family)
    turns = [[60, 41], [3, 2], [12, 9], [1, 1], [1, 1], [4, 3]]
    parts = [
        left_padded([prompt(n, seed=7 * at + row)[0] for row, n in enumerate(turn)]) for at, turn in enumerate(turns)
    ]
    mask = torch.cat([seen for _, seen in parts], 1)

    @torch.no_grad()
    def read(keep):
        cache = ShadowKVCache(
            model, budget=8, rank=16, chunk=4, outlier_chunks=0, local_chunks=1, fold=1, dense_below=0, select_queries=4
        )
        counted, past, last = Counted(model), 0, []
        for ids, _ in parts:
            at = slice(past, past + ids.shape[1])
            given = {"attention_mask": mask[:, : at.stop], "position_ids": places(mask)[:, at]}
            last.append(model(ids, **given, logits_to_keep=keep, **cache_argument(model, cache)).logits[:, -1])
            past = at.stop
        counted.close()
        assert all(layer.segment.is_folded for layer in cache.layers)
        return torch.stack(last), counted.columns[FIRST:]

    logits, columns = read(1)
    torch.testing.assert_close(logits, read(0)[0], **CLOSE)
    # more than choose read every chunk
    assert columns == [[1, 3, 5, 1, 1, 4]] * (LAYERS - FIRST)


def test_packed_storage_is_shared_too():
    model = converted("llama", 4)
    alone, shared = (
        GEARCache(model, bits=4, group_size=8, buffer=8),
        SwiftKVCache(model, storage=lambda m: GEARCache(m, bits=4, group_size=8, buffer=8)),
    )
    with torch.no_grad():
        for cache in (alone, shared):
            model(prompt(40, 2), **cache_argument(model, cache))
    assert "codes" in shared.memory().by_component
    assert shared.memory().total_bytes * LAYERS == alone.memory().total_bytes * (FIRST + 1)


def test_rows_move_once_and_drafts_are_taken_back():
    model = converted("llama", 2)
    ids = prompt(20, 2)
    settings = [
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3, "ids": torch.cat([ids[:1], ids[:1]], 1)},
    ]
    for how in settings:
        fed = how.pop("ids", ids)
        answers = []
        for cache in (DenseCache(model), SwiftKVCache(model), DynamicCache(config=model.config)):
            torch.manual_seed(0)
            answers.append(generate(model, cache, fed, **how))
        assert torch.equal(answers[0], answers[1])
        assert torch.equal(answers[0], answers[2])


@pytest.mark.parametrize("name", ["dense", "h2o", "gear"])
def test_a_saved_or_cloned_cache_goes_on_as_it_was(name, tmp_path):
    entry = sharing(name)
    model = converted("llama", 2)
    cache = entry.build(model)
    feed(model, cache, prompt(20, 2))
    cache.save(tmp_path / "cache.safetensors")
    loaded = SwiftKVCache.load(tmp_path / "cache.safetensors", model)
    cloned = cache.clone()
    expected = [feed(model, cache, part) for part in prompt(6, 2, seed=4).split([4, 1, 1], 1)]
    for other in (loaded, cloned):
        assert other.layers[FIRST + 1].kv_source is other.layers[FIRST]
        again = [feed(model, other, part) for part in prompt(6, 2, seed=4).split([4, 1, 1], 1)]
        torch.testing.assert_close(again, expected)
    assert loaded.memory().total_bytes == cache.memory().total_bytes
    cache.reset()
    assert cache.memory().total_bytes == 0
    assert torch.equal(feed(model, cache, prompt(20, 2)), feed(model, entry.build(model), prompt(20, 2)))


class Copying(DynamicCache):
    """The full cache, whose layers of a group are given what the group's first layer was fed."""

    def __init__(self, model, first, share):
        super().__init__(config=model.config)
        self.first, self.share, self.of_leader = first, share, {}

    def update(self, key, value, layer, *args, **kwargs):
        within = (layer - self.first) % self.share if layer >= self.first else 0
        self.of_leader[layer] = key, value
        return super().update(*self.of_leader[layer - within], layer, *args, **kwargs)


# README: | a diagnostic for models that were not converted |
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_on_any_model_it_is_a_diagnostic_and_says_so(family):
    model = build(family, num_hidden_layers=5, **({"layer_types": KINDS} if family in ("gemma2", "gpt_oss") else {}))
    with pytest.warns(UserWarning, match="was not trained to share .* is a diagnostic"):
        cache = AcrossKVCache(model, share=2, skip_from=1)
    judge = Copying(model, 1, 2)
    with torch.no_grad():
        for part in prompt(24, 2).split([18, 1, 1, 4], 1):
            other = copy.deepcopy(model)
            other.set_attn_implementation("eager")
            torch.testing.assert_close(
                model(part, **cache_argument(model, cache)).logits,
                other(part, **cache_argument(other, judge)).logits,
                **CLOSE,
            )
    assert [bool(layer.segments()) for layer in cache.layers] == [True, True, False, True, False]


KINDS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "full_attention"]


def test_it_is_silent_on_a_model_converted_so_and_refuses_other_groups():
    model = converted("llama", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache = AcrossKVCache(model, share=2)
    assert sum(isinstance(layer, FollowingLayer) for layer in cache.layers) == 2
    with pytest.raises(ValueError, match="converted with share=2, got share=4"):
        AcrossKVCache(model, share=4)


def test_what_cannot_be_shared_is_refused_by_name():
    with pytest.raises(ValueError, match="supports converted models, got LlamaForCausalLM"):
        SwiftKVCache(build("llama"))
    model = converted("llama", 2)
    with pytest.raises(ValueError, match="DenseCache, EvictingCache, GEARCache; got HydragenCache"):
        SwiftKVCache(model, storage=HydragenCache)
    with pytest.raises(ValueError, match="got EvictingCache with rerotated=True"):
        SwiftKVCache(model, storage=lambda m: EvictingCache(m, policy=H2O(), budget=8, rerotated=True))
    plain = build("llama", num_hidden_layers=5)
    with (
        pytest.warns(UserWarning, match="diagnostic"),
        pytest.raises(ValueError, match="share must divide the 3 later layers"),
    ):
        AcrossKVCache(plain, share=2, skip_from=2)
    mixed = build(
        "gemma2", num_hidden_layers=5, layer_types=["full_attention", "sliding_attention"] * 2 + ["full_attention"]
    )
    with pytest.warns(UserWarning, match="diagnostic"), pytest.raises(ValueError, match="layers 1 to 2 have windows"):
        AcrossKVCache(mixed, share=2, skip_from=1)


def test_a_following_layer_is_not_run_alone():
    model = converted("llama", 2)
    cache = SwiftKVCache(model)
    layer = cache.layers[FIRST + 1]
    layer.update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16))
    with pytest.raises(RuntimeError, match="ran without it"):
        layer.attend(torch.zeros(1, 4, 1, 16), None, LogitSpec(1.0), sinks=None, position_ids=None)


def test_packed_slots_are_shared_as_well():
    model = converted("llama", 2, dtype=torch.float64)
    make = lambda m: EvictingCache(m, policy=Knorm(), budget=8, packed=GEAR(bits=3, group_size=8))  # noqa: E731
    answers = [generate(model, cache, prompt(20, 2)) for cache in (make(model), SwiftKVCache(model, storage=make))]
    # the layers of a group are fed the same tokens, and this policy looks at nothing else
    assert torch.equal(*answers)


@pytest.mark.parametrize("how", ["pyramid", "profile", "uniform"])
def test_layers_that_store_nothing_get_no_part_of_the_budget(how):
    model = converted(share=2)
    leaders = [*range(FIRST), *range(FIRST, LAYERS, 2)]
    allocation = how
    if how == "profile":
        shares = torch.ones(LAYERS, model.config.num_key_value_heads)
        # what belongs to the layers that follow is nobody's
        shares[[layer for layer in range(LAYERS) if layer not in leaders]] = 20.0
        shares[0, 0] = 3.0
        allocation = Profile.of(model, shares)
    cache = SwiftKVCache(
        model, storage=lambda model: EvictingCache(model, policy=H2O(), budget=12, allocation=allocation)
    )
    feed(model, cache, prompt(60))
    kept = torch.stack([cache.layers[layer].tokens_kept().double() for layer in leaders])
    assert kept.mean() <= 12
    # up to the rounding of counts
    assert kept.mean() > 11
    if how == "profile":
        assert kept[0, 0, 0] == kept.max() > kept[1:].max()


def test_a_profile_that_gives_nothing_to_layers_that_store_is_refused():
    model = converted(share=2)
    shares = torch.zeros(LAYERS, model.config.num_key_value_heads)
    shares[FIRST + 1] = 1.0
    profile = Profile.of(model, shares)
    with pytest.raises(ValueError, match="gives layers .* no share, and the others store nothing here"):
        SwiftKVCache(model, storage=lambda model: EvictingCache(model, policy=H2O(), budget=12, allocation=profile))


def test_a_file_from_before_layers_shared_budgets_means_what_it_meant(tmp_path):
    model = converted(share=2)
    cache = SwiftKVCache(
        model, storage=lambda model: EvictingCache(model, policy=H2O(), budget=16, allocation="pyramid")
    )
    # as it was: layers that follow have their part of the pyramid
    own = EvictingCache(model, policy=H2O(), budget=16, allocation="pyramid")
    for layer, other in zip(cache.layers, own.layers, strict=True):
        if not isinstance(layer, FollowingLayer):
            layer.budget = other.budget
    settings = cache._settings()
    del settings["shares_budget"]
    cache._settings = lambda: settings
    feed(model, cache, prompt(5))
    cache.save(tmp_path / "old")
    loaded = SwiftKVCache.load(tmp_path / "old", model)
    for step in range(20):
        found, expected = (feed(model, each, prompt(1, seed=step + 2)) for each in (loaded, cache))
        torch.testing.assert_close(found, expected)
    for layer in range(LAYERS):
        assert torch.equal(loaded.layers[layer].tokens_kept(), cache.layers[layer].tokens_kept())
