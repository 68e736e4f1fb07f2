"""The messages that users meet: what was expected, and what came."""

import pytest
import torch

from kvcompress import EvictingCache, H2OCache, SnapKVCache, StreamingLLMCache
from kvcompress.hf import cache_argument
from kvcompress.policies.h2o import H2O
from kvcompress.policies.snapkv import SnapKV
from kvcompress.policies.streaming_llm import StreamingLLM
from tests.contract.caches import every_cache
from tests.contract.drive import feed, generate
from tests.contract.models import DEVICE, build, prompt, tiny


@every_cache
@pytest.mark.parametrize("columns", [3, 19, 22])
def test_a_mask_of_the_wrong_length(entry, columns):
    model = tiny()
    cache = entry.build(model)
    feed(model, cache, prompt(20, 2))
    with (
        pytest.raises(ValueError, match=rf"attention_mask must cover the 21 tokens seen.*got \[2, {columns}\]"),
        torch.no_grad(),
    ):
        model(
            prompt(1, 2),
            attention_mask=torch.ones(2, columns, dtype=torch.long, device=DEVICE),
            position_ids=torch.full((2, 1), 20, device=DEVICE),
            **cache_argument(model, cache),
        )


@every_cache
def test_a_mask_of_the_wrong_length_leaves_the_cache_usable(entry):
    """The mask is looked at before any layer stores anything."""
    model = tiny()
    cache, straight = entry.build(model), entry.build(model)
    for each in (cache, straight):
        feed(model, each, prompt(20, 2))
    with pytest.raises(ValueError, match="attention_mask"), torch.no_grad():
        model(prompt(2, 2), attention_mask=torch.ones(2, 7, device=DEVICE), **cache_argument(model, cache))
    assert torch.equal(feed(model, cache, prompt(3, 2)), feed(model, straight, prompt(3, 2)))


@every_cache
def test_a_mask_for_another_batch(entry):
    model = tiny()
    cache = entry.build(model)
    with (
        pytest.raises(ValueError, match=r"attention_mask must be \[batch=2, tokens seen=20\], got \[3, 20\]"),
        torch.no_grad(),
    ):
        model(prompt(20, 2), attention_mask=torch.ones(3, 20, device=DEVICE), **cache_argument(model, cache))
    # nothing was taken in: it may serve another batch
    assert cache.memory().total_bytes == 0
    assert torch.equal(feed(model, cache, prompt(20, 3)), feed(model, entry.build(model), prompt(20, 3)))


@every_cache
def test_a_four_dimensional_mask(entry):
    model = tiny()
    cache, straight = entry.build(model), entry.build(model)
    for each in (cache, straight):
        feed(model, each, prompt(20, 2))
    mask = torch.ones(2, 1, 5, 25, dtype=torch.bool, device=DEVICE).tril(20)
    with (
        pytest.raises(ValueError, match=r"padding mask \[batch, tokens seen\].*got a mask of shape \[2, 1, 5, 25\]"),
        torch.no_grad(),
    ):
        model(prompt(5, 2), attention_mask=mask, **cache_argument(model, cache))
    assert torch.equal(feed(model, cache, prompt(3, 2)), feed(model, straight, prompt(3, 2)))


@every_cache
def test_another_batch_without_a_reset(entry):
    model = tiny()
    cache, straight = entry.build(model), entry.build(model)
    for each in (cache, straight):
        feed(model, each, prompt(20, 2))
    with (
        pytest.raises(
            ValueError, match=r"\[batch, kv_heads, head_dim\] = \[2, 2, 16\].*one cache per batch, or cache.reset\(\)"
        ),
        torch.no_grad(),
    ):
        model(prompt(20, 3), **cache_argument(model, cache))
    # nothing was taken in
    assert torch.equal(feed(model, cache, prompt(3, 2)), feed(model, straight, prompt(3, 2)))
    cache.reset()
    assert feed(model, cache, prompt(20, 3)).shape[0] == 3


@every_cache
@pytest.mark.parametrize("chosen", ["sdpa", "eager"])
def test_an_attention_that_was_changed_behind_the_cache(entry, chosen):
    model = build("llama")
    cache = entry.build(model)
    model.set_attn_implementation(chosen)
    with pytest.raises(RuntimeError, match=f"attention implementation is '{chosen}'.*set_attn_implementation"):
        feed(model, cache, prompt(20))
    # the remedy that the message names
    model.set_attn_implementation("kvcompress")
    cache.reset()
    fresh = entry.build(model)
    assert torch.equal(feed(model, cache, prompt(20)), feed(model, fresh, prompt(20)))


@every_cache
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("where", ["after", "before", "within"])
def test_an_interrupted_forward_is_noticed_and_reset_mends_it(entry, layer, where):
    """Ctrl-C in the middle of a model: some layers have the tokens, others not."""
    model = tiny()
    cache, straight = entry.build(model), entry.build(model)
    feed(model, cache, prompt(20, 2))

    def interrupt(*_):
        raise KeyboardInterrupt

    attention = model.model.layers[layer].self_attn
    # before its output projection a layer has stored the tokens; before its query projection it has nothing
    hook = (attention.o_proj if where == "after" else attention.q_proj).register_forward_pre_hook(interrupt)
    if where == "within":
        hook.remove()
        cache.layers[layer].clock.advance = interrupt
    with pytest.raises(KeyboardInterrupt):
        feed(model, cache, prompt(5, 2))
    hook.remove()
    vars(cache.layers[layer].clock).pop("advance", None)
    # whole forwards and none at all leave a cache that is whole
    if (layer, where) not in ((0, "before"), (2, "after")):
        with pytest.raises((RuntimeError, ValueError), match=r"interrupted.*reset"):
            feed(model, cache, prompt(5, 2))
    cache.reset()
    assert torch.equal(feed(model, cache, prompt(20, 2)), feed(model, straight, prompt(20, 2)))


