"""Spans of tokens that see one another both ways, against attention under a whole mask."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.masking_utils import (
    and_masks,
    blockwise_overlay,
    causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

from kvcompress import DenseCache, GEARCache, H2OCache, HydragenCache, KVzipCache, ShadowKVCache, release
from kvcompress.caches.spans import Spans, attend_ahead
from kvcompress.check.typical import TYPICAL
from kvcompress.hf import cache_argument
from kvcompress.hf.masks import shown_and_spans, spans_of, with_spans
from kvcompress.kernels.attention import causal_attention
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.kernels.merge import merge_states
from kvcompress.layer import AttentionInput
from tests.contract.drive import feed
from tests.contract.models import left_padded, places, prompt

BATCH, HEADS, KV_HEADS, TOKENS, DIM = 3, 4, 2, 23, 16
# one row has two spans that lie apart, and one in two pieces; one has a span that ends the text; one has none
NUMBERS = torch.zeros(BATCH, TOKENS, dtype=torch.int64)
NUMBERS[0, 3:8], NUMBERS[0, 11:14], NUMBERS[0, 17:19], NUMBERS[0, 20:22] = 2, 1, 3, 3
NUMBERS[1, 15:] = 1


def made(spec, padded, key_heads=KV_HEADS):
    generator = torch.Generator().manual_seed(1)
    query, key, value = (
        torch.randn(BATCH, heads, TOKENS, DIM, generator=generator) for heads in (HEADS, key_heads, key_heads)
    )
    visible = None
    if padded:
        visible = torch.ones(BATCH, TOKENS, dtype=torch.bool)
        # before the tokens, and within a span
        visible[0, :2] = visible[1, 17] = visible[2, :5] = False
    return AttentionInput(query, key, value, visible, spec, None, NUMBERS)


def sees(x):
    """Who sees whom, [batch, 1, 1, queries, tokens] bool."""
    column = torch.arange(TOKENS)
    past = column[None, :] <= column[:, None]
    if x.spec.window is not None:
        past = past & (column[None, :] > column[:, None] - x.spec.window)
    within = (NUMBERS[:, :, None] == NUMBERS[:, None]) & (NUMBERS[:, None] > 0) & (column[None, :] > column[:, None])
    seen = past | within
    return (seen if x.visible is None else seen & x.visible[:, None])[:, None, None]


def weights_of(x):
    """The whole attention, [batch, kv_heads, group, queries, tokens]."""
    query = x.query.unflatten(1, (KV_HEADS, -1))
    logits = x.spec.cap_(x.spec.scale * query @ x.key[:, :, None].mT)
    return logits.masked_fill(~sees(x), -torch.inf).softmax(-1).nan_to_num()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("spec", [LogitSpec(0.4), LogitSpec(0.4, window=9), LogitSpec(0.4, softcap=2.0)])
def test_attention_within_spans_equals_that_under_a_whole_mask(spec, padded):
    x = made(spec, padded)
    spans = Spans.of(x)
    parts = [causal_attention(x.query, x.key, x.value, x.spec, x.visible), *attend_ahead(x, spans)]
    out, lse = merge_states(*map(list, zip(*parts, strict=True)))
    weights = weights_of(x)
    real = torch.ones(BATCH, TOKENS, dtype=torch.bool) if x.visible is None else x.visible
    wanted = (weights @ x.value[:, :, None]).flatten(1, 2)
    torch.testing.assert_close(out.transpose(1, 2)[real], wanted.transpose(1, 2)[real])

    # what columns receive beyond causal attention
    lse = lse.masked_fill(~real[:, None], torch.inf)
    ahead = weights.masked_fill((torch.arange(TOKENS)[None, :] <= torch.arange(TOKENS)[:, None]), 0.0)
    ahead = ahead.masked_fill(~real[:, None, None, :, None], 0.0)
    torch.testing.assert_close(spans.column_sums(x, lse), ahead.sum((2, 3)))
    # only some queries count
    lse[:, :, :12] = torch.inf
    torch.testing.assert_close(spans.column_sums(x, lse), ahead[:, :, :, 12:].sum((2, 3)))


def test_what_has_no_span_of_several_tokens_has_none():
    x = made(LogitSpec(0.4), padded=False)
    for spans in (None, torch.zeros_like(NUMBERS), torch.eye(TOKENS, dtype=torch.int64)[:BATCH]):
        assert Spans.of(AttentionInput(x.query, x.key, x.value, None, x.spec, None, spans)) is None
    # one that padding leaves a single token of
    visible = NUMBERS == 0
    visible[0, 3] = True
    assert Spans.of(AttentionInput(x.query, x.key, x.value, visible, x.spec, None, NUMBERS)) is None


IDS = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, -1, -1, -1]])


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (or_masks(causal_mask_function, blockwise_overlay(IDS)), True),
        (and_masks(or_masks(causal_mask_function, blockwise_overlay(IDS)), sliding_window_overlay(2)), True),
        # here a span's last tokens see its first ones, wherever the window ends
        (or_masks(sliding_window_causal_mask_function(3), blockwise_overlay(IDS)), True),
        (or_masks(sliding_window_causal_mask_function(2), blockwise_overlay(IDS)), False),
        (causal_mask_function, False),
        (sliding_window_causal_mask_function(3), False),
        (or_masks(causal_mask_function, lambda *at: torch.tensor(True)), False),
        (or_masks(blockwise_overlay(IDS), blockwise_overlay(IDS)), False),
        (and_masks(causal_mask_function, blockwise_overlay(IDS)), False),
        (and_masks(or_masks(causal_mask_function, blockwise_overlay(IDS)), lambda *at: torch.tensor(True)), False),
        (lambda *at: torch.tensor(True), False),
    ],
)
def test_a_mask_is_read_where_it_is_made_of_the_past_and_of_spans(function, found):
    assert (spans_of(function) is IDS) == found


def test_a_mask_with_spans_says_which_columns_are_padding_too():
    shown = torch.ones(1, 10, dtype=torch.bool)
    shown[0, 0] = False
    visible, numbers = shown_and_spans(with_spans(shown, IDS, 10, 10))
    assert torch.equal(visible, shown)
    assert numbers.tolist() == [[0, 1, 1, 1, 0, 2, 2, 0, 0, 0]]
    # a second forward, of the last seven columns and one that was not numbered
    visible, numbers = shown_and_spans(with_spans(None, IDS, 11, 7))
    assert bool(visible.all())
    assert numbers.tolist() == [[0, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0]]


@pytest.mark.parametrize(("seen", "fed"), [(0, 3), (0, 6), (2, 4)])
def test_a_span_must_be_fed_whole(seen, fed):
    with pytest.raises(ValueError, match=f"a span of row 0 goes on after the {seen + fed} tokens"):
        with_spans(None, IDS, seen + fed, fed)
    # one that has ended, or not begun, does not matter
    with_spans(None, IDS, 5, 5)


@pytest.fixture(scope="module")
def hrm_text():
    """A text model whose prompts see themselves, and whose layers run several times."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("hrm_text", **TYPICAL["hrm_text"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    yield model
    release(model)


