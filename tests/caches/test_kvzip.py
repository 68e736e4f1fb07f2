"""KVzip through a cache: what stays is what the model's own attention weights look up in a second reading."""

import functools

import pytest
import torch
from transformers import DynamicCache

from kvcompress import AttentionMatchingCache, EvictingCache, GEARCache, KVzipCache
from kvcompress.caches import evicting
from kvcompress.hf import cache_argument
from kvcompress.policies.gear import GEAR
from kvcompress.policies.h2o import H2O
from kvcompress.policies.kvzip import KVzip
from kvcompress.swiftkv.cache import SharedStorageCache
from tests.contract.drive import feed, full, generate, tokens_kept
from tests.contract.models import WINDOW, build, left_padded, prompt, tiny

BUDGET, TOKENS = 9, 40
# each head for itself, and while decoding too
uniform = functools.partial(EvictingCache, allocation="uniform")
kvzip = functools.partial(KVzip, keeps_answers=False)


def looked_up(model, ids, kv_heads, chunk, prompt_ids):
    """The most that each token of [1, tokens] receives from a later reading of it, [layers, kv_heads, tokens]."""
    tokens = ids.shape[1]
    most = 0.0
    model.set_attn_implementation("eager")
    for start in range(0, tokens, chunk):
        again = torch.cat([torch.tensor([prompt_ids], dtype=torch.long), ids[:, start : start + chunk]], 1)
        with torch.no_grad():
            weights = model(torch.cat([ids, again], 1), output_attentions=True).attentions
        received = [layer[0, :, tokens:, :tokens].unflatten(0, (kv_heads, -1)).amax((1, 2)) for layer in weights]
        most = torch.maximum(torch.stack(received), torch.as_tensor(most))
    return most


def held(cache, row=0):
    return [
        [sorted(place for place in head if place >= 0) for head in layer.slots.positions[row].tolist()]
        for layer in cache.layers
    ]


# README: | `KVzipCache` | what is looked up to say the context again: for questions not asked yet | a second prefill |
# docs: has the model read its input a second time, after the first, and keeps what the second reading looks up most
@pytest.mark.parametrize("prompt_ids", [(), (7, 8, 9)], ids=["bare", "prompt"])
@pytest.mark.parametrize("chunk", [2048, TOKENS, 7])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_heads_keep_what_a_second_reading_attends_to_most(family, chunk, prompt_ids):
    model, ids = build(family, num_hidden_layers=2), prompt(TOKENS)
    cache = uniform(model, policy=kvzip(sinks=2, chunk=chunk, prompt=prompt_ids), budget=BUDGET)
    feed(model, cache, ids)
    wanted = looked_up(model, ids, cache.layers[0].slots.spare.shape[1], chunk, prompt_ids)
    # sinks and the newest token always stay
    wanted[..., [0, 1, -1]] = 2.0
    kept = wanted.topk(BUDGET).indices.sort(-1).values
    assert held(cache) == kept.tolist()


def test_a_sliding_layer_keeps_what_is_looked_up_within_its_window():
    model, ids = build("mistral", num_hidden_layers=2), prompt(TOKENS)
    cache = uniform(model, policy=kvzip(sinks=0), budget=6)
    feed(model, cache, ids)
    wanted = looked_up(model, ids, 2, TOKENS, ())
    wanted[..., : TOKENS - WINDOW] = -1.0
    wanted[..., -1] = 2.0
    assert held(cache) == wanted.topk(6).indices.sort(-1).values.tolist()


@pytest.mark.parametrize("chunk", [2048, 7])
def test_each_row_of_a_padded_batch_keeps_what_it_would_alone(chunk):
    model = tiny(num_hidden_layers=2)
    rows = [prompt(TOKENS)[0], prompt(1, seed=2)[0], prompt(23, seed=3)[0], prompt(2, seed=4)[0]]
    ids, mask = left_padded(rows)
    policy = kvzip(sinks=0, chunk=chunk, prompt=(7, 8))
    together = uniform(model, policy=policy, budget=BUDGET)
    feed(model, together, ids, mask)
    for index, row in enumerate(rows):
        alone = uniform(model, policy=policy, budget=BUDGET)
        feed(model, alone, row[None])
        assert held(together, index) == held(alone)


