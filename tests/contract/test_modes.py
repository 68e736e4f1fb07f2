"""What is not a number is not hidden, and the modes that torch runs a model in change no answer."""

import contextlib
import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import DynamicCache

from kvcompress import EvictingCache
from kvcompress.hf import cache_argument
from kvcompress.policies.gear import GEAR
from kvcompress.policies.kvzip import KVzip
from tests.contract.caches import KINDS, Entry, caches, every_cache, slots, those
from tests.contract.drive import feed, generate
from tests.contract.models import DEVICE, build, prompt, tiny


def spoil(model, layer, place):
    """Makes one number of one token's key NaN in the next forward."""
    projection = model.model.layers[layer].self_attn.k_proj

    def hook(module, args, out):
        handle.remove()
        out = out.clone()
        out[0, place, 3] = torch.nan
        return out

    handle = projection.register_forward_hook(hook)


def logits_after_nan(entry, make, place):
    """Logits of a prompt whose first layer has a NaN among its keys, and of the steps that follow, [batch, 4, any]."""
    model = tiny("llama", dtype=entry.dtype)
    cache = make(model)
    spoil(model, 0, place)
    logits = [feed(model, cache, prompt(30, 2))[:, -1:]]
    logits += [feed(model, cache, prompt(1, 2, seed=step)) for step in range(3)]
    return torch.cat(logits, 1)


@every_cache
def test_a_nan_among_the_keys_of_the_newest_token_comes_through(entry):
    logits = logits_after_nan(entry, entry.build, -1)
    # a layer that keeps one token has let it go after the next step
    steps = 2 if entry.name == "h2o_pyramid" else 4
    assert logits[0, :steps].isnan().all()
    assert logits[1].isfinite().all()


@those(lambda entry: entry.budget is None or entry.roomy)
@pytest.mark.parametrize("place", [0, 3])
def test_a_nan_among_the_keys_of_a_token_that_is_kept_comes_through(entry, place):
    logits = logits_after_nan(entry, entry.build if entry.budget is None else entry.roomy, place)
    assert logits[0].isnan().all()
    assert logits[1].isfinite().all()


def forwards(model, cache, modes, first=0):
    """Logits of the last token of a forward in each mode: a prompt, then single tokens, [forwards, batch, any]."""
    logits = []
    for index, mode in enumerate(modes, first):
        ids = prompt(1, 2, seed=index) if index else prompt(20, 2)
        with mode, torch.no_grad():
            logits.append(model(ids, **cache_argument(model, cache)).logits[:, -1].float().clone())
    return torch.stack(logits)


KVZIP_IN_CODES = Entry(
    "kvzip_packed",
    lambda model: EvictingCache(
        model, policy=KVzip(sinks=1, chunk=7, prompt=(5, 6)), budget=8, packed=GEAR(bits=4, group_size=8)
    ),
    kept=slots,
)


def autocast():
    return torch.autocast(DEVICE, torch.bfloat16)


# README: Autocast, inference mode
# README: A cache compresses at the end of a forward, so the first generated token has seen the whole prompt
@every_cache
def test_autocast_gives_the_full_caches_first_logits_and_goes_on_in_its_dtype(entry):
    model = tiny()
    cache, full = entry.build(model), DynamicCache(config=model.config)
    found = forwards(model, cache, [autocast() for _ in range(3)])
    assert found.isfinite().all()
    # of one bfloat16, as the logits are computed in it
    torch.testing.assert_close(found[0], forwards(model, full, [autocast()])[0], rtol=0.01, atol=0.05)
    assert {layer.dtype for layer in cache.layers} == {torch.bfloat16}
    # and without autocast the cache serves as it is
    assert forwards(model, cache, [contextlib.nullcontext()], first=3).isfinite().all()


# a share of the prompt is less than all from the first step on
@those(lambda entry: (entry.roomy or entry.name == "dense") and entry.name != "h2o_fraction")
def test_a_cache_that_lets_nothing_go_is_within_rounding_of_the_full_cache_under_autocast(entry):
    model = tiny()
    modes = [autocast() for _ in range(4)]
    found = forwards(model, (entry.roomy or entry.build)(model), modes)
    straight = forwards(model, DynamicCache(config=model.config), [contextlib.nullcontext() for _ in range(4)])
    rounding = (forwards(model, DynamicCache(config=model.config), modes) - straight).abs().max()
    assert (found - straight).abs().max() < 3 * rounding


@caches(*KINDS, also=(KVZIP_IN_CODES,))
def test_what_changes_a_cache_works_under_autocast(entry):
    """Autocast on a CPU joins no tensors of float16, which codes come with."""
    model = tiny()
    cache = entry.build(model)
    with autocast(), torch.no_grad():
        feed(model, cache, prompt(20, 2))
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 1, 0, 2], device=DEVICE))
        cache.batch_select_indices(torch.tensor([0, 2], device=DEVICE))
        cache = cache.clone()
        if hasattr(cache, "reserve"):
            cache.reserve()
        feed(model, cache, prompt(3, 2, seed=3))
        cache.crop(-1 if entry.croppable else 0)
        assert feed(model, cache, prompt(1, 2, seed=4)).isfinite().all()


