"""What a mask of transformers lets tokens see beside those before them: the later ones of a span, such as an image.

A mask comes as a function of a query's column and a key's, put together from a few parts. It is read, and never run on
all pairs. What is found goes to the attention as one number for each column, [batch, 1, 1, columns] int32: 0 for
padding, 1 for a token, and 1 + n for a token of span n, whose tokens see one another both ways. A model that makes
masks twice, for all of it and for its decoder, passes on what has four dimensions.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

# what makes masks that only hide
_HIDING = ("sliding_window_overlay", "chunked_overlay")
# by what makes masks, what they are called
_MADE = {"and_masks": "and_mask", "or_masks": "or_mask"}


def spans_of(mask_function: Callable[..., Any]) -> Tensor | None:
    """The spans of a mask, [batch, columns] int64 as transformers numbers them, negative where there is none; None if
    the mask is not made of the past and of spans alone."""
    # a span's later tokens are in every window
    within = _but_windows(mask_function)
    parts = _parts(within[0], "or") if len(within) == 1 else []
    ids = [numbers for part in parts if (numbers := _ids(part)) is not None]
    past = [part for part in parts if _but_windows(part) == [causal_mask_function]]
    if len(parts) != 2 or len(ids) != 1 or len(past) != 1:
        return None
    windows = [window for part in _parts(past[0], "and") if (window := _window(part)) is not None]
    # else a token sees its span's first ones, which have left its window
    return ids[0] if not windows or _longest(ids[0]) <= min(windows) else None


def shows_nothing_more(mask_function: Any) -> bool:
    """Whether a mask is known to show no more than the past, within a window or a chunk: it has no spans, or they name
    no token."""
    pending = [mask_function]
    while pending:
        function = pending.pop()
        if getattr(function, "__module__", None) != causal_mask_function.__module__:
            return False
        if _made_by("and_masks", function) or _made_by("or_masks", function):
            pending += _enclosed(function)["mask_functions"]
        elif (ids := _ids(function)) is not None:
            if bool((ids >= 0).any()):
                return False
        elif function is not causal_mask_function and not any(_made_by(each, function) for each in _HIDING):
            return False
    return True


def with_spans(shown: Tensor | None, ids: Tensor, kv_length: int, q_length: int) -> Tensor:
    """A padding mask with spans in it, [batch, 1, 1, columns] int32.

    Args:
        shown: [batch, columns] bool, or None for no padding. ids: as `spans_of` gives them, from column 0 on.

    Raises:
        ValueError: a span of the new columns goes on in later ones.
    """
    past, ids = kv_length - q_length, ids.to(torch.int32)
    for row, numbers in enumerate(ids if ids.shape[1] > kv_length else ()):
        fresh, later = numbers[past:kv_length], numbers[kv_length:]
        if bool(torch.isin(fresh[fresh >= 0], later).any()):
            raise ValueError(
                f"tokens of a span, such as an image, see one another both ways, and a span of row {row} goes on after "
                f"the {int(kv_length)} tokens seen and fed so far: feed it whole, in one forward"
            )
    columns = torch.nn.functional.pad(ids[:, :kv_length], (0, max(0, kv_length - ids.shape[1])), value=-1)
    numbered = columns.clamp(min=-1) + 2
    # those seen before show nothing later
    numbered[:, :past] = 1
    if shown is not None:
        numbered = numbered[:, -shown.shape[1] :].masked_fill(~shown.to(numbered.device), 0)
    return numbered[:, None, None]


def as_columns(shown: Tensor) -> Tensor:
    """A padding mask [batch, columns] in four dimensions, [batch, 1, 1, columns] int8; no columns for no padding."""
    return shown[:, None, None].to(torch.int8)


def shown_and_spans(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """What `with_spans` put into a mask: which columns are tokens, and their spans, 0 for none, [batch, columns]; what
    `as_columns` did, and None; of any other mask that mask, and None."""
    if mask is not None and mask.dtype == torch.int8 and mask.dim() == 4 and mask.shape[1:3] == (1, 1):
        return (mask[:, 0, 0] != 0 if mask.shape[-1] else None), None
    if mask is None or mask.dtype != torch.int32 or mask.dim() != 4 or mask.shape[1:3] != (1, 1):
        return mask, None
    numbers = mask[:, 0, 0]
    return numbers != 0, (numbers - 1).clamp(min=0)


def _parts(function: Callable[..., Any], how: str) -> list[Callable[..., Any]]:
    """What a mask is a union ("or") or an intersection ("and") of; else the mask itself."""
    if _made_by(f"{how}_masks", function):
        return [*_enclosed(function)["mask_functions"]]
    return [function]


def _but_windows(function: Callable[..., Any]) -> list[Callable[..., Any]]:
    """What a mask is an intersection of, beside windows."""
    return [part for part in _parts(function, "and") if _window(part) is None]


def _window(function: Callable[..., Any]) -> int | None:
    return _enclosed_by("sliding_window_overlay", function, "sliding_window")


def _ids(function: Callable[..., Any]) -> Tensor | None:
    return _enclosed_by("blockwise_overlay", function, "block_sequence_ids")


def _enclosed_by(maker: str, function: Callable[..., Any], name: str) -> Any:
    return _enclosed(function).get(name) if _made_by(maker, function) else None


def _made_by(maker: str, function: Callable[..., Any]) -> bool:
    return getattr(function, "__qualname__", "") == f"{maker}.<locals>.{_MADE.get(maker, 'inner_mask')}"


def _enclosed(function: Callable[..., Any]) -> Any:
    return inspect.getclosurevars(function).nonlocals


def _longest(ids: Tensor) -> int:
    """How many columns lie from the first token of a span to its last, at most."""
    column = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    most = 0
    for row, columns in zip(ids, column, strict=True):
        for number in row[row >= 0].unique().tolist():
            of_span = columns[row == number]
            most = max(most, int(of_span[-1] - of_span[0]) + 1)
    return most
