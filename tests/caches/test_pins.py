"""Pinned tokens stay in every evicting cache, whatever they score, and count in the budget."""

import pytest
import torch

from kvcompress import (
    AttentionMatchingCache,
    DenseCache,
    EvictingCache,
    H2OCache,
    KVzipCache,
    SnapKVCache,
    StreamingLLMCache,
    registry,
)
from kvcompress.caches import evicting_layer
from kvcompress.hf import cache_argument
from kvcompress.policies.gear import GEAR
from kvcompress.policies.method import import_policies
from kvcompress.policies.policy import Policy
from kvcompress.policies.random_choice import Random
from kvcompress.storage.segment import EMPTY
from tests.contract.caches import uneven
from tests.contract.drive import feed, generate
from tests.contract.models import build, left_padded, prompt, tiny

import_policies()
SPANS = [(5, 9), (13, 13)]
PINNED = [5, 6, 7, 8, 9, 13]
BUDGET = 16
POLICIES = {
    name: method.kind
    for name, method in registry.METHODS.items()
    if method.kind is not None and issubclass(method.kind, Policy)
}


def policy_of(name):
    small = {"snapkv": {"window": 3, "recent": 3}, "chunkkv": {"window": 3, "recent": 3, "chunk": 4}}
    return POLICIES[name](**small.get(name, {}))


def held_in_all(cache, places, row=0):
    """Whether every head of every layer holds these places of a row."""
    for layer in cache.layers:
        for head in layer.held_positions()[row]:
            if not set(places) <= set(head.tolist()):
                return False
    return True


def spread(model, cache, tokens=60, steps=12):
    feed(model, cache, prompt(tokens))
    for step in range(steps):
        feed(model, cache, prompt(1, seed=step))
    return cache


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_keeps_what_is_pinned_within_its_budget(name):
    model = tiny()
    cache = spread(model, EvictingCache(model, policy=policy_of(name), budget=BUDGET, pin=SPANS))
    assert held_in_all(cache, PINNED)
    answers = 12 if cache.layers[0].keeps_answers else 0
    kept = torch.stack([layer.tokens_kept() for layer in cache.layers]).float()
    assert kept.mean() == BUDGET + answers
    # without the pins it is another choice
    without = EvictingCache(model, policy=policy_of(name), budget=BUDGET)
    assert not held_in_all(spread(model, without), PINNED)


@pytest.mark.parametrize(
    "settings",
    [
        {"allocation": "pyramid"},
        {"allocation": "heads"},
        {"allocation": uneven},
        {"packed": GEAR(bits=4, group_size=8)},
        {"packed": GEAR(bits=4, group_size=8), "allocation": "heads"},
        {"rerotated": True},
        {"rerotated": True, "allocation": "heads"},
        {"budget": 0.3},
        {"budget": 0.3, "allocation": "heads"},
        {"budget": 0.02},
        {"recent": 0.99},
        {"sinks": 7},
        {"second_stage": 0.5},
    ],
    # a function's own words have its address, and each worker another
    ids=lambda settings: str({name: getattr(value, "__name__", value) for name, value in settings.items()}),
)
def test_pins_stay_with_every_setting_of_a_cache(settings):
    model = tiny()
    settings = {name: value(model) if callable(value) else value for name, value in settings.items()}
    cache = spread(model, H2OCache(model, **{"budget": BUDGET, **settings}, pin=SPANS))
    assert held_in_all(cache, PINNED)
    if isinstance(settings.get("budget", BUDGET), int) and "allocation" not in settings:
        assert {int(layer.tokens_kept().max()) for layer in cache.layers} == {BUDGET}


@pytest.mark.parametrize("kind", [KVzipCache, AttentionMatchingCache, SnapKVCache, StreamingLLMCache])
def test_the_short_names_take_pins(kind):
    model = tiny()
    window = {"window": 3} if kind is SnapKVCache else {}
    assert held_in_all(spread(model, kind(model, budget=BUDGET, pin=SPANS, **window)), PINNED)


