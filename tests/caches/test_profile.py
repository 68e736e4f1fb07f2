"""Shares of the budget that were measured before: how they become numbers of tokens, and the file they are in."""

import dataclasses
import functools

import numpy as np
import pytest
import torch

import kvcompress
from kvcompress import (
    H2O,
    TOVA,
    AttentionMatchingCache,
    Candidates,
    EvictingCache,
    H2OCache,
    KVzip,
    KVzipCache,
    Profile,
    SnapKV,
    StreamingLLM,
    hf,
    measure_profile,
    registry,
)
from kvcompress.caches.allotment import Allotment
from kvcompress.policies.method import own_policies
from kvcompress.storage.tensor_file import write_tensors
from tests.contract.caches import POLICIES, uneven
from tests.contract.drive import feed, tokens_kept
from tests.contract.models import DEVICE, build, left_padded, prompt, tiny

# batches of other sizes sum in another order
close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
# of three layers with two KV heads; exact where shares are rounded
SHARES = [[0.5, 1.5], [0.25, 1.75], [1.25, 0.75]]
FLAT = [share for row in SHARES for share in row]


def profile(model, shares=SHARES):
    return Profile.of(model, shares)


def held(cache):
    """Tokens that each head keeps, [batch, heads of all layers]."""
    return torch.cat([kept.cpu() for kept in tokens_kept(cache)], 1)


def counts(shares, mean, least, length, fraction=None):
    """What heads of one sequence get, as one list."""
    layers, mean = Allotment.of_layers(shares), torch.tensor([mean])
    if fraction is not None:
        return [count for each in layers for count in each.of_fraction(fraction, mean, least)[0].tolist()]
    return [count for each in layers for count in each.of_count(mean, least, torch.tensor([length]))[0].tolist()]


def test_heads_get_their_shares():
    assert counts(SHARES, 20, 2, 1000) == [10, 30, 5, 35, 25, 15]
    assert counts(SHARES, 20, 2, 200, fraction=0.1) == [10, 30, 5, 35, 25, 15]


def test_what_a_head_cannot_do_without_is_taken_from_the_others():
    # the third head needs 8 instead of 5; the others share 112 instead of 115 as before
    found = counts(SHARES, 20, 8, 1000)
    assert found == [9, 29, 8, 34, 24, 14]
    assert sum(found) <= 120


@pytest.mark.parametrize("fraction", [None, 20 / 25])
def test_no_head_gets_more_than_there_is_and_the_others_get_the_surplus(fraction):
    found = counts(SHARES, 20, 2, 25, fraction)
    assert max(found) == 25
    assert 120 - 6 < sum(found) <= 120
    # three have all there is, and the others more than their shares of 10, 5 and 15
    assert sorted(found)[3:] == [25, 25, 25]
    assert all(own > share for own, share in zip([found[0], found[2], found[5]], [10, 5, 15], strict=True))


def test_all_stays_while_all_fits():
    found = counts(SHARES, 20, 2, 19)
    assert min(found) >= 19
    assert sum(found) <= 120
    # what is left over goes by the shares
    assert counts(SHARES, 20, 2, 3) == [9, 29, 5, 34, 24, 14] or counts(SHARES, 20, 2, 3) == [10, 30, 5, 35, 25, 15]


def test_equal_shares_are_a_uniform_budget():
    for mean, length in ((20, 1000), (20, 7), (20, 20), (7, 8)):
        assert counts([[1.0, 1.0]] * 3, mean, 2, length) == [mean] * 6


@pytest.mark.parametrize("seed", range(20))
def test_the_budget_is_used_but_for_rounding_and_few_numbers_occur(seed):
    torch.manual_seed(seed)
    layers, heads, batch = 6, 4, 5
    shares = torch.rand(layers, heads, dtype=torch.float64) ** 2
    shares = shares / shares.mean()
    found = Allotment.of_layers(shares.tolist())
    mean = torch.randint(10, 300, (batch,))
    length = mean + torch.randint(-5, 900, (batch,))
    numbers = torch.cat([each.of_count(mean, 4, length) for each in found], 1)
    pool = mean * layers * heads
    assert (numbers.sum(1) <= pool).all()
    assert (numbers.sum(1) > pool - layers * heads).all()
    assert (numbers >= 4).all()
    assert (numbers <= length[:, None])[length > mean].all()
    # four to each power of two
    assert all(len(row.unique()) <= 4 * 8 for row in numbers)
    rounded = torch.cat([each.own for each in found])
    assert ((rounded / shares.flatten() - 1).abs() < 0.3)[shares.flatten() > 0.01].all()


