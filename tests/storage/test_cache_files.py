"""Files of caches: which model they are for, that every byte is checked, and that they appear whole or not at all."""

import copy
import dataclasses
import json
import pickle
import random
import re
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kvcompress import (
    GEAR,
    AcrossKVCache,
    Basis,
    DenseCache,
    EvictingCache,
    H2OCache,
    HydragenCache,
    Knorm,
    Policy,
    Profile,
    ShadowKVCache,
    SwiftKVCache,
    convert,
)  # fmt: skip
from kvcompress.hf import Fingerprint
from kvcompress.storage.classes import class_named
from kvcompress.storage.tensor_file import DamagedFileError, TensorFile, write_tensors
from kvcompress.swiftkv.model import as_teacher
from tests.contract.caches import every_cache
from tests.contract.drive import feed
from tests.contract.models import WINDOW, build, left_padded, prompt, tiny

ROOT = Path(__file__).parents[2]


def saved(path, model=None, cache=None):
    cache = cache or DenseCache(model or tiny())
    ids, mask = left_padded([prompt(20)[0], prompt(13, seed=2)[0]])
    feed(cache._model(), cache, ids, mask)
    cache.save(path)
    return cache


ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}


# docs: A file holds a fingerprint of its model and a checksum: another model's file is refused
@pytest.mark.parametrize(
    ("family", "changes", "differ"),
    [
        ("llama", {"seed": 1}, "weights"),
        ("llama", ROPE, "rope"),
        ("qwen2", {}, "architecture"),
        ("mistral", {}, "windows"),
        ("llama", {"num_key_value_heads": 4}, "4 KV heads"),
    ],
)
def test_a_cache_of_another_model_is_refused_and_both_are_named(family, changes, differ, tmp_path):
    saved(tmp_path / "cache")
    other = build(family, **changes)
    with pytest.raises(ValueError, match=r"cache was made with LlamaForCausalLM of 3 layers.*the model given") as error:
        DenseCache.load(tmp_path / "cache", other)
    assert differ in str(error.value)
    assert f"the model given, {type(other).__name__}, has 3 layers" in str(error.value)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"rms_norm_eps": 0.1}),
        ("llama", {"hidden_act": "gelu"}),
        ("mixtral", {"num_experts_per_tok": 1}),
        ("gemma2", {"attn_logit_softcapping": 9.0}),
        ("gemma2", {"query_pre_attn_scalar": 99}),
        ("gpt_neox", {"use_parallel_residual": False}),
    ],
)
def test_what_a_config_says_of_the_computation_tells_models_of_equal_weights_apart(family, changes):
    one, other = build(family), build(family, **changes)
    other.load_state_dict(one.state_dict())
    ours, theirs = Fingerprint.of(one), Fingerprint.of(other)
    assert ours.differences(theirs) == theirs.differences(ours) == list(changes)
    with pytest.raises(ValueError, match=f"differ in {next(iter(changes))}"):
        ours.check(theirs, "it")
    # what only one of two says, as another release of transformers may, is not compared
    assert not dataclasses.replace(ours, config="{}").differences(theirs)


def test_windows_tell_models_apart_whose_weights_are_equal():
    plain, windows = build("mistral", sliding_window=None), build("mistral")
    plain.load_state_dict(windows.state_dict())
    assert Fingerprint.of(plain).differences(Fingerprint.of(windows)) == ["windows"]
    assert f"windows {WINDOW},{WINDOW},{WINDOW}" in Fingerprint.of(windows).text()


