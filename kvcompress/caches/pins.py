"""Tokens that an evicting cache never evicts: a system prompt, tools, images."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from kvcompress.storage.segment import EMPTY


class Pins:
    """Which tokens of each sequence stay, by their places in it.

    most: tokens that stay in a sequence, at most. spans: the same in all sequences; None where a mask says it.
    """

    def __init__(self, given: Sequence[tuple[int, int]] | Tensor) -> None:
        """
        Args:
            given: spans (first, last) of places in each sequence, padding not counted, both ends included; or a mask
                [batch or 1, tokens], not 0 where the token stays, padding counted.

        Raises:
            TypeError: it is neither.
            ValueError: a span ends before it begins or begins before 0, or a mask has another number of dimensions.
        """
        self.spans: tuple[tuple[int, int], ...] | None = None
        self.mask: Tensor | None = None
        self._given: Tensor | None = None
        # which places stay, [batch or 1, places] bool; None before the first forward
        self.places: Tensor | None = None
        if isinstance(given, Tensor):
            if given.dim() != 2 or given.is_floating_point() or given.is_complex():
                raise ValueError(
                    "a mask of pinned tokens must be [batch, tokens] of bool or integers, got "
                    f"{list(given.shape)} of {str(given.dtype).removeprefix('torch.')}"
                )
            self.mask = self._given = given.detach() != 0
            self.most = int(self.mask.sum(-1).max()) if self.mask.numel() else 0
        else:
            self.spans = _read(given)
            self.most = sum(last + 1 - first for first, last in _joined(self.spans))

    @classmethod
    def of(cls, given: "Sequence[tuple[int, int]] | Tensor | Pins | None") -> Self | None:
        """None where nothing is pinned."""
        pins = given if isinstance(given, cls) or given is None else cls(given)  # type: ignore[arg-type]
        return pins if pins is not None and pins.most else None

    def facts(self) -> Any:
        """What JSON can hold of it, for `restored`; where a mask says which tokens stay, how many they are at most."""
        return self.most if self.spans is None else [list(span) for span in self.spans]

    @classmethod
    def restored(cls, facts: Any) -> Self | None:
        """What `facts` told, without what a mask says, which is among `tensors`."""
        if not isinstance(facts, int):
            return None if facts is None else cls([(first, last) for first, last in facts])
        pins = cls([])
        pins.spans, pins.most = None, facts
        return pins

    def check_rows(self, batch: int) -> None:
        """Raises ValueError if so many sequences cannot be those of the mask, before the first forward."""
        if self.mask is not None and self.places is None and batch % len(self.mask):
            raise ValueError(f"the mask of pinned tokens is of {len(self.mask)} sequences, but {batch} are fed")

    def note(self, past: int, tokens: int, lengths: Tensor | None, visible: Tensor | None, like: Tensor) -> None:
        """Takes in which tokens of a forward stay.

        Args:
            past: columns before. tokens: fed now. lengths: real tokens of each sequence before, [batch]; None: none.
            visible: [batch, tokens] bool, False for padding; None where there is none.
            like: a tensor [batch, ...] on the device.

        Raises:
            ValueError: the mask is of another number of sequences.
        """
        batch, device, mask = len(like), like.device, self.mask
        if mask is None or past >= mask.shape[1]:
            return
        self.check_rows(batch)
        if len(mask) != batch:
            # generate makes several of each
            mask = mask.repeat_interleave(batch // len(mask), 0)
        mask = self.mask = mask.to(device)
        if self.places is None:
            self.places = torch.zeros(batch, mask.shape[1], dtype=torch.bool, device=device)
        now = mask[:, past : past + tokens]
        shown = torch.ones_like(now) if visible is None else visible[:, : now.shape[1]]
        place = shown.long().cumsum(-1) - 1 + (0 if lengths is None else lengths[:, None])
        row, column = (now & shown).nonzero(as_tuple=True)
        self.places[row, place[row, column]] = True

    def note_rest(self, past: int, lengths: Tensor, visible: Tensor | None) -> None:
        """Takes in what the mask says of tokens to come, as steps that are compiled will not: all of them are real.

        Args:
            past, lengths: as in `note`. visible: of the tokens seen, [batch, tokens] bool; None where none is padding.
        """
        mask = self.mask
        if mask is None or past >= mask.shape[1] or (visible is not None and not bool(visible[:, -1].all())):
            return
        self.note(past, mask.shape[1] - past, lengths, None, lengths)

    def holds(self, positions: Tensor) -> Tensor:
        """Which of these stay, of positions [batch, kv_heads, any] int32."""
        places = self._places_of_spans(positions.device) if self.spans is not None else self.places
        if places is None:
            return torch.zeros_like(positions, dtype=torch.bool)
        width = places.shape[1]
        within = (positions >= 0) & (positions < width)
        places = places.to(positions.device)[:, None].expand(len(positions), positions.shape[1], width)
        return within & places.gather(2, positions.clamp(0, width - 1).long())

    def _places_of_spans(self, device: torch.device) -> Tensor:
        if self.places is None:
            assert self.spans is not None
            self.places = torch.zeros(1, 1 + max(last for _, last in self.spans), dtype=torch.bool, device=device)
            for first, last in self.spans:
                self.places[:, first : last + 1] = True
        return self.places

    def remap(self, remap: Tensor) -> None:
        """Moves places as `PaddingRecord.remap` says, [batch, past tokens] int32."""
        if self.spans is not None or self.places is None:
            return
        held = self.places[:, : remap.shape[1]]
        row, place = (held & (remap[:, : held.shape[1]] != EMPTY)).nonzero(as_tuple=True)
        self.places = torch.zeros_like(self.places)
        self.places[row, remap[row, place].long()] = True

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replaces what is known of each sequence by `change(tensor)`, of tensors [batch, ...]."""
        if self.spans is None and self.places is not None:
            self.places = change(self.places)
            if self.mask is not None:
                self.mask = change(self.mask)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that it holds, by name."""
        held = {"places": self.places, "mask": self.mask, "given": self._given}
        return {f"pins.{name}": tensor for name, tensor in held.items() if tensor is not None}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `tensors` returned."""
        self.places, self.mask, self._given = (tensors.get(f"pins.{name}") for name in ("places", "mask", "given"))

    def reset(self) -> None:
        """Forgets the sequences; spans, and a mask as it was given, are those of the next ones too."""
        self.places, self.mask = None, self._given


def _joined(spans: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    """The same places in spans that do not overlap."""
    found: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return found


def _read(given: Any) -> tuple[tuple[int, int], ...]:
    try:
        spans = tuple((operator.index(first), operator.index(last)) for first, last in given)
    except (TypeError, ValueError):
        raise TypeError(
            f"pin must be spans of tokens such as [(0, 31), (100, 119)], or a mask [batch, tokens], got {given!r}"
        ) from None
    for first, last in spans:
        if not 0 <= first <= last:
            raise ValueError(
                f"a span of pinned tokens must be (first, last) with 0 <= first <= last, got {first, last}"
            )
    return spans
