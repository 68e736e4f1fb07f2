"""GEAR and KIVI caches: what they store, how much, and that it is what they were fed."""

import math

import pytest
import torch
from transformers import DynamicCache

from kvcompress import DenseCache, EvictingCache, GEARCache, H2OCache, KIVICache
from kvcompress.hf import cache_argument
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.policies.gear import GEAR, PRESETS, preset
from kvcompress.policies.h2o import H2O
from kvcompress.storage.tail import TailSegment
from tests.contract.caches import closed_up, unpacked
from tests.contract.drive import feed, generate
from tests.contract.models import DEVICE, build, left_padded, prompt, tiny
from tests.peak import peak_bytes

ROWS = [prompt(40, seed=3)[0], prompt(27, seed=4)[0], prompt(9, seed=5)[0]]


def eight_bits(model, **settings):
    return GEARCache(model, **{"bits": 8, "group_size": 8, "buffer": 8, "outliers": 0.0, **settings})


def assert_holds_what_was_fed(cache, full, mask, layer=0):
    """What the first layer's codes decode to is, to 8 bits, what a full cache holds: later layers saw decoded keys."""
    keys, values, _ = full.layers[layer].dense.held()
    place = (mask.cumsum(-1) - 1).clamp(min=0)[:, None, :, None]
    for found, fed in zip(unpacked(cache)[layer], (keys, values), strict=True):
        at = place.expand(-1, fed.shape[1], -1, fed.shape[3])
        real = mask.bool()[:, None, :, None].expand_as(fed)
        error = (found.gather(2, at) - fed)[real].abs().max()
        assert error < 0.02 * fed[real].abs().max()


def both(model, cache, full, ids, mask):
    feed(model, cache, ids, mask)
    feed(model, full, ids, mask)


# README: or 2, 3, 8 bits, outliers, low rank |
@pytest.mark.parametrize("settings", [{}, {"rank": 2}, {"outliers": 0.2}], ids=["codes", "factors", "outliers"])
def test_rows_of_all_lengths_are_held_through_turns_reorders_and_crops(settings):
    model = tiny()
    cache, full = eight_bits(model, **settings), DenseCache(model)
    ids, mask = left_padded(ROWS)
    both(model, cache, full, ids, mask)
    assert_holds_what_was_fed(cache, full, mask)
    for step in range(11):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        both(model, cache, full, prompt(1, 3, seed=step), mask)
    assert_holds_what_was_fed(cache, full, mask)
    rows = torch.tensor([2, 0, 1], device=DEVICE)
    for each in (cache, full):
        each.reorder_cache(rows)
    mask = torch.cat([mask[rows], torch.ones(3, 12, dtype=torch.long, device=DEVICE)], 1)
    both(model, cache, full, prompt(12, 3, seed=9), mask)
    for each in (cache, full):
        each.crop(-7)
    mask = mask[:, :-7]
    assert_holds_what_was_fed(cache, full, mask)
    for each in (cache, full):
        each.batch_repeat_interleave(2)
        each.batch_select_indices(torch.tensor([1, 2, 5], device=DEVICE))
    mask = torch.cat([mask.repeat_interleave(2, 0)[[1, 2, 5]], torch.ones(3, 45, dtype=torch.long, device=DEVICE)], 1)
    both(model, cache, full, prompt(45, 3, seed=10), mask)
    assert_holds_what_was_fed(cache, full, mask)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_more_bits_lose_less_and_eight_lose_next_to_nothing(bits):
    model = tiny()
    ids = prompt(60, 2)
    full, cache = DenseCache(model), GEARCache(model, bits=bits, value_bits=bits, group_size=8, buffer=8)
    both(model, cache, full, ids, torch.ones_like(ids))
    keys, values, _ = full.layers[0].dense.held()
    for found, fed in zip(unpacked(cache)[0], (keys, values), strict=True):
        error = (found - fed).norm() / fed.norm()
        # half a step of the range of 8 numbers, about 2.8 deviations wide, is 1.4 / levels at most
        assert error < 1.4 / (2**bits - 1)
        assert error > 0.1 / 2**bits


