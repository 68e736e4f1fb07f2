import pytest
import torch

from kvcompress import DenseCache, H2OCache, KVzipCache, StreamingLLMCache
from kvcompress.evals.sweep.agreement import FullReference, make_windows
from kvcompress.evals.sweep.protocol import NotCompressedError, Reader

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
    assert torch.tensor(found.attention_error).shape == (3, 2)
    assert max(map(max, found.attention_error)) < 1e-5
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
    errors, fewer = torch.tensor(more.attention_error), torch.tensor(few.attention_error)
    assert (errors > 0.01).all()
    assert (errors.mean(0) < fewer.mean(0)).all()


@torch.inference_mode()
def test_errors_of_attention_are_those_of_each_layers_outputs(model, windows, monkeypatch):
    """Layer 1 alone is put off by a known share, and layer 0 by none."""
    reference = FullReference(model, windows, CONTEXT)
    own, calls = model.model.layers[1].self_attn.forward, []

    def louder(*arguments, **settings):
        output, *rest = own(*arguments, **settings)
        calls.append(output.shape)
        return (output * 1.5 if len(calls) % 2 else output, *rest)

    monkeypatch.setattr(model.model.layers[1].self_attn, "forward", louder)
    reader = lambda: DenseCache(model)  # noqa: E731
    with pytest.MonkeyPatch.context() as inner:
        # the prompt is read once more before the first comparison
        inner.setattr("kvcompress.evals.sweep.agreement.Reader.measure", lambda self: calls.clear())
        found, _ = reference.compare(reader, chunk=4)
    errors = torch.tensor(found.attention_error)
    assert errors[:, 0].max() < 1e-5
    torch.testing.assert_close(errors[:, 1], torch.full((3,), 0.5), rtol=1e-4, atol=1e-4)
    assert not model.model.layers[1].self_attn._forward_hooks


def test_a_second_reading_is_not_taken_for_the_first(model, reference):
    found, _ = reference.compare(lambda: KVzipCache(model, budget=100), chunk=4)
    assert max(map(max, found.attention_error)) < 1e-5


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


# docs: read once for all methods
def test_caches_and_the_full_one_share_one_reading_of_the_context_and_score_as_alone(model, windows):
    fed = []
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: fed.append(args[0].shape[1]), with_kwargs=True)
    shared = FullReference(model, windows, CONTEXT)
    found = [shared.compare(lambda budget=budget: H2OCache(model, budget=budget), chunk=5)[0] for budget in (10, 20)]
    hook.remove()
    assert fed.count(CONTEXT - 1) == 1
    for budget, one in zip((10, 20), found, strict=True):
        reader = Reader(model, H2OCache(model, budget=budget))
        reader.read([window[: CONTEXT - 1] for window in windows])
        rows = [window[CONTEXT - 1 : CONTEXT + 4] for window in windows]
        scores = reader.read(rows, 5).log_softmax(-1)
        rows = [window[CONTEXT + 4 : CONTEXT + 9] for window in windows]
        scores = torch.cat([scores, reader.read(rows, 5).log_softmax(-1)], 1)
        targets = torch.tensor([window[CONTEXT:] for window in windows])
        loss = -scores.gather(-1, targets[..., None])[..., 0].double().mean(-1)
        torch.testing.assert_close(torch.tensor(one.loss).double(), loss, rtol=1e-5, atol=1e-5)
