"""What kvcompress knows of transformers' names stands in kvcompress/hf/, and outlives their next renaming."""

import ast
import copy
import inspect
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import Cache

from kvcompress import (
    DenseCache,
    EvictingCache,
    GEARCache,
    H2OCache,
    HydragenCache,
    KVzipCache,
    ShadowKVCache,
    SwiftKVCache,
    convert,
    hf,
)
from kvcompress.hf import release, versions
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.policies.expected_attention import ExpectedAttention
from tests.contract.models import build, left_padded, prompt

ROOT = Path(__file__).parents[2]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "disable_compile": True}
LARGE = 100

# names that transformers gives to modules, hooks and fields of a config; model classes of our own are built on some
NAMES = {
    "_attn_implementation", "_device_mesh", "_hf_hook", "_tp_plan", "_tp_size", "base_model", "ffn_dim", "get_decoder",
    "get_input_embeddings", "hf_device_map", "hidden_size", "intermediate_size", "is_encoder_decoder", "kv_lora_rank",
    "layer_types", "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads",
    "num_kv_shared_layers", "prepare_inputs_for_generation", "register_forward_hook", "register_forward_pre_hook",
    "rope_parameters", "sliding_window", "vocab_size",
}  # fmt: skip
MODEL_CLASSES = {ROOT / "kvcompress" / "swiftkv" / name for name in ("conversion.py", "forward.py", "model.py")}
# written down under transformers' own names, or running where kvcompress is not installed
APART = {"kvpress_answers.py"}
OLDER = {"past_key_values", "past_key_value", "layer_past"}
MODELS = re.compile(r"(^|\.)(model|generate|decoder|network|other|base|converted|forward)$")


def found(source: str, path: Path, addressed: bool = True) -> set[str]:
    """Names of transformers' that a source text should leave to kvcompress/hf/."""
    wrong = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg in OLDER:
            wrong.add(f"{node.arg}=")
        elif isinstance(node, ast.Constant) and node.value in OLDER:
            wrong.add(repr(node.value))
        elif isinstance(node, ast.Call) and addressed and MODELS.search(ast.unparse(node.func)):
            wrong.update("cache= to a model" for keyword in node.keywords if keyword.arg == "cache")
        elif isinstance(node, ast.Attribute) and node.attr in NAMES and path not in MODEL_CLASSES:
            wrong.add(f".{node.attr}")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers."):
            wrong.add(f"from {node.module}")
        elif isinstance(node, ast.Import):
            wrong.update(f"import {each.name}" for each in node.names if each.name.startswith("transformers."))
    return wrong


def library():
    folders = ("kvcompress", "kernels", "policies", "evals", "examples")
    files = {file.resolve() for folder in folders for file in (ROOT / folder).rglob("*.py")}
    return sorted(f for f in files if ROOT / "kvcompress" / "hf" not in f.parents and f.name not in APART)


