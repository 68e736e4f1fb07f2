"""Models whose later layers attend to keys and values of earlier ones (Gemma 3n): every cache keeps these once."""

import pytest
import torch
from transformers import CONFIG_MAPPING, DynamicCache

from kvcompress import (
    TOVA,
    AcrossKVCache,
    DenseCache,
    EvictingCache,
    GEARCache,
    H2OCache,
    HydragenCache,
    KVzipCache,
    ShadowKVCache,
    measure_basis,
    measure_profile,
)
from kvcompress.hf import cache_argument, layer_kinds
from kvcompress.hf.judge import judge_of
from kvcompress.plan import make_plan, shape_of
from tests.contract.caches import BUDGET, LARGE, SHADOW
from tests.contract.drive import feed, full, generate
from tests.contract.models import build, left_padded, prompt, tiny
from tests.swiftkv.test_model import CLOSE

# of four layers, the last two share what the first two keep
ROOMY = {
    "dense": DenseCache,
    "h2o": lambda model: H2OCache(model, budget=LARGE),
    "rolled": lambda model: H2OCache(model, budget=LARGE, rerotated=True),
    "heads": lambda model: H2OCache(model, budget=LARGE, allocation="heads"),
    "kvzip": lambda model: KVzipCache(model, budget=LARGE, sinks=1, chunk=9),
    "gear": lambda model: GEARCache(model, buffer=256, tail_bits=None),
    "shadowkv": lambda model: ShadowKVCache(model, **SHADOW | {"budget": LARGE}),
}
every_roomy_cache = pytest.mark.parametrize("name", ROOMY)


@pytest.fixture
def model():
    return tiny("gemma3n")


def test_the_config_says_whose_keys_and_values_a_layer_attends_to(model):
    kinds = layer_kinds(model.config)
    assert [(kind.attends, kind.kv_source, kind.window) for kind in kinds] == [
        (True, None, 12), (True, None, None), (False, 0, 12), (False, 1, None)
    ]  # fmt: skip


# README: so too where layers share KV: Gemma 3n
@every_roomy_cache
def test_chunks_single_tokens_and_a_second_turn_equal_the_model_without_a_cache(name, model):
    rows = [prompt(60, seed=4)[0], prompt(49, seed=5)[0]]
    ids, mask = left_padded(rows)
    cache, logits = ROOMY[name](model), []
    for start, stop in [(0, 25), (25, 40), (40, 41), (41, 42), (42, 55), (55, 56)]:
        logits.append(feed(model, cache, ids[:, start:stop], mask[:, :stop]))
    for index, row in enumerate(rows):
        with torch.no_grad():
            alone = model(row[None], use_cache=False).logits[0]
        found = torch.cat(logits, 1)[index, len(ids[0]) - len(row) :]
        torch.testing.assert_close(found, alone[: len(found)], **CLOSE)


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
@every_roomy_cache
def test_beams_are_those_of_transformers_cache(name, settings, model):
    ids, mask = left_padded([prompt(30, seed=5)[0], prompt(17, seed=6)[0]])
    assert torch.equal(generate(model, ROOMY[name](model), ids, mask, **settings), full(model, ids, mask, **settings))


def test_drafts_are_taken_back(model):
    ids = prompt(12).repeat(1, 3)
    wanted = full(model, ids)
    for name in ("dense", "gear", "shadowkv"):
        assert torch.equal(generate(model, ROOMY[name](model), ids, prompt_lookup_num_tokens=3), wanted), name