def test_a_weight_that_changed_anywhere_tells_models_apart():
    model = build("llama")
    before = Fingerprint.of(model)
    assert Fingerprint.of(build("llama")) == before
    for name, parameter in model.model.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.mul_(1.05)
        assert before.differences(Fingerprint.of(model)) == ["weights"], name
        parameter.data = kept
    assert Fingerprint.of(model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_dtype_makes_no_other_model(dtype):
    ours, theirs = Fingerprint.of(build("llama")), Fingerprint.of(build("llama", dtype=dtype))
    assert not ours.differences(theirs)
    assert not theirs.differences(ours)
    assert not Fingerprint.of(build("llama", dtype=torch.bfloat16)).differences(theirs)
    assert Fingerprint.of(build("llama", seed=1)).differences(theirs) == ["weights"]


def test_a_converted_model_is_another_one_and_so_is_its_teacher(tmp_path):
    base = build("llama", num_hidden_layers=4)
    model, other = convert(base, 2), convert(base, 1)
    prints = [Fingerprint.of(each) for each in (base, model, other)]
    with as_teacher(model):
        prints.append(Fingerprint.of(model))
    for index, one in enumerate(prints):
        for at, another in enumerate(prints):
            assert bool(one.differences(another)) == (index != at)
    saved(tmp_path / "cache", cache=SwiftKVCache(model))
    with pytest.raises(ValueError, match="differ in weights"):
        SwiftKVCache.load(tmp_path / "cache", other)


def test_offloaded_weights_are_not_compared():
    model, other = build("llama"), build("llama")
    other.model.layers[1].to("meta")
    assert not Fingerprint.of(model).differences(Fingerprint.of(other))
    assert Fingerprint.of(build("llama", seed=1)).differences(Fingerprint.of(other)) == ["weights"]


def test_a_cache_whose_model_is_gone_is_not_saved(tmp_path):
    model = build("llama")
    cache = DenseCache(model)
    del model
    with pytest.raises(ValueError, match="the cache's model has been deleted"):
        cache.save(tmp_path / "cache")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [DenseCache, lambda model: H2OCache(model, budget=8)], ids=["dense", "h2o"])
def test_a_file_of_the_first_format_is_loaded_with_a_warning(kind, tmp_path):
    model = tiny()
    cache = saved(tmp_path / "second", cache=kind(model))
    tensors, layers = {"padding": cache.padding.visible}, []
    for index, layer in enumerate(cache.layers):
        state, facts = layer.dump()
        tensors |= {f"layers.{index}.{name}": tensor.contiguous() for name, tensor in state.items()}
        layers.append(facts)
    facts = {"cache": type(cache).__name__, "settings": cache._settings(), "layers": layers}
    save_file(tensors, tmp_path / "first", metadata={"format": "kvcompress-cache-1", "facts": json.dumps(facts)})
    with pytest.warns(UserWarning, match="first was saved by an earlier kvcompress") as told:
        loaded = type(cache).load(tmp_path / "first", model)
    assert len(told) == 1
    token, mask = prompt(1, 2, seed=5), torch.cat([cache.padding.visible.long(), torch.ones(2, 1).long()], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = type(cache).load(tmp_path / "second", model)
    assert torch.equal(feed(model, loaded, token, mask), feed(model, again, token, mask))


# docs: and so is a damaged one
def test_every_flipped_bit_is_an_error(tmp_path):
    path = tmp_path / "cache"
    saved(path)
    whole = path.read_bytes()
    generator = random.Random(0)
    head = 8 + int.from_bytes(whole[:8], "little")
    places = [*range(8), *(generator.randrange(head) for _ in range(150))]
    places += [generator.randrange(head, len(whole)) for _ in range(50)]
    for at in places:
        data = bytearray(whole)
        data[at] ^= 1 << generator.randrange(8)
        path.write_bytes(data)
        with pytest.raises(ValueError, match="damaged|not a saved kvcompress cache"):
            DenseCache.load(path, tiny())
    for size in (0, 5, head - 3, head, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DamagedFileError):
            DenseCache.load(path, tiny())
    path.write_bytes(whole)
    assert DenseCache.load(path, tiny()).get_seq_length() == 20


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "cache"
    cache = saved(path)
    whole = path.read_bytes()
    dump = type(cache.layers[2]).dump
    calls = []

    def fails(layer):
        calls.append(layer)
        if len(calls) == 6:
            raise OSError("No space left on device")
        return dump(layer)

    monkeypatch.setattr(type(cache.layers[2]), "dump", fails)
    with pytest.raises(OSError, match="No space left"):
        cache.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]
    assert path.read_bytes() == whole


def test_one_part_is_held_at_a_time_while_a_file_is_written(tmp_path):
    alive = weakref.WeakSet()

    def parts():
        for index in range(5):
            # an earlier part may live until this one takes its place
            assert len(alive) <= 1
            tensor = torch.full((7,), index, dtype=torch.float32)
            alive.add(tensor)
            yield {f"part.{index}": tensor}, {}
            del tensor

    with (tmp_path / "file").open("w+b") as file:
        write_tensors(file, "test", {}, parts)
    with TensorFile(tmp_path / "file") as read:
        assert [read.tensor(f"part.{index}")[0].item() for index in range(5)] == list(range(5))