@pytest.mark.parametrize("seed", range(5))
def test_numbers_of_a_growing_fraction_never_fall(seed):
    torch.manual_seed(seed)
    shares = torch.rand(4, 3, dtype=torch.float64)
    layers = Allotment.of_layers((shares / shares.mean()).tolist())
    lengths = torch.arange(1, 400)
    mean = (0.3 * lengths).int().clamp(min=5)
    numbers = torch.cat([each.of_fraction(0.3, mean, 5) for each in layers], 1)
    assert (numbers.diff(dim=0) >= 0).all()


# docs: A profile gives each KV head of each layer its own share of the budget, and serves every policy
@pytest.mark.parametrize("policy", POLICIES.values(), ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("budget", [24, 0.3])
def test_every_policy_keeps_the_shares(policy, budget):
    model = tiny()
    cache = EvictingCache(model, policy=policy, budget=budget, allocation=profile(model))
    feed(model, cache, prompt(80, 2))
    assert held(cache).tolist() == [[int(24 * share) for share in FLAT]] * 2
    # and while decoding, where the budget grows or stays
    for step in range(40):
        feed(model, cache, prompt(1, 2, seed=step))
    if not any(layer.keeps_answers for layer in cache.layers):
        wanted = torch.tensor([int((24 if budget == 24 else 36) * share) for share in FLAT])
        # a head's number may grow by two at once, and it takes in one token at a time
        assert ((wanted - held(cache) == 0) | ((wanted - held(cache) == 1) & (budget == 0.3))).all()


def test_every_policy_of_the_package_is_among_those():
    assert {type(policy) for policy in POLICIES.values()} == set(own_policies())


@pytest.mark.parametrize("policy", [H2O(sinks=2), SnapKV(window=4, recent=4), TOVA(), StreamingLLM(sinks=1)])
def test_shares_of_one_keep_what_a_uniform_budget_does(policy):
    model = tiny()
    one = profile(model, [[1.0, 1.0]] * 3)
    caches = [EvictingCache(model, policy=policy, budget=12, allocation=how) for how in (one, "uniform")]
    for ids in (prompt(40, 2), *(prompt(1, 2, seed=step) for step in range(10)), prompt(9, 2, seed=3)):
        close(*(feed(model, cache, ids) for cache in caches))


def test_a_fraction_of_its_own_budget_is_what_a_head_always_keeps_of_the_newest():
    model = tiny()
    cache = EvictingCache(model, policy=H2O(recent=0.5), budget=20, allocation=profile(model))
    feed(model, cache, prompt(60))
    for step in range(5):
        feed(model, cache, prompt(1, seed=step))
    for layer, row in zip(cache.layers, SHARES, strict=True):
        for head, share in enumerate(row):
            newest = sorted(layer.slots.positions[0, head].tolist())[-int(10 * share) :]
            assert newest == list(range(65 - int(10 * share), 65))
            # the other half are chosen
            assert layer.recents[0, head] == int(10 * share)


def test_bytes_are_those_of_what_is_kept():
    model = tiny("llama", head_dim=64)
    caches = [H2OCache(model, budget=100, allocation=how) for how in (profile(model), "uniform")]
    for cache in caches:
        feed(model, cache, prompt(450))
    kept = held(caches[0])
    assert kept.max() == 7 * kept.min()
    assert kept.float().mean() <= 100
    assert caches[0].memory().total_bytes <= 1.05 * caches[1].memory().total_bytes


# docs: A sliding layer keeps no more than its window
def test_a_sliding_layer_keeps_no_more_than_its_window():
    model = tiny("mistral")
    cache = H2OCache(model, budget=10, allocation=profile(model))
    feed(model, cache, prompt(60))
    # of 12 tokens the next query sees 11
    assert held(cache)[0].tolist() == [5, 11, 2, 11, 11, 7]


@pytest.mark.parametrize("budget", [12, 0.4])
@pytest.mark.parametrize("policy", [H2O(sinks=1), KVzip(sinks=1, chunk=7)])
def test_a_clone_a_choice_of_rows_and_a_file_hold_what_the_cache_held(policy, budget, tmp_path):
    model = tiny()
    own = Profile.of(model, SHARES, {"source": "by hand"})
    cache = EvictingCache(model, policy=policy, budget=budget, allocation=own)
    feed(model, cache, prompt(40, 3))
    cache.save(tmp_path / "cache")
    loaded = EvictingCache.load(tmp_path / "cache", model)
    assert loaded.allocation == own
    assert loaded.allocation.measured == {"source": "by hand"}
    assert repr(loaded) == repr(cache)
    chosen = cache.clone()
    rows = torch.tensor([2, 0, 0], device=DEVICE)
    chosen.reorder_cache(rows)
    for ids in (*(prompt(1, 3, seed=step) for step in range(20)), prompt(9, 3, seed=3), prompt(1, 3)):
        straight = feed(model, cache, ids)
        assert torch.equal(feed(model, loaded, ids), straight)
        close(feed(model, chosen, ids[rows]), straight[rows])
    assert torch.equal(held(loaded), held(cache))
    assert torch.equal(held(chosen), held(cache)[rows.cpu()])


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("budget", [10, 0.3])
@pytest.mark.parametrize("policy", [H2O(sinks=1), TOVA(), KVzip(sinks=1, chunk=7, keeps_answers=False)])
def test_a_padded_row_keeps_what_it_does_alone_one_token_or_many_at_a_time(policy, family, budget):
    model, rows = tiny(family, dtype=torch.float64), [prompt(50)[0], prompt(31, seed=2)[0]]
    ids, mask = left_padded(rows)
    # the second row gets a single token where the first gets several
    more, shown = prompt(9, 2, seed=3), torch.ones(2, 9, dtype=torch.long, device=DEVICE)
    shown[1, :8] = 0
    cache, alone = (EvictingCache(model, policy=policy, budget=budget, allocation=profile(model)) for _ in range(2))
    feed(model, cache, ids, mask)
    whole = torch.cat([mask, shown], 1)
    feed(model, cache, more, whole)
    last = feed(model, cache, prompt(1, 2, seed=7), torch.cat([whole, whole[:, -1:]], 1))
    feed(model, alone, rows[1][None])
    feed(model, alone, more[1:, 8:])
    close(last[1:], feed(model, alone, prompt(1, 2, seed=7)[1:]))
    assert torch.equal(held(cache)[1], held(alone)[0])


def test_a_prompt_of_one_token_gets_the_same_room_alone_and_beside_a_longer_one():
    model = tiny()
    ids, mask = left_padded([prompt(20)[0], prompt(1, seed=2)[0]])
    cache, alone = (H2OCache(model, budget=10, allocation=profile(model)) for _ in range(2))
    feed(model, cache, ids, mask)
    feed(model, alone, ids[1:, -1:])
    for step in range(40):
        token = prompt(1, 2, seed=step)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        feed(model, cache, token, mask)
        feed(model, alone, token[1:])
    assert torch.equal(held(cache)[1], held(alone)[0])
    assert held(alone)[0].tolist() == [5, 15, 2, 17, 12, 7]


# docs: while a text is shorter than the budget all of it stays
# docs: With a count, the numbers are set after every forward of several tokens
def test_what_heads_keep_changes_with_texts_until_it_is_by_the_shares():
    model = tiny()
    cache = H2OCache(model, budget=20, allocation=profile(model))
    feed(model, cache, prompt(18))
    assert held(cache)[0].tolist() == [18] * 6
    for step in range(60):
        feed(model, cache, prompt(1, seed=step))
    # single tokens do not move the shares: what fitted keeps its room
    assert held(cache).float().mean() <= 20
    assert held(cache).min() >= 18
    feed(model, cache, prompt(60, seed=2))
    assert held(cache)[0].tolist() == [10, 30, 5, 35, 25, 15]


@pytest.mark.parametrize("budget", [None, 10, 0.5])
def test_a_cache_is_compacted_by_its_shares(budget):
    model, ids = tiny(), prompt(60)
    cache = AttentionMatchingCache(model, budget=24, sinks=1, allocation=profile(model))
    feed(model, cache, ids)
    for step in range(10):
        feed(model, cache, prompt(1, seed=step))
    cache.compact(ids, budget=budget)
    # half is of the 34 tokens held by heads on average; of 10, the third head would have too few
    mean = {None: 24, 10: 10, 0.5: 17}[budget]
    wanted = [4, 14, 3, 17, 12, 7] if budget == 10 else [int(mean * share) for share in FLAT]
    assert held(cache)[0].tolist() == wanted
    feed(model, cache, prompt(60, seed=3))
    assert held(cache)[0].tolist() == [int(24 * share) for share in FLAT]


# docs: A cache refuses a profile of another model
# docs: Of a model whose layers differ in their number of KV heads (Gemma
def test_layers_of_unlike_heads_are_refused():
    model = tiny("gemma4")
    said = "a profile has equally many shares for every layer, and Gemma4ForCausalLM has layers of 1 and 2 KV heads"
    with pytest.raises(ValueError, match=said):
        measure_profile(model, [prompt(40)])
    with pytest.raises(ValueError, match=said):
        Profile.of(model, torch.ones(3, 2))
    by_hand = Profile(((1.0, 1.0),) * 3, hf.Fingerprint.of(model))
    with pytest.raises(ValueError, match=said):
        H2OCache(model, budget=8, allocation=by_hand)


def test_a_profile_of_another_model_is_refused():
    other = profile(build("llama", seed=1))
    with pytest.raises(ValueError, match="the profile was made with LlamaForCausalLM of .* They differ in weights"):
        H2OCache(tiny(), budget=8, allocation=other)
    with pytest.raises(ValueError, match="They differ in .*sizes"):
        H2OCache(tiny(num_hidden_layers=2), budget=8, allocation=profile(tiny()))


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([[1.0, 1.0]] * 2, r"shares must be \[layers=3, kv_heads=2\] for LlamaForCausalLM, got \[2, 2\]"),
        ([1.0] * 6, r"shares must be \[layers, kv_heads\], got \[6\]"),
        ([[1.0, 1.0], [1.0], [1.0, 1.0]], r"shares must be numbers, \[layers, kv_heads\]"),
        ([["a", 1.0]] * 3, r"shares must be numbers, \[layers, kv_heads\]"),
        ([[1.0, -0.5]] * 3, "shares must be 0 or more, got -0.5 for head 1 of layer 0"),
        ([[1.0, float("nan")]] * 3, "shares must be 0 or more, got nan for head 1 of layer 0"),
        ([[0.0, 0.0]] * 3, "shares must be more than 0 for some head"),
    ],
)
def test_shares_that_are_none_are_refused(shares, message):
    with pytest.raises(ValueError, match=message):
        Profile.of(tiny(), shares)