def expected_bytes(model, settings, rows, kv_heads=2, head_dim=16, element=4):
    """The closed formula, layer by layer: rows are the blocks packed and tokens in hand of the whole batch."""
    blocks, spans, batch = rows
    buffer, bits = settings.buffer, settings.bits
    key_group = settings.group_size if settings.backbone == "kivi" else buffer
    value_groups = math.ceil(head_dim / min(settings.group_size, head_dim)) if settings.backbone == "kivi" else 1
    codes = buffer * head_dim * (bits + (settings.value_bits or {3: 2, 4: 3}.get(bits, bits))) // 8
    scales = 4 * (buffer // key_group * head_dim + buffer * value_groups)
    if settings.is_centred:
        # of every token of keys and values one, and the mean of a block's keys
        scales = 2 * (2 * buffer + head_dim)
    key_outliers, value_outliers = (2 * math.ceil(settings.outliers * n / 2 - 1e-9) for n in (buffer, head_dim))
    outliers = 3 * (key_outliers * head_dim + value_outliers * buffer)
    factors = 2 * 2 * buffer * settings.rank
    bases = 2 * 2 * head_dim * settings.rank * spans
    positions = 4 * buffer * blocks + (4 * blocks if settings.rank else 0)
    packed = batch * (kv_heads * (blocks * (codes + scales + outliers + factors) + bases) + positions)
    a_token = 2 * kv_heads * head_dim * element + 4
    # a byte for each number, a scale and a zero for each vector
    waits = a_token if settings.tail_bits is None else 2 * kv_heads * (head_dim + 2 * 2) + 4
    return packed + batch * (settings.sinks * a_token + buffer * waits)


@pytest.mark.parametrize(
    "settings",
    [
        GEAR(bits=2, group_size=8, buffer=16, sinks=0, centred=False),
        GEAR(bits=2, group_size=8, buffer=16, rank=2, rank_decode=2),
        GEAR(bits=4, value_bits=2, group_size=16, buffer=16, centred=True),
        GEAR(bits=3, group_size=16, buffer=32, outliers=0.1),
        GEAR(bits=4, group_size=8, buffer=8, rank=2, rank_decode=2, outliers=0.0, backbone="whole"),
        GEAR(bits=8, group_size=8, buffer=16, rank=3, rank_decode=3, outliers=0.05),
        GEAR(group_size=8, buffer=32, tail_bits=None),
    ],
    ids=str,
)
def test_bytes_are_those_of_the_formula_and_of_the_live_storages(settings):
    model = tiny()
    cache = GEARCache(model, **vars(settings))
    feed(model, cache, prompt(200, 3))
    before = (200 - settings.sinks) // settings.buffer
    assert cache.memory().total_bytes == 3 * expected_bytes(model, settings, (before, 1, 3))
    for step in range(40):
        feed(model, cache, prompt(1, 3, seed=step))
    blocks = (240 - settings.sinks) // settings.buffer
    spans = 1 + (blocks - before if settings.rank else 0)
    report = cache.memory()
    assert report.total_bytes == 3 * expected_bytes(model, settings, (blocks, spans, 3))
    assert report.bits_per_element == 8 * report.total_bytes / (2 * 3 * 3 * 2 * 16 * 240)
    assert f"{report.bits_per_element:.2f} bits per number" in str(report)


# README: unpacking where attention reads
def test_nothing_of_the_compressed_tokens_lives_on_in_full():
    """After the prefill and after a flush, the tensors alive that could hold them are packed ones or the tail."""
    import gc

    model = tiny()
    cache = GEARCache(model, bits=4, group_size=8, buffer=8)

    def wide():
        gc.collect()
        return [
            tensor.shape
            for tensor in gc.get_objects()
            if isinstance(tensor, torch.Tensor)
            and tensor.is_floating_point()
            and tensor.untyped_storage().nbytes() >= 3 * 2 * 96 * 16 * 2
            and tensor.dim() == 4
        ]

    before = len(wide())
    with torch.no_grad():
        model(prompt(96, 3), **cache_argument(model, cache), logits_to_keep=1)
        for step in range(9):
            model(prompt(1, 3, seed=step), **cache_argument(model, cache), logits_to_keep=1)
    assert len(wide()) == before
    # and the test can fail
    kept = torch.zeros(3, 2, 96, 16)
    assert len(wide()) == before + 1
    del kept


# README: packing a token, then its block; unpacking where attention reads
def test_blocks_once_packed_are_never_touched_again():
    model = tiny()
    cache = GEARCache(model, bits=2, group_size=8, buffer=8, rank=2, rank_decode=2, outliers=0.1)
    feed(model, cache, prompt(40, 2))
    then = {name: tensor.clone() for name, tensor in cache.layers[1].prompt.tensors().items()}
    for step in range(30):
        feed(model, cache, prompt(1, 2, seed=step))
    feed(model, cache, prompt(37, 2, seed=50))
    now = cache.layers[1].prompt.tensors()
    assert now["keys.codes"].shape[2] > then["keys.codes"].shape[2]
    for name, tensor in then.items():
        dim = 1 if name == "spans" else 2
        assert torch.equal(now[name].narrow(dim, 0, tensor.shape[dim]), tensor), name


def test_without_factors_a_prompt_in_chunks_is_packed_as_in_one():
    model = tiny(dtype=torch.float64)
    how = {"bits": 3, "group_size": 8, "buffer": 16, "outliers": 0.1, "tail_bits": None}
    whole, chunks = (GEARCache(model, **how) for _ in range(2))
    ids = prompt(200, 2)
    feed(model, whole, ids)
    for chunk in ids.split(33, 1):
        feed(model, chunks, chunk)
    # the first layer's keys and values do not depend on what attention read
    one, many = (cache.layers[0].prompt.tensors() for cache in (whole, chunks))
    for name, tensor in one.items():
        assert torch.equal(many[name], tensor), name
    assert whole.layers[0].tail.held == chunks.layers[0].tail.held


@pytest.mark.parametrize("settings", [{"rank": 3}, {"rank": 3, "rank_decode": 3}, {"outliers": 0.1}], ids=str)
def test_a_row_is_packed_as_it_would_be_alone(settings):
    model = tiny(dtype=torch.float64)
    cache = GEARCache(model, bits=2, group_size=8, buffer=8, **settings)
    ids, mask = left_padded(ROWS)
    feed(model, cache, ids, mask)
    for step in range(10):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        feed(model, cache, prompt(1, 3, seed=step), mask)
    for index, row in enumerate(ROWS):
        alone = GEARCache(model, bits=2, group_size=8, buffer=8, **settings)
        feed(model, alone, row[None])
        for step in range(10):
            feed(model, alone, prompt(1, 3, seed=step)[index : index + 1])
        for layer in range(3):
            for found, own in zip(unpacked(cache)[layer], unpacked(alone)[layer], strict=True):
                torch.testing.assert_close(found[index, :, : own.shape[2]], own[0], rtol=1e-3, atol=1e-3)


def test_the_newest_tokens_are_what_they_were():
    model = tiny()
    cache, full = GEARCache(model, bits=2, group_size=8, buffer=16, sinks=0, tail_bits=None), DenseCache(model)
    ids = prompt(50, 2)
    both(model, cache, full, ids, torch.ones_like(ids))
    tail = cache.layers[0].tail
    keys, values, _ = full.layers[0].dense.held()
    assert tail.held == [2, 2]
    assert torch.equal(tail.keys[:, :, :2], keys[:, :, 48:])
    assert torch.equal(tail.values[:, :, :2], values[:, :, 48:])


# docs: 512 tokens of the default model take 0.153 of the full cache's bytes in float32
# docs: they stay as they are, and take 0.245
def test_512_tokens_take_less_than_a_sixth_of_the_full_cache():
    """transformers' own caches of 4 bits take 0.156, where 9 heads of 64 share 3."""
    model = tiny(head_dim=64, hidden_size=576, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=1)
    report = {}
    for tail_bits in (8, None):
        cache = GEARCache(model, bits=4, tail_bits=tail_bits)
        feed(model, cache, torch.cat([prompt(256), prompt(256, seed=1)], 1))
        memory = cache.memory()
        report[tail_bits] = memory.total_bytes / memory.full_bytes
    assert round(report[8], 3) == 0.153
    assert round(report[None], 3) == 0.245


def test_what_waits_has_the_codes_that_the_row_alone_has_and_keeps_them():
    model = tiny()
    ids, mask = left_padded([prompt(30, seed=3)[0], prompt(20, seed=4)[0]])
    cache = GEARCache(model, buffer=32, group_size=8)
    feed(model, cache, ids, mask)

    def codes(cache, row):
        tail = cache.layers[0].tail
        return {name: x[row, :, : tail.held[row]].clone() for name, x in tail._of_tokens().items()}

    before = [codes(cache, row) for row in range(2)]
    for row, tokens in enumerate((30, 20)):
        alone = GEARCache(model, buffer=32, group_size=8)
        feed(model, alone, ids[row : row + 1, -tokens:])
        for name, tensor in codes(alone, 0).items():
            assert torch.equal(before[row][name], tensor), name
    cache.reorder_cache(torch.tensor([1, 0], device=DEVICE))
    mask = torch.cat([mask.flip(0), mask.new_ones(2, 3)], 1)
    feed(model, cache, prompt(3, 2), mask)
    cache.crop(-2)
    for row in range(2):
        for name, tensor in codes(cache, row).items():
            then = before[1 - row][name]
            assert torch.equal(tensor[:, : then.shape[1]], then), name


def test_a_block_is_packed_of_what_waited_and_of_what_just_came():
    model = tiny()
    cache, full = GEARCache(model, bits=8, buffer=16, group_size=8, sinks=0), DenseCache(model)
    ids = prompt(40)
    for each in (cache, full):
        feed(model, each, ids[:, :10])
    waited = cache.layers[0].tail.contents(10)
    for each in (cache, full):
        # longer than a draft
        feed(model, each, torch.cat([ids[:, 10:], prompt(3, seed=5)], 1))
    came = full.layers[0].dense.held()
    for found, early, late in zip(cache.layers[0].prompt.decoded(), waited, came, strict=False):
        for part, wanted in ((found[:, :, :10], early), (found[:, :, 10:32], late[:, :, 10:32])):
            error = (part - wanted).abs().max()
            assert error < 0.006 * wanted.abs().max()
        assert (early - late[:, :, :10]).abs().max() > 0


# docs: nor do they wait in 8 bits
@pytest.mark.parametrize("fed", [(3,), (1, 1, 1), (30,), (2, 5)], ids=str)
def test_the_first_tokens_never_wait_in_eight_bits(fed):
    model = tiny()
    cache, full = GEARCache(model, sinks=3), DenseCache(model)
    for seed, tokens in enumerate(fed):
        both(model, cache, full, prompt(tokens, seed=seed), None)
    keys, values, _ = full.layers[0].dense.held()
    first = cache.layers[0].first
    assert torch.equal(first.keys, keys[:, :, :3])
    assert torch.equal(first.values, values[:, :, :3])
    assert cache.layers[0].tail.held == [sum(fed) - 3]


def test_a_file_whose_newest_tokens_are_unpacked_goes_on(tmp_path):
    """As they were saved before, the first tokens among them."""
    model = tiny()
    cache = GEARCache(model, tail_bits=None, sinks=0)
    feed(model, cache, prompt(20, 2))
    settings = cache._settings() | {"sinks": 4}
    del settings["tail_bits"]
    cache._settings = lambda: settings
    cache.save(tmp_path / "old")
    loaded, straight = GEARCache.load(tmp_path / "old", model), GEARCache(model, tail_bits=None)
    assert type(loaded.layers[0].tail) is TailSegment
    feed(model, straight, prompt(20, 2))
    for tokens in (1, 70, 1):
        ids = prompt(tokens, 2, seed=tokens)
        torch.testing.assert_close(feed(model, loaded, ids), feed(model, straight, ids))
    assert loaded.layers[0].first.held == [4, 4]
    assert loaded.memory().total_bytes == straight.memory().total_bytes


def test_a_sliding_layer_lets_blocks_go():
    model = tiny("mistral")
    cache = GEARCache(model, bits=4, group_size=8, buffer=8, rank=2, rank_decode=2)
    feed(model, cache, prompt(200, 2))
    sizes = []
    for step in range(100):
        feed(model, cache, prompt(1, 2, seed=step))
        sizes.append(cache.memory().total_bytes)
    # a window of 12, 32 tokens that a draft may take back, a block on either side
    assert all(kept.max() <= 12 + 32 + 2 * 8 for kept in cache.memory().tokens_kept)
    assert max(sizes[50:]) <= max(sizes[:50])


@pytest.mark.parametrize("tail_bits", [None, 8])
def test_crop_takes_back_whole_blocks_exactly_and_takes_apart_the_one_it_ends_in(tail_bits):
    model = tiny()
    cache = GEARCache(model, bits=4, group_size=8, buffer=8, sinks=0, tail_bits=tail_bits)
    feed(model, cache, prompt(50, 2))
    state = unpacked(cache)
    for tokens in (10, 3, 2):
        cache.crop(-tokens)
        for then, now in zip(state, unpacked(cache), strict=True):
            # in another order, a packed token is what it was
            assert now[0].shape[2] == cache.get_seq_length()
            then, now = then[0][:, :, : now[0].shape[2]], now[0]
            # of two crops the second takes apart what the first had
            blocks = now.shape[2] // 8 * 8
            torch.testing.assert_close(then[:, :, :blocks], now[:, :, :blocks], rtol=0, atol=0)
            step = 0 if tail_bits is None else (then.amax() - then.amin()) / 255
            torch.testing.assert_close(then, now, rtol=0, atol=float(step))
    assert cache.get_seq_length() == 35
    assert [layer.tail.held for layer in cache.layers] == [[3, 3]] * 3
    assert torch.isfinite(feed(model, cache, prompt(5, 2))).all()
    with pytest.raises(ValueError, match="crop can take back the 40 tokens seen, got 41"):
        cache.crop(-41)


# README: Hydragen, GEAR, KIVI and ShadowKV take back drafts of any length
@pytest.mark.parametrize("settings", [{"rank": 0}, {"rank": 2, "rank_decode": 1}], ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("draft", [5, 31, 45, 90])
def test_drafts_of_any_length_are_taken_back(draft, family, settings):
    """Token by token with a draft before each, as with none, within what codes of 8 bits lose once more."""
    model = tiny(family, initializer_range=0.05)
    cache, full = eight_bits(model, sinks=3, **settings), DenseCache(model)
    ids, mask = left_padded(ROWS)
    both(model, cache, full, ids, mask)
    for step in range(10):
        ids = prompt(draft, 3, seed=step)
        mask = torch.cat([mask, torch.ones(3, draft, dtype=torch.long, device=DEVICE)], 1)
        feed(model, cache, ids, mask)
        taken = draft - 1 - step % 3
        cache.crop(-taken)
        mask = mask[:, :-taken]
        feed(model, full, ids[:, :-taken], mask)
        assert cache.get_seq_length() == full.get_seq_length() == mask.shape[1]
        one = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        found, expected = (feed(model, each.clone(), prompt(1, 3, seed=30), one) for each in (cache, full))
        torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * expected.abs().max().item())


def test_a_layer_that_took_back_a_long_draft_packs_the_next_ones_late():
    model = tiny()
    cache = GEARCache(model, bits=2, group_size=8, buffer=8, sinks=2)
    feed(model, cache, prompt(20, 2))
    for seed in range(3):
        feed(model, cache, prompt(50, 2, seed=seed))
        before = [sum(layer.prompt.blocks) for layer in cache.layers]
        cache.crop(-45)
        after = [sum(layer.prompt.blocks) for layer in cache.layers]
        # of the first draft, blocks were packed and taken apart; of the others, no token
        assert (before != after) == (seed == 0)


def test_a_crop_may_take_the_first_tokens_back_too():
    model = tiny()
    cache, straight = (GEARCache(model, bits=8, group_size=8, buffer=8, sinks=4) for _ in range(2))
    ids = prompt(40, 2)
    feed(model, cache, ids)
    cache.crop(-38)
    assert [layer.first.held for layer in cache.layers] == [[2, 2]] * 3
    feed(model, straight, ids[:, :2])
    for tokens in (30, 1, 1):
        more = prompt(tokens, 2, seed=tokens)
        torch.testing.assert_close(feed(model, cache, more), feed(model, straight, more))
    assert [layer.first.held for layer in cache.layers] == [[4, 4]] * 3


@pytest.mark.parametrize("tokens", [3, 12, 40, 100])
@pytest.mark.parametrize(
    "make",
    [GEARCache, KIVICache, lambda model: eight_bits(model, sinks=2)],
    ids=["gear", "kivi", "blocks of 8"],
)
def test_prompt_lookup_may_draft_as_much_as_it_likes(make, tokens):
    """It died in the middle of generation wherever a draft was longer than the tail."""
    model = tiny(vocab_size=14)
    ids = prompt(30) % 12 + 2
    cache = make(model)
    drafts = []
    taken_back = cache.crop
    cache.crop = lambda count: (drafts.append(-int(count)), taken_back(count))
    out = generate(model, cache, ids.repeat(1, 4), max_new_tokens=40, prompt_lookup_num_tokens=tokens)
    assert max(drafts) > tokens // 4
    assert cache.get_seq_length() == out.shape[1] - 1 == 159


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
@pytest.mark.parametrize("make", [GEARCache, KIVICache])
def test_sliding_layers_take_back_what_is_drafted_behind_a_prompt(make, family):
    """generate feeds the first drafts with the prompt; more than 57 tokens of it had left the windows."""
    model = tiny(family, vocab_size=14)
    cache = make(model)
    how = {"prompt_lookup_num_tokens": 100, "max_matching_ngram_size": 1, "max_new_tokens": 110}
    ids = (prompt(60) % 12 + 2).repeat(1, 7)
    out = generate(model, cache, ids, **how)
    assert cache.get_seq_length() == out.shape[1] - 1
    # what windows need no more goes when the next block is packed
    cache, plain = make(model), make(model)
    cache.layers[0].activate_past_recording()
    held = []
    for fed in (ids, ids[:, :130]):
        for each in (cache, plain):
            feed(model, each, fed)
        held.append([int(each.layers[0].tokens_kept().max()) for each in (cache, plain)])
    assert held[0][0] == ids.shape[1] > held[0][1]
    assert held[1][0] == held[1][1] < ids.shape[1]


def test_keys_and_values_of_two_widths_have_outliers_and_groups_of_their_own():
    key, value = GEAR(outliers=0.02, buffer=256, bits=4).codings(192, 0, 128)
    assert (key.outliers, value.outliers) == (3, 2)
    whole = GEAR(bits=4, backbone="whole", group_size=64)
    assert [coding.group for coding in whole.codings(192, 0, 100)] == [64, 128]
    assert [coding.group for coding in GEAR(bits=2).codings(192, 0, 100)] == [256, 128]
    with pytest.raises(ValueError, match="rank must be at most head_dim = 32, got 40"):
        GEAR(rank=40).codings(64, 40, 32)
    one = GEAR(bits=4, outliers=1.0, backbone="whole").per_token_scheme(192, 128)
    assert (one.group, one.outliers) == (256, 64)


def test_outliers_are_rounded_up_at_either_end():
    """What the docstrings say of 2 %: of 64 numbers it is one at either end."""
    key, value = GEAR(outliers=0.02).codings(64, 0)
    assert (key.outliers, value.outliers) == (1, 1)
    assert [GEAR(outliers=0.02, buffer=256).codings(128, 0)[side].outliers for side in (0, 1)] == [3, 2]


def test_whole_groups_are_those_of_kivi_where_a_block_and_a_head_are_as_long():
    whole = GEAR(bits=4, backbone="whole")
    assert whole.codings(64, 0) == GEAR(bits=4, group_size=64).codings(64, 0)
    assert whole.codings(128, 0) != GEAR(bits=4, group_size=64).codings(128, 0)


def test_a_full_cache_can_be_packed_afterwards():
    model = tiny(dtype=torch.float64)
    ids = prompt(70, 2)
    full, fed = DynamicCache(config=model.config), GEARCache(model, bits=3, group_size=8, buffer=16)
    feed(model, fed, ids)
    with torch.no_grad():
        model(ids, **cache_argument(model, full))
    filled = GEARCache(model, bits=3, group_size=8, buffer=16).fill(full)
    assert filled.get_seq_length() == 70
    assert filled.memory().total_bytes == fed.memory().total_bytes
    for step in range(20):
        token = prompt(1, 2, seed=step)
        torch.testing.assert_close(feed(model, filled, token), feed(model, fed, token))
    with pytest.raises(ValueError, match="fill needs an empty cache, this one has seen 90 tokens"):
        filled.fill(full)
    with pytest.raises(ValueError, match=r"layer 0 should hold keys .*got None"):
        GEARCache(model).fill(DynamicCache(config=model.config))
    one, fed = DynamicCache(config=model.config), GEARCache(model)
    feed(model, fed, ids[:, :1])
    with torch.no_grad():
        model(ids[:, :1], **cache_argument(model, one))
    filled = GEARCache(model).fill(one)
    torch.testing.assert_close(feed(model, filled, ids[:, 1:2]), feed(model, fed, ids[:, 1:2]))
    windowed = tiny("mistral")
    full = DynamicCache(config=windowed.config)
    with torch.no_grad():
        windowed(ids, **cache_argument(windowed, full))
    with pytest.raises(ValueError, match=r"tokens=70, head_dim\], got \[2, 2, 11, 16\]"):
        GEARCache(windowed).fill(full)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "bits must be 2, 3, 4 or 8, got 5"),
        ({"buffer": 48}, "buffer must be a power of two from 8 to 256 tokens, got 48"),
        ({"group_size": 24}, "group_size must be a power of two, at least 8, got 24"),
        ({"group_size": 128}, "group_size must be at most buffer = 64 tokens.*got 128"),
        ({"outliers": 2}, "outliers must be a share of the elements from 0 to 1, got 2"),
        ({"rank": -1}, "rank must not be negative, got -1"),
        ({"rank": 17}, "rank must be at most head_dim = 16, got 17"),
        ({"value_bits": 5}, "value_bits must be 2, 3, 4 or 8, or None, got 5"),
        ({"sinks": -1}, "sinks must be 0 tokens or more, got -1"),
        ({"centred": True, "hadamard": False}, "centred codes are of rotated numbers.*got hadamard=False, bits=4"),
        ({"centred": True, "outliers": 0.02}, "centred codes are .* without outliers, got .* outliers=0.02"),
        ({"centred": True, "bits": 8}, "centred codes are .* of 2 to 4 bits .* bits=8"),
        ({"unbiased": True, "outliers": 0.02}, "unbiased scales are .* without outliers .* outliers=0.02"),
        ({"unbiased": True, "rank": 2}, "unbiased scales are .* and a low-rank part, got .* rank=2"),
        ({"unbiased": True, "bits": 8}, "unbiased scales are of codes of up to 4 bits .* got bits=8"),
        ({"backbone": "gptq"}, "backbone must be 'kivi' or 'whole'.*got 'gptq'"),
        ({"tail_bits": 4}, "tail_bits must be 8, or None for newest tokens that stay as they are.*got 4"),
    ],
    ids=str,
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        GEARCache(tiny(), **settings)


