"""A conversation: what was fed is not fed again, and what has become padding is forgotten."""

import pytest
import torch
from transformers import LogitsProcessor

from tests.contract.caches import caches, every_cache, every_variant, every_variant_with, those
from tests.contract.drive import feed, full, generate, recorded, tokens_kept
from tests.contract.models import DEVICE, END, FAMILIES, PAD, families, left_padded, prompt, tiny
from tests.contract.oracle import assert_equals_oracle

TOKENS = 12


# README: beam search and several turns
@every_variant_with("ids_of", "full", "new")
def test_a_second_turn_feeds_only_what_is_new_and_equals_the_oracle(entry, ids_of):
    model = tiny()
    first, cache, transcript = recorded(entry, model, prompt(20, 2))
    conversation = torch.cat([first, prompt(6, 2, seed=4)], 1)
    # the last token of the answer was never fed
    fed = first.shape[1] - 1
    ids = conversation if ids_of == "full" else conversation[:, fed:]
    with entry.recording(model, cache, transcript):
        generate(model, cache, ids, torch.ones_like(conversation))
    assert transcript.fed == [20] + [1] * (TOKENS - 1) + [7] + [1] * (TOKENS - 1)
    assert_equals_oracle(model, transcript)


@every_cache
def test_full_ids_and_only_new_ids_give_one_answer(entry):
    model = tiny()
    answers = []
    for whole in (True, False):
        first, cache, _ = recorded(entry, model, prompt(20, 2))
        conversation = torch.cat([first, prompt(6, 2, seed=4)], 1)
        ids = conversation if whole else conversation[:, first.shape[1] - 1 :]
        answers.append(generate(model, cache, ids, torch.ones_like(conversation))[:, -TOKENS:])
    assert torch.equal(*answers)


@caches("dense", "h2o", "snapkv")
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama"])
def test_three_turns_of_a_padded_batch_equal_the_oracle_in_every_family(entry, family):
    model = tiny(family)
    ids, mask = left_padded([prompt(20)[0], prompt(13, seed=2)[0]])
    cache = entry.build(model)
    with entry.recording(model, cache) as transcript:
        for turn in range(3):
            ids = generate(model, cache, ids, mask, max_new_tokens=5)
            new, new_mask = left_padded([prompt(4, seed=turn)[0], prompt(2, seed=turn)[0]])
            mask = torch.cat([mask, torch.ones_like(ids[:, mask.shape[1] :]), new_mask], 1)
            ids = torch.cat([ids, new], 1)
    assert transcript.fed == [20, 1, 1, 1, 1, 5, 1, 1, 1, 1, 5, 1, 1, 1, 1]
    assert_equals_oracle(model, transcript)


@those(lambda entry: entry.exact)
@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_turns_of_an_exact_cache_give_the_answer_of_one_long_prompt(entry, family):
    model = tiny(family)
    first, cache, _ = recorded(entry, model, prompt(20, 2))
    conversation = torch.cat([first, prompt(6, 2, seed=4)], 1)
    assert torch.equal(generate(model, cache, conversation), full(model, conversation))


class EndsFirstRow(LogitsProcessor):
    """The first row says END as its second token, and nobody else does."""

    def __call__(self, input_ids, scores):
        scores[:, END] = -torch.inf
        if input_ids.shape[1] == 21:
            scores[0, END] = torch.inf
        return scores


def finished_early(entry, model):
    """A batch whose first row ends after two tokens: what generate leaves, with the mask the caller then writes."""
    ids, mask = left_padded([prompt(20)[0], prompt(13, seed=2)[0]])
    cache = entry.build(model)
    with entry.recording(model, cache) as transcript:
        out = generate(model, cache, ids, mask, eos_token_id=END, logits_processor=[EndsFirstRow()])
    answer = torch.ones_like(out[:, 20:])
    answer[0, 2:] = 0
    assert (out[:, 20:] * (1 - answer) == PAD).all()
    assert answer.shape[1] == TOKENS
    return cache, transcript, out, torch.cat([mask, answer], 1)