def test_shares_are_one_on_average():
    found = Profile.of(tiny(), [[2, 6], [1, 7], [5, 3]])
    assert found.shares == tuple(map(tuple, SHARES))
    with pytest.raises(ValueError, match="shares must be 1 on average over all heads of all layers, got 2"):
        Profile(((2.0, 2.0),), found.model)


def test_a_head_with_no_share_keeps_what_its_policy_needs():
    model = tiny()
    cache = H2OCache(model, budget=10, sinks=3, recent=2, allocation=profile(model, [[0, 2], [1, 1], [1, 1]]))
    feed(model, cache, prompt(60))
    # sinks, recent tokens and one to choose
    assert held(cache)[0, 0] == 6
    assert held(cache).float().mean() <= 10


# docs: `print(profile)` shows the model, how it was measured, and the shares
def test_a_profile_comes_back_from_its_file_and_tells_what_it_is(tmp_path):
    model = tiny()
    own = Profile.of(model, uneven(model).shares, {"source": "by hand", "budgets": [0.2]})
    own.save(tmp_path / "profile")
    loaded = Profile.load(tmp_path / "profile")
    assert loaded == own
    assert loaded.measured == own.measured
    assert repr(own) == "<Profile of LlamaForCausalLM: 3 layers x 2 KV heads, shares 0.50 to 1.50>"
    lines = str(own).splitlines()
    assert lines[:2] == [
        "model      LlamaForCausalLM",
        "sizes      3 layers, hidden size 64, 4 heads, 2 KV heads, head_dim 16, vocabulary 512",
    ]
    assert lines[2:4] == ["attention  full attention", "rope       rope_theta 10000.0, rope_type default"]
    assert lines[5:7] == ["source     by hand", "budgets    [0.2]"]
    assert lines[7] == "layer   0   0.500  1.500"
    assert len(lines) == 10
    assert f"allocation={own!r}" in repr(H2OCache(model, budget=8, allocation=own))