# README: | `KIVICache` | every token, 2-bit codes |
def test_the_papers_settings_have_names():
    model = tiny()
    for name in PRESETS:
        cache = GEARCache.preset(model, name, rank=0, rank_decode=0)
        assert cache.settings == preset(name, rank=0, rank_decode=0)
    assert PRESETS["gear"] == GEAR(
        bits=2,
        group_size=64,
        rank=4,
        rank_decode=2,
        outliers=0.02,
        buffer=64,
        backbone="kivi",
        sinks=0,
        hadamard=False,
        centred=False,
        unbiased=False,
        tail_bits=None,
    )
    assert vars(KIVICache(model).settings) == vars(PRESETS["kivi"])
    with pytest.raises(ValueError, match=r"unknown preset 'gera'; did you mean gear\? known: default, small, gear, "):
        GEARCache.preset(model, "gera")


def test_outliers_are_counted_by_the_text_and_not_by_the_code():
    key, value = GEAR(outliers=0.02, buffer=256).codings(128, 0)
    assert (key.outliers, value.outliers) == (3, 2)
    assert GEAR(outliers=1.0, buffer=64).codings(64, 0)[0].outliers == 32
    assert GEAR(outliers=0.0).codings(64, 0)[0].outliers == 0


def test_a_tail_with_room_for_all_is_the_full_cache():
    model = tiny()
    ids = prompt(30, 2)
    expected = generate(model, DynamicCache(config=model.config), ids)
    cache = GEARCache(model, bits=2, buffer=64, tail_bits=None)
    assert torch.equal(generate(model, cache, ids), expected)
    assert [type(segment) for segment in cache.layers[0].segments()] == [TailSegment] * 2


