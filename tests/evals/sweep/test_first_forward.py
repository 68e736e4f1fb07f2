"""A forward recorded once fills caches as the model would."""

import pytest
import torch
from transformers import DynamicCache

from kvcompress import EvictingCache, H2OCache, registry
from kvcompress.check.models import small_model
from kvcompress.evals.sweep import baselines
from kvcompress.evals.sweep.first_forward import FirstForward, Known
from kvcompress.evals.sweep.protocol import Reader, answer
from kvcompress.kernels.attention import causal_attention
from kvcompress.kernels.common.logits import LogitSpec
from kvcompress.policies.kvzip import KVzip
from kvcompress.swiftkv.conversion import convert
from tests.contract.models import build
from tests.evals.sweep.test_protocol import prompts

# every method of the registry, and settings that change how a first forward is stored
SETTINGS = [
    "h2o:bits=4",
    "snapkv:window=4:recent=4:allocation=heads",
    "snapkv:window=4:recent=4:second_stage=0.5",
    "kvzip:allocation=heads",
    "kvzip:keeps_answers=false",
    "gear:bits=2:buffer=16:group_size=16",
    "shadowkv:chunk=4:outlier_chunks=1:local_chunks=1:dense_below=8:fold=4",
]
SPECS = [*registry.METHODS, *SETTINGS]


def filled_and_read(model, spec, budget=20, recorded=None):
    """Two readers of the same rows, of several lengths, so that some are padded: one filled, one that the model fed."""
    rows = [prompt.context for prompt in prompts()]
    readers = [Reader(model, registry.build(spec, model, budget)) for _ in range(2)]
    (recorded or FirstForward(model, rows)).fill(readers[0])
    readers[1].read(rows)
    return readers


def tensors_of(cache):
    return [
        {name: tensor for segment in layer.segments() for name, tensor in segment.tensors().items()}
        for layer in cache.layers
    ]


def spec_of(name):
    window = {"snapkv", "chunkkv", "pyramidkv", "adakv", "criticalkv"}
    return f"{name}:window=4:recent=4" if name in window else name


# docs: filled from one recorded forward, as the model would have filled them
@pytest.mark.parametrize("spec", SPECS)
def test_a_cache_filled_from_a_recording_is_the_cache_that_the_model_fills(model, spec):
    readers = filled_and_read(model, spec_of(spec))
    for filled, read in zip(*(tensors_of(reader.cache) for reader in readers), strict=True):
        assert filled.keys() == read.keys()
        for name, tensor in read.items():
            assert torch.equal(filled[name], tensor), name
    assert readers[0].measure() == readers[1].measure()
    questions = [prompt.question for prompt in prompts()]
    assert torch.equal(*(reader.read(questions) for reader in readers))
    step = [[5]] * len(questions)
    assert torch.equal(*(reader.read(step) for reader in readers))
    assert readers[0].measure() == readers[1].measure()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_transformers_own_cache_stores_what_was_recorded(family):
    model = build(family)
    rows = [list(range(3, 53)), list(range(60, 110))]
    readers = [Reader(model, DynamicCache(config=model.config)) for _ in range(2)]
    FirstForward(model, rows).store(readers[0].cache)
    readers[0].mask = torch.ones(2, 50, dtype=torch.int64)
    readers[1].read(rows)
    for stored, fed in zip(*(reader.cache.layers for reader in readers), strict=True):
        assert stored.get_seq_length() == fed.get_seq_length() == 50
        torch.testing.assert_close(stored.keys, fed.keys)
        torch.testing.assert_close(stored.values, fed.values)
    torch.testing.assert_close(*(reader.read([[5], [6]]) for reader in readers))


def test_a_converted_model_feeds_each_cache_itself():
    converted = convert(build("llama", num_hidden_layers=4), 0.5)
    for spec in ("h2o", "snapkv:window=4:recent=4", "gear", "none", "swiftkv"):
        assert not FirstForward.serves(baselines.build(spec, converted, 9)), spec