def turn_by_turn(model, cache):
    """Prompts of two rows, one padded, that see themselves, then a token and a turn of several: the logits of all."""
    ids, mask = left_padded([prompt(40, seed=4)[0], prompt(33, seed=5)[0]])
    prompts = torch.zeros_like(ids)
    prompts[:, :18] = 1
    with torch.no_grad():
        first = model(
            ids[:, :30],
            attention_mask=mask[:, :30],
            token_type_ids=prompts[:, :30],
            position_ids=places(mask)[:, :30],
            **cache_argument(model, cache),
        ).logits
    later = [feed(model, cache, ids[:, start:stop], mask[:, :stop]) for start, stop in [(30, 31), (31, 40)]]
    return torch.cat([first, *later], 1)[mask > 0]


@pytest.mark.parametrize(
    "build",
    [
        DenseCache,
        lambda model: H2OCache(model, budget=400),
        lambda model: KVzipCache(model, budget=400),
        lambda model: GEARCache(model, buffer=256, tail_bits=None),
        lambda model: ShadowKVCache(model, budget=400),
    ],
    ids=["dense", "h2o", "kvzip", "gear", "shadowkv"],
)
def test_a_text_whose_prompt_sees_itself_equals_that_of_transformers_cache(build, hrm_text):
    wanted = turn_by_turn(hrm_text, DynamicCache(config=hrm_text.config))
    torch.testing.assert_close(turn_by_turn(hrm_text, build(hrm_text)), wanted, rtol=1e-4, atol=1e-4)
    # a layer of the cache for each run of one
    assert len(build(hrm_text).layers) == 4


def test_a_cache_that_serves_no_spans_refuses_them_and_stays_as_it_was(hrm_text):
    cache = HydragenCache(hrm_text)
    with pytest.raises(ValueError, match="tokens of a span, such as an image, see one another both ways here"):
        turn_by_turn(hrm_text, cache)
    assert cache.get_seq_length() == 0
    assert not cache.is_interrupted
    assert bool(feed(hrm_text, cache, prompt(20)).isfinite().all())
