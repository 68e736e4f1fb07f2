"""A tenth of a text answers for all of it: the same tokens forgotten, with weights and values fitted and without.

python examples/attention_matching.py
"""

import torch

from kvcompress import AttentionMatchingCache, DenseCache, KVzipCache, load_model

TEXT = """
The ferry leaves the northern quay at seven and at eleven, and in summer once more at five. It was built in 1962 by a
yard that no longer exists, and it carries twelve cars, a mail van and as many bicycles as will fit. Captain Ruth
Ekholm has steered it for nineteen years. The crossing takes thirty-five minutes when the sea is calm. On the island
there are two shops, a school with eleven children, a church with a leaking roof, and a bakery whose rye bread is sold
on the mainland too. The keeper of the lighthouse lives in the yellow house above the harbour and rings the bell in
fog. Letters are sorted in the back room of the larger shop by the owner's daughter, who knows every hand. The doctor
comes on Wednesdays with a black bag and stays for soup. In winter the ice is measured each morning, and when it is
thicker than a thumb is long the ferry stays in port, and the road across the ice is marked with branches of spruce.
"""
NEXT = " When the ferry does not leave, the mail waits in the shop, and the keeper of the lighthouse has no bread."


def main(budget: int | float = 0.1) -> dict[str, float]:
    """The divergence of each cache's next tokens from the full cache's, in nats."""
    model, tokenizer = load_model()
    text, continuation = (tokenizer(part, return_tensors="pt").input_ids for part in (TEXT.replace("\n", " "), NEXT))
    chances = {}
    for cache in (
        DenseCache(model),
        KVzipCache(model, budget=budget),
        AttentionMatchingCache(model, budget=budget),
    ):
        with torch.no_grad():
            model(text, cache=cache, logits_to_keep=1)
            report = cache.memory()
            chances[type(cache).__name__] = model(continuation, cache=cache).logits.log_softmax(-1)
        print(f"{type(cache).__name__}: {report.ratio:.0%} of the full cache's bytes")
    full = chances.pop("DenseCache")
    divergences = {name: float((full.exp() * (full - other)).sum(-1).mean()) for name, other in chances.items()}
    for name, divergence in divergences.items():
        print(f"{name}: {divergence:.3f} nats from the full cache")
    return divergences


if __name__ == "__main__":
    main()