@every_cache
def test_dropout(entry):
    model = build("llama", attention_dropout=0.5).train()
    with pytest.raises(ValueError, match=r"attention dropout is on: call model.eval\(\)"):
        feed(model, entry.build(model), prompt(20))


@every_cache
def test_gradients(entry):
    """A forward outside of torch.no_grad() is as good as one inside, and holds no graph; a backward is refused."""
    model = tiny()
    caches = [entry.build(model) for _ in range(2)]
    for tokens in (20, 3, 1):
        ids = prompt(tokens, 2)
        wanted = feed(model, caches[0], ids)
        found = model(ids, **cache_argument(model, caches[1])).logits
        assert torch.equal(found, wanted)
    held = [tensor for layer in caches[1].layers for part in layer.segments() for tensor in part.tensors().values()]
    assert held
    assert not any(tensor.requires_grad for tensor in held)
    with pytest.raises(RuntimeError, match="no gradient passes through it; train with use_cache=False"):
        found.sum().backward()


@every_cache
def test_crop_by_a_length(entry):
    """transformers once took the length to keep; it now takes minus what goes."""
    model = tiny()
    cache = entry.build(model)
    feed(model, cache, prompt(20))
    with pytest.raises(ValueError, match="tokens to remove as a negative number, got 5"):
        cache.crop(5)
    assert cache.get_seq_length() == 20


@every_cache
def test_crop_of_more_than_there_is(entry):
    model = tiny()
    cache = entry.build(model)
    feed(model, cache, prompt(20))
    with pytest.raises(ValueError, match="take back"):
        cache.crop(-21)
    assert cache.get_seq_length() == 20


@every_cache
def test_room_for_no_step(entry):
    model = tiny()
    cache = entry.build(model)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        cache.reserve(0)


@every_cache
def test_moving_layers_between_devices(entry):
    cache = entry.build(tiny())
    with pytest.raises(NotImplementedError, match="ShadowKVCache keeps values off the device"):
        cache.layers[0].offload()


@pytest.mark.parametrize(
    ("build_cache", "kind", "message"),
    [
        (lambda model: H2OCache(model, budget=0), ValueError, "budget must be at least .* 2 tokens"),
        (lambda model: H2OCache(model, budget=-3), ValueError, "budget must be at least"),
        (lambda model: H2OCache(model, budget=4, recent=5), ValueError, "recent \\+ 1 to choose = 6 tokens.*got 4"),
        (lambda model: H2OCache(model, budget=5, sinks=4), ValueError, "recent \\+ 1 to choose = 6 tokens.*got 5"),
        (lambda model: H2OCache(model, budget=0.0), ValueError, r"in \(0, 1\] \(float\), got 0.0"),
        (lambda model: H2OCache(model, budget=1.5), ValueError, r"in \(0, 1\] \(float\), got 1.5"),
        (lambda model: H2OCache(model, budget=float("nan")), ValueError, r"in \(0, 1\] \(float\), got nan"),
        (lambda model: H2OCache(model, budget="512"), TypeError, "int.*or a fraction.*got '512'"),
        (lambda model: H2OCache(model, budget=True), TypeError, "got True"),
        (lambda model: H2OCache(model, budget=None), TypeError, "got None"),
        (lambda model: H2OCache(model, budget=8, recent=0), ValueError, "recent must be at least 1 token"),
        (lambda model: H2OCache(model, budget=8, recent=1.5), ValueError, "recent must be .* got 1.5"),
        (lambda model: H2OCache(model, budget=8, sinks=-1), ValueError, "sinks must be 0 tokens or more, got -1"),
        (lambda model: SnapKVCache(model, budget=32), ValueError, "recent \\+ 1 to choose = 33 tokens"),
        (lambda model: SnapKVCache(model, budget=64, window=0), ValueError, "window must be at least 1|recent must be"),
        (lambda model: SnapKVCache(model, budget=64, kernel=4), ValueError, "kernel must be an odd number.*got 4"),
        (lambda model: StreamingLLMCache(model, budget=4), ValueError, "at least sinks \\+ recent = 5 tokens"),
        (lambda model: EvictingCache(model, policy="h2o", budget=8), TypeError, r"Policy such as H2O\(\), got 'h2o'"),
        (lambda model: EvictingCache(model, policy=H2O, budget=8), TypeError, r"Policy such as H2O\(\)"),
        (
            lambda model: EvictingCache(model, policy=H2O(), budget=8, allocation="cone"),
            ValueError,
            r"one of uniform, pyramid, heads, global, or a Profile such as Profile.load\(path\), got 'cone'",
        ),
        (lambda model: EvictingCache(model, policy=SnapKV(pooling="sum"), budget=64), ValueError, "'avg' or 'max'"),
        (lambda model: EvictingCache(model, policy=StreamingLLM(sinks=-2), budget=64), ValueError, "sinks must be"),
    ],
)
def test_impossible_settings(build_cache, kind, message):
    with pytest.raises(kind, match=message):
        build_cache(tiny())


@every_cache
def test_a_second_way_to_ask_for_a_cache(entry):
    """transformers' own refusals pass through: a cache and cache_implementation exclude each other."""
    model = tiny()
    with pytest.raises(ValueError, match="cache_implementation"):
        generate(model, entry.build(model), prompt(20), cache_implementation="static")
