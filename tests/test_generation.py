"""transformers' `custom_generate`: the cache by a method's name, in an ordinary call of generate."""

import inspect

import pytest
import torch

import kvcompress
from kvcompress import H2OCache, generate_folder
from kvcompress.generation import generate
from kvcompress.hf import cache_argument, cache_of
from tests.contract.models import left_padded, prompt, tiny


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """transformers copies what it loads into a folder of the user's."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))


def by_name(model, ids, **settings):
    common = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    return model.generate(input_ids=ids, custom_generate=generate_folder(), trust_remote_code=True, **common | settings)


# docs: it runs an ordinary `generate` through the cache that the strings name
def test_strings_give_what_the_cache_itself_gives():
    model = tiny()
    ids, mask = left_padded([prompt(40)[0], prompt(33, seed=2)[0]])
    ordinary = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **cache_argument(model, H2OCache(model, budget=12, sinks=2)), **ordinary)
    found = by_name(model, ids, attention_mask=mask, cache_method="h2o:sinks=2", budget=12)
    assert torch.equal(found, expected)
    assert not torch.equal(found, model.generate(ids, **ordinary))


def test_it_returns_what_generate_returns_with_the_cache_in_it():
    found = by_name(tiny(), prompt(40), cache_method="h2o:budget=0.5", return_dict_in_generate=True)
    assert found.sequences.shape == (1, 46)
    assert cache_of(found).budget == 0.5
    assert isinstance(cache_of(by_name(tiny(), prompt(40), cache_method="none", return_dict_in_generate=True)),
                      kvcompress.DenseCache)  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"cache_method": "h20", "budget": 8}, ValueError, "unknown method 'h20'; did you mean h2o"),
        ({"cache_method": "h2o"}, ValueError, "the method h2o needs a budget"),
        ({"cache_method": "gear", "budget": 8}, ValueError, "the method gear takes no budget: leave it out; got 8"),
        ({"cache_method": "h2o:sink=1", "budget": 8}, ValueError, "did you mean sinks"),
        ({"budget": 8}, TypeError, "cache_method"),
        ({"cache_method": 3, "budget": 8}, TypeError, "a method must be named by a str such as 'h2o:sinks=4', got 3"),
    ],
)
def test_mistakes_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        by_name(tiny(), prompt(40), **settings)


def test_a_cache_beside_the_method_is_refused():
    cache = H2OCache(tiny(), budget=8)
    with pytest.raises(ValueError, match="give a cache or cache_method, not both; got cache_method='h2o'"):
        generate(tiny(), "h2o", 8, input_ids=prompt(40), **cache_argument(tiny(), cache))


def test_transformers_asks_whether_the_code_is_trusted():
    with pytest.raises(ValueError, match="trust_remote_code"):
        tiny().generate(prompt(4), custom_generate=generate_folder(), trust_remote_code=False, cache_method="none")


def test_no_argument_of_generate_has_the_name_of_ours():
    ours = set(inspect.signature(generate).parameters) - {"model", "arguments"}
    assert not ours & set(inspect.signature(type(tiny()).generate).parameters)
    assert not any(hasattr(tiny().generation_config, name) for name in ours)
