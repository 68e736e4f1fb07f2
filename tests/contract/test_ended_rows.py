"""Rows that have ended while others go on: what `generate` feeds them evicts nothing."""

import warnings

import pytest
import torch

from kvcompress import H2OCache, StreamingLLMCache
from kvcompress.hf import cache_argument
from tests.contract.caches import slots, those
from tests.contract.models import DEVICE, END, PAD, build, left_padded, places, prompt

TURNS = ((9, 4), (3, 11), (5, 2))
ENDS = (END, END - 1, END - 2)
CLOSE = {"atol": 1e-3, "rtol": 1e-3}


def chat(model, cache, rows, pad, shows_filler):
    """Three turns of two rows, whose answers have other lengths; the logits of each row's own tokens."""
    ids = torch.empty(len(rows), 0, dtype=torch.long, device=DEVICE)
    mask = torch.empty_like(ids)
    logits = [[] for _ in rows]

    def feed(new, shown, own):
        nonlocal ids, mask
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, shown], 1)
        at = places(mask)[:, -new.shape[1] :]
        with torch.no_grad():
            out = model(new, attention_mask=mask, position_ids=at, **cache_argument(model, cache)).logits
        for row in range(len(rows)):
            logits[row].append(out[row, own[row].bool()])

    for turn, answers in enumerate(TURNS):
        asked, shown = left_padded([row[turn][0] for row in rows])
        feed(asked, shown, shown)
        for step in range(max(answers[row] for row in range(len(rows)))):
            going = torch.tensor([step < answers[row] for row in range(len(rows))], device=DEVICE)
            said = torch.stack([row[turn][1][min(step, len(row[turn][1]) - 1)] for row in rows])
            said = torch.where(going, said, pad)
            # as generate does it: whoever has ended is shown too
            feed(said[:, None], (going | shows_filler).long()[:, None], going[:, None])
        # in the next turn the caller hides what was filler
        mask = hide_filler(mask, answers)
    return [torch.cat(each) for each in logits]


def hide_filler(mask, answers):
    last = max(answers)
    for row, count in enumerate(answers):
        if count < last:
            mask[row, mask.shape[1] - (last - count) :] = 0
    return mask


def spoken(row):
    """(question, answer) of each turn of a row; an answer ends with one of ENDS."""
    # no token twice: some policies score two of a kind equal up to rounding
    tokens = prompt(100, seed=row)[0]
    tokens = tokens[~torch.isin(tokens, torch.tensor(ENDS, device=DEVICE))]
    turns = []
    for turn, answers in enumerate(TURNS):
        asked, said, tokens = tokens.split(
            [6 + 3 * row + turn, answers[row], len(tokens) - 6 - 3 * row - turn - answers[row]]
        )
        said = said.clone()
        said[-1] = ENDS[turn]
        turns.append((asked, said))
    return turns


def models(ends, pad):
    model = build("llama", pad_token_id=pad)
    model.generation_config.eos_token_id = ends
    model.generation_config.pad_token_id = pad
    return model


# docs: Rows that have ended evict nothing
@those(lambda entry: entry.kept is slots)
def test_a_batched_chat_of_three_turns_is_each_rows_chat_alone(entry):
    compare(entry.build, PAD, True, entry.dtype)


# docs: they are recognised by a mask of 0, or by `generation_config.pad_token_id` after an end token
@pytest.mark.parametrize(("pad", "shows_filler"), [(PAD, False), (ENDS[0], True), (ENDS[0], False), (None, True)])
def test_rows_that_have_ended_are_known_by_the_mask_or_by_what_generate_feeds_them(pad, shows_filler):
    compare(lambda model: H2OCache(model, budget=8), pad, shows_filler)


