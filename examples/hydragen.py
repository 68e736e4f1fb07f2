"""64 questions about one document, with the document run and stored once: python examples/hydragen.py"""

import pydoc_data.topics
import time

from transformers import DynamicCache

from kvcompress import HydragenCache, load_model

WORDS = ["for", "else", "break", "continue", "range", "target list", "iterable", "StopIteration"]
ASKED = ["What is {}?", "When is {} used?", "Show {} in a line of code.", "Can {} be left out?"]
ASKED += ["What follows {}?", "Who needs {}?", "What does the text say about {}?", "Is {} an error?"]


def main(questions: int = 64, new_tokens: int = 32, compare: bool = True) -> list[list[str]]:
    model, tokenizer = load_model()
    texts = [
        f"<|im_start|>user\n{pydoc_data.topics.topics['for']}\n{ask.format(word)}<|im_end|>\n<|im_start|>assistant\n"
        for word in WORDS
        for ask in ASKED
    ][:questions]
    prompts = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    answers = []
    print(f"{'':<14} {'seconds':>8} {'tokens/s':>9} {'cache':>10}")
    for name in ["HydragenCache", "DynamicCache"][: 1 + compare]:
        start = time.perf_counter()
        # finds what the prompts share, runs it once, and reports it as seen
        cache = HydragenCache(model, **prompts) if name == "HydragenCache" else DynamicCache()
        out = model.generate(**prompts, cache=cache, max_new_tokens=new_tokens, do_sample=False)
        took = time.perf_counter() - start
        tensors = [tensor for layer in cache.layers for tensor in vars(layer).values() if hasattr(tensor, "nbytes")]
        size = cache.memory().total_bytes if name == "HydragenCache" else sum(tensor.nbytes for tensor in tensors)
        print(f"{name:<14} {took:8.1f} {questions * new_tokens / took:9.1f} {size / 2**20:6.0f} MiB")
        answers.append(tokenizer.batch_decode(out[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


if __name__ == "__main__":
    main()
