"""Perplexity of a text longer than the model was trained for, in constant memory: kvcompress bench stream

The text is read in chunks; a chunk attends to itself and to what the cache kept, and its loss is counted by where it
stands. Methods are written as in the registry, `h2o:rerotated=true:sinks=4`.
"""

from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import load_model
from kvcompress.evals.sweep.samples import read_text
from kvcompress.hf import cache_argument, sizes
from kvcompress.registry import build


@torch.no_grad()
def chunk_losses(model: PreTrainedModel, ids: Tensor, method: str, budget: int, chunk: int) -> list[float]:
    """Mean cross entropy of each chunk of ids [1, tokens], in nats per token; a chunk's last token is not scored."""
    cache = build(method, model, budget)
    losses = []
    for start in range(0, ids.shape[1], chunk):
        piece = ids[:, start : start + chunk]
        logits = model(piece, **cache_argument(model, cache)).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, piece[0, 1:]).item())
    return losses


def main(
    model: Annotated[str | None, "hub id, folder or .gguf file; default: SmolLM2-135M-Instruct"] = None,
    methods: Annotated[str, "by commas"] = "h2o:sinks=4,h2o:sinks=4:rerotated=true,streaming,streaming:rerotated=true",
    budget: int = 512,
    chunk: Annotated[int, None, 1] = 512,
    tokens: Annotated[int, None, 2] = 13312,
    text: Annotated[Path | None, "UTF-8 file; default: Python's own documentation"] = None,
    sections: Annotated[int, "equal parts of the text, a perplexity each", 1] = 4,
) -> None:
    """Perplexity along a text, past the length the model was trained for."""
    loaded, tokenizer = load_model(model)
    ids = tokenizer(read_text(text), return_tensors="pt").input_ids[:, :tokens]
    if ids.shape[1] < 2:
        raise ValueError(f"text must hold at least 2 tokens, got {ids.shape[1]}")
    print(f"{ids.shape[1]} tokens; the model was trained on {sizes(loaded.config).longest}")
    for method in methods.split(","):
        losses = torch.tensor(chunk_losses(loaded, ids, method, budget, chunk))
        parts = losses.tensor_split(min(sections, len(losses)))
        print(f"{method:<28}", *(f"{part.mean().exp().item():8.2f}" for part in parts), flush=True)
