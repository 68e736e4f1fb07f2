"""Compiled steps of GEAR and KIVI: what they write, what is packed between them, and what may follow."""

import pytest
import torch

from kvcompress import GEARCache, KIVICache
from kvcompress.hf import cache_argument
from kvcompress.storage.segment import EMPTY
from tests.contract.drive import compiled_apart, counting_graphs, feed
from tests.contract.models import DEVICE, left_padded, prompt, tiny
from tests.contract.test_compile import ONE_LAYER, TWO_LAYERS, step_function

ROWS = [prompt(20)[0], prompt(13, seed=2)[0]]


def gear(model, **settings):
    return GEARCache(model, **{"buffer": 8, "group_size": 8, **settings})


@pytest.fixture(autouse=True)
def fresh_dynamo(request):
    # of this one case may run what another has compiled
    yield from compiled_apart(request, ("test_what_comes_after_compiled_steps_finds_what_they_wrote",))


class Fed:
    """A cache that is fed by compiled steps, and one that is fed the same tokens by eager ones."""

    def __init__(self, model, make=gear, rows=ROWS):
        self.model = model
        self.compiled = torch.compile(step_function(model), fullgraph=True, backend="eager")
        ids, self.mask = left_padded(rows)
        self.cache, self.eager = make(model), make(model)
        for each in (self.cache, self.eager):
            feed(model, each, ids, self.mask)

    @torch.no_grad()
    def step(self, steps, packs=False):
        for _ in range(steps):
            if packs:
                self.cache.forward_comes()
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
            token, position = prompt(1, 2, seed=self.mask.shape[1]), self.mask.sum(-1, keepdim=True) - 1
            self.compiled(token, position, self.cache)
            feed(self.model, self.eager, token, self.mask)

    def assert_first_layers_agree(self):
        """Later layers would be fed what attention made of tokens that one had packed and the other had not."""
        assert_same(self.cache.layers[0], self.eager.layers[0])


def assert_same(found, wanted):
    assert found.lengths == wanted.lengths
    for ours, theirs in ((found.tail, wanted.tail), (found.first, wanted.first)):
        if theirs is None:
            assert ours is None
            continue
        assert ours.held == theirs.held
        for row, held in enumerate(theirs.held):
            for name, tensor in theirs.tensors().items():
                sides = (
                    each[row, :held] if name == "positions" else each[row, :, :held]
                    for each in (tensor, ours.tensors()[name])
                )
                assert torch.equal(*sides), name
            assert (ours.positions[row, held:] == EMPTY).all()
    for part, other in zip(found._packed(), wanted._packed(), strict=True):
        assert part.blocks == other.blocks
        tensors, others = part.dump()[0], other.dump()[0]
        assert tensors.keys() == others.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, others[name]), name


FACTORS = {"bits": 2, "rank": 3, "rank_decode": 2, "outliers": 0.1}
SHARED = {"rank": 2, "rank_decode": 2}


# docs: and those of GEAR and KIVI pack nothing
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        pytest.param("llama", {}, id="llama-codes"),
        pytest.param("llama", FACTORS, id="llama-factors"),
        pytest.param("llama", SHARED, id="llama-shared"),
        # of windows only what they hold is compared, which does not depend on the settings
        pytest.param("mistral", {}, id="mistral-codes"),
        pytest.param("mistral", FACTORS, id="mistral-factors", marks=pytest.mark.slow),
        pytest.param("mistral", SHARED, id="mistral-shared", marks=pytest.mark.slow),
    ],
)
def test_what_steps_by_hand_left_unpacked_is_packed_when_more_are_reserved(family, settings):
    fed = Fed(tiny(family, **ONE_LAYER), lambda model: gear(model, **settings))
    for steps in (30, 17):
        fed.cache.reserve(steps)
        before = [part.blocks for part in fed.cache.layers[0]._packed()]
        fed.step(steps)
        tail = fed.cache.layers[0].tail
        assert max(tail.held) >= steps > fed.cache.settings.buffer
        assert [part.blocks for part in fed.cache.layers[0]._packed()] == before
    fed.cache.reserve(1)
    if family == "llama":
        fed.assert_first_layers_agree()
    else:
        # packed at once, what is out of sight is not packed at all
        assert fed.cache.layers[0].tail.held == fed.eager.layers[0].tail.held


@pytest.mark.parametrize(("prompts", "tail_bits"), [((2, 1), 8), ((20, 2), 8), ((3, 1), None)], ids=str)
def test_first_tokens_stay_as_they_came_where_the_prompt_has_fewer(prompts, tail_bits):
    rows = [prompt(tokens, seed=tokens)[0] for tokens in prompts]
    fed = Fed(tiny(dtype=torch.float64, **ONE_LAYER), lambda model: gear(model, tail_bits=tail_bits), rows)
    fed.cache.reserve(40)
    layer = fed.cache.layers[0]
    for steps in (1, 2, 14):
        fed.step(steps)
        # asking for segments takes in what was written
        assert layer.segments()[-2:] == [layer.first, layer.tail]
        assert layer.lengths == fed.mask.sum(-1).tolist()
        assert layer.first.held == [min(4, length) for length in layer.lengths]
    assert "slots" in layer.counters()
    token, mask = prompt(1, 2, seed=99), torch.cat([fed.mask, torch.ones_like(fed.mask[:, :1])], 1)
    logits = [feed(fed.model, each, token, mask) for each in (fed.cache, fed.eager)]
    fed.assert_first_layers_agree()
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