def test_tokens_hidden_afterwards_leave_the_others_in_place():
    """A second turn masks what the first one showed: those tokens go, and what follows is placed and packed behind."""
    model = tiny()
    cache, full = eight_bits(model, sinks=0), DenseCache(model)
    ids = prompt(40, 2)
    mask = torch.ones_like(ids)
    both(model, cache, full, ids, mask)
    mask[0, 3:6] = 0
    mask[1, 33:39] = 0
    for step in range(20):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        both(model, cache, full, prompt(1, 2, seed=step), mask)
    assert_holds_what_was_fed(cache, full, mask)
    assert [kept.tolist() for kept in cache.memory().tokens_kept] == [[[57, 57], [54, 54]]] * 3
    cache.crop(-2)
    assert cache.layers[0].lengths == [55, 52]


@pytest.mark.parametrize("fed", [(40,), (1,) * 40, (3, 30, 7), (2, 1, 37)], ids=str)
def test_the_first_tokens_stay_as_they_were(fed):
    model = tiny()
    cache, full = GEARCache(model, bits=2, group_size=8, buffer=8, sinks=3), DenseCache(model)
    rows = [prompt(40, seed=3)[0], prompt(40, seed=4)[0]]
    ids, start = torch.stack(rows), 0
    for tokens in fed:
        piece, start = ids[:, start : start + tokens], start + tokens
        both(model, cache, full, piece, torch.ones(2, start, dtype=torch.long, device=DEVICE))
    keys, values, _ = full.layers[0].dense.held()
    first = cache.layers[0].first
    assert first.held == [3, 3]
    assert torch.equal(first.keys, keys[:, :, :3])
    assert torch.equal(first.values, values[:, :, :3])
    # and blocks begin behind them
    packed = cache.layers[0].segments()[0]
    assert packed.positions[0, 0, :8].tolist() == list(range(3, 11))