def compare(build_cache, pad, shows_filler, dtype=torch.float32):
    """A batched chat, and each row's chat alone."""
    model = models(list(ENDS), pad).to(dtype)
    # what generate takes where no token is named for it
    pad = ENDS[0] if pad is None else pad
    rows = [spoken(0), spoken(1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        together = chat(model, build_cache(model), rows, pad, shows_filler)
    for row, turns in enumerate(rows):
        cache = build_cache(model)
        alone = []
        seen = 0
        with torch.no_grad():
            for asked, said in turns:
                for part in (asked, *said.split(1)):
                    at = torch.arange(seen, seen + len(part), device=DEVICE)[None]
                    alone.append(model(part[None], position_ids=at, **cache_argument(model, cache)).logits[0])
                    seen += len(part)
        torch.testing.assert_close(together[row], torch.cat(alone), **CLOSE)


@pytest.mark.parametrize("make", [H2OCache, StreamingLLMCache])
def test_generate_evicts_nothing_of_a_row_that_has_ended(make):
    """The faults' own case: a prompt of 40, a budget of 32, one row ends after 3 tokens and one runs to 60."""
    model = models(END, PAD)
    row = prompt(40, seed=3)[0]
    ids, mask = left_padded([row, prompt(37, seed=4)[0]])
    cache, alone = make(model, budget=32), make(model, budget=32)

    def ends_at_43(tokens, scores):
        scores[:, END] = -torch.inf
        if tokens.shape[1] == 42:
            scores[0] = -torch.inf
            scores[0, END] = 0.0
        return scores

    how = {"max_new_tokens": 60, "do_sample": False, "logits_processor": [ends_at_43], "disable_compile": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        out = model.generate(ids, attention_mask=mask, **cache_argument(model, cache), **how)
    own = out[0, :43]
    assert own[-1] == END
    assert bool((out[0, 43:] == PAD).all())
    with torch.no_grad():
        for part in (own[None, :40], *own[None, 40:].split(1, 1)):
            model(part, **cache_argument(model, alone))
    for together, single in zip(cache.layers, alone.layers, strict=True):
        held, wanted = (set(layer.slots.positions[0, 0].tolist()) for layer in (together, single))
        assert held == wanted
    assert cache.get_seq_length() == 99


def test_a_row_that_has_ended_stays_so_where_nothing_is_taken_back():
    """transformers crops by no token where all drafts were taken."""
    model = models(END, PAD)
    cache = H2OCache(model, budget=8)
    ended = torch.tensor([[END], [5]], device=DEVICE)
    with torch.no_grad():
        model(prompt(20, 2), **cache_argument(model, cache))
        model(ended, **cache_argument(model, cache))
        before = [layer.slots.positions[0].clone() for layer in cache.layers]
        cache.crop(0)
        for step in range(3):
            filler = torch.tensor([[PAD], [6 + step]], device=DEVICE)
            model(filler, **cache_argument(model, cache))
    for layer, positions in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.slots.positions[0], positions)


# docs: If neither tells, a warning says what was lost
def test_where_nobody_says_which_rows_have_ended_what_was_lost_is_told():
    model = build("llama", pad_token_id=None)
    model.generation_config.pad_token_id = None
    cache = H2OCache(model, budget=8)
    ids = prompt(20, 2)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        model(ids, attention_mask=mask, **cache_argument(model, cache))
        for step in range(4):
            mask = torch.cat([mask, mask[:, :1]], 1)
            model(prompt(1, 2, seed=step), attention_mask=mask, **cache_argument(model, cache))
        mask[0, -3:] = 0
        mask = torch.cat([mask, mask[:, :1]], 1)
        with pytest.warns(UserWarning, match="up to 3 others were evicted for them in 1 of 2 sequences.*pad_token_id"):
            model(prompt(1, 2), attention_mask=mask, position_ids=places(mask)[:, -1:], **cache_argument(model, cache))


def test_a_token_of_a_row_that_goes_on_is_its_own_whatever_pads_are():
    """A model may say the token that pads are, and nothing has ended."""
    for ends in (None, END):
        model = models(ends, PAD)
        rows = prompt(20, 2)
        cache, alone = H2OCache(model, budget=8), H2OCache(model, budget=8)
        with torch.no_grad():
            for ids in (rows, torch.full((2, 1), PAD, device=DEVICE), rows[:, :1]):
                found = model(ids, **cache_argument(model, cache)).logits[:1]
                expected = model(ids[:1], **cache_argument(model, alone)).logits
                torch.testing.assert_close(found, expected, **CLOSE)


def test_the_tokens_that_end_a_row_are_those_of_the_generation_at_hand():
    """A row that says what ends others by default, and goes on, has not ended."""
    model = models(END, END)

    def says_it_thrice(tokens, scores):
        if tokens.shape[1] in (21, 22, 23):
            scores[0] = -torch.inf
            scores[0, END] = 0.0
        return scores

    ids = prompt(20, 2)
    how = {"max_new_tokens": 12, "do_sample": False, "logits_processor": [says_it_thrice], "disable_compile": True}
    how |= {"eos_token_id": END - 1, "pad_token_id": PAD}
    expected = model.generate(ids, **how)
    assert bool((expected[0, 21:24] == END).all())
    cache = H2OCache(model, budget=400)
    assert torch.equal(model.generate(ids, **cache_argument(model, cache), **how), expected)
