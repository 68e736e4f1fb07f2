"""Trains a SwiftKV model briefly, and lets its prompt skip a third of the layers: python examples/swiftkv.py"""

import pydoc_data.topics
import tempfile
from pathlib import Path

from kvcompress import SwiftKVCache, convert, load_model
from kvcompress.swiftkv.data import read_rows
from kvcompress.swiftkv.distill import Distillation, distill


def main(steps: int = 20, length: int = 256, new_tokens: int = 32) -> SwiftKVCache:
    base, tokenizer = load_model()
    # the last 10 of 30 layers, in pairs that share one set of keys and values; the base model is not changed
    model = convert(base, skip_from=20, share=2)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text("\n\n".join(pydoc_data.topics.topics[name] for name in ("for", "while", "with", "try")))
        settings = Distillation(steps=steps, length=length, learning_rate=1e-3)
        # far from enough: the paper trains on 680 million tokens
        distill(model, read_rows([text], tokenizer, length), settings, folder, lambda line: print(line["loss"]))

    inputs = tokenizer("The for statement is used to iterate over", return_tensors="pt")
    cache = SwiftKVCache(model)
    output = model.generate(**inputs, cache=cache, max_new_tokens=new_tokens, do_sample=False)
    print(tokenizer.decode(output[0]))
    print(cache.memory())
    return cache


if __name__ == "__main__":
    main()