def test_safetensors_reads_the_tensors_of_every_dtype_and_shape(tmp_path):
    generator = torch.Generator().manual_seed(0)
    wanted = {"scalar": torch.tensor(3), "empty": torch.zeros(0, 5), "flags": torch.rand(7, generator=generator) > 0.5}
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        wanted[str(dtype)] = torch.randn(3, 5, generator=generator).to(dtype)
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        wanted[str(dtype)] = torch.randint(0, 99, (5, 3), generator=generator).to(dtype).T
    with (tmp_path / "file").open("w+b") as file:
        digest = write_tensors(file, "test", {"a": 1}, lambda: iter([(wanted, {"b": 2})]))
    with safe_open(tmp_path / "file", framework="pt") as theirs, TensorFile(tmp_path / "file") as ours:
        assert json.loads(theirs.metadata()["facts"]) == {"a": 1, "parts": [{"b": 2}]}
        assert ours.digest == digest
        for name, tensor in wanted.items():
            for found in (theirs.get_tensor(name), ours.tensor(name)):
                torch.testing.assert_close(found, tensor, rtol=0, atol=0)


CACHES = {
    "dense": DenseCache,
    "h2o": lambda model: H2OCache(model, budget=8),
    "shadowkv": lambda model: ShadowKVCache(model, budget=8),
    "hydragen": lambda model: HydragenCache.from_prefix(model, prompt(40)[0]),
}


# docs: `pickle` and `torch.save` refuse, and point to `save`
@pytest.mark.parametrize("name", CACHES)
def test_a_cache_is_saved_and_not_pickled_and_can_be_copied(name, tmp_path):
    model = tiny()
    cache = CACHES[name](model)
    match = rf"a {type(cache).__name__} cannot be pickled.*cache\.save\(path\), and {type(cache).__name__}\.load"
    with pytest.raises(TypeError, match=match):
        pickle.dumps(cache)
    with pytest.raises(TypeError, match=match):
        torch.save({"cache": cache}, tmp_path / "cache.pt")
    feed(model, cache, prompt(3, seed=4))
    copied, step = copy.deepcopy(cache), prompt(1, seed=5)
    assert copied.padding is not cache.padding
    assert copied.padding is copied.layers[0].padding
    assert copy.copy(cache).layers is cache.layers
    logits = feed(model, cache, step)
    feed(model, cache, prompt(2, seed=6))
    assert torch.equal(feed(model, copied, step), logits)


def policy(called, module="mine", **fields):
    """A policy class of somebody's own, as a module of theirs would define it."""
    types = {key: type(of) for key, of in fields.items()}
    names = {"__module__": module, "__qualname__": called, "__annotations__": types, **fields}
    kind = type(called, (Policy,), {**names, "score": lambda self, candidates: -candidates.positions.float()})
    return dataclasses.dataclass(frozen=True, kw_only=True)(kind)


def loaded_policy(path, chosen):
    model = tiny()
    saved(path, cache=EvictingCache(model, policy=chosen, budget=8))
    return EvictingCache.load(path, model).policy


def test_a_policy_of_ones_own_is_not_taken_for_another_of_its_name(tmp_path):
    for kind in (policy("Knorm"), policy("Knorm", "theirs"), Knorm):
        assert type(loaded_policy(tmp_path / "cache", kind(recent=2))) is kind
    # a cell of a notebook that ran again
    policy("Cell")
    newest = policy("Cell")
    assert type(loaded_policy(tmp_path / "cache", newest())) is newest


def test_a_policy_may_have_settings_of_any_name_and_a_tuple_is_one_again(tmp_path):
    kind = policy("Named", name="x", of="y", settings=(1, 2), note="z")
    assert loaded_policy(tmp_path / "cache", kind(name="a", settings=(3, 4))) == kind(name="a", settings=(3, 4))
    assert loaded_policy(tmp_path / "cache", kind(name="b", recent=np.int64(3))) == kind(name="b", recent=3)


def test_a_file_of_a_class_that_is_not_imported_says_what_to_import(tmp_path, fresh):
    saved(tmp_path / "cache", cache=EvictingCache(tiny(), policy=Knorm(), budget=8))
    code = """
from tests.storage.test_cache_files import *
from tests.contract.models import tiny
for name in ("mine:Knorm", "mine:Gone", "Gone"):
    try:
        print(class_named(Policy, name))
    except ValueError as error:
        print(error)
"""
    done = fresh(code)
    known, gone, old = done.stdout.splitlines()
    assert known.startswith(
        "the file's policy 'mine:Knorm' is not imported: import mine first; known: AttentionMatching, "
    )
    assert gone.startswith("the file's policy 'mine:Gone' is not imported: import mine first")
    assert old.startswith("the file's policy 'Gone' is not imported: import the module that defines it first")