def test_rows_set_their_first_tokens_apart_each_in_its_time():
    model = tiny()
    cache, full = eight_bits(model, sinks=2), DenseCache(model)
    ids, mask = left_padded([ROWS[0], ROWS[1][:1], ROWS[2]])
    both(model, cache, full, ids, mask)
    assert cache.layers[0].first.held == [2, 1, 2]
    for step in range(12):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        both(model, cache, full, prompt(1, 3, seed=step), mask)
        assert_holds_what_was_fed(cache, full, mask)
    assert cache.layers[0].first.held == [2, 2, 2]


# README: | `GEARCache` | every token: keys in 4 bits, values in 3
def test_values_have_a_bit_less_where_that_costs_least():
    key, value = GEAR().codings(64, 0)
    assert (key.bits, value.bits) == (4, 3)
    assert [GEAR(bits=bits).codings(64, 0)[1].bits for bits in (2, 3, 8)] == [2, 2, 8]
    assert GEAR(bits=2, value_bits=8).codings(64, 0)[1].bits == 8
    with pytest.raises(ValueError, match="leaves no block for a mean: centred must be off"):
        GEAR(centred=True).per_token_scheme(64)
    with pytest.raises(ValueError, match="slots have keys and values of one size.*got 3"):
        GEAR(value_bits=3).per_token_scheme(64)


