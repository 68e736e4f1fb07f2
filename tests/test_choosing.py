import pytest
import torch

from kvcompress import EvictingCache, GEARCache, auto_cache, choosing
from kvcompress.caches.dense import DenseCache
from kvcompress.hf import cache_argument
from kvcompress.hf.working import peak_of_tensors
from kvcompress.memory import read_bytes
from kvcompress.plan import shape_of

CONTEXT = 4096


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=224,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
    )
    return LlamaForCausalLM(config).eval()


# docs: `auto_cache` makes the same choice in code, for a model that is loaded
@pytest.mark.parametrize(
    ("memory", "known", "kind", "first"),
    [
        *[("1GiB", False, DenseCache, 0), ("32MiB", True, DenseCache, 0), ("10MiB", True, GEARCache, 0)],
        *[("20MiB", False, EvictingCache, 2), ("10MiB", True, EvictingCache, 2)],
    ],
)
def test_the_first_that_fits_is_chosen_and_does_fit(model, monkeypatch, memory, known, kind, first):
    others = {"UNFORESEEN": choosing.Candidate("kvzip", 0.2, ""), "FORESEEN": choosing.Candidate("h2o", 0.2, "")}
    for name, other in others.items():
        # packed tokens are unpacked in tiles on a CPU, which a kernel has in registers
        monkeypatch.setattr(choosing, name, getattr(choosing, name) if first == 0 else (other,))
    cache = auto_cache(model, memory, question_known=known)
    assert isinstance(cache, kind)
    assert f"{CONTEXT} tokens x batch 1, the question {'known' if known else 'not known'}, into" in repr(cache)
    need = choosing.choose(
        shape_of(model), CONTEXT, 1, torch.float32, read_bytes("memory", memory),
        question_known=known, with_weights=False,
    ).need  # fmt: skip
    ids = torch.randint(0, 64, (1, CONTEXT), generator=torch.Generator().manual_seed(0))
    how = {} if need.chunk is None else {"prefill_chunk_size": need.chunk}
    if how:
        assert f"prefill_chunk_size={need.chunk}" in cache.chosen
    assert need.peak <= read_bytes("memory", memory)
    if kind is not GEARCache:
        more = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
        peak, _ = peak_of_tensors(lambda: model.generate(ids, **cache_argument(model, cache), **more, **how))
        assert peak == pytest.approx(need.peak, rel=0.05)


# docs: Where nothing fits, the error says how many tokens would.
def test_what_would_fit_is_said_where_nothing_does(model):
    with pytest.raises(ValueError, match=r"nothing fits 4096 tokens x batch 9 into 0.00 GiB; .*, \d+ tokens would"):
        auto_cache(model, "4MiB", batch=9)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({}, ValueError, "memory must be told for a model on cpu"),
        ({"memory": "8"}, ValueError, "memory must be a number of bytes"),
        ({"memory": 1.5}, TypeError, "memory must be a number of bytes"),
        ({"memory": "1GiB", "context": 0}, ValueError, "context must be at least 1, got 0"),
        ({"memory": "1GiB", "batch": 0}, ValueError, "batch must be at least 1, got 0"),
        ({"memory": "1GiB", "context": 10**12}, ValueError, "context must be at most 134217728, got 1000000000000"),
        ({"memory": "1GiB", "context": 2.5}, TypeError, "context must be a whole number, got 2.5"),
        ({"memory": "1GiB", "context": "128k"}, TypeError, "context must be a whole number, got '128k'"),
        ({"memory": "1GiB", "batch": True}, TypeError, "batch must be a whole number, got True"),
    ],
)
def test_what_cannot_be_chosen_for_is_refused(model, arguments, error, said):
    with pytest.raises(error, match=said):
        auto_cache(model, **arguments)


def test_chunks_are_as_large_as_fit(model):
    shape = shape_of(model)

    def chunk(memory):
        return choosing.with_chunks(shape, "h2o", CONTEXT, 1, 0.1, torch.float32, memory).chunk

    assert chunk(2**40) is None
    sizes = [chunk(memory * 2**18) for memory in range(1, 200)]
    assert sizes == sorted(sizes, key=lambda size: CONTEXT if size is None else size)
    assert set(sizes) == {512, 1024, 2048, None}
    # what does not fit at all is told with the smallest
    assert choosing.with_chunks(shape, "h2o", CONTEXT, 1, 0.1, torch.float32, 1).peak > 1


def test_every_candidate_can_be_built(model):
    for candidate in {*choosing.UNFORESEEN, *choosing.FORESEEN}:
        assert choosing.registry.build(candidate.method, model, candidate.budget) is not None
