"""The full cache with the same interface, saved to a file and continued from it: python examples/dense.py"""

import tempfile
from pathlib import Path

from torch import Tensor

from kvcompress import DenseCache, load_model


def main(new_tokens: int = 16) -> tuple[Tensor, Tensor]:
    model, tokenizer = load_model()
    inputs = tokenizer("Once upon a time, in a library full of caches,", return_tensors="pt")
    cache = DenseCache(model)
    first = model.generate(**inputs, cache=cache, max_new_tokens=new_tokens, do_sample=False)
    with tempfile.TemporaryDirectory() as folder:
        cache.save(Path(folder) / "story.safetensors")
        again = DenseCache.load(Path(folder) / "story.safetensors", model)
    here = model.generate(first, cache=cache, max_new_tokens=new_tokens, do_sample=False)
    there = model.generate(first, cache=again, max_new_tokens=new_tokens, do_sample=False)
    print(tokenizer.decode(there[0]))
    print(cache.memory())
    return here, there


if __name__ == "__main__":
    main()