def test_what_json_cannot_hold_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "profile"
    profile(tiny()).save(path)
    with pytest.raises(ValueError, match="a file cannot hold the facts of how the profile was measured"):
        Profile.of(tiny(), SHARES, {"policy": H2O()}).save(path)
    assert Profile.load(path) == profile(tiny())
    cache = H2OCache(tiny(), budget=8, allocation=Profile.of(tiny(), SHARES, {"policy": H2O()}))
    with pytest.raises(ValueError, match="a file cannot hold the facts of how the profile was measured"):
        cache.save(tmp_path / "cache")
    assert [each.name for each in tmp_path.iterdir()] == ["profile"]


# docs: A damaged file is refused
@pytest.mark.parametrize("at", [40, -3], ids=["facts", "shares"])
def test_a_damaged_file_is_refused(at, tmp_path):
    path = tmp_path / "profile"
    profile(tiny()).save(path)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        Profile.load(path)
    path.write_bytes(data[:-4])
    with pytest.raises(ValueError, match="is damaged"):
        Profile.load(path)


def test_a_file_that_holds_something_else_is_refused(tmp_path):
    model = tiny()
    H2OCache(model, budget=8).save(tmp_path / "cache")
    with pytest.raises(ValueError, match="is not a profile .format 'kvcompress-profile-1'., got format 'kvcompress-ca"):
        Profile.load(tmp_path / "cache")
    profile(model).save(tmp_path / "profile")
    with pytest.raises(ValueError, match="not a saved kvcompress cache"):
        H2OCache.load(tmp_path / "profile", model)
    (tmp_path / "text.json").write_text("{}")
    with pytest.raises(ValueError, match="not a safetensors file"):
        Profile.load(tmp_path / "text.json")
    with pytest.raises(FileNotFoundError):
        Profile.load(tmp_path / "nothing")
    with open(tmp_path / "unsigned", "wb") as file:
        write_tensors(file, "kvcompress-profile-1", {}, lambda: iter([({}, {})]))
    text = (tmp_path / "unsigned").read_bytes().replace(b'"digest"', b'"idgest"')
    (tmp_path / "unsigned").write_bytes(text)
    with pytest.raises(ValueError, match="it has no digest"):
        Profile.load(tmp_path / "unsigned")


