"""What does not come through our caches is bit for bit what it was before the model's attention was switched."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from kvcompress import DenseCache, H2OCache
from tests.contract.drive import feed, full, generate
from tests.contract.models import FAMILIES, build, left_padded, prompt

ATTENTIONS = ["sdpa", "eager"]
ROWS = [prompt(20)[0], prompt(13, seed=2)[0]]


def pair(family, attention):
    """The same model twice: as it came, and after caches were built for it and used."""
    if FAMILIES[family].get("attention", attention) != attention:
        pytest.skip(f"{family} has no {attention} attention")
    before = build(family, attention=attention)
    after = copy.deepcopy(before)
    generate(after, H2OCache(after, budget=8), prompt(20), max_new_tokens=2)
    DenseCache(after)
    assert before.config._attn_implementation == attention
    assert after.config._attn_implementation.startswith("kvcompress")
    return before, after


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_without_a_cache(family, attention):
    before, after = pair(family, attention)
    ids, mask = left_padded(ROWS)
    with torch.no_grad():
        for how in ({"attention_mask": mask}, {"attention_mask": torch.ones_like(mask)}, {}):
            assert torch.equal(before(ids, **how).logits, after(ids, **how).logits)


# README: Other caches and training on that model give bit-for-bit the same results as before
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_transformers_own_cache(family, attention):
    before, after = pair(family, attention)
    ids, mask = left_padded(ROWS)
    for how in ({}, {"num_beams": 2}, {"prefill_chunk_size": 6}):
        assert torch.equal(full(before, ids, mask, **how), full(after, ids, mask, **how))
    caches = [DynamicCache(config=model.config) for model in (before, after)]
    for chunk, stop in ((ids, 20), (ids[:, :1], 21), (ids[:, :7], 28)):
        so_far = torch.cat([mask, torch.ones_like(mask)], 1)[:, :stop]
        logits = [feed(model, cache, chunk, so_far) for model, cache in zip((before, after), caches, strict=True)]
        assert torch.equal(*logits)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_neox"])
def test_generation_with_a_static_cache(family, attention):
    before, after = pair(family, attention)
    ids, mask = left_padded(ROWS)
    logits = []
    for model in (before, after):
        cache = StaticCache(config=model.config, max_cache_len=40)
        logits.append([feed(model, cache, ids, mask)])
        so_far = torch.cat([mask, torch.ones_like(mask)], 1)
        logits[-1] += [feed(model, cache, ids[:, step : step + 1], so_far[:, : 21 + step]) for step in range(4)]
    assert all(torch.equal(*step) for step in zip(*logits, strict=True))
    assert torch.equal(*(generate(model, None, ids, mask, cache_implementation="static") for model in (before, after)))


# README: training on that model give bit-for-bit the same results as before
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "opt", "gpt_oss"])
def test_training(family, attention):
    before, after = pair(family, attention)
    ids, mask = left_padded(ROWS)
    losses = []
    for model in (before, after):
        model.train()
        torch.manual_seed(0)
        loss = model(ids, attention_mask=mask, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
    assert torch.equal(*losses)
    after_grads = dict(after.named_parameters())
    for name, parameter in before.named_parameters():
        grad = after_grads[name].grad
        assert (parameter.grad is None) == (grad is None), name
        assert grad is None or torch.equal(parameter.grad, grad), name


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_four_dimensional_mask_and_packed_sequences(attention):
    before, after = pair("llama", attention)
    ids = prompt(12, 2)
    mask = torch.ones(12, 12, dtype=torch.bool, device=ids.device).tril()[None, None].expand(2, 1, 12, 12)
    positions = torch.tensor([[*range(5), *range(7)]] * 2, device=ids.device)
    with torch.no_grad():
        for how in ({"attention_mask": mask}, {"position_ids": positions}):
            assert torch.equal(before(ids, **how).logits, after(ids, **how).logits)


def test_attention_weights_can_be_asked_for():
    before, after = pair("llama", "eager")
    with torch.no_grad():
        weights = [model(prompt(9), output_attentions=True).attentions for model in (before, after)]
    for ours, theirs in zip(*weights, strict=True):
        assert torch.equal(ours, theirs)


# README: No model is forked and no class is patched
def test_building_caches_and_generating_changes_no_class():
    model = build("llama")
    kinds = {kind for module in model.modules() for kind in type(module).__mro__} | {DynamicCache, type(model.config)}
    before = {kind: dict(vars(kind)) for kind in kinds}
    own = [type(module) for module in model.modules()]
    for cache in (DenseCache(model), H2OCache(model, budget=8)):
        generate(model, cache, prompt(20), max_new_tokens=2)
    assert [type(module) for module in model.modules()] == own
    for kind, attributes in before.items():
        assert attributes.keys() == vars(kind).keys(), kind
        changed = [name for name, value in attributes.items() if vars(kind)[name] is not value]
        assert not [name for name in changed if name != "_abc_impl"], kind


def test_importing_kvcompress_changes_no_model():
    model = build("llama")
    assert model.config._attn_implementation == "sdpa"


def test_selecting_twice_keeps_the_first_choice_beneath():
    model = build("llama", attention="eager")
    DenseCache(model)
    name = model.config._attn_implementation
    H2OCache(model, budget=4)
    assert model.config._attn_implementation == name == "kvcompress_eager"
