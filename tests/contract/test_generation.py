"""`model.generate` in all its ways, through every cache."""

import pytest
import torch
from transformers import set_seed

from tests.contract.caches import ENTRIES, all_those, by_name, every_cache, every_variant, those
from tests.contract.drive import assert_same_state, feed, full, generate, recorded, replay, tokens_kept
from tests.contract.models import build, families, prompt, tiny
from tests.contract.oracle import assert_equals_oracle


# README: pass one to `model.generate`
@every_variant
def test_greedy_decoding_equals_the_oracle(entry):
    model = tiny()
    _, _, transcript = recorded(entry, model, prompt(20, 2))
    assert transcript.fed == [20] + [1] * 11
    assert_equals_oracle(model, transcript)


# README: The evicting caches evict at the end of every forward, in prefill and at each decode step
@all_those(lambda entry: entry.budget and not entry.competes)
def test_what_is_kept_stays_within_the_budget_at_every_step(entry):
    model = tiny()
    _, cache, transcript = recorded(entry, model, prompt(20, 2), max_new_tokens=20)
    for step, forward in enumerate(transcript.forwards[1:], 1):
        seen = sum(transcript.fed[:step])
        for layer, kept in enumerate(forward.kept):
            wanted = min(seen, entry.budget(layer, seen))
            assert (kept.sum(-1) == wanted).all(), f"step {step}, layer {layer}"
            assert kept[..., -1].all(), f"step {step}, layer {layer}: the newest token is gone"
    for layer, kept in enumerate(tokens_kept(cache)):
        assert (kept == entry.budget(layer, transcript.seen)).all()


@those(lambda entry: entry.competes)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma4"])
def test_heads_that_compete_keep_the_budget_on_average_and_different_numbers(entry, family):
    model = tiny(family)
    _, cache, transcript = recorded(entry, model, prompt(60, 2), max_new_tokens=20)
    for step, forward in enumerate(transcript.forwards[1:], 1):
        kept = [each.sum(-1).float() for each in forward.kept]  # of each layer [batch, kv_heads]
        assert all(each[..., -1].all() for each in forward.kept), f"step {step}: the newest token is gone"
        # of each layer where only its own heads compete
        is_one = cache.layers_share == "global"
        means = torch.cat(kept, 1).mean(1) if is_one else torch.stack([each.mean(1) for each in kept])
        seen = sum(transcript.fed[:step])
        answers = step - 1 if entry.keeps_answers else 0
        assert (means <= entry.budget(0, seen) + answers).all(), f"step {step}: more than the budget"
        # few tokens are lost to rounding
        assert (means >= 0.85 * entry.budget(0, seen) + answers).all(), f"step {step}: less than the budget"
    assert len({int(count) for each in tokens_kept(cache) for count in each.flatten()}) > 1


# README: | `DenseCache` | every token | the full cache: the ceiling, exact | |
@all_those(lambda entry: entry.exact)
def test_an_exact_cache_generates_what_the_full_cache_does(entry):
    model = tiny()
    assert torch.equal(recorded(entry, model, prompt(20, 2))[0], full(model, prompt(20, 2)))


@those(lambda entry: entry.roomy)
@families("mistral", slow=("llama", "gemma2"))
def test_a_budget_that_is_never_filled_equals_the_full_cache(entry, family):
    model = tiny(family)
    cache = entry.roomy(model)
    assert torch.equal(generate(model, cache, prompt(20, 2)), full(model, prompt(20, 2)))
    reference = by_name["dense"].build(model)
    feed(model, reference, prompt(20, 2))
    cache = entry.roomy(model)
    feed(model, cache, prompt(20, 2))
    torch.testing.assert_close(
        feed(model, cache, prompt(5, 2)), feed(model, reference, prompt(5, 2)), rtol=1e-4, atol=1e-4
    )


@every_cache
def test_sampling_with_one_seed_gives_one_answer_and_equals_the_oracle(entry):
    model = tiny()
    answers = []
    for _ in range(2):
        set_seed(7)
        ids, _, transcript = recorded(entry, model, prompt(20, 2), do_sample=True, temperature=0.9, top_k=20)
        answers.append(ids)
    assert torch.equal(*answers)
    assert_equals_oracle(model, transcript)
    if entry.exact:
        set_seed(7)
        assert torch.equal(answers[0], full(model, prompt(20, 2), do_sample=True, temperature=0.9, top_k=20))


