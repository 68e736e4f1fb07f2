"""Which cache for this model, this context and this much memory: the best that was measured of those that fit.

The caches come in the order of what they cost in quality. `measured` says what that was, with SmolLM2-135M: of needles
among other needles at 1,024 tokens, whose question was not foreseen, 50 samples, and of text (evals/results/README.md).
The order of a larger model may differ: `kvcompress sweep` measures yours.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from kvcompress import hf, registry
from kvcompress.cache import CompressedCache
from kvcompress.memory import read_bytes
from kvcompress.plan import Need, Shape, largest, make_plan, shape_of

# tokens of a prompt in a forward, where it has to be fed in chunks
_CHUNKS = (32768, 16384, 8192, 4096, 2048, 1024, 512)


@dataclass(frozen=True)
class Candidate:
    """A method with its budget, and what it kept of the full cache's quality where that was measured."""

    method: str
    budget: float | None
    measured: str

    @property
    def title(self) -> str:
        """For people."""
        return self.method if self.budget is None else f"{self.method} with a budget of {self.budget:g}"


_EXACT = Candidate("none", None, "exact")
UNFORESEEN = (
    _EXACT,
    Candidate("gear", None, "0.90 of needles, as the full cache has 0.96; text: KL of 0.004 nats"),
    Candidate("kvzip:bits=4", 0.5, "0.76 of needles, as the full cache has 0.96"),
    Candidate("kvzip:bits=4", 0.2, "0.64 of needles, as the full cache has 0.96"),
)
# methods that read once lose more of these than KVzip, also where the question is at the end of the prompt
FORESEEN = (
    _EXACT,
    Candidate("gear", None, "0.94 of needles, as the full cache has 0.96; text: KL of 0.004 nats"),
    Candidate("kvzip:bits=4", 0.5, "0.84 of needles, as the full cache has 0.96"),
    Candidate("kvzip:bits=4", 0.2, "0.60 of needles, as the full cache has 0.96"),
)


@dataclass(frozen=True)
class Choice:
    """The first candidate that fits, and what it needs, with the chunks in which its prompt is fed."""

    candidate: Candidate
    need: Need


def with_chunks(
    shape: Shape,
    method: str,
    context: int,
    batch: int,
    budget: int | float,
    dtype: torch.dtype,
    memory: int,
    *,
    chunk: int | None = None,
    weight_bits: int | None = None,
    with_weights: bool = True,
) -> Need:
    """What a method needs, its prompt fed in one forward if that fits, or else in the largest chunks that do.

    Args:
        memory: bytes. chunk: tokens of a forward, instead of these. with_weights: the weights are to fit, too.

    Returns:
        What the smallest chunks need, where nothing fits.

    Raises:
        ValueError: as `make_plan`.
    """

    def need(tokens: int | None) -> Need:
        found = make_plan(shape, [method], context, batch, budget, dtype, chunk=tokens, weight_bits=weight_bits)[0]
        return found if with_weights else replace(found, weights=0)

    if chunk is not None:
        return need(chunk)
    found = need(None)
    for tokens in [size for size in _CHUNKS if size < context]:
        if found.peak <= memory:
            break
        found = need(tokens)
    return found


def largest_context(
    shape: Shape, method: str, batch: int, budget: int | float, dtype: torch.dtype, memory: int, **how: Any
) -> int:
    """The longest context of so many sequences that fits into so many bytes, in chunks if need be; how: as
    `with_chunks` takes it."""

    def fits(context: int) -> bool:
        return with_chunks(shape, method, context, batch, budget, dtype, memory, **how).peak <= memory

    return largest(fits, 2**24)


def choose(
    shape: Shape,
    context: int,
    batch: int,
    dtype: torch.dtype,
    memory: int,
    *,
    question_known: bool = False,
    chunk: int | None = None,
    weight_bits: int | None = None,
    with_weights: bool = True,
) -> Choice | None:
    """The first candidate that fits; None if none does.

    Args:
        memory: bytes for weights, cache and prefill, or without weights for the latter two.
        question_known: what is asked is at the end of the prompt; else what is compressed must do for any question.

    Raises:
        ValueError: as `make_plan`.
    """
    for candidate in FORESEEN if question_known else UNFORESEEN:
        need = with_chunks(
            shape, candidate.method, context, batch, candidate.budget or 1.0, dtype, memory,
            chunk=chunk, weight_bits=weight_bits, with_weights=with_weights,
        )  # fmt: skip
        if need.peak <= memory:
            return Choice(candidate, need)
    return None


def auto_cache(
    model: PreTrainedModel,
    memory: int | str | None = None,
    context: int | None = None,
    *,
    batch: int = 1,
    question_known: bool = False,
) -> CompressedCache:
    """An empty cache for a model: the best that was measured of those that fit.

    `print(cache)` says what was chosen, why, and with which `prefill_chunk_size` its prompt fits.

    Args:
        memory: bytes for cache and prefill, beside the weights: a number, or "8GiB". None: what is free on the model's
            GPU.
        context: tokens that each sequence will have in the end. None: as many as the model was trained for.
        batch: sequences at a time.
        question_known: what is asked is at the end of the prompt; else what is compressed must do for any question.

    Raises:
        ValueError: nothing fits, memory is not told and the model is on no GPU, or a number is less than 1.
        TypeError: memory is neither a number nor a size.
    """
    shape = shape_of(model)
    if memory is None:
        if model.device.type != "cuda":
            raise ValueError(f"memory must be told for a model on {model.device.type}, such as memory='8GiB'")
        memory, _ = torch.cuda.mem_get_info(model.device)
    size = read_bytes("memory", memory)
    if context is None:
        context = hf.sizes(hf.text_config(model)).longest
        if context is None:
            raise ValueError("context must be told, as the model's config does not say for how many it was trained")
    choice = choose(shape, context, batch, model.dtype, size, question_known=question_known, with_weights=False)
    of_model = f"{context} tokens x batch {batch}"
    if choice is None:
        last = (FORESEEN if question_known else UNFORESEEN)[-1]
        most = largest_context(shape, last.method, batch, last.budget or 1.0, model.dtype, size, with_weights=False)
        raise ValueError(f"nothing fits {of_model} into {size / 2**30:.2f} GiB; with {last.title}, {most} tokens would")
    cache = registry.build(choice.candidate.method, model, choice.candidate.budget)
    assert isinstance(cache, CompressedCache)
    fed = "in one forward" if choice.need.chunk is None else f"with prefill_chunk_size={choice.need.chunk}"
    question = "known" if question_known else "not known"
    cache.chosen = (
        f"{choice.candidate.title}: the first that fits {of_model}, the question {question}, into "
        f"{size / 2**30:.2f} GiB: {choice.need.peak / 2**30:.2f} GiB at most, fed {fed}. "
        f"Measured on SmolLM2-135M: {choice.candidate.measured}"
    )
    return cache
