"""Adding a policy, as a guide shows it: a frozen dataclass and one method."""

import re

import torch

from kvcompress import EvictingCache
from tests.contract.drive import feed
from tests.contract.models import prompt, tiny
from tests.test_readme import ROOT


# README: A policy of your own is a scoring function
# docs: A policy is a scoring function
def test_the_guides_policy_decides_what_a_cache_keeps_and_is_found_again_in_a_file(tmp_path):
    guide = (ROOT / "docs/guides/choosing.md").read_text("utf-8")
    (snippet,) = [block for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if "(Policy)" in block]
    model, ids = tiny("llama"), prompt(20, batch=2)
    names = {"__name__": __name__, "EvictingCache": EvictingCache, "model": model, "inputs": {"input_ids": ids}}
    exec(snippet, names)
    assert isinstance(names["cache"], EvictingCache)
    policy = type(names["cache"].policy)(recent=2)

    cache, full = (EvictingCache(model, policy=policy, budget=budget) for budget in (8, 100))
    for each in (cache, full):
        feed(model, each, ids)
    for layer, whole in zip(cache.layers, full.layers, strict=True):
        order = whole.slots.positions.where(whole.slots.positions >= 0, 99).argsort(-1)[..., :20]
        norms = whole.slots.values.norm(dim=-1).gather(-1, order)
        norms[..., -2:] = torch.inf
        kept = norms.topk(8, -1).indices.sort(-1).values
        assert torch.equal(layer.slots.positions.sort(-1).values[..., -8:].long(), kept)
        # layers see what earlier ones kept only from the next forward on
    cache.save(tmp_path / "cache.safetensors")
    assert EvictingCache.load(tmp_path / "cache.safetensors", model).policy == policy
