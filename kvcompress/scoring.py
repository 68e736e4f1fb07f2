"""How likely a model finds what could follow the tokens that a cache holds: answers to choose from, a held-out text.

cache = store.prefix(document_ids)
texts = [tokenizer(answer, add_special_tokens=False).input_ids for answer in answers]
choices = logprobs(cache, texts)  # the document is read once for all
best = max(range(len(choices)), key=lambda choice: float(choices[choice].sum()))
"""

import operator
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from kvcompress import hf
from kvcompress.cache import CompressedCache
from kvcompress.prefix.cache import HydragenCache


@overload
def logprobs(
    cache: CompressedCache,
    continuations: Tensor,
    *,
    last_logits: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor: ...


@overload
def logprobs(
    cache: CompressedCache,
    continuations: Sequence[Sequence[int] | Tensor],
    *,
    last_logits: Tensor | None = None,
    chunk_size: int | None = None,
) -> list[Tensor]: ...


@torch.no_grad()
def logprobs(
    cache: CompressedCache,
    continuations: Tensor | Sequence[Sequence[int] | Tensor],
    *,
    last_logits: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor | list[Tensor]:
    """The log-probability of each token of texts that continue a cache's rows, the first tokens' too.

    What comes first in a text is not its beginning: tokenize it with add_special_tokens=False.

    The cache stays as it is: a copy reads the continuations. Copies of a `HydragenCache` share all that it holds, so
    many answers to one document cost little more than their own tokens; another cache is copied whole for each of them.

    The first tokens need the model's logits after the last token that the cache has seen. A `HydragenCache`, so what a
    `PrefixStore` returns, knows that token and reads it again; with another cache pass `last_logits`, which the forward
    or generation that filled it returned.

    Args:
        cache: one that has seen tokens.
        continuations: token ids, a tensor [rows, tokens] or [tokens], or a list of sequences of any lengths. As many as
            the cache has rows, or several times as many: those of a row are adjacent.
        last_logits: [rows of the cache, vocabulary], such as `model(ids, cache=cache, logits_to_keep=1).logits[:, -1]`.
        chunk_size: read at most so many tokens in one forward. Logits then take less memory, and caches that compress
            do so after each. None: all at once.

    Returns:
        Natural logarithms in float32: a tensor of the shape of `continuations`, or a list with one [tokens] each.

    Raises:
        ValueError: the cache is empty, its model is gone or gives images positions of several axes, the number of
            continuations does not fit its rows, one is empty or holds what is no token id; or `last_logits` is needed,
            or has another shape.
    """
    if not isinstance(cache, CompressedCache):
        raise TypeError(f"logprobs takes a kvcompress cache, such as HydragenCache, got {type(cache).__name__}")
    model: Any = cache._model()
    if model is None:
        raise ValueError(f"the model of this {type(cache).__name__} has been deleted; scoring needs it")
    if hf.has_several_axes(model):
        raise ValueError(
            f"{type(model).__name__} gives images positions of several axes, and a cache does not know those of what "
            "it holds: score continuations by a forward of the model"
        )
    rows = cache.batch_size
    if rows < 1 or not int(cache.get_seq_length()):
        raise ValueError(f"logprobs continues what a cache has seen, but this {type(cache).__name__} is empty")
    if chunk_size is not None and (isinstance(chunk_size, bool) or operator.index(chunk_size) < 1):
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        raise ValueError(f"logprobs needs a model with a language head, got {type(model).__name__}")
    size = head.weight.shape[0]
    texts = _sequences(continuations, size)
    if not texts or len(texts) % rows:
        raise ValueError(
            f"the cache has {rows} rows: logprobs needs one continuation or more of each, got {len(texts)}"
        )
    if last_logits is not None and tuple(getattr(last_logits, "shape", ())) != (rows, size):
        got = list(last_logits.shape) if isinstance(last_logits, Tensor) else type(last_logits).__name__
        raise ValueError(f"last_logits must be [rows, vocabulary] = [{rows}, {size}], got {got}")

    device = hf.input_device(model)
    # what follows a text's end does not change what is said of it
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True).to(device)
    copy = _copy(cache, len(texts) // rows)
    found: list[Tensor] = []
    if last_logits is None:
        # the token before each one that is scored
        fed = torch.cat([_step_back(copy), ids[:, :-1]], 1)
    else:
        first = last_logits.repeat_interleave(len(texts) // rows, 0)[:, None]
        found.append(_chosen(first, ids[:, :1]))
        fed = ids[:, :-1]
    wanted = ids[:, ids.shape[1] - fed.shape[1] :]
    step = max(1, fed.shape[1]) if chunk_size is None else chunk_size
    for tokens, scored in zip(fed.split(step, 1), wanted.split(step, 1), strict=True):
        if tokens.numel():
            found.append(_chosen(_read(model, copy, tokens), scored))
    whole = torch.cat(found, 1)
    if isinstance(continuations, Tensor):
        return whole.reshape(continuations.shape)
    return [row[: len(text)] for row, text in zip(whole, texts, strict=True)]


def _sequences(continuations: Tensor | Sequence[Sequence[int] | Tensor], size: int) -> list[Tensor]:
    """The continuations, each [tokens] int64 on the CPU; `size` is that of the vocabulary."""
    if isinstance(continuations, Tensor):
        if continuations.dim() not in (1, 2):
            raise ValueError(f"continuations must be [rows, tokens] or [tokens], got {list(continuations.shape)}")
        continuations = list(continuations) if continuations.dim() == 2 else [continuations]
    texts = []
    for number, text in enumerate(continuations):
        try:
            ids = torch.as_tensor(text)
        except (RuntimeError, TypeError, ValueError):
            raise ValueError(f"continuations must be token ids; number {number} is {text!r}") from None
        if ids.dim() != 1 or not ids.numel():
            raise ValueError(
                f"each continuation must be token ids [tokens], at least one; number {number} is {list(ids.shape)}"
            )
        if ids.is_floating_point() or ids.dtype == torch.bool or int(ids.min()) < 0 or int(ids.max()) >= size:
            raise ValueError(
                f"continuations must be token ids, integers from 0 to {size - 1}; number {number} is {ids.dtype}, from "
                f"{ids.min().item()} to {ids.max().item()}"
            )
        texts.append(ids.long().cpu())
    return texts


def _copy(cache: CompressedCache, copies: int) -> CompressedCache:
    """A cache with so many copies of each row, adjacent."""
    copy = cache.clone()
    # nothing that it is fed ends a row
    copy.fillers = (None, [])
    if copies > 1:
        if isinstance(copy, HydragenCache):
            copy._suffix_to_node()
        copy.batch_repeat_interleave(copies)
    return copy


def _step_back(cache: CompressedCache) -> Tensor:
    """Has a cache expect each row's last token again; returns those, [rows, 1]."""
    if not isinstance(cache, HydragenCache):
        raise ValueError(
            f"a {type(cache).__name__} does not hold what the model says after its last token: pass last_logits, such "
            "as model(ids, cache=cache, logits_to_keep=1).logits[:, -1]"
        )
    return cache._step_back()


def _read(model: Any, cache: CompressedCache, tokens: Tensor) -> Tensor:
    """Feeds tokens [rows, tokens] to a cache; returns their logits."""
    mask = cache.cover(torch.ones_like(tokens))
    logits: Tensor = model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1)[:, -tokens.shape[1] :],
        use_cache=True,
        **hf.cache_argument(model, cache),
    ).logits
    return logits


def _chosen(logits: Tensor, tokens: Tensor) -> Tensor:
    """The log-probabilities of tokens [rows, tokens], by logits [rows, tokens, vocabulary]."""
    of_tokens = logits.float().log_softmax(-1).gather(-1, tokens.to(logits.device)[..., None])
    return of_tokens[..., 0]