@pytest.mark.parametrize("as_mask", [False, True])
@pytest.mark.parametrize("chunk", [40, 7, 1])
def test_rows_of_a_batch_have_their_own_places(as_mask, chunk):
    """Spans are places in each sequence; a mask says for each row, by columns, padding included."""
    model = tiny()
    ids, mask = left_padded([prompt(40)[0], prompt(29, seed=1)[0]])
    wanted = [PINNED, PINNED]
    pin = SPANS
    if as_mask:
        pin = torch.zeros_like(ids, dtype=torch.bool)
        pin[0, 5:9] = pin[1, 20:23] = True
        # padding is not a token that could stay
        pin[1, 3] = True
        wanted = [[5, 6, 7, 8], [9, 10, 11]]
    cache = H2OCache(model, budget=BUDGET, pin=pin)
    for start in range(0, 40, chunk):
        feed(model, cache, ids[:, start : start + chunk], mask[:, : start + chunk])
    for step in range(6):
        feed(model, cache, prompt(1, seed=step).expand(2, -1), torch.nn.functional.pad(mask, (0, step + 1), value=1))
    assert [held_in_all(cache, places, row) for row, places in enumerate(wanted)] == [True, True]
    alone = H2OCache(model, budget=BUDGET, pin=SPANS if not as_mask else [(9, 11)])
    if not as_mask or chunk == 40:
        feed(model, alone, prompt(29, seed=1))
        for step in range(6):
            feed(model, alone, prompt(1, seed=step))
        if chunk == 40 and not as_mask:
            rows = [layer.held_positions()[1].sort(-1).values for layer in cache.layers]
            for row, layer in zip(rows, alone.layers, strict=True):
                torch.testing.assert_close(row, layer.held_positions()[0].sort(-1).values)


def two_rows():
    """A model, two rows of tokens, and a cache in which each has its own pins."""
    model = tiny()
    ids = torch.cat([prompt(40), prompt(40, seed=1)])
    pin = torch.zeros_like(ids)
    pin[0, 5:9] = pin[1, 20:23] = 1
    cache = H2OCache(model, budget=BUDGET, pin=pin)
    return model, ids, cache


def test_rows_that_move_take_their_pins_along():
    model, ids, cache = two_rows()
    feed(model, cache, ids)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    copy = cache.clone()
    for step in range(30):
        for each in (cache, copy):
            feed(model, each, prompt(1, seed=step).expand(2, -1))
    for each in (cache, copy):
        assert held_in_all(each, [20, 21, 22], 0)
        assert held_in_all(each, [5, 6, 7, 8], 1)
        assert not held_in_all(each, [5, 6, 7, 8], 0)


@pytest.mark.parametrize("pin", [SPANS, torch.arange(60)[None] % 9 == 5], ids=["spans", "mask"])
def test_a_file_keeps_pins(pin, tmp_path):
    model = tiny()
    cache = H2OCache(model, budget=BUDGET, pin=pin)
    feed(model, cache, prompt(60)[:, :50])
    cache.save(tmp_path / "cache")
    again = H2OCache.load(tmp_path / "cache", model)
    for each in (cache, again):
        feed(model, each, prompt(60)[:, 50:])
        for step in range(12):
            feed(model, each, prompt(1, seed=step))
    wanted = PINNED if pin is SPANS else list(range(5, 60, 9))
    assert held_in_all(cache, wanted)
    assert held_in_all(again, wanted)
    for one, other in zip(cache.layers, again.layers, strict=True):
        assert torch.equal(one.held_positions(), other.held_positions())