# README: and a `Profile` gives each head a share that was measured beforehand
@pytest.mark.parametrize("policy", [KVzip(sinks=1), SnapKV(window=4, recent=4)])
def test_a_profile_is_what_heads_keep_where_they_compete(policy):
    model, text = build("llama"), prompt(60)
    found = measure_profile(model, [text], policy=policy, budgets=[20])
    how = "global" if isinstance(policy, KVzip) else "heads"
    cache = EvictingCache(model, policy=policy, budget=20, allocation=how)
    feed(model, cache, text)
    kept = torch.stack(tokens_kept(cache))[:, 0].double().cpu()
    close(torch.tensor(found.shares, dtype=torch.float64), kept / kept.mean())
    assert len(kept.unique()) > 1
    assert found.measured["policy"] == str(policy)
    assert (found.measured["allocation"], found.measured["texts"], found.measured["tokens"]) == (how, 1, 60)


def test_a_profile_is_the_mean_over_texts_and_budgets():
    model, texts, budgets = tiny(), [prompt(60, 2), prompt(40, seed=3)[0]], [12, 0.4]
    found = measure_profile(model, texts, policy=KVzip(sinks=1), budgets=budgets, source="random")
    each = [
        torch.tensor(measure_profile(model, [text], policy=KVzip(sinks=1), budgets=[budget]).shares)
        for text in texts
        for budget in budgets
    ]
    close(torch.tensor(found.shares), torch.stack(each).mean(0))
    assert (found.measured["texts"], found.measured["tokens"], found.measured["source"]) == (3, 160, "random")
    assert measure_profile(model, texts, policy=KVzip(sinks=1), budgets=budgets) == found


@pytest.mark.parametrize(
    ("texts", "settings", "kind", "message"),
    [
        ([], {}, ValueError, "got 0 texts and 3 budgets"),
        ([prompt(20)], {"budgets": []}, ValueError, "got 1 texts and 0 budgets"),
        (["a text"], {}, TypeError, "texts must be tensors of token ids, int64 or int32, got str"),
        ([prompt(20).float()], {}, TypeError, "int64 or int32, got torch.float32"),
        ([prompt(20)[None]], {}, ValueError, r"a text must be \[tokens\] or \[batch, tokens\], got \[1, 1, 20\]"),
        ([prompt(20)], {"budgets": [20]}, ValueError, "budget must be below the 20 tokens of each text, got 20"),
        ([prompt(20)], {"budgets": [1.0]}, ValueError, "budget must be below the 20 tokens of each text, got 1.0"),
        ([prompt(40)], {"budgets": [0.1]}, ValueError, "a budget of 0.1 of 40 tokens is 4, and must be at least"),
        ([prompt(40)], {"budgets": [3]}, ValueError, "budget must be at least sinks"),
        ([prompt(40)], {"policy": TOVA(), "budgets": [9]}, ValueError, "do not compare across heads"),
    ],
)
def test_what_a_profile_cannot_be_measured_on_is_refused(texts, settings, kind, message):
    with pytest.raises(kind, match=message):
        measure_profile(tiny(), texts, **settings)