def test_a_second_turn_is_read_again_too_and_scores_are_the_highest_ever():
    model = build("llama", num_hidden_layers=1)
    cache = uniform(model, policy=kvzip(sinks=0), budget=100)
    first, second = prompt(20), prompt(15, seed=2)
    feed(model, cache, first)
    before = cache.layers[0].slots.scores.clone()
    feed(model, cache, second)
    slots = cache.layers[0].slots
    after = torch.zeros(2, 36).scatter_(1, slots.positions[0].long() % 36, slots.scores[0])[:, :35]
    both = torch.cat([first, second], 1)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(torch.cat([both, second], 1), output_attentions=True).attentions[0]
    received = weights[0, :, 35:, :35].unflatten(0, (2, -1)).amax((1, 2))
    received[:, :20] = torch.maximum(received[:, :20], before[0, :, :20])
    torch.testing.assert_close(after, received)


def test_a_row_that_is_fed_one_token_among_longer_ones_is_scored_as_in_decoding():
    model = tiny()
    first, longer, one = prompt(20), prompt(6, seed=2), prompt(1, seed=3)
    together, alone = (uniform(model, policy=kvzip(sinks=0), budget=100) for _ in range(2))
    feed(model, together, first.expand(2, -1))
    ids, fresh = left_padded([longer[0], one[0]])
    feed(model, together, ids, torch.cat([torch.ones_like(first).expand(2, -1), fresh], 1))
    feed(model, alone, first)
    feed(model, alone, one)
    for layer, wanted in zip(together.layers, alone.layers, strict=True):
        scores = [
            each.slots.scores[row].gather(1, each.slots.positions[row].long().argsort(-1))[:, -21:]
            for each, row in ((layer, 1), (wanted, 0))
        ]
        torch.testing.assert_close(*scores)


def test_the_logits_of_the_first_reading_are_the_full_caches():
    model, ids = tiny(), prompt(TOKENS)
    cache = uniform(model, policy=kvzip(), budget=BUDGET)
    torch.testing.assert_close(feed(model, cache, ids), feed(model, DynamicCache(config=model.config), ids))
    assert cache.get_seq_length() == TOKENS
    assert all((kept == BUDGET).all() for kept in tokens_kept(cache))


def test_what_was_let_go_is_freed():
    """Slots, their positions and scores, and counters: nothing else is left of a long prompt."""
    model = tiny()
    caches = [uniform(model, policy=policy, budget=BUDGET) for policy in (kvzip(), H2O())]
    for cache in caches:
        feed(model, cache, prompt(300))
    assert caches[0].memory().total_bytes == caches[1].memory().total_bytes


# docs: A prompt takes two prefills and is held in full until the second ends; `prefill_chunk_size` bounds that
@pytest.mark.parametrize(("chunk", "most"), [(None, 300), (50, BUDGET + 50)])
def test_a_prompt_is_held_in_full_until_it_is_read_again_and_a_piece_of_it_where_it_comes_in_pieces(
    chunk, most, monkeypatch
):
    model, held, read = tiny(), [], []
    cache = uniform(model, policy=kvzip(), budget=BUDGET)
    again = evicting.read_again

    def note(decoder, layers, ids, *rest):
        held.append(layers[0].waiting.segment.slots + (layers[0].slots.positions[0, 0] >= 0).sum().item())
        read.append(ids.shape[1])
        return again(decoder, layers, ids, *rest)

    monkeypatch.setattr(evicting, "read_again", note)
    how = {} if chunk is None else {"prefill_chunk_size": chunk}
    generate(model, cache, prompt(300), max_new_tokens=2, **how)
    assert sum(read) == 300
    assert most - BUDGET <= max(held) <= most
    assert cache.layers[0].waiting is None


def test_slots_may_be_packed():
    model, ids = tiny(), prompt(TOKENS)
    caches = [uniform(model, policy=kvzip(), budget=BUDGET, packed=packed) for packed in (None, GEAR(bits=4))]
    for cache in caches:
        feed(model, cache, ids)
    kept = [
        [sorted(place for place in head if place >= 0) for head in cache.layers[0].slots.positions[0].tolist()]
        for cache in caches
    ]
    assert kept[0] == kept[1]