def test_what_is_kept_is_chosen_by_the_attention_of_all_layers_that_share_it(model):
    """The mean of the column sums of both layers, in a prompt and in the steps after it."""
    ids = prompt(40)
    cache, judge = H2OCache(model, budget=20), judge_of(model)
    with torch.no_grad():
        weights = judge(ids, use_cache=False, output_attentions=True).attentions
    feed(model, cache, ids[:, :30])
    for index, sharing in [(0, 2), (1, 3)]:
        slots = cache.layers[index].slots
        # of the heads of a group; over the prompt's queries
        sums = [weights[layer][0, :, :30, :30].sum(1).unflatten(0, (2, 2)).sum(1) for layer in (index, sharing)]
        wanted = (sums[0] + sums[1]) / 2
        held = slots.positions[0] >= 0
        found = slots.scores[0]
        at = slots.positions[0].clamp(min=0).long()
        torch.testing.assert_close(found[held], wanted.gather(1, at)[held], **CLOSE)
        # the layers do not attend alike
        assert float((sums[0] - sums[1]).abs().max()) > 0.1

    tova = EvictingCache(model, policy=TOVA(), budget=LARGE)
    feed(model, tova, ids[:, :30])
    feed(model, tova, ids[:, 30:31])
    for index, sharing in [(0, 2), (1, 3)]:
        slots = tova.layers[index].slots
        # of the heads of a group, and of the groups, which TOVA lets choose together
        last = [weights[layer][0, :, 30, :31].sum(0) / 2 for layer in (index, sharing)]
        held = slots.positions[0] >= 0
        torch.testing.assert_close(slots.scores[0][held], ((last[0] + last[1]) / 2)[slots.positions[0][held]], **CLOSE)


def test_memory_and_plan_count_only_what_is_kept(model):
    cache, ids = DenseCache(model), prompt(10, 2)
    with torch.no_grad():
        model(ids, **cache_argument(model, cache))
    report, of_a_layer = cache.memory(), 2 * 2 * 2 * 10 * 32 * 4
    assert report.full_bytes == report.total_bytes == 2 * of_a_layer
    assert len(report.tokens_kept) == 2
    transformers_own = DynamicCache(config=model.config)
    feed(model, transformers_own, ids)
    held = [layer for layer in transformers_own.layers if getattr(layer, "keys", None) is not None]
    assert report.full_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in held)
    shape = shape_of(model)
    assert shape.windows == (12, None)
    (need,) = make_plan(shape, ["none"], 10, 2, 0.5, torch.float32)
    assert need.cache == need.full_cache == report.total_bytes
    # the layers that share are run without numbers too
    assert shape.working(torch.float32) > 0


@pytest.mark.parametrize("name", ["dense", "gear", "shadowkv", "h2o"])
def test_copies_and_files_go_on_as_the_cache_does(name, model, tmp_path):
    make = {**ROOMY, "h2o": lambda model: H2OCache(model, budget=BUDGET)}[name]
    ids, mask = left_padded([prompt(40, seed=5)[0], prompt(33, seed=6)[0]])
    cache = make(model)
    feed(model, cache, ids[:, :35], mask[:, :35])
    cache.save(tmp_path / "cache.safetensors")
    copies = [cache.clone(), type(cache).load(tmp_path / "cache.safetensors", model)]
    wanted = [feed(model, cache, ids[:, at : at + 1], mask[:, : at + 1]) for at in range(35, 40)]
    for copied in copies:
        found = [feed(model, copied, ids[:, at : at + 1], mask[:, : at + 1]) for at in range(35, 40)]
        torch.testing.assert_close(torch.cat(found), torch.cat(wanted), **CLOSE)


def test_a_forward_interrupted_between_layers_that_share_is_noticed(model):
    cache, ids = H2OCache(model, budget=BUDGET), prompt(20)
    wanted = feed(model, cache, ids)
    cache.reset()

    def stop(*args):
        raise KeyboardInterrupt

    hook = model.model.layers[2].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        feed(model, cache, ids)
    hook.remove()
    assert cache.is_interrupted
    with pytest.raises(RuntimeError, match="interrupted"):
        feed(model, cache, prompt(1), torch.ones(1, 21))
    cache.reset()
    torch.testing.assert_close(feed(model, cache, ids), wanted)


