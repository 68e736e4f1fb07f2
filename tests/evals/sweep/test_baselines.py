"""transformers' own caches in the evals: bytes of live storages, batches taken apart, what is not installed."""

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from kvcompress.evals.sweep import baselines
from kvcompress.evals.sweep.points import Settings
from kvcompress.evals.sweep.sweep import Sweep
from kvcompress.evals.tasks import make_tasks
from kvcompress.hf import cache_argument
from tests.contract.models import prompt, tiny

QUANTISED = ["quanto:bits=4", "quanto:bits=2", "hqq:bits=4", "fp8"]


def built(spec, model):
    if not baselines.installed(spec.partition(":")[0]):
        pytest.skip(f"{spec} is not installed")
    try:
        return baselines.build(spec, model)
    except ValueError as error:
        pytest.skip(f"not in this transformers: {error}")


@torch.no_grad()
def read(model, cache, tokens):
    return model(tokens, **cache_argument(model, cache)).logits


def test_dynamic_is_transformers_cache_with_its_bytes_counted():
    model = tiny()
    cache, plain = baselines.build("dynamic", model), DynamicCache(config=model.config)
    for tokens in (prompt(10, 2), prompt(3, 2, seed=1)):
        torch.testing.assert_close(read(model, cache, tokens), read(model, plain, tokens), rtol=0, atol=0)
    report = cache.memory()
    held = sum(layer.keys.numel() + layer.values.numel() for layer in plain.layers) * 4
    assert report.by_component == {"keys": held // 2, "values": held // 2}
    assert report.full_bytes == report.total_bytes == held
    assert [layer.tolist() for layer in report.tokens_kept] == [[[13, 13], [13, 13]]] * 3


def test_sliding_layers_are_counted_with_their_window():
    config = MistralConfig(
        vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    cache = baselines.build("dynamic", model)
    read(model, cache, prompt(20) % 99)
    read(model, cache, prompt(1) % 99)
    report = cache.memory()
    assert report.full_bytes == 2 * 2 * 2 * 8 * 16 * 4
    # transformers shows 7 of the 8 that it holds; a layer's window is a tensor too
    assert report.by_component["keys"] == report.by_component["values"] == 2 * 2 * 8 * 16 * 4


def test_an_empty_cache_holds_nothing():
    report = baselines.build("dynamic", tiny()).memory()
    assert (report.total_bytes, report.full_bytes, report.tokens_kept) == (0, 0, [])


def test_packed_tensors_are_taken_apart():
    pair = TwoTensor(torch.zeros(3), torch.ones(3))
    held = {"a": [(pair, {"scale": torch.full((1,), 2.0)})], "b": 4}
    assert [part.tolist() for part in baselines._tensors(held)] == [[0.0] * 3, [1.0] * 3, [2.0]]


@pytest.mark.parametrize("spec", QUANTISED)
def test_a_quantised_cache_counts_its_codes(spec):
    model = tiny()
    cache = built(spec, model)
    read(model, cache, prompt(128, 2))
    report = cache.memory()
    bits = 8.0 if spec == "fp8" else int(spec[-1]) + 64 / 64
    assert report.bits_per_element == pytest.approx(bits, rel=0.01)
    read(model, cache, prompt(3, 2))
    tail = 0 if spec == "fp8" else report.full_elements // 128 * 3 * 4
    assert cache.memory().total_bytes == pytest.approx(report.total_bytes + tail, rel=0.03)


@pytest.mark.parametrize("spec", QUANTISED)
def test_sequences_taken_out_of_a_quantised_batch_go_on_as_they_would_have(spec):
    model = tiny()
    cache = built(spec, model)
    read(model, cache, prompt(64, 2))
    read(model, cache, prompt(4, 2, seed=1))
    fork = cache.clone()
    try:
        fork.batch_select_indices(torch.tensor([1, 1, 0]))
    except NotImplementedError as error:
        pytest.skip(str(error))
    assert fork.memory().full_bytes == cache.memory().full_bytes * 3 // 2
    following = prompt(5, 2, seed=2)
    expected = read(model, cache, following)
    found = read(model, fork, following[[1, 1, 0]])
    torch.testing.assert_close(found, expected[[1, 1, 0]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", QUANTISED)
def test_sequences_repeated_in_a_quantised_batch_go_on_as_they_would_have(spec):
    model = tiny()
    cache = built(spec, model)
    read(model, cache, prompt(64, 2))
    repeated = cache.clone()
    try:
        repeated.batch_repeat_interleave(2)
    except NotImplementedError as error:
        pytest.skip(str(error))
    following = prompt(5, 2, seed=2)
    expected = read(model, cache, following).repeat_interleave(2, 0)
    found = read(model, repeated, following.repeat_interleave(2, 0))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_sequences_are_not_taken_out_where_packed_ones_would_stay():
    class Layer:
        """A layer of an older transformers, whose reordering does not reach what is packed."""

        def reorder_cache(self, indices):
            raise AssertionError

    cache = baselines.MeasuredQuantizedCache.__new__(baselines.MeasuredQuantizedCache)
    cache.layers = [Layer()]
    with pytest.raises(NotImplementedError, match="cannot select sequences of a batch: read one at a time"):
        cache.batch_select_indices(torch.tensor([0]))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("quanto:bits=4", "the method quanto needs the package optimum-quanto, which is not installed"),
        ("hqq", "the method hqq needs the package hqq, which is not installed"),
        (
            "dynamo",
            "unknown method 'dynamo'; did you mean dynamic[?] known: none, random, h2o, .*dynamic, quanto, hqq, fp8",
        ),
        ("quanto:bit=4", "the method quanto does not take these settings"),
    ],
)
def test_mistakes_are_named(spec, message, monkeypatch):
    monkeypatch.setattr(baselines, "installed", lambda name: False)
    with pytest.raises(ValueError, match=message):
        baselines.build(spec, tiny())


def test_what_is_not_installed_is_known_as_such(monkeypatch):
    monkeypatch.setitem(baselines._PACKAGES, "hqq", "no_such_package.inside")
    assert not baselines.installed("hqq")
    monkeypatch.setitem(baselines._PACKAGES, "hqq", "torch.nn")
    assert baselines.installed("hqq")
    assert baselines.installed("dynamic")


def test_they_are_methods_of_a_sweep(model, tokenizer, tmp_path):
    settings = Settings(("dynamic",), (0.5,), ("passkey",), (700,), 2, protocols=("question-aware",))
    full, dynamic, _ = Sweep(settings, make_tasks(settings), model, tokenizer, tmp_path).run()
    assert dynamic["status"] == "ok"
    assert dynamic["predictions"] == full["predictions"]
    assert dynamic["bytes"] == dynamic["by_component"]["keys"] * 2 > 0.99 * dynamic["full_bytes"]


def test_a_point_depends_on_what_the_files_of_its_settings_hold(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"basis")
    other.write_bytes(b"basis")
    before = baselines.source(f"gear:bits=2:basis={one}")
    assert before == baselines.source(f"gear:bits=2:basis={other}") != {}
    one.write_bytes(b"another")
    assert baselines.source(f"gear:bits=2:basis={one}") != before
    assert baselines.source("gear:bits=2") == {}