def test_a_segment_that_let_go_of_every_block_takes_new_ones():
    """A crop, or a window that has passed, may leave none."""
    model = tiny()
    cache, straight = (GEARCache(model, buffer=8, group_size=8, rank=2, rank_decode=2, sinks=0) for _ in range(2))
    for tokens in (8, 1):
        feed(model, cache, prompt(tokens, 2, seed=5))
    cache.crop(-9)
    assert all(layer.prompt.blocks == [0, 0] for layer in cache.layers)
    for tokens in (11, 1, 1):
        ids = prompt(tokens, 2)
        torch.testing.assert_close(feed(model, cache, ids), feed(model, straight, ids))
    assert all(layer.prompt.blocks == [1, 1] for layer in cache.layers)


@pytest.mark.parametrize("rank", [0, 2])
def test_rows_that_outlive_a_longer_one_go_on(rank):
    """Its blocks were more than theirs are after the next forward."""
    model = tiny()
    cache, straight = (GEARCache(model, buffer=8, group_size=8, rank=rank, rank_decode=rank, sinks=0) for _ in range(2))
    ids, mask = left_padded([prompt(40)[0], prompt(9, seed=2)[0]])
    feed(model, cache, ids, mask)
    cache.batch_select_indices(torch.tensor([1], device=DEVICE))
    feed(model, straight, ids[1:], mask[1:])
    # blocks of one row alone are not more than those there were for both
    for step in range(18):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        token = prompt(1, seed=step)
        logits = feed(model, cache, token, mask[1:])
        torch.testing.assert_close(logits, feed(model, straight, token, mask[1:]), rtol=1e-4, atol=1e-4)
    assert cache.layers[0].prompt.blocks == straight.layers[0].prompt.blocks == [3]