def test_first_tokens_come_from_compiled_steps_by_padded_rows_and_after_a_crop():
    model = tiny(dtype=torch.float64, **ONE_LAYER)
    fed = Fed(model, rows=[prompt(3)[0], prompt(1, seed=2)[0]])
    fed.cache.reserve(9)
    fed.step(2)
    for each in (fed.cache, fed.eager):
        each.crop(-3)
    fed.mask = fed.mask[:, :-3]
    fed.cache.reserve(20)
    fed.step(12, packs=True)
    fed.cache.reserve(1)
    fed.assert_first_layers_agree()
    assert fed.cache.layers[0].first.held == [4, 4]


def test_a_row_that_is_fed_padding_by_compiled_steps_stores_nothing():
    model = tiny(**ONE_LAYER)
    cache, alone = gear(model), gear(model)
    ids, mask = left_padded(ROWS)
    feed(model, cache, ids, mask)
    feed(model, alone, ids, mask)
    cache.reserve(6)
    name = cache_argument(model, cache)

    def step(token, mask, position):
        return model(token, attention_mask=mask, position_ids=position, **name).logits

    compiled = torch.compile(step, backend="eager")
    for shown in ([1, 1], [1, 0], [1, 0], [1, 1]):
        mask = torch.cat([mask, torch.tensor(shown, device=DEVICE)[:, None]], 1)
        token, position = prompt(1, 2, seed=mask.shape[1]), mask.sum(-1, keepdim=True) - 1
        with torch.no_grad():
            compiled(token, mask[:, -1:], position)
        feed(model, alone, token, mask)
    cache.reserve(1)
    assert_same(cache.layers[0], alone.layers[0])
    assert cache.layers[0].lengths == [24, 15]


@pytest.mark.parametrize("change", ["reorder", "crop", "clone", "load", "repeat", "select"])
def test_what_comes_after_compiled_steps_finds_what_they_wrote(change, tmp_path):
    fed = Fed(tiny(dtype=torch.float64, **ONE_LAYER))
    fed.cache.reserve(40)
    fed.step(11, packs=True)
    caches = [fed.cache, fed.eager]
    if change == "reorder":
        for each in caches:
            each.reorder_cache(torch.tensor([1, 0], device=DEVICE))
        fed.mask = fed.mask.flip(0)
    elif change == "crop":
        fed.cache.reserve(20)
        for each in caches:
            each.crop(-3)
        fed.mask = fed.mask[:, :-3]
    elif change == "clone":
        caches[0] = fed.cache.clone()
    elif change == "load":
        fed.cache.save(tmp_path / "cache")
        caches[0] = GEARCache.load(tmp_path / "cache", fed.model)
    elif change == "repeat":
        for each in caches:
            each.batch_repeat_interleave(2)
        fed.mask = fed.mask.repeat_interleave(2, 0)
    else:
        for each in caches:
            each.batch_select_indices(torch.tensor([1], device=DEVICE))
        fed.mask = fed.mask[1:]
    mask = torch.cat([fed.mask, torch.ones_like(fed.mask[:, :1])], 1)
    token = prompt(1, len(mask), seed=99)
    logits = [feed(fed.model, each, token, mask) for each in caches]
    assert_same(caches[0].layers[0], caches[1].layers[0])
    # log-sum-exps are float32
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)


# docs: `generate` packs between its compiled steps, all of which one graph serves
@pytest.mark.parametrize("make", [gear, lambda model: KIVICache(model, group_size=8, buffer=8)], ids=["gear", "kivi"])
def test_generate_packs_between_its_compiled_steps_what_eager_steps_would_have_packed(make):
    model = tiny(dtype=torch.float64, **TWO_LAYERS)
    ids, mask = left_padded(ROWS)
    config, graphs = counting_graphs()
    cache, eager = make(model), make(model)
    cache.reserve(64)
    options = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False}
    found = model.generate(ids, **cache_argument(model, cache), compile_config=config, **options)
    assert torch.equal(found, model.generate(ids, **cache_argument(model, eager), **options))
    # the mask grows by a column
    assert 1 <= len(graphs) <= 2
    cache.reserve(1)
    for layer, other in zip(cache.layers, eager.layers, strict=True):
        assert layer.lengths == other.lengths
        assert layer.tail.held == other.tail.held
        assert layer._packed()[0].blocks == other._packed()[0].blocks


def test_a_compiled_step_must_follow_on_compiled_steps_or_on_reserve():
    fed = Fed(tiny(**ONE_LAYER))
    fed.cache.reserve(8)
    fed.step(1)
    feed(fed.model, fed.cache, prompt(1, 2), torch.cat([fed.mask, torch.ones_like(fed.mask[:, :1])], 1))
    with pytest.raises(Exception, match="call it anew"):
        fed.step(1)


def test_room_that_compiled_steps_use_later_is_not_saved(tmp_path):
    fed = Fed(tiny())
    fed.step(0)
    fed.eager.save(tmp_path / "plain")
    fed.cache.reserve(500)
    fed.cache.save(tmp_path / "roomy")
    packed = fed.cache.layers[0].prompt
    assert packed.positions.shape[2] > 500
    assert (packed.positions[:, :, 8 * max(packed.blocks, default=0) :] == EMPTY).all()
    # but for the tail, which has room to be written to at once
    tail = sum(tensor.nbytes for layer in fed.cache.layers for tensor in layer.tail.tensors().values())
    sizes = [(tmp_path / name).stat().st_size for name in ("plain", "roomy")]
    assert sizes[1] <= sizes[0] + tail + 8192
