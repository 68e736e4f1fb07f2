"""Two caches and two models at once: nothing is shared but weights and settings."""

import pytest
import torch

from tests.contract.caches import by_name, every_cache
from tests.contract.drive import feed, full, generate
from tests.contract.models import build, prompt, tiny


@every_cache
def test_two_caches_of_one_model_do_not_meet(entry):
    model = tiny()
    alone, logits = [], []
    for seed in (1, 2):
        cache = entry.build(model)
        alone.append([feed(model, cache, chunk) for chunk in chunks(seed)])
    one, two = entry.build(model), entry.build(model)
    for first, second in zip(chunks(1), chunks(2), strict=True):
        logits.append((feed(model, one, first), feed(model, two, second)))
    for step, (first, second) in enumerate(logits):
        assert torch.equal(first, alone[0][step])
        assert torch.equal(second, alone[1][step])


@every_cache
def test_two_models_and_their_caches_do_not_meet(entry):
    llama, gemma = tiny("llama"), tiny("gemma2")
    alone = []
    for model in (llama, gemma):
        cache = entry.build(model)
        alone.append([feed(model, cache, chunk) for chunk in chunks(1)])
    one, two = entry.build(llama), entry.build(gemma)
    for step, chunk in enumerate(chunks(1)):
        assert torch.equal(feed(llama, one, chunk), alone[0][step])
        assert torch.equal(feed(gemma, two, chunk), alone[1][step])


@every_cache
def test_a_cache_serves_another_model_of_the_same_shape(entry):
    """A fine-tuned twin: what matters is that its attention was selected too."""
    first, twin = build("llama", seed=0), build("llama", seed=1)
    entry.build(twin)
    cache = entry.build(first)
    if entry.of_one_model:
        with pytest.raises(ValueError, match="another model"):
            generate(twin, cache, prompt(20))
        return
    assert torch.equal(generate(twin, cache, prompt(20)), generate(twin, entry.build(twin), prompt(20)))


@every_cache
def test_caches_of_two_kinds_and_no_cache_take_turns(entry):
    model = tiny()
    wanted = generate(model, entry.build(model), prompt(20))
    full_answer = full(model, prompt(20))
    dense = by_name["dense"].build(model)
    cache = entry.build(model)
    feed(model, cache, prompt(20)[:, :-1])
    feed(model, dense, prompt(20)[:, :-1])
    with torch.no_grad():
        model(prompt(20))
    assert torch.equal(full(model, prompt(20)), full_answer)
    assert torch.equal(generate(model, dense, prompt(20)), full_answer)
    again = entry.build(model)
    assert torch.equal(generate(model, again, prompt(20)), wanted)


def chunks(seed):
    return prompt(30, 2, seed=seed).split([15, 1, 1, 5, *[1] * 8], 1)