@pytest.mark.parametrize("backbone", ["kivi", "whole"])
@pytest.mark.parametrize("head_dim", [20, 48, 80, 96])
def test_heads_of_every_size_are_packed(head_dim, backbone):
    """Groups are powers of two; head_dim need not be."""
    model = tiny(hidden_size=2 * head_dim, num_attention_heads=2, num_key_value_heads=1, head_dim=head_dim)
    ids = prompt(40)
    cache, full = eight_bits(model, group_size=64, buffer=64, backbone=backbone), DenseCache(model)
    both(model, cache, full, prompt(80), torch.ones(1, 80, dtype=torch.long))
    assert_holds_what_was_fed(cache, full, torch.ones(1, 80, dtype=torch.long, device=DEVICE))
    slots = EvictingCache(model, policy=H2O(), budget=100, packed=GEAR(bits=8, outliers=0.0, backbone=backbone))
    feed(model, slots, ids)
    wanted = DenseCache(model)
    feed(model, wanted, ids)
    (_, values), fed = closed_up(slots)[0], wanted.layers[0].dense.held()[1]
    assert (values[:, :, :40] - fed).abs().max() < 0.02 * fed.abs().max()


def test_rows_that_leave_give_their_room_back():
    """Of a long row and one of ten tokens, the short one stays."""
    model = tiny()
    ids, mask = left_padded([prompt(400)[0], prompt(10, seed=2)[0]])
    cache, alone = (GEARCache(model, buffer=8, group_size=8) for _ in range(2))
    feed(model, cache, ids, mask)
    feed(model, alone, ids[1:, 390:])
    before = cache.memory().total_bytes
    cache.batch_select_indices(torch.tensor([1], device=DEVICE))
    report = cache.memory()
    # what a token costs that is not packed, of room for 64 more
    spare = len(cache.layers) * 64 * (2 * 2 * 16 * 4 + 4) + cache.layers[0].first.keys.nbytes * 2 * 3
    assert report.total_bytes - report.by_component["padding"] <= alone.memory().total_bytes + spare
    assert report.total_bytes < before / 10
    mask = mask[1:]
    for step in range(12):
        mask = torch.cat([mask, mask[:, -1:]], 1)
        token = prompt(1, seed=step)
        left = feed(model, cache, token, mask)
        torch.testing.assert_close(left, feed(model, alone, token), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(DEVICE != "cpu", reason="PyTorch's allocator is asked what it gave, on a CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pads", [0, 100], ids=["alone", "padded"])
def test_a_prefill_takes_at_most_a_fifth_more_than_the_keys_and_values_beside_them(dtype, pads):
    """With what stays; it took 3.2 times in bfloat16, and twice where a row was padded."""
    batch, tokens = 2, 2048
    model = tiny("llama", num_attention_heads=4, num_key_value_heads=4, head_dim=64, num_hidden_layers=1, dtype=dtype)
    layer = GEARCache(model).layers[0]
    query, key, value = (torch.randn(batch, tokens, 4, 64).to(dtype).transpose(1, 2) for _ in range(3))
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    mask[1, :pads] = False

    def run():
        layer.update(key, value)
        return layer.attend(query, mask if pads else None, LogitSpec(0.1), sinks=None, position_ids=None)

    peak, out = peak_bytes(run)
    assert layer.prompt is not None
    # the output is the model's
    assert peak - out.nbytes <= 1.2 * (key.nbytes + value.nbytes)


def test_a_loaded_cache_packs_as_its_clone_does_after_drafts_were_taken_back(tmp_path):
    model = tiny()
    cache = GEARCache(model, bits=2, buffer=8, group_size=8)
    feed(model, cache, prompt(100))
    cache.crop(-42)
    cache.save(tmp_path / "cache")
    copy, loaded = cache.clone(), GEARCache.load(tmp_path / "cache", model)
    for tokens in (50, 1, 20, 1):
        ids = prompt(tokens, seed=tokens)
        assert torch.equal(feed(model, loaded, ids), feed(model, copy, ids))
    assert [layer.draft for layer in loaded.layers] == [layer.draft for layer in copy.layers]


def test_drafts_are_taken_back_from_a_row_whose_first_tokens_were_hidden():
    """What lies apart from the blocks counts by its places, of which hidden tokens have none."""
    model = tiny()
    cache, full = GEARCache(model, bits=8, buffer=8, group_size=8), DynamicCache(config=model.config)
    ids, mask = prompt(50, 2), torch.ones(2, 50, dtype=torch.long)
    for each in (cache, full):
        feed(model, each, ids, mask)
    assert cache.layers[0].first.held == [4, 4]
    # of row 1 few tokens stay, of those apart the first alone
    mask[1, 1:49] = 0
    mask = torch.cat([mask, mask.new_ones(2, 2)], 1)
    for each in (cache, full):
        feed(model, each, prompt(2, 2, seed=7), mask)
        each.crop(-1)
    assert cache.layers[0].tokens_kept()[:, 0].tolist() == [51, 3]
    assert cache.layers[0].first.positions.tolist() == [[0, 1, 2, 3], [0, -1, -1, -1]]
    found, expected = (feed(model, each, prompt(1, 2, seed=8), mask) for each in (cache, full))
    # in 8 bits
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.1 * float(expected.std()))