@pytest.mark.parametrize("path", library(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_transformers_names_stand_in_one_place(path):
    # examples say what a user says, in today's spelling
    assert not found(path.read_text(), path, addressed=path.parent.name != "examples")


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: path.name)
def test_tests_hand_a_cache_over_by_its_type(path):
    if path != Path(__file__):
        wrong = found(path.read_text(), path)
        assert not {name for name in wrong if not name.startswith((".", "from", "import"))}


@pytest.mark.parametrize(
    "line",
    [
        "model(ids, past_key_values=cache)",
        "self.model.generate(ids, cache=cache)",
        "kwargs.get('past_key_values')",
        "from transformers.cache_utils import Cache",
        "import transformers.models.llama.modeling_llama",
        "config.num_hidden_layers",
        "layer.register_forward_hook(f)",
    ],
)
def test_the_check_of_names_can_fail(line):
    assert found(line, Path("evals/some.py"))


# a renamed argument


def renamed(model: nn.Module, name: str) -> nn.Module:
    """The model, whose forwards take their cache by another name, as if transformers had renamed the argument."""
    for module in model.modules():
        kind = type(module)
        known = hf.cache_name(module) if re.match("transformers|kvcompress", kind.__module__) else None
        if known is None:
            continue
        body = {"__module__": kind.__module__}
        if module is not model:
            body["__call__"] = _called_by(known, name, kind)
        if known in inspect.signature(kind.forward).parameters:
            body["forward"] = _taking(name, known, kind)
            module.__class__ = type(kind.__name__, (kind,), body)
        else:
            # a forward of any keywords stays as it is, and the class that it extends is the renamed one
            family = next(k for k in kind.__mro__ if k.__module__.startswith("transformers") and "forward" in vars(k))
            over = {"__module__": family.__module__, "forward": _taking(name, known, family)}
            module.__class__ = type(kind.__name__, (kind, type(family.__name__, (family,), over)), body)
    return model


def _called_by(known: str, name: str, kind: type) -> Callable[..., Any]:
    """The call of a module by transformers' code, which knows the installed name."""

    def call(self, *args, **kwargs):
        if known in kwargs:
            kwargs[name] = kwargs.pop(known)
        return kind.__call__(self, *args, **kwargs)

    return call


def _taking(name: str, known: str, kind: type) -> Callable[..., Any]:
    """A forward of a parameter of the other name."""

    def forward(self, *args, **kwargs):
        if name != known:
            # what transformers does with a keyword that it does not know
            kwargs.pop(known, None)
        if name in kwargs:
            kwargs[known] = kwargs.pop(name)
        return kind.forward(self, *args, **kwargs)

    parameters = inspect.signature(kind.forward).parameters
    taken = parameters[known].replace(name=name, annotation="Cache | None")
    forward.__signature__ = inspect.Signature([taken if p.name == known else p for p in parameters.values()])
    return forward


CACHES = {
    "dense": DenseCache,
    "h2o": lambda model: H2OCache(model, budget=LARGE),
    # with tokens that wait as they came
    "gear": lambda model: GEARCache(model, tail_bits=None),
    "rolled": lambda model: H2OCache(model, budget=LARGE, rerotated=True),
    "expected": lambda model: EvictingCache(model, policy=ExpectedAttention(), budget=LARGE),
    "kvzip": lambda model: KVzipCache(model, budget=LARGE),
    "shadowkv": ShadowKVCache,
    "hydragen": HydragenCache,
}
every_cache = pytest.mark.parametrize("name", CACHES)
every_spelling = pytest.mark.parametrize("spelling", ["cache", "past_key_values", "kv_store"])


# README: transformers has called this argument `cache` since release 5.24; before, it was `past_key_values`
@every_cache
@every_spelling
def test_a_forward_takes_a_cache_whatever_the_argument_is_called(name, spelling):
    ids = prompt(20)
    plain = build("llama")
    with torch.no_grad():
        expected = torch.cat(
            [plain(ids, use_cache=False).logits, plain(torch.cat([ids, ids[:, :3]], 1)).logits[:, 20:]], 1
        )
        model = renamed(build("llama"), spelling)
        for given in ("cache", "past_key_values", spelling):
            cache = CACHES[name](model)
            logits = [model(part, **{given: cache}).logits for part in (ids, ids[:, :3])]
            assert cache.get_seq_length() == 23
            torch.testing.assert_close(torch.cat(logits, 1), expected, atol=1e-4, rtol=1e-4)


# README: both names work, with every release from 5.17 on
@every_cache
@every_spelling
@pytest.mark.parametrize("given", ["cache", "past_key_values"])
@pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")
def test_generate_takes_a_cache_by_either_name(name, spelling, given):
    ids, mask = left_padded([prompt(20)[0], prompt(13, seed=2)[0]])
    expected = build("llama").generate(ids, attention_mask=mask, **GREEDY)
    model = renamed(build("llama"), spelling)
    # built where it is used, as README does
    found = model.generate(ids, attention_mask=mask, **{given: CACHES[name](model)}, **GREEDY)
    assert torch.equal(found, expected)


@every_spelling
@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")
def test_a_converted_model_finds_its_cache_whatever_the_argument_is_called(spelling, share):
    ids, mask = left_padded([prompt(20)[0], prompt(13, seed=2)[0]])

    def converted():
        return convert(build("llama", num_hidden_layers=6), skip_from=2, share=share)

    expected = converted().generate(ids, attention_mask=mask, use_cache=False, **GREEDY)
    model = renamed(converted(), spelling)
    # transformers' generate knows the installed name, not the one that this test makes up
    hf.watch_forwards(model)
    caches = [lambda: None, lambda: SwiftKVCache(model), lambda: H2OCache(model, budget=LARGE)]
    caches += [lambda: DynamicCache(config=model.config), lambda: DenseCache(model)]
    for make in caches:
        for given in ("cache", "past_key_values"):
            # the keyword of a cache that transformers makes is transformers' own
            arguments = {} if (cache := make()) is None else {given: cache}
            assert torch.equal(model.generate(ids, attention_mask=mask, **arguments, **GREEDY), expected)


def swallowed(model: nn.Module, kinds: str) -> nn.Module:
    """The model, some of whose modules lose the cache that they are given."""
    for module in model.modules():
        kind = type(module)
        if re.search(kinds, kind.__name__):

            def call(self, *args, kind=kind, **kwargs):
                kwargs = {key: None if isinstance(value, Cache) else value for key, value in kwargs.items()}
                return kind.__call__(self, *args, **kwargs)

            module.__class__ = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
    return model


@every_cache
@pytest.mark.parametrize("kinds", ["Attention$", "Layer$", "LlamaModel$"])
def test_a_cache_that_does_not_reach_the_layers_is_an_error(name, kinds):
    model = build("llama")
    cache = CACHES[name](model)
    swallowed(model, kinds)
    message = rf"LlamaAttention in layer 0 of Llama\w+ attends without the {type(cache).__name__}"
    with torch.no_grad(), pytest.raises(RuntimeError, match=message):
        model(prompt(20), **hf.cache_argument(model, cache))


@pytest.mark.parametrize("make", [lambda model: DynamicCache(config=model.config), SwiftKVCache, lambda model: None])
def test_a_later_layer_that_is_not_given_the_cache_is_an_error(make):
    model = swallowed(convert(build("llama"), skip_from=1), "SwiftKVDecoderLayer$")
    cache = make(model)
    with torch.no_grad(), pytest.raises(RuntimeError, match="its layer 1 was given no cache"):
        model(prompt(20), **({} if cache is None else hf.cache_argument(model, cache)), use_cache=True)


def test_after_an_error_another_model_and_other_caches_are_as_before():
    model = build("llama")
    cache = H2OCache(model, budget=8)
    broken = swallowed(build("llama"), "LlamaModel$")
    other = DenseCache(broken)
    with torch.no_grad():
        expected = model(prompt(20)).logits
        with pytest.raises(RuntimeError, match="attends without"):
            broken(prompt(20), **hf.cache_argument(broken, other))
        hidden = torch.zeros(1, 4, 64)
        turns = broken.model.rotary_emb(hidden, torch.arange(4)[None])
        broken.model.layers[0].self_attn(hidden, position_embeddings=turns, attention_mask=None)
        assert torch.equal(model(prompt(20)).logits, expected)
        assert torch.equal(broken(prompt(20)).logits, build("llama")(prompt(20)).logits)
        # an error before the forward begins leaves nothing behind either
        with pytest.raises(ValueError, match="inputs_embeds"):
            model(
                inputs_embeds=model.get_input_embeddings()(prompt(20)),
                **hf.cache_argument(model, KVzipCache(model, budget=8)),
            )
        assert torch.equal(model(prompt(20)).logits, expected)
        model(prompt(20), **hf.cache_argument(model, cache))


@pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")
def test_outputs_have_their_cache_by_either_name():
    model = build("llama")
    cache = DenseCache(model)
    with torch.no_grad():
        output = model(prompt(20), **hf.cache_argument(model, cache))
        assert output.cache is output.past_key_values is hf.cache_of(output) is cache
        output = model.model(prompt(3, seed=2), **hf.cache_argument(model.model, cache))
        assert output.cache is output.past_key_values is cache
    cache.reset()
    output = model.generate(prompt(20), **hf.cache_argument(model, cache), return_dict_in_generate=True, **GREEDY)
    assert output.cache is output.past_key_values is cache


@pytest.mark.skipif(
    "cache" in inspect.signature(build("llama").prepare_inputs_for_generation).parameters,
    reason="transformers takes the newer of the two, and warns",
)
def test_two_caches_in_one_call_are_an_error():
    model = build("llama")
    caches = {"cache": DenseCache(model), "past_key_values": DenseCache(model)}
    with pytest.raises(ValueError, match="not both"):
        model.generate(prompt(20), **caches, **GREEDY)


def test_our_own_calls_cause_no_warning_of_a_renamed_argument():
    model = build("llama")
    ids = prompt(20)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        for make in CACHES.values():
            model.generate(ids, **hf.cache_argument(model, make(model)), **GREEDY)
        HydragenCache(model, torch.cat([ids, ids]))
        converted = convert(model)
        converted.generate(ids, **hf.cache_argument(converted, SwiftKVCache(converted)), **GREEDY)


def test_a_model_that_a_cache_was_built_for_can_be_pickled_and_let_go():
    model = build("llama")
    plain = set(vars(model)), [len(model._forward_hooks), len(model.model._forward_hooks)]
    DenseCache(model)
    twin = pickle.loads(pickle.dumps(model))
    ids = prompt(20)
    assert torch.equal(
        twin.generate(ids, **hf.cache_argument(twin, DenseCache(twin)), **GREEDY), model.generate(ids, **GREEDY)
    )
    DenseCache(model)
    assert [len(model._forward_hooks), len(model.model._forward_hooks)] == [1, 1]
    release(model)
    assert (set(vars(model)), [len(model._forward_hooks), len(model.model._forward_hooks)]) == plain
    for module in (model, model.model):
        assert not module._forward_pre_hooks
        assert not module._forward_hooks_always_called


def test_a_forward_that_was_interrupted_from_the_keyboard_leaves_other_calls_alone():
    model, other = build("llama"), build("llama", seed=1)

    def stop(*_):
        raise KeyboardInterrupt

    ids = prompt(20)
    with torch.no_grad():
        expected = [each(ids).logits for each in (model, other)]
        hook = model.model.layers[1].register_forward_pre_hook(stop)
        for make in CACHES.values():
            with pytest.raises(KeyboardInterrupt):
                model(ids, **hf.cache_argument(model, make(model)))
            DenseCache(other)
            assert torch.equal(other(ids).logits, expected[1])
        hook.remove()
        assert torch.equal(model(ids).logits, expected[0])


# versions


@pytest.mark.parametrize(
    ("installed", "warned"), [("5.17.0", 0), (versions.NEWEST_TESTED, 0), ("5.99.0", 1), ("6.0.0.dev0", 1)]
)
def test_a_newer_transformers_than_was_tested_is_told_once(monkeypatch, installed, warned):
    # by way of versions: a library that loads transformers a second time leaves two modules of that name
    monkeypatch.setattr(versions.transformers, "__version__", installed)
    monkeypatch.setattr(versions, "_told", set())
    model = build("llama")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        DenseCache(model)
        H2OCache(model, budget=8)
    told = [str(each.message) for each in caught if "newer than" in str(each.message)]
    assert len(told) == warned
    for text in told:
        assert installed in text
        assert versions.NEWEST_TESTED in text
        assert "kvcompress check" in text


# what passes on


# README: `kvcompress.release(model)` undoes it all
# README: building a cache selects kvcompress's attention in that one model and hooks its forwards
def test_release_makes_the_model_what_it_was():
    model = build("llama")
    ids, before = prompt(20), set(vars(model))
    expected = model.generate(ids, **GREEDY)
    cache = H2OCache(model, budget=8)
    assert model.config._attn_implementation == "kvcompress"
    release(model)
    assert model.config._attn_implementation == "sdpa"
    assert set(vars(model)) == before
    assert not model._forward_hooks
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    with torch.no_grad(), pytest.raises(RuntimeError, match="build a new cache"):
        model(ids, **hf.cache_argument(model, cache))
    release(model)
    model = build("gemma2")
    DenseCache(model)
    release(model)
    assert model.config._attn_implementation == "eager"


# README: Continuous batching keeps the attention that the model had before
def test_continuous_batching_has_the_attention_that_the_model_had_before(monkeypatch):
    model = build("llama")
    used = []
    monkeypatch.setattr(
        type(model),
        "init_continuous_batching",
        lambda self, *args: used.append((self.config._attn_implementation, args)),
    )
    DenseCache(model)
    model.init_continuous_batching(3)
    assert used == [("sdpa", (3,))]
    # a cache built later serves it again
    ids = prompt(20)
    expected = build("llama").generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, **hf.cache_argument(model, DenseCache(model)), **GREEDY), expected)