def test_keys_that_were_moved_to_another_device_are_still_known(model):
    """They come back as other tensors, as they do where accelerate spreads a model over devices."""

    def move(module, args, kwargs):
        shared = kwargs["shared_kv_states"]
        for name in list(shared):
            shared[name] = tuple(each.clone() for each in shared[name])

    ids, mask = left_padded([prompt(30, seed=5)[0], prompt(17, seed=6)[0]])
    wanted = generate(model, H2OCache(model, budget=BUDGET), ids, mask)
    hook = model.model.layers[2].register_forward_pre_hook(move, with_kwargs=True)
    try:
        assert torch.equal(generate(model, H2OCache(model, budget=BUDGET), ids, mask), wanted)
    finally:
        hook.remove()


def test_shadowkv_counts_a_forward_once_however_many_layers_read_it(model):
    cache = ShadowKVCache(model, **SHADOW)
    feed(model, cache, prompt(40))
    before = cache.memory().fetching_forwards
    for at in range(3):
        feed(model, cache, prompt(1, seed=at + 3))
    assert cache.memory().fetching_forwards == before + 3


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (HydragenCache, "attend to keys and values of others"),
        (lambda model: AcrossKVCache(model, share=2), "no keys and values of their own"),
        (lambda model: measure_basis(model, [prompt(40)]), "no keys and values of their own"),
        (lambda model: measure_profile(model, [prompt(40)]), "no keys and values of their own"),
    ],
    ids=["hydragen", "across", "basis", "profile"],
)
@pytest.mark.filterwarnings("ignore:AcrossKVCache on")
def test_what_needs_keys_and_values_of_every_layer_refuses_by_name(make, reason, model):
    with pytest.raises(ValueError, match=f"Gemma3nForCausalLM.*{reason}"):
        make(model)


def test_sharing_in_another_way_is_refused_by_name():
    model = build("llama")
    model.config.kv_sharing_modes = ["store", None, "reuse"]
    with pytest.raises(ValueError, match="LlamaForCausalLM shares keys and values between layers in a way of its own"):
        DenseCache(model)


def sharing_gemma_4():
    kinds = ["sliding_attention", "full_attention"] * 2
    return build("gemma4", num_hidden_layers=4, layer_types=kinds, num_kv_shared_layers=2)


# Gemma 4 leaves out of such layers all queries whose logits are not asked for, and cuts its own masks to fit
@pytest.mark.skipif("gemma4_text" not in CONFIG_MAPPING, reason="transformers has no Gemma 4")
@pytest.mark.parametrize("name", ["dense", "h2o", "heads", "gear"])
def test_rows_of_gemma_4_are_each_as_it_is_alone(name):
    model = sharing_gemma_4()
    rows = [prompt(40, seed=4)[0], prompt(29, seed=5)[0]]
    ids, mask = left_padded(rows)
    cache = ROOMY[name](model)
    positions = (mask[:, :-1].cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1], "position_ids": positions}
    with torch.no_grad():
        found = model(**inputs, **cache_argument(model, cache), logits_to_keep=1).logits[:, -1]
    after = feed(model, cache, ids[:, -1:], mask)[:, -1]
    for index, row in enumerate(rows):
        with torch.no_grad():
            alone = model(row[None], use_cache=False).logits[0]
        torch.testing.assert_close(torch.stack([found[index], after[index]]), alone[-2:], **CLOSE)


@pytest.mark.skipif("gemma4_text" not in CONFIG_MAPPING, reason="transformers has no Gemma 4")
def test_a_padded_prompt_of_gemma_4_keeps_what_it_keeps_alone():
    model = sharing_gemma_4()
    rows = [prompt(40, seed=4)[0], prompt(29, seed=5)[0]]
    ids, mask = left_padded(rows)
    settings = {"cache": H2OCache(model, budget=12), "do_sample": False, "max_new_tokens": 6}
    together = model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]
    for index, row in enumerate(rows):
        alone = model.generate(row[None], **settings | {"cache": H2OCache(model, budget=12)})[0, len(row) :]
        assert alone.tolist() == together[index].tolist()