@every_cache
@families("llama", "mistral", slow=("opt", "gemma2"))
def test_pads_at_the_end_of_a_turn_are_forgotten_when_the_next_masks_them(entry, family):
    if entry.decoded is not None and entry.during is None:
        pytest.skip("what it gives depends on the mask to come, which the oracle reads too late")
    model = tiny(family)
    cache, transcript, out, mask = finished_early(entry, model)
    question = prompt(6, 2, seed=4)
    with entry.recording(model, cache, transcript):
        generate(model, cache, torch.cat([out, question], 1), torch.cat([mask, torch.ones_like(question)], 1))
    assert_equals_oracle(model, transcript)
    # what is now padding is neither seen nor counted
    hidden = ~transcript.visible[:, None]
    for kept, columns in zip(tokens_kept(cache), transcript.forwards[-1].kept, strict=True):
        if columns is not None:
            assert not (columns & hidden[:, :, : columns.shape[-1]]).any()
            assert (kept >= columns.sum(-1)).all()


@those(lambda entry: entry.exact)
@pytest.mark.parametrize("family", ["llama", "opt", "mistral", "gemma2"])
def test_a_row_that_finished_early_goes_on_as_if_it_had_not_waited(entry, family):
    model = tiny(family)
    cache, _, out, mask = finished_early(entry, model)
    question = prompt(6, 2, seed=4)
    ids = torch.cat([out, question], 1)
    answer = generate(model, cache, ids, torch.cat([mask, torch.ones_like(question)], 1))[:, -TOKENS:]
    alone = torch.cat([out[:1, :22], question[:1]], 1)
    assert torch.equal(answer[0], full(model, alone)[0, -TOKENS:])


@those(lambda entry: entry.budget and not entry.competes)
def test_pads_that_were_hidden_free_their_room(entry):
    """Once hidden, pads take no part of the budget: new tokens fill it."""
    model = tiny()
    cache, _, out, mask = finished_early(entry, model)
    question = prompt(30, 2, seed=4)
    generate(model, cache, torch.cat([out, question], 1), torch.cat([mask, torch.ones_like(question)], 1))
    real = cache.padding.visible.sum(-1).tolist()
    for layer, kept in enumerate(tokens_kept(cache)):
        assert kept.tolist() == [[entry.budget(layer, tokens)] * 2 for tokens in real]


@every_cache
def test_a_mask_cannot_bring_back_what_was_padding(entry):
    model = tiny()
    ids, mask = left_padded([prompt(20)[0], prompt(13, seed=2)[0]])
    cache = entry.build(model)
    feed(model, cache, ids, mask)
    with pytest.raises(ValueError, match="padding when they were cached"):
        feed(model, cache, prompt(2, 2), torch.ones(2, 22, dtype=torch.long, device=DEVICE))


# the prompt in pieces


@every_cache
@pytest.mark.parametrize("chunk", [1, 5, 7, 100])
def test_chunked_prefill_equals_the_oracle(entry, chunk):
    model = tiny()
    _, _, transcript = recorded(entry, model, prompt(20, 2), prefill_chunk_size=chunk)
    assert transcript.fed[: -(-20 // chunk)] == [min(chunk, 20 - start) for start in range(0, 20, chunk)]
    assert_equals_oracle(model, transcript)


@every_variant
def test_chunks_fed_by_hand_equal_the_oracle(entry):
    model = tiny()
    ids, mask = left_padded([prompt(30)[0], prompt(17, seed=2)[0]])
    cache = entry.build(model)
    with entry.recording(model, cache) as transcript:
        # the second row's first chunk is all padding
        for stop, chunk in zip((9, 10, 26, 30), ids.split([9, 1, 16, 4], 1), strict=True):
            feed(model, cache, chunk, mask[:, :stop])
        for step in range(5):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            feed(model, cache, prompt(1, 2, seed=step), mask)
    assert_equals_oracle(model, transcript)


@those(lambda entry: entry.exact)
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_make_no_difference_to_an_exact_cache(entry, family):
    model = tiny(family)
    ids, mask = left_padded([prompt(30)[0], prompt(17, seed=2)[0]])
    wanted = generate(model, entry.build(model), ids, mask)
    for chunk in (4, 16):
        assert torch.equal(generate(model, entry.build(model), ids, mask, prefill_chunk_size=chunk), wanted)


@caches("dense", "h2o", "tova", "streaming")
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "llama"])
def test_chunked_prefill_equals_the_oracle_in_every_family(entry, family):
    model = tiny(family)
    ids, mask = left_padded([prompt(30)[0], prompt(17, seed=2)[0]])
    _, _, transcript = recorded(entry, model, ids, mask, prefill_chunk_size=8, max_new_tokens=4)
    assert_equals_oracle(model, transcript)