# README: padding, beam search and several turns
@every_cache
def test_beam_search_equals_the_oracle_and_each_beam_its_sequence_alone(entry):
    model = tiny()
    ids, cache, transcript = recorded(entry, model, prompt(20, 2), num_beams=3, early_stopping=False)
    assert transcript.ids.shape[0] == 6
    assert_equals_oracle(model, transcript)
    # the state of each beam is that of its sequence fed without any beams: all of it was moved along
    other = entry.build(model)
    replay(model, other, transcript)
    assert_same_state(entry, cache, other)
    if entry.exact:
        assert torch.equal(ids, full(model, prompt(20, 2), num_beams=3, early_stopping=False))


@every_cache
def test_a_beam_search_that_swaps_beams_is_what_was_tested(entry):
    """The test above needs beams that cross."""
    model = tiny()
    cache = entry.build(model)
    orders = []
    reorder = cache.reorder_cache
    cache.reorder_cache = lambda beam_idx: (orders.append(beam_idx.tolist()), reorder(beam_idx))
    generate(model, cache, prompt(20, 2), num_beams=3, early_stopping=False)
    assert any(order != sorted(order) or len(set(order)) < 6 for order in orders)


@every_cache
def test_many_returned_sequences_equal_the_oracle(entry):
    model = tiny()
    set_seed(3)
    ids, _, transcript = recorded(entry, model, prompt(20, 2), do_sample=True, num_return_sequences=3)
    assert len({tuple(row) for row in ids.tolist()}) > 2
    assert_equals_oracle(model, transcript)


@every_cache
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_a_prompt_shorter_than_any_budget_equals_the_oracle(entry, tokens):
    model = tiny()
    _, cache, transcript = recorded(entry, model, prompt(tokens, 2), max_new_tokens=4)
    assert_equals_oracle(model, transcript)
    assert cache.get_seq_length() == tokens + 3


# README: Prompt-lookup and assisted decoding need a cache that keeps every token: Dense, Hydragen, GEAR, KIVI
@those(lambda entry: entry.exact)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "llama4"])
@pytest.mark.parametrize("way", ["prompt lookup", "assistant"])
def test_speculative_decoding_gives_the_greedy_answer(entry, family, way):
    model = few_words(family)
    cache = entry.build(model)
    ids = prompt(20) % 12 + 2
    how = {"prompt_lookup_num_tokens": 4} if way == "prompt lookup" else {"assistant_model": _assistant()}
    out = generate(model, cache, ids, max_new_tokens=20, **how)
    assert torch.equal(out, full(model, ids, max_new_tokens=20))
    # prompt and answer, of which the last token was never fed
    assert cache.get_seq_length() == out.shape[1] - 1


@those(lambda entry: entry.croppable)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
def test_speculative_decoding_equals_the_oracle(entry, family):
    model = few_words(family)
    ids = prompt(20) % 12 + 2
    out, cache, transcript = recorded(entry, model, ids, max_new_tokens=20, prompt_lookup_num_tokens=4)
    # lossy answers may repeat nothing, nor do those of this mistral
    assert max(transcript.fed[1:]) > 1 or not entry.exact or family == "mistral"
    # prompt and answer, of which the last token was never fed
    assert cache.get_seq_length() == out.shape[1] - 1
    assert_equals_oracle(model, transcript)


# transformers refuses by itself since 5.24, before the first draft
REFUSED = r"cannot take back \d+ tokens.*use DenseCache|requires a cache that can be cropped"


# README: Prompt-lookup and assisted decoding need a cache that keeps every token
@those(lambda entry: not entry.croppable)
@pytest.mark.parametrize("way", ["prompt lookup", "assistant"])
def test_speculative_decoding_is_refused_and_the_cache_stays_whole(entry, way):
    model = few_words("llama")
    cache = entry.build(model)
    assert not cache.is_croppable
    ids = prompt(24) % 12 + 2
    how = {"prompt_lookup_num_tokens": 4} if way == "prompt lookup" else {"assistant_model": _assistant()}
    with pytest.raises(ValueError, match=REFUSED):
        generate(model, cache, ids, max_new_tokens=20, **how)
    assert len({layer.get_seq_length() for layer in cache.layers}) == 1
    # what was fed stays, as if it had been fed by hand, and the cache goes on
    other = entry.build(model)
    seen = cache.get_seq_length()
    assert seen >= 24
    assert torch.isfinite(feed(model, cache, ids[:, :3])).all()
    cache.reset()
    assert torch.equal(feed(model, cache, ids), feed(model, other, ids))


def few_words(family):
    """A model whose drafts come true now and then."""
    return tiny(family, vocab_size=14)


def _assistant():
    # without windows, whose own cache transformers 5.17 cannot crop
    return build("llama", vocab_size=14, num_hidden_layers=1)


def test_every_entry_has_a_name_of_its_own():
    assert len(by_name) == len(ENTRIES)