# README: a model that changes its dtype between calls
@every_cache
@pytest.mark.parametrize("saved", [False, True])
def test_a_model_of_another_dtype_goes_on_with_a_filled_cache_in_the_caches_dtype(entry, saved, tmp_path):
    model = build("llama")
    cache, straight = entry.build(model), entry.build(model)
    expected = forwards(model, straight, [contextlib.nullcontext() for _ in range(3)])
    forwards(model, cache, [contextlib.nullcontext()])
    if saved:
        cache.save(tmp_path / "cache")
    model.to(torch.bfloat16)
    if saved:
        cache = type(cache).load(tmp_path / "cache", model)
    found = forwards(model, cache, [contextlib.nullcontext() for _ in range(2)], first=1)
    assert {layer.dtype for layer in cache.layers} == {torch.float32}
    if entry.exact:
        assert (found - expected[1:]).abs().max() < 0.5 < expected.std()
    assert found.isfinite().all()


# README: inference mode, a compiled `forward`
@every_cache
@pytest.mark.parametrize("copied", [lambda cache: cache.clone(), copy.deepcopy], ids=["clone", "deepcopy"])
def test_a_cache_that_was_filled_in_inference_mode_goes_on_outside_of_it(entry, copied):
    model = tiny()
    plain = [contextlib.nullcontext() for _ in range(4)]

    def course(cache, mode):
        with mode:
            logits = [forwards(model, cache, plain[:2])]
            rows = torch.arange(2, device=DEVICE)
            cache.batch_repeat_interleave(1)
            cache.reorder_cache(rows)
            cache.batch_select_indices(rows)
            if entry.croppable:
                cache.crop(-1)
            if entry.compileable:
                cache.reserve()
            logits.append(forwards(model, cache, plain[:1], first=2))
            other = copied(cache)
        return torch.cat([*logits, forwards(model, other, plain, first=3)])

    expected = course(entry.build(model), contextlib.nullcontext())
    found = course(entry.build(model), torch.inference_mode())
    assert torch.equal(found, expected)


@every_cache
def test_a_cache_that_is_loaded_in_inference_mode_goes_on_outside_of_it(entry, tmp_path):
    model = tiny()
    cache = entry.build(model)
    forwards(model, cache, [contextlib.nullcontext()])
    cache.save(tmp_path / "cache")
    with torch.inference_mode():
        loaded = type(cache).load(tmp_path / "cache", model)
    modes = [contextlib.nullcontext(), torch.inference_mode(), contextlib.nullcontext()]
    plain = [contextlib.nullcontext() for _ in modes]
    assert torch.equal(forwards(model, loaded, modes, first=1), forwards(model, cache, plain, first=1))


# README: a compiled `forward`
@caches("dense", "h2o_fraction", "gear")
def test_a_model_whose_forward_is_compiled_generates_as_ever_and_what_can_be_traced_is(entry):
    torch._dynamo.reset()
    model, backend = build("llama", num_hidden_layers=2), CompileCounterWithBackend("eager")
    ids = prompt(20, 2)
    cache, straight = entry.build(model), entry.build(model)
    expected = generate(model, straight, ids, max_new_tokens=6)
    if entry.between_folds or entry.shares or entry.packs_between:
        # as on a GPU from the first forward on
        cache.reserve()
    model.forward = torch.compile(model.forward, backend=backend)
    found = generate(model, cache, ids, max_new_tokens=6)
    # the slots of a share grow with what is seen, which those of a compiled step cannot
    assert torch.equal(found, expected) or entry.name == "h2o_fraction"
    # one graph serves every step, or two, where the model is given a mask, whose second length stands for all others
    graphs = backend.frame_count
    assert graphs in ((1, 2) if entry.compileable else (0,))
    # and what has nothing to do with a cache is compiled as before
    model(ids, use_cache=False)
    assert backend.frame_count > graphs


# what is reserved is folded, and read in other pieces
@those(lambda entry: entry.between_folds is None)
@pytest.mark.parametrize("when", [pytest.param("before", marks=pytest.mark.slow), "between", "both"])
def test_room_for_compiled_steps_changes_no_token_of_eager_ones(entry, when):
    model, question = tiny("mistral"), prompt(6, 2, seed=4)
    answers = []
    for reserves in (False, True):
        cache = entry.build(model)
        if reserves and when != "between":
            cache.reserve()
        first = generate(model, cache, prompt(20, 2))
        if reserves and when != "before":
            cache.reserve(3)
        answers.append(generate(model, cache, torch.cat([first, question], 1)))
    assert torch.equal(*answers)
