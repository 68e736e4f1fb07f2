import pytest
import torch

from kvcompress import DenseCache, H2OCache, StreamingLLMCache
from kvcompress.evals.agreement import FullReference, make_windows
from kvcompress.evals.protocol import NotCompressedError

CONTEXT, CONTINUATION = 40, 10


@pytest.fixture(scope="module")
def windows():
    tokens = torch.randint(0, 256, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    return make_windows(tokens, CONTEXT, CONTINUATION, 3)


@pytest.fixture(scope="module")
def reference(model, windows):
    return FullReference(model, windows, CONTEXT)


def test_windows_are_spread_over_the_whole_text():
    windows = make_windows(list(range(100)), 20, 5, 3)
    assert [window[0] for window in windows] == [0, 37, 74]
    assert all(len(window) == 25 for window in windows)
    assert windows[-1][-1] == 98


@pytest.mark.parametrize("chunk", [1, 4, 10])
def test_the_full_cache_agrees_with_itself(model, reference, chunk):
    found, held = reference.compare(lambda: DenseCache(model), chunk=chunk)
    assert found.top1 == [1.0] * 3
    assert max(found.kl) < 1e-6
    assert held.tokens_kept == held.tokens_seen == CONTEXT - 1
    torch.testing.assert_close(torch.tensor(found.loss), torch.tensor(found.full_loss))


@torch.inference_mode()
def test_losses_are_those_of_one_plain_forward(model, reference, windows):
    found, _ = reference.compare(lambda: DenseCache(model), chunk=3)
    tokens = torch.tensor(windows)
    logits = model(tokens).logits[:, CONTEXT - 1 : -1]
    wanted = torch.nn.functional.cross_entropy(logits.mT, tokens[:, CONTEXT:], reduction="none").mean(-1)
    torch.testing.assert_close(torch.tensor(found.full_loss).float(), wanted)


def test_every_scored_token_sees_the_compressed_cache_alone(model, reference):
    few, _ = reference.compare(lambda: StreamingLLMCache(model, budget=2, sinks=1), chunk=1)
    more, _ = reference.compare(lambda: H2OCache(model, budget=30), chunk=1)
    assert min(few.kl) > 0.01
    assert sum(more.kl) < sum(few.kl)
    assert sum(few.top1) < 3.0


def test_comparing_leaves_the_reference_as_it_was(model, reference):
    first, _ = reference.compare(lambda: H2OCache(model, budget=10))
    again, _ = reference.compare(lambda: H2OCache(model, budget=10))
    assert first == again


def test_a_single_scored_token_is_no_longer_immune(model, windows):
    single = FullReference(model, [window[: CONTEXT + 1] for window in windows], CONTEXT)
    found, _ = single.compare(lambda: StreamingLLMCache(model, budget=2, sinks=1))
    assert min(found.kl) > 1e-3


def test_a_cache_that_does_not_compress_is_found_out(model, reference):
    with pytest.raises(NotCompressedError):
        reference.compare(lambda: DenseCache(model), must_keep_at_most=10)


def test_mistakes_are_named(reference, model):
    with pytest.raises(ValueError, match=r"text must hold 3 windows of 20 \+ 5 = 25 tokens, got 60 tokens"):
        make_windows(list(range(60)), 20, 5, 3)
    with pytest.raises(ValueError, match="context of at least 2 tokens"):
        make_windows(list(range(60)), 1, 5, 3)
    with pytest.raises(ValueError, match="chunk must be at least 1 token, got 0"):
        reference.compare(lambda: DenseCache(model), chunk=0)