def test_beams_and_a_second_prompt_after_reset():
    model, ids, cache = two_rows()
    for _ in range(2):
        generate(model, cache, ids, num_beams=3, max_new_tokens=20)
        for row in range(6):
            assert held_in_all(cache, [[5, 6, 7, 8], [20, 21, 22]][row // 3], row)
        cache.reset()
        assert cache.layers[0].pins.places is None


def test_tokens_that_a_later_mask_hides_move_the_pins_behind_them():
    model = tiny()
    ids = torch.cat([prompt(40), prompt(40, seed=1)])
    pin = torch.zeros_like(ids)
    pin[:, 20:23] = 1
    cache = H2OCache(model, budget=BUDGET, pin=pin)
    feed(model, cache, ids)
    mask = torch.ones(2, 50, dtype=torch.long)
    mask[1, 38:40] = mask[1, 2:5] = 0
    with pytest.warns(UserWarning, match="hides tokens"):
        feed(model, cache, prompt(10).expand(2, -1), mask)
    for step in range(20):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        feed(model, cache, prompt(1, seed=step).expand(2, -1), mask)
    assert held_in_all(cache, [20, 21, 22], 0)
    assert held_in_all(cache, [17, 18, 19], 1)


def test_on_a_sliding_layer_pins_leave_with_the_window():
    model = build("mistral", sliding_window=24)
    cache = spread(model, H2OCache(model, budget=BUDGET, pin=[(45, 49)]))
    for layer in cache.layers:
        places = set(layer.held_positions().flatten().tolist()) - {EMPTY}
        assert min(places) > 72 - 1 - 24
        assert set(range(49, 50)) <= places or min(places) > 45
    cache = spread(model, H2OCache(model, budget=BUDGET, pin=[(45, 49)]), steps=2)
    assert held_in_all(cache, range(45, 50))


def test_pins_are_told_and_their_bytes_counted():
    model = tiny()
    cache = H2OCache(model, budget=BUDGET, pin=SPANS)
    assert "pin=[[5, 9], [13, 13]]" in repr(cache)
    feed(model, cache, prompt(30))
    plain = H2OCache(model, budget=BUDGET)
    feed(model, plain, prompt(30))
    # one byte for each place up to the last
    assert cache.memory().device_bytes == plain.memory().device_bytes + 14


@pytest.mark.parametrize(
    ("pin", "error", "told"),
    [
        ([(5, 4)], ValueError, r"0 <= first <= last, got \(5, 4\)"),
        ([(-3, 4)], ValueError, "0 <= first <= last"),
        ([5, 9], TypeError, r"pin must be spans of tokens such as \[\(0, 31\)"),
        ("0-9", TypeError, "pin must be spans"),
        (torch.ones(9), ValueError, r"must be \[batch, tokens\] of bool or integers, got \[9\] of float32"),
        ([(0, 12)], ValueError, r"sinks \+ recent \+ 1 to choose \+ 13 pinned = 15 tokens .* got 14"),
    ],
)
def test_what_is_no_pin_is_refused(pin, error, told):
    with pytest.raises(error, match=told):
        H2OCache(tiny(), budget=14, recent=1, pin=pin)


def test_a_mask_of_other_rows_is_refused_before_anything_is_stored():
    model = tiny()
    cache = H2OCache(model, budget=BUDGET, pin=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="the mask of pinned tokens is of 2 sequences, but 3 are fed"):
        feed(model, cache, prompt(20).expand(3, -1))
    assert cache.get_seq_length() == 0


def test_nothing_pinned_is_a_cache_without_pins():
    model = tiny()
    for pin in (None, [], torch.zeros(1, 9, dtype=torch.bool)):
        cache = EvictingCache(model, policy=Random(), budget=BUDGET, pin=pin)
        assert cache.layers[0].pins is None


def test_what_another_cache_holds_is_pinned_by_spans():
    model = tiny()
    dense = DenseCache(model)
    ids = prompt(60)
    feed(model, dense, ids)
    cache = AttentionMatchingCache.from_cache(dense, ids, budget=BUDGET, pin=SPANS)
    assert held_in_all(cache, PINNED)
    with pytest.raises(ValueError, match="pin must be spans where tokens come from another cache"):
        AttentionMatchingCache.from_cache(dense, ids, budget=BUDGET, pin=torch.ones(1, 4, dtype=torch.bool))


def test_heads_that_compete_have_a_choice_beside_their_pins():
    model = tiny()
    cache = H2OCache(model, budget=len(PINNED) + 2 + 1, recent=2, allocation="heads", pin=SPANS)
    feed(model, cache, prompt(200))
    assert {count for layer in cache.layers for count in layer.tokens_kept().flatten().tolist()} == {9}


def test_a_mask_reaches_tokens_that_are_fed_one_by_one_and_stay_until_the_next_text():
    model = tiny()
    pin = torch.zeros(1, 40, dtype=torch.bool)
    pin[0, 33:36] = True
    cache = KVzipCache(model, budget=BUDGET, pin=pin)
    feed(model, cache, prompt(40)[:, :30])
    for column in range(30, 40):
        feed(model, cache, prompt(40)[:, column : column + 1])
    for seed in range(4):
        feed(model, cache, prompt(30, seed=seed))
    assert held_in_all(cache, [33, 34, 35])


def test_the_step_of_one_kernel_knows_no_pins_and_is_not_taken(monkeypatch):
    taken = []

    class Noted(evicting_layer.FusedDecodeStep):
        def __init__(self, *args):
            taken.append(args)
            super().__init__(*args)

    monkeypatch.setattr(evicting_layer, "attends_in_triton", lambda tensor: True)
    monkeypatch.setattr(evicting_layer, "FusedDecodeStep", Noted)
    model = tiny()
    assert held_in_all(spread(model, H2OCache(model, budget=BUDGET, pin=SPANS)), PINNED)
    assert not taken
    spread(model, H2OCache(model, budget=BUDGET), steps=1)
    assert taken


MASK = torch.zeros(1, 60, dtype=torch.bool)
MASK[0, 5:10] = True


@pytest.mark.parametrize("when", ["empty", "filled", "reset"])
def test_a_mask_is_in_the_file_of_a_cache_whatever_it_holds(when, tmp_path):
    model = tiny()
    cache = H2OCache(model, budget=BUDGET, pin=MASK)
    if when != "empty":
        feed(model, cache, prompt(60))
    if when == "reset":
        cache.reset()
    cache.save(tmp_path / "cache")
    again = H2OCache.load(tmp_path / "cache", model)
    if when == "filled":
        again.reset()
    feed(model, again, prompt(60))
    assert held_in_all(again, range(5, 10))


def test_compiled_steps_know_the_rest_of_a_mask():
    model = build("llama")
    pin = torch.zeros(1, 60, dtype=torch.bool)
    pin[0, 45:50] = True
    cache = H2OCache(model, budget=BUDGET, pin=pin)
    feed(model, cache, prompt(40))
    cache.reserve()
    step = torch.compile(
        lambda ids, at: model(ids, position_ids=at, **cache_argument(model, cache)).logits, backend="eager"
    )
    with torch.no_grad():
        for column in range(40, 75):
            step(prompt(100)[:, column : column + 1].clone(), torch.tensor([[column]]))
    assert held_in_all(cache, range(45, 50))


def test_a_cache_that_refused_a_mask_of_other_rows_goes_on():
    model = tiny()
    cache = H2OCache(model, budget=BUDGET, pin=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="2 sequences, but 3 are fed"):
        feed(model, cache, prompt(20).expand(3, -1))
    feed(model, cache, prompt(20, 2))
    assert held_in_all(cache, range(4), row=1)


def test_overlapping_spans_are_counted_once_and_long_ones_at_once():
    cache = H2OCache(tiny(), budget=14, recent=2, pin=[(0, 5), (4, 7), (2, 3)])
    assert cache.layers[0].pinned == 8
    with pytest.raises(ValueError, match="1000000000 pinned"):
        H2OCache(tiny(), budget=64, pin=[(0, 10**9 - 1)])