@pytest.mark.parametrize("spec", ["h2o", "kvzip", "attention_matching", "gear", "shadowkv"])
def test_one_recording_serves_caches_one_after_the_other(model, spec):
    asked = prompts()
    recorded = FirstForward(model, [prompt.context for prompt in asked])
    for budget in (12, 30):
        make = lambda: registry.build(spec, model, budget)  # noqa: B023, E731 (called before the next budget)
        with_it = answer(model, make, asked, "question-agnostic", first=recorded.fill)
        assert with_it == answer(model, make, asked, "question-agnostic")


def test_what_looks_at_all_pairs_of_tokens_is_done_once(model, monkeypatch):
    read, again = [], EvictingCache._read_again
    monkeypatch.setattr(EvictingCache, "_read_again", lambda *given: [read.append(1), again(*given)][1])
    recorded = FirstForward(model, [prompt.context for prompt in prompts()])

    def fill(budget, *specs):
        for spec in specs:
            recorded.fill(Reader(model, registry.build(spec, model, budget)))

    def computed():
        return sorted(name for call in recorded._calls for name, *_ in call.known._found)

    for budget in (12, 20, 30):
        fill(budget, "gear", "none", "h2o")
        assert computed() == ["causal_attention"] * 2 + ["causal_column_sums"] * 2
    for budget in (12, 20, 30):
        fill(budget, "kvzip", "kvzip:keeps_answers=false")
        assert len(read) == 1
    fill(12, "attention_matching")
    assert len(read) == 2


def test_results_are_known_by_what_the_arguments_hold():
    known = Known()
    query, key, value = (torch.randn(1, heads, 5, 8) for heads in (2, 1, 1))
    given = lambda: (query.clone(), key.clone(), value.clone(), LogitSpec(0.5))  # noqa: E731
    first = known(causal_attention, *given())
    # a caller may write to what it got
    first[0].zero_()
    again = known(causal_attention, *given())
    assert torch.equal(again[0], causal_attention(*given())[0])
    assert len(known._found) == 1
    query[0, 0, 0, 0] += 1
    assert torch.equal(known(causal_attention, *given())[0], causal_attention(*given())[0])
    known(causal_attention, *given()[:3], LogitSpec(0.25))
    assert len(known._found) == 3


def test_other_caches_are_refused(model):
    recorded = FirstForward(model, [[1, 2, 3]])
    with pytest.raises(ValueError, match=r"fills an empty cache of DenseCache, .*; got DynamicCache that has seen 0"):
        recorded.fill(Reader(model, DynamicCache(config=model.config)))
    used = Reader(model, H2OCache(model, budget=4))
    used.read([[1, 2]])
    with pytest.raises(ValueError, match=r"got H2OCache that has seen 2 tokens"):
        recorded.fill(used)


def test_a_cache_class_of_ones_own_is_fed_by_the_model(model):
    class Mine(H2OCache):
        """It may count forwards, or attend to less."""

    assert FirstForward.serves(H2OCache(model, budget=12))
    assert not FirstForward.serves(Mine(model, budget=12))
    # its rounding errors are others
    assert not FirstForward.serves(H2OCache(model, budget=12, rerotated=True))


def test_a_filled_cache_reads_its_next_text_twice_by_itself(model):
    cache = EvictingCache(model, policy=KVzip(), budget=12)
    rows = [prompt.context for prompt in prompts()]
    FirstForward(model, rows).fill(Reader(model, cache))
    assert "_read_again" not in vars(cache)


def test_a_recording_is_about_as_large_as_it_says(model):
    rows = [list(range(3, 203))] * 2
    recorded = FirstForward(model, rows)
    tensors = [x for call in recorded._calls for x in (call.key, call.value, call.query)]
    for call in recorded._calls:
        for _, given, found in call.known._found:
            tensors += [x for x in (*given, *found) if isinstance(x, torch.Tensor)]
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    assert sum(held.values()) == pytest.approx(FirstForward.size(model, 400), rel=0.15)


@pytest.mark.parametrize("name", ["gemma3n_text", "deepseek_v3"])
def test_layers_that_share_keys_or_keep_latents_are_not_recorded(name):
    """A recording has keys and values of each layer; such models are read by each point itself."""
    model = small_model(name)
    assert not FirstForward.records(model)
    assert FirstForward.most_rows(model, 8) == 0
    assert not FirstForward.serves(H2OCache(model, budget=8))