# docs: Values are rotated by a Hadamard matrix with random signs before they are packed
@pytest.mark.parametrize("make", [GEARCache, lambda model, **how: H2OCache(model, budget=30, packed=GEAR(**how))])
def test_values_that_stand_out_lose_less_where_they_are_rotated(make):
    model = build("llama", seed=3)
    for layer in model.model.layers:
        # two channels of every head
        layer.self_attn.v_proj.weight.data.unflatten(0, (-1, 16))[:, 3:5] *= 30
    ids, lost = prompt(72, seed=7), {}
    for hadamard in (False, True):
        cache = make(model, bits=4, hadamard=hadamard, group_size=16)
        feed(model, cache, ids)
        plain = DenseCache(model) if make is GEARCache else H2OCache(model, budget=30)
        feed(model, plain, ids)
        small = [channel for channel in range(16) if channel not in (3, 4)]
        if make is GEARCache:
            found, fed = unpacked(cache)[0][1], plain.layers[0].dense.held()[1]
        else:
            # slots stand in the order in which tokens came
            found, fed = (each.layers[0].slots.contents()[1] for each in (cache, plain))
            found = found[:, :, : fed.shape[2]]
        lost[hadamard] = (found - fed)[..., small].square().mean()
    assert lost[True] < 0.7 * lost[False]


# docs: With 2 bits keys are rotated too
def test_two_bits_are_around_zero_where_nothing_else_was_asked_for():
    assert GEAR(bits=2).is_centred
    others = [
        GEAR(),
        GEAR(bits=3),
        GEAR(bits=2, outliers=0.02),
        GEAR(bits=2, value_bits=4),
        GEAR(bits=2, centred=False),
    ]
    assert not any(each.is_centred for each in (*others, *PRESETS.values()))
    assert GEAR(centred=True).is_centred
    key, value = GEAR(bits=2).codings(64, 0)
    assert (key.zeros, value.zeros) == ("block", "none")
    # 16 bits of scale for the 64 channels of a token; those of the 64 means of a block
    assert 8 * (key.bytes(64, 64) + value.bytes(64, 64)) / (2 * 64 * 64) == 2 + (2 * 0.25 + 0.25) / 2


# docs: a block of them around its mean
@pytest.mark.parametrize("backbone", ["kivi", "whole"])
def test_keys_with_large_means_lose_less_around_them(backbone):
    model = build("llama", seed=3)
    for layer in model.model.layers:
        # low frequencies, which RoPE hardly turns
        layer.self_attn.k_proj.weight.data.unflatten(0, (-1, 16))[:, 7] *= 30
    ids, lost = prompt(72, seed=7), {}
    full = DenseCache(model)
    feed(model, full, ids)
    for centred in (False, True):
        cache = GEARCache(model, bits=2, group_size=16, backbone=backbone, centred=centred)
        feed(model, cache, ids)
        lost[centred] = (unpacked(cache)[0][0] - full.layers[0].dense.held()[0]).square().mean()
    assert lost[True] < lost[False]


# docs: The papers' presets and `KIVICache` leave them as they are, as `hadamard=False` does
def test_a_file_from_before_values_were_rotated_means_what_it_meant(tmp_path):
    model = tiny()
    for make in (GEARCache, lambda model, **how: H2OCache(model, budget=30, packed=GEAR(**how))):
        cache = make(model, hadamard=False, tail_bits=None)
        feed(model, cache, prompt(72))
        settings = cache._settings()
        own = settings if "hadamard" in settings else settings["packed"]
        del own["hadamard"], own["centred"], own["tail_bits"]
        cache._settings = lambda settings=settings: settings
        cache.save(tmp_path / "old")
        loaded = type(cache).load(tmp_path / "old", model)
        assert torch.equal(feed(model, loaded, prompt(3, seed=4)), feed(model, cache, prompt(3, seed=4)))


def test_a_file_from_before_codes_were_around_zero_means_what_it_meant(tmp_path):
    model = tiny()
    cache = GEARCache(model, bits=2, centred=False, tail_bits=None)
    feed(model, cache, prompt(72))
    settings = cache._settings()
    del settings["centred"], settings["tail_bits"]
    cache._settings = lambda: settings
    cache.save(tmp_path / "old")
    loaded = GEARCache.load(tmp_path / "old", model)
    assert torch.equal(feed(model, loaded, prompt(3, seed=4)), feed(model, cache, prompt(3, seed=4)))
