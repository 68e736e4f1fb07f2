"""Decode compiles to one graph that serves every step, with the answers of eager mode."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.contract.caches import caches, those
from tests.contract.drive import assert_same_state, feed
from tests.contract.models import left_padded, prompt, tiny

STEPS = 200


def step_function(model):
    def step(token, position, cache):
        return model(token, position_ids=position, past_key_values=cache).logits

    return step


def decode(step, cache, token, position, steps):
    """Greedy decoding, token by token, as the compiled decode loop of `generate` does."""
    tokens = []
    with torch.no_grad():
        for _ in range(steps):
            token = step(token, position, cache)[:, -1:].argmax(-1)
            position = position + 1
            tokens.append(token)
    return torch.cat(tokens, 1)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@those(lambda entry: entry.compileable)
def test_the_promise_is_what_transformers_reads(entry):
    assert entry.build(tiny()).is_compileable


@caches("h2o", "snapkv", "tova", "streaming")
@pytest.mark.parametrize("family", ["llama"])
def test_two_hundred_steps_are_one_graph_and_the_tokens_of_eager_mode(entry, family):
    check(entry, family)


@pytest.mark.slow
@those(lambda entry: entry.compileable)
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt_neox", "qwen3", "phi3", "opt", "gpt_oss"])
def test_it_compiles_in_every_family(entry, family):
    check(entry, family)


def check(entry, family):
    if not entry.compileable:
        pytest.skip("not compileable")
    model = tiny(family)
    ids, mask = left_padded([prompt(20)[0], prompt(13, seed=2)[0]])
    cache, straight = entry.build(model), entry.build(model)
    for each in (cache, straight):
        logits = feed(model, each, ids, mask)
    token, position = logits[:, -1:].argmax(-1), mask.sum(-1, keepdim=True)
    backend = CompileCounterWithBackend("eager")
    compiled = torch.compile(step_function(model), fullgraph=True, backend=backend)
    ours = decode(compiled, cache, token, position, STEPS)
    assert backend.frame_count == 1, f"compiled {backend.frame_count} times"
    assert torch.equal(ours, decode(step_function(model), straight, token, position, STEPS))
    assert cache.get_seq_length() == 20 + STEPS
    assert_same_state(entry, cache, straight)
    # and eager mode takes over where the graph left
    assert torch.equal(feed_on(model, cache, mask), feed_on(model, straight, mask))


def feed_on(model, cache, mask):
    mask = torch.cat([mask, mask.new_ones(2, STEPS + 3)], 1)
    return feed(model, cache, prompt(3, 2), mask)