def test_no_profile_is_measured_of_a_model_that_makes_nan():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="LlamaForCausalLM makes hidden states that are not finite: its weights hold"):
        measure_profile(model, [prompt(60)])


@pytest.mark.parametrize(
    "budgets", [np.array([0.3, 0.5], dtype=np.float32), [np.int64(8)], torch.tensor([0.3])], ids=str
)
def test_budgets_of_other_libraries_can_be_held_by_a_file(budgets, tmp_path):
    found = measure_profile(tiny(), [prompt(30)], policy=KVzip(sinks=1), budgets=budgets)
    found.save(tmp_path / "profile")
    assert Profile.load(tmp_path / "profile").measured["budgets"] == [each.item() for each in budgets]


# docs: On the command line, the file's name is the allocation
def test_a_spec_names_the_file(tmp_path):
    model, path = tiny(), tmp_path / "profile.safetensors"
    profile(model).save(path)
    cache = registry.build(f"h2o:sinks=1:allocation={path}", model, 20)
    assert cache.allocation == profile(model)
    assert registry.canonical(f"h2o:allocation={path}:sinks=1") == f"h2o:allocation={path}:sinks=1"
    with pytest.raises(FileNotFoundError):
        registry.build("h2o:allocation=nothing.safetensors", model, 20)
    with pytest.raises(
        ValueError, match="takes as allocation 'uniform', .* or a file such as x.safetensors, got 'flat'"
    ):
        registry.build("h2o:allocation=flat", model, 20)


def test_names_are_public():
    assert {"Profile", "measure_profile"} <= set(kvcompress.__all__)
    assert KVzipCache(tiny(), budget=64, allocation=profile(tiny())).allocation == profile(tiny())


def test_tova_averages_tokens_and_not_places_where_heads_differ():
    attention, positions = torch.tensor([[[0.2, 0.4, 0.0], [0.6, 0.8, 0.3]]]), torch.tensor([[[5, 2, -1], [2, 7, 5]]])
    other = torch.zeros(1, 2, 1, 4)
    found = TOVA().score(
        Candidates(
            positions, torch.zeros_like(attention), attention, other, torch.zeros(1, 1), None, torch.tensor([8]),
            list, is_ragged=True,
        )
    )  # fmt: skip
    close(found[0, 0, :2], torch.tensor([0.25, 0.5]))
    close(found[0, 1], torch.tensor([0.5, 0.8, 0.25]))


@pytest.mark.parametrize("wrong", ["fingerprint", "measured", "field", "list"])
def test_a_file_with_other_facts_is_refused(tmp_path, wrong):
    model = tiny()
    profile = Profile.of(model, torch.ones(3, 2))
    facts = {"fingerprint": dataclasses.asdict(profile.model), "measured": {}}
    if wrong == "field":
        facts["fingerprint"]["colour"] = "red"
    elif wrong == "list":
        facts["measured"] = [1]
    else:
        del facts[wrong]
    with (tmp_path / "other").open("wb") as file:
        write_tensors(file, "kvcompress-profile-1", facts, lambda: iter([({"shares": torch.ones(3, 2)}, {})]))
    with pytest.raises(ValueError, match="holds no profile that this release of kvcompress reads"):
        Profile.load(tmp_path / "other")


@pytest.mark.parametrize("size", [1e308, 5e-324, 1.0])
def test_shares_may_be_of_any_size(size):
    shares = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]], dtype=torch.float64) * size
    assert Profile.of(tiny(), shares).shares == ((1.2, 1.2), (1.2, 1.2), (1.2, 0.0))


def test_parts_of_a_profile_keep_their_proportions():
    small = Allotment.of_layers([[0.0005, 0.001]])[0].own
    assert small.tolist() == pytest.approx([2 / 3, 4 / 3], rel=0.15)