def test_a_class_that_has_moved_is_found_with_a_warning_and_an_older_file_has_none(tmp_path):
    moved = policy("Moved", "new_place")
    with pytest.warns(UserWarning, match="the file's old_place:Moved is read with new_place:Moved"):
        assert class_named(Policy, "old_place:Moved") is moved
    assert class_named(Policy, "Moved") is moved
    assert class_named(Policy, "Knorm") is Knorm


class Bound(Policy):
    """Its weight is no field."""

    def __init__(self, weight=1.0, recent=2, sinks=0):
        super().__init__(recent=recent, sinks=sinks)
        object.__setattr__(self, "weight", weight)

    def score(self, candidates):
        return self.weight * candidates.positions.float()


class Told(DenseCache):
    """Its name is no setting."""

    def __init__(self, model, name="nobody"):
        super().__init__(model)
        self.name = name


class Saved(Told):
    """Its name is one."""

    def _settings(self):
        return {"name": self.name}


class Halved(H2OCache):
    """An evicting cache with an attribute of its own."""

    def __init__(self, model, *, budget, by=2):
        super().__init__(model, budget=budget // by)
        self.by = by


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda model: Told(model, "Ada"),
            "Told would be loaded without name='Ada': a cache's `_settings` must return",
        ),
        (lambda model: Halved(model, budget=16), "Halved would be loaded without by=2"),
        (lambda model: EvictingCache(model, policy=Bound(3.0), budget=8), "Bound would be loaded without weight=3.0"),
        (
            lambda model: EvictingCache(model, policy=policy("OfTensor", x=torch.ones(2))(), budget=8),
            "a file cannot hold the settings of OfTensor.*: Object of type Tensor is not JSON serializable",
        ),
        (
            lambda model: EvictingCache(model, policy=policy("Nested", x=GEAR())(), budget=8),
            "x must be GEAR, got",
        ),
    ],
)
def test_what_would_be_lost_is_said_when_a_cache_is_saved(make, message, tmp_path):
    path = tmp_path / "cache"
    path.write_bytes(b"before")
    with pytest.raises(ValueError, match=message):
        saved(path, cache=make(tiny()))
    assert path.read_bytes() == b"before"


def test_a_cache_class_of_ones_own_comes_back_as_itself(tmp_path):
    model = tiny()
    saved(tmp_path / "cache", cache=Saved(model, "Ada"))
    assert Saved.load(tmp_path / "cache", model).name == "Ada"
    alike = type("DenseCache", (Saved,), {"__module__": "mine", "__qualname__": "DenseCache"})
    saved(tmp_path / "cache", cache=alike(model, "Ada"))
    with pytest.raises(ValueError, match="holds a mine:DenseCache; load it with mine:DenseCache.load"):
        DenseCache.load(tmp_path / "cache", model)
    assert alike.load(tmp_path / "cache", model).name == "Ada"


@every_cache
def test_a_subclass_that_adds_nothing_is_saved_as_any_cache(entry, tmp_path):
    model = tiny()
    cache = entry.build(model)
    cache.__class__ = type("Mine", (type(cache),), {})
    cache = saved(tmp_path / "cache", cache=cache)
    assert type(cache).load(tmp_path / "cache", model).get_seq_length() == 20


def test_layers_share_the_storage_of_a_class_of_ones_own_in_a_file_too(tmp_path):
    model = tiny()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved(tmp_path / "cache", cache=AcrossKVCache(model, share=1, storage=Saved))
        assert AcrossKVCache.load(tmp_path / "cache", model).get_seq_length() == 20


@pytest.mark.parametrize("read", [lambda path: DenseCache.load(path, tiny()), Basis.load, Profile.load])
def test_a_file_that_is_not_there_is_named_with_the_folder_that_was_looked_in(read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = f"No such file below {re.escape(str(tmp_path))}, where one that save.. wrote should be: 'missing.safet"
    with pytest.raises(FileNotFoundError, match=told) as error:
        read("missing.safetensors")
    assert error.value.filename == "missing.safetensors"
    with pytest.raises(FileNotFoundError, match=f"No such file, where one .*: '{tmp_path}/missing'"):
        read(tmp_path / "missing")
