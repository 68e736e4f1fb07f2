"""Perplexity of a text longer than the model was trained for, in constant memory.

    python -m kvcompress.evals.bench.stream

The text is read in chunks; a chunk attends to itself and to what the cache kept, and its loss is counted by where it
stands. Methods are written as in the registry, `h2o:rerotated=true:sinks=4`.
"""

import argparse
import pydoc_data.topics
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import load_model
from kvcompress.hf import cache_argument, sizes
from kvcompress.registry import build


@torch.no_grad()
def chunk_losses(model: PreTrainedModel, ids: Tensor, method: str, budget: int, chunk: int) -> list[float]:
    """Mean cross entropy of each chunk of ids [1, tokens], in nats a token; a chunk's last token is not scored."""
    cache = build(method, model, budget)
    losses = []
    for start in range(0, ids.shape[1], chunk):
        piece = ids[:, start : start + chunk]
        logits = model(piece, **cache_argument(model, cache)).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, piece[0, 1:]).item())
    return losses


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Perplexity along a text, past the length the model was trained for.")
    parser.add_argument("--model", help="hub id, folder or .gguf file; default: SmolLM2-135M-Instruct")
    parser.add_argument(
        "--methods", default="h2o:sinks=4,h2o:sinks=4:rerotated=true,streaming,streaming:rerotated=true"
    )
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=13312)
    parser.add_argument("--text", type=Path, help="UTF-8 file; default: Python's own documentation")
    parser.add_argument("--sections", type=int, default=4, help="equal parts of the text, a perplexity each")
    options = parser.parse_args(arguments)

    model, tokenizer = load_model(options.model)
    topics = pydoc_data.topics.topics
    text = options.text.read_text("utf-8") if options.text else "\n\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : options.tokens]
    print(f"{ids.shape[1]} tokens; the model was trained on {sizes(model.config).longest}")
    for method in options.methods.split(","):
        losses = torch.tensor(chunk_losses(model, ids, method, options.budget, options.chunk))
        parts = losses.tensor_split(min(options.sections, len(losses)))
        print(f"{method:<28}", *(f"{part.mean().exp().item():8.2f}" for part in parts), flush=True)


if __name__ == "__main__":
    main()