def test_a_prompt_may_reach_the_end_of_a_table_of_positions():
    """OPT has no position beyond its last; the second reading then stands before the end."""
    model = build("opt", max_position_embeddings=50)
    cache = uniform(model, policy=kvzip(), budget=BUDGET)
    feed(model, cache, prompt(48))
    assert all((kept == BUDGET).all() for kept in tokens_kept(cache))
    assert torch.isfinite(feed(model, cache, prompt(1, seed=2))).all()


# docs: It needs `input_ids`
def test_embeddings_are_refused_before_anything_is_stored():
    model = tiny()
    cache = uniform(model, policy=kvzip(), budget=BUDGET)
    embeddings = model.get_input_embeddings()(prompt(20))
    with pytest.raises(ValueError, match="KVzip reads the tokens again: pass input_ids instead of inputs_embeds"):
        model(inputs_embeds=embeddings, **cache_argument(model, cache))
    assert cache.get_seq_length() == 0
    feed(model, cache, prompt(20))
    other = EvictingCache(model, policy=H2O(), budget=BUDGET)
    with torch.no_grad():
        model(inputs_embeds=embeddings, **cache_argument(model, other))
    assert other.get_seq_length() == 20


def test_tokens_that_were_never_read_again_are_not_passed_over_in_silence():
    model = tiny()
    cache = uniform(model, policy=kvzip(), budget=BUDGET)
    decoder = model.get_decoder()
    with torch.no_grad():
        # no hook runs
        decoder.forward(input_ids=prompt(20), **cache_argument(decoder, cache))
    # what waits is counted
    assert cache.memory().total_bytes > cache.memory().full_bytes
    with pytest.raises(RuntimeError, match="tokens wait to be read again"):
        feed(model, cache, prompt(1))
    cache.reset()
    feed(model, cache, prompt(20))
    assert all((kept == BUDGET).all() for kept in tokens_kept(cache))


def test_a_second_reading_that_fails_leaves_a_cache_that_says_so(monkeypatch):
    model = tiny()
    cache = uniform(model, policy=kvzip(chunk=8), budget=BUDGET)
    calls = []

    def interrupt(module, args, kwargs):
        calls.append(module)
        if len(calls) == 3:
            raise KeyboardInterrupt

    hook = model.get_decoder().layers[-1].register_forward_pre_hook(interrupt, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        feed(model, cache, prompt(30))
    hook.remove()
    with pytest.raises(RuntimeError, match="tokens wait to be read again"):
        feed(model, cache, prompt(1))
    cache.reset()
    feed(model, cache, prompt(20))


def test_other_caches_of_the_same_model_are_read_once():
    model, ids = build("llama"), prompt(20, batch=2)
    before = full(model, ids)
    for _ in range(2):
        generate(model, uniform(model, policy=kvzip(), budget=BUDGET), ids)
    forwards = []
    hook = model.get_decoder().layers[0].register_forward_hook(lambda *_: forwards.append(1))
    assert torch.equal(full(model, ids, max_new_tokens=12), before)
    assert len(forwards) == 12
    forwards.clear()
    generate(model, EvictingCache(model, policy=H2O(), budget=BUDGET), ids)
    assert len(forwards) == 12
    forwards.clear()
    generate(model, uniform(model, policy=kvzip(), budget=BUDGET), ids)
    assert len(forwards) == 13
    forwards.clear()
    generate(model, uniform(model, policy=kvzip(), budget=BUDGET), ids[:, :1])
    assert len(forwards) == 12
    assert len(model.get_decoder()._forward_hooks) == 1
    hook.remove()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda model: uniform(model, policy=kvzip(), budget=20, rerotated=True),
            "rerotated cannot be combined with",
        ),
        # whoever asked for no allocation hears of none
        (
            lambda model: KVzipCache(model, budget=20, rerotated=True),
            "^rerotated cannot be combined with KVzip, which reads tokens twice",
        ),
        (lambda model: uniform(model, policy=kvzip(), budget=3), "at least sinks \\+ recent \\+ 1 to choose = 6"),
        (
            lambda model: SharedStorageCache(
                model, first=1, share=2, storage=lambda m: uniform(m, policy=kvzip(), budget=20)
            ),
            "KVzip reads tokens twice",
        ),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(tiny())


