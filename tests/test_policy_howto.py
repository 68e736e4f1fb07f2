"""Adding a policy, as the README shows it: a frozen dataclass and one method."""

from dataclasses import dataclass

import torch

from kvcompress import EvictingCache
from kvcompress.hf import cache_argument
from kvcompress.policies.policy import Candidates, Policy
from tests.contract.models import prompt, tiny


# the README's ten lines
@dataclass(frozen=True, kw_only=True)
class KeepEveryOther(Policy):
    """Every `stride`-th token of the text, and the newest."""

    stride: int = 2

    def score(self, candidates: Candidates) -> torch.Tensor:
        return (candidates.positions % self.stride == 0).float()


def test_a_policy_of_ten_lines_decides_what_a_cache_keeps(tmp_path):
    model, ids = tiny("llama"), prompt(20, batch=2)
    cache = EvictingCache(model, policy=KeepEveryOther(sinks=1), budget=12)
    model.generate(ids, **cache_argument(model, cache), max_new_tokens=4, do_sample=False, disable_compile=True)
    # 23 tokens were fed: of 0, 2, ..., 22 all 12 have a place
    kept = cache.layers[0].slots.positions.sort(-1).values[..., 1:]
    assert kept.tolist() == [[list(range(0, 23, 2))] * 2] * 2

    cache.save(tmp_path / "cache.safetensors")
    assert EvictingCache.load(tmp_path / "cache.safetensors", model).policy == KeepEveryOther(sinks=1)
