"""Your own policy in a few lines: keep the tokens whose values are large.

python examples/own_policy.py
"""

from dataclasses import dataclass

from torch import Tensor

from kvcompress import EvictingCache, load_model
from kvcompress.policies.policy import Candidates, Policy


@dataclass(frozen=True, kw_only=True)
class ValueNorm(Policy):
    recent: int | float = 0.25
    sinks: int = 4

    def score(self, candidates: Candidates) -> Tensor:
        return candidates.values.float().norm(dim=-1)


def main(new_tokens: int = 24) -> EvictingCache:
    model, tokenizer = load_model()
    inputs = tokenizer("The capital of France is Paris. " * 30 + "The capital of France is", return_tensors="pt")
    cache = EvictingCache(model, policy=ValueNorm(), budget=64)
    output = model.generate(**inputs, cache=cache, max_new_tokens=new_tokens, do_sample=False)
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))
    print(cache.memory())
    return cache


if __name__ == "__main__":
    main()
