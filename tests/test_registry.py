import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from kvcompress import DenseCache, EvictingCache, ShadowKVCache, registry


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    return LlamaForCausalLM(config).eval()


def test_every_name_builds_a_cache(model):
    for name, method in registry.METHODS.items():
        cache = registry.build(name, model, 64)
        assert isinstance(cache, EvictingCache) == (method.takes_budget and not method.reads_budget)
        assert isinstance(cache, ShadowKVCache) == method.reads_budget
        assert isinstance(cache, DenseCache) == (name == "none")


def test_settings_go_to_the_policy_and_the_cache(model):
    cache = registry.build("h2o:sinks=4:recent=0.25:allocation=pyramid", model, 64)
    assert (cache.policy.sinks, cache.policy.recent, cache.allocation) == (4, 0.25, "pyramid")


def test_a_spec_has_one_spelling():
    assert registry.canonical("h2o:sinks=4:recent=0.25") == registry.canonical(" h2o:recent=0.25:sinks=4")
    assert registry.canonical("full") == registry.canonical("dense") == "none"
    assert registry.canonical("SnapKV:sinks=4") == registry.canonical("snapkv:sinks=4")


@pytest.mark.parametrize(
    ("spec", "budget", "message"),
    [
        ("h3o", 64, "unknown method 'h3o'; known: none, h2o, "),
        ("h2o:sinks", 64, "a method's settings are written h2o:setting=value, got 'h2o:sinks'"),
        ("h2o:size=1", 64, "the method h2o does not take these settings: .*size"),
        ("h2o", None, "the method h2o needs a budget"),
        ("h2o:sinks=-1", 64, "sinks must be 0 tokens or more"),
    ],
)
def test_mistakes_are_named(model, spec, budget, message):
    with pytest.raises(ValueError, match=message):
        registry.build(spec, model, budget)