# README: encoder-decoders, attention biases
@pytest.mark.parametrize("name", ["indices", "block_indices", "sinks", "attention_bias", "cu_seq_lens_q"])
def test_keywords_of_attention_that_are_not_known_are_refused_by_name(name):
    model = build("llama")
    with torch.no_grad(), pytest.raises(ValueError, match=rf"LlamaAttention passes '{name}' to its attention"):
        model(prompt(20), **hf.cache_argument(model, DenseCache(model)), **{name: torch.zeros(2)})


def test_a_window_that_the_config_does_not_tell_of_is_refused():
    model = build("mistral")
    cache = DenseCache(model)
    model.config.sliding_window = 5
    with torch.no_grad(), pytest.raises(ValueError, match="within a window of 5, where the model's config says 12"):
        model(prompt(20), **hf.cache_argument(model, cache))


@every_cache
def test_attention_weights_are_refused(name):
    model = build("llama")
    with torch.no_grad(), pytest.raises(ValueError, match="gives no attention weights"):
        model(prompt(20), **hf.cache_argument(model, CACHES[name](model)), output_attentions=True)


def test_the_last_layer_is_checked_too():
    model = build("llama", num_hidden_layers=1)
    cache = DenseCache(model)
    # a layer with a config of its own keeps the attention that it had
    attention = model.model.layers[0].self_attn
    attention.config = copy.deepcopy(attention.config)
    attention.config._attn_implementation = "sdpa"
    with torch.no_grad(), pytest.raises(RuntimeError, match="layer 0 of LlamaForCausalLM gave its keys"):
        model(prompt(20), **hf.cache_argument(model, cache))


def test_a_layer_that_attends_twice_is_refused():
    model = build("llama")
    cache = DenseCache(model)
    ids = prompt(20)
    with torch.no_grad():
        model(ids, **hf.cache_argument(model, cache))
    with pytest.raises(RuntimeError, match="attends twice"):
        cache.layers[0].attend(torch.zeros(1, 4, 1, 16), None, LogitSpec(1.0), sinks=None, position_ids=None)