@pytest.mark.parametrize("kind", [KVzipCache, AttentionMatchingCache])
def test_tokens_that_wait_to_be_read_again_are_not_saved_without_them(kind, tmp_path):
    model, path = build("llama"), tmp_path / "cache.safetensors"
    cache, times = kind(model, budget=12), iter((False, True))

    def interrupt(*_):
        if next(times):
            raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        feed(model, cache, prompt(20))
    hook.remove()
    with pytest.raises(RuntimeError, match="interrupted; call cache.reset"):
        cache.save(path)
    assert not path.exists()
    cache.reset()
    feed(model, cache, prompt(20))
    cache.save(path)


def test_gear_takes_no_part():
    """A cache that knows nothing of second readings, of a model that does."""
    model = build("llama")
    uniform(model, policy=kvzip(), budget=BUDGET)
    cache = GEARCache(model)
    feed(model, cache, prompt(20))
    assert cache.get_seq_length() == 20


def test_the_newest_tokens_are_kept_as_far_as_asked_for():
    model = tiny()
    cache = KVzipCache(model, budget=BUDGET, sinks=2, recent=BUDGET - 6, allocation="uniform", keeps_answers=False)
    feed(model, cache, prompt(40))
    for step in range(6):
        feed(model, cache, prompt(1, seed=step))
    for layer in cache.layers:
        for head in layer.slots.positions[0].tolist():
            assert sum(place >= 0 for place in head) == BUDGET
            assert set(range(46 - (BUDGET - 6), 46)) | {0, 1} <= set(head)


def test_where_answers_stay_a_row_that_is_fed_one_token_among_longer_ones_is_as_it_would_be_alone():
    model = tiny(dtype=torch.float64)
    together, alone = (KVzipCache(model, budget=8, sinks=1) for _ in range(2))
    mask = torch.ones(2, 20, dtype=torch.long)
    feed(model, together, prompt(20, 2), mask)
    feed(model, alone, prompt(20, 2)[1:])
    more = torch.cat([mask, torch.tensor([[1, 1, 1, 1], [0, 0, 0, 1]])], 1)
    feed(model, together, prompt(4, 2, seed=3), more)
    feed(model, alone, prompt(4, 2, seed=3)[1:, -1:])
    for mine, other in zip(together.layers, alone.layers, strict=True):
        # one token says nothing about what the others are worth
        for head in range(2):
            scores = mine.slots.scores[1, head, : mine.slots.capacities[1, head]].sort(descending=True).values
            own = other.slots.scores[0, head, : other.slots.capacities[0, head]].sort(descending=True).values
            torch.testing.assert_close(scores[: len(own)], own)
            assert (scores[len(own) :] == 0).all()
    last = prompt(6, 2, seed=4)
    got = feed(model, together, last, torch.cat([more, torch.ones_like(last)], 1))[1:]
    torch.testing.assert_close(got, feed(model, alone, last[1:]), rtol=1e-5, atol=1e-5)
    got = feed(model, together, last[:, :1], torch.cat([more, torch.ones(2, 7, dtype=torch.long)], 1))[1:]
    torch.testing.assert_close(got, feed(model, alone, last[1:, :1]), rtol=1e-5, atol=1e-5)
    for mine, other in zip(together.layers, alone.layers, strict=True):
        assert (mine.slots.kept()[1] == other.slots.kept()[0]).all()


def test_packed_slots_of_older_files_keep_no_answers(tmp_path):
    """Whatever their policy says: it was not followed where slots were packed."""
    model = tiny()
    cache = KVzipCache(model, budget=12, packed=GEAR(bits=4), allocation="uniform", keeps_answers=False)
    feed(model, cache, prompt(40))
    settings = cache._settings()
    del settings["packs_answers"]
    settings["policy"]["keeps_answers"] = True
    older = KVzipCache._rebuild(model, settings)
    assert not older.policy.keeps_answers
    assert [type(layer) for layer in older.layers] == [type(layer) for layer in cache.layers]
    again = KVzipCache(model, budget=12, packed=GEAR(bits=4))
    assert KVzipCache._rebuild(model, again._settings()).policy.keeps_answers
