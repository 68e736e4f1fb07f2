"""CriticalKV's second stage against its formula, and the projections that it reads."""

import pytest
import torch
from torch import nn

from kvcompress import DenseCache, EvictingCache, H2OCache, KVzipCache, SnapKVCache
from kvcompress.hf import attention_module, cache_argument, output_projection
from kvcompress.policies.expected_attention import ExpectedAttention
from kvcompress.policies.h2o import H2O
from kvcompress.policies.kvzip import KVzip
from kvcompress.policies.second_stage import output_norms
from kvcompress.policies.snapkv import SnapKV
from tests.contract.models import FAMILIES, build, left_padded, prompt, tiny

BUDGET = 12


def fed(model, cache, ids, mask=None):
    with torch.no_grad():
        model(ids, attention_mask=mask, **cache_argument(model, cache))
    return cache


def norms_by_loops(model, layer, values):
    """[kv_heads, tokens], of values [kv_heads, tokens, head_dim]."""
    weight = attention_module(model, layer).o_proj.weight.double()
    kv_heads, tokens, head_dim = values.shape
    group = weight.shape[1] // head_dim // kv_heads
    norms = torch.zeros(kv_heads, tokens, dtype=torch.float64)
    for head in range(kv_heads * group):
        columns = weight[:, head * head_dim : (head + 1) * head_dim]
        for token in range(tokens):
            norms[head // group, token] += (columns @ values[head // group, token].double()).abs().sum() / group
    return norms


@pytest.mark.parametrize(
    "policy",
    [H2O(recent=3, sinks=1), SnapKV(window=3, recent=3), KVzip(), ExpectedAttention(value_norm=False)],
    ids=lambda policy: type(policy).__name__,
)
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_what_stays_is_chosen_by_scores_and_then_by_what_it_adds(policy, share):
    model, ids = tiny(dtype=torch.float64), prompt(40)
    second = type(policy)(**{**vars(policy), "second_stage": share})
    # all the scores, where nothing has to go
    whole = fed(model, EvictingCache(model, policy=policy, budget=100, allocation="uniform"), ids)
    dense = fed(model, DenseCache(model), ids)
    found = fed(model, EvictingCache(model, policy=second, budget=BUDGET, allocation="uniform"), ids)
    sooner = 0
    for index, (layer, scored) in enumerate(zip(found.layers, whole.layers, strict=True)):
        norms = norms_by_loops(model, index, dense.layers[index].dense.held()[1][0])
        for head in range(norms.shape[0]):
            scores = torch.zeros(40, dtype=torch.float64)
            places = scored.slots.positions[0, head].long()
            scores[places[places >= 0]] = scored.slots.scores[0, head][places >= 0].double()
            stays = {*range(policy.sinks), *range(40 - policy.recent, 40)}

            def best(by, count, stays=stays):
                more = sorted({*range(40)} - stays, key=lambda token: (-float(by[token]), -token))
                return stays | {*more[: count - len(stays)]}

            first = best(scores, BUDGET - int(share * BUDGET)) if BUDGET - int(share * BUDGET) > len(stays) else stays
            expected = best((scores / scores.sum() + 1e-4) * norms[head], BUDGET, first)
            held = layer.slots.positions[0, head]
            assert {*held[held >= 0].tolist()} == expected
            sooner += expected != best(scores, BUDGET)
    # or the second stage has chosen nothing of its own
    assert sooner


def test_padding_changes_nothing():
    model = tiny(dtype=torch.float64)
    rows = [prompt(40)[0], prompt(25, seed=2)[0]]
    together = fed(model, SnapKVCache(model, budget=BUDGET, window=3, second_stage=0.5), *left_padded(rows))
    for row, own in enumerate(rows):
        alone = fed(model, SnapKVCache(model, budget=BUDGET, window=3, second_stage=0.5), own[None])
        for mine, other in zip(together.layers, alone.layers, strict=True):
            sides = [each.slots.positions[at].sort(dim=-1).values for each, at in ((mine, row), (other, 0))]
            assert torch.equal(*sides)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantized", [False, True])
def test_the_projection_is_what_the_module_computes(family, quantized):
    model = build(family)
    attention = attention_module(model, 1)
    name = next(name for name in ("o_proj", "out_proj", "dense") if hasattr(attention, name))
    module = getattr(attention, name)

    class Packed(nn.Module):
        """A projection that does not show its weight, as quantized ones."""

        def forward(self, x):
            return module(x)

    if quantized:
        setattr(attention, name, Packed())
    weight = output_projection(model, 1)(torch.zeros(1))
    heads, head_dim, hidden = weight.shape
    x = torch.randn(3, heads * head_dim)
    with torch.no_grad():
        expected = module(x) - module(torch.zeros_like(x))
    assert hidden == model.config.hidden_size
    torch.testing.assert_close(torch.einsum("thd,hdo->to", x.unflatten(-1, (heads, head_dim)), weight), expected)


def test_norms_of_many_tokens_are_taken_in_parts(monkeypatch):
    value, weight = torch.randn(2, 2, 11, 8), torch.randn(6, 8, 20)
    whole = output_norms(value, weight)
    monkeypatch.setattr("kvcompress.policies.second_stage._BLOCK", 2 * 2 * 20 * 3)
    torch.testing.assert_close(output_norms(value, weight), whole)
    torch.testing.assert_close(output_norms(value.to(torch.bfloat16), weight), whole, rtol=2e-2, atol=2e-2)


def test_a_model_whose_projection_is_unknown_is_refused():
    model = build("llama")
    del attention_module(model, 0).o_proj
    with pytest.raises(ValueError, match="attention of layer 0 of LlamaForCausalLM has no output projection .* o_proj"):
        KVzipCache(model, budget=BUDGET, second_stage=0.5)
    # which is not asked for where there is no second stage
    KVzipCache(model, budget=BUDGET)


def test_a_cache_does_not_keep_its_model_alive():
    model = build("llama")
    layer = H2OCache(model, budget=BUDGET, second_stage=0.5).layers[0]
    projection = layer.output_projection
    del model
    with pytest.raises(RuntimeError, match="model has been deleted"):
        projection(torch.zeros(1))


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_is_between_0_and_1(share):
    with pytest.raises(ValueError, match=f"second_stage must be a share of the budget, from 0 to 1, got {share}"):
        SnapKV(second_stage=share)


@pytest.mark.parametrize("make", [
    lambda model: SnapKVCache(model, budget=BUDGET, window=3, second_stage=0.5),
    lambda model: KVzipCache(model, budget=BUDGET, keeps_answers=False, allocation="uniform", second_stage=0.5),
])  # fmt: skip
def test_a_row_fed_one_token_beside_others_goes_as_alone(make):
    model = tiny(dtype=torch.float64)
    together, alone = make(model), make(model)
    ids = prompt(40, 2)
    with torch.no_grad():
        model(ids, **cache_argument(model, together))
        model(ids[1:], **cache_argument(model, alone))
        mask, own = torch.ones(2, 40, dtype=torch.long), torch.ones(1, 40, dtype=torch.long)
        for step in range(4):
            more = prompt(5, 2, seed=step + 2)
            fed = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
            mask, own = torch.cat([mask, fed], 1), torch.cat([own, torch.ones(1, 1, dtype=torch.long)], 1)
            places = (mask.cumsum(-1) - 1).clamp(min=0)[:, -5:]
            model(more, attention_mask=mask, position_ids=places, **cache_argument(model, together))
            model(more[1:, -1:], attention_mask=own, **cache_argument(model, alone))
    for mine, other in zip(together.layers, alone.layers, strict=True):
        sides = [each.slots.positions[row].sort(dim=-1).values[..., -BUDGET:] for each, row in ((mine, 1), (other, 0))]
        assert torch.equal(*sides)


def test_expected_attention_weighs_values_once():
    model, ids = tiny(dtype=torch.float64), prompt(40)
    caches = [
        fed(
            model,
            EvictingCache(model, policy=ExpectedAttention(second_stage=1.0, value_norm=weighs), budget=BUDGET),
            ids,
        )
        for weighs in (True, False)
    ]
    for mine, other in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(mine.slots.positions, other.slots.positions)


def test_norms_of_16_bits_are_summed_in_32():
    value, weight = (
        torch.full((1, 1, 2, 8), 2.0, dtype=torch.float16),
        torch.full((1, 8, 5000), 2.0, dtype=torch.float16),
    )
    assert output_norms(value, weight).tolist() == [[[160000.0, 160000.0]]]


def test_a_weight_that_a_quantizer_put_in_its_place_is_not_read():
    class Stored(torch.Tensor):
        """What only `linear` takes, as the tensors of quantizers."""

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.nn.functional.linear:
                plain = [each.as_subclass(torch.Tensor) if isinstance(each, cls) else each for each in args]
                return function(*plain, **(kwargs or {}))
            if getattr(function, "__name__", "") == "__get__":
                return super().__torch_function__(function, types, args, kwargs or {})
            raise NotImplementedError(function)

    model = build("llama")
    projection = attention_module(model, 0).o_proj
    expected = output_projection(model, 0)(torch.zeros(1))
    stored = projection.weight.detach().clone().as_subclass(Stored)
    del projection._parameters["weight"]
    projection.weight = stored
    torch.testing.assert_close(output_projection(model, 0)(torch.zeros(1)), expected)


def test_norms_of_a_weight_that_is_trained_have_no_gradient():
    weight = nn.Parameter(torch.randn(20, 48))
    assert not output_norms(torch.randn(1, 2, 5, 8), weight.T.unflatten(0, (6, 8))).requires_grad
