"""Shares of the budget per layer and KV head, measured once for a model and kept in a file.

Which heads need many tokens is mostly the model's doing and little the text's (LU-KV, arXiv:2602.08585), so what was
measured on some texts serves others, and policies whose scores do not compare across heads. The paper has a curve per
head, over the ratios of compression; here a head has one share, of which `kvcompress/caches/allotment.py` makes numbers
of tokens. `kvcompress/caches/profiling.py` measures one.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import hf
from kvcompress.hf.tensor_parallel import TPGroup
from kvcompress.storage.durable import write_whole
from kvcompress.storage.tensor_file import TensorFile, told, write_tensors

_FORMAT = "kvcompress-profile-1"
_SHARES = "shares"
# how far the mean may be from 1, for sums of rounded numbers
_TOLERANCE = 1e-4


@dataclass(frozen=True, repr=False)
class Profile:
    """Each head's share of the budget, to be a cache's `allocation`.

        profile = Profile.load("profile.safetensors")
        cache = H2OCache(model, budget=512, allocation=profile)

    shares: of each layer, of each of its KV heads; 1 on average over all heads of all layers.
    model: of which model; a cache refuses it for another one.
    measured: how they were measured, as facts that JSON can hold: policy, budgets, texts.

    Raises:
        ValueError: shares are not [layers, kv_heads], negative or not finite, or not 1 on average.
    """

    shares: tuple[tuple[float, ...], ...]
    model: hf.Fingerprint
    measured: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        shares = _rows(self.shares)
        mean = math.fsum(map(math.fsum, shares)) / (len(shares) * len(shares[0]))
        if abs(mean - 1.0) > _TOLERANCE:
            raise ValueError(f"shares must be 1 on average over all heads of all layers, got {mean:.6g}")
        object.__setattr__(self, "shares", shares)

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        shares: Tensor | Sequence[Sequence[float]],
        measured: Mapping[str, Any] | None = None,
    ) -> Self:
        """A profile of one's own for a model.

        Args:
            shares: [layers, kv_heads], in proportion to what heads are to have.
            measured: how they were found.

        Raises:
            ValueError: they are not of the model's size, negative, not finite, or all 0; or its layers differ in their
                number of KV heads.
        """
        rows = _rows(shares)
        layers = hf.layer_heads(hf.text_config(model))
        _check_size(rows, len(layers), heads_that_share(layers, type(model).__name__), type(model).__name__)
        most = max(map(max, rows))
        if not most:
            raise ValueError("shares must be more than 0 for some head, got 0 for all")
        parts = [[share / most for share in row] for row in rows]
        mean = math.fsum(map(math.fsum, parts)) / (len(rows) * len(rows[0]))
        scaled = tuple(tuple(part / mean for part in row) for row in parts)
        found = hf.Fingerprint.of(model)
        return cls(scaled, found if TPGroup.of(model) is None else found.of_config(), measured or {})

    def check(self, model: PreTrainedModel) -> None:
        """Raises ValueError unless this is the model that the profile was made for."""
        heads_that_share(hf.layer_heads(hf.text_config(model)), type(model).__name__)
        own, given = self.model, hf.Fingerprint.of(model)
        if not own.weights or TPGroup.of(model) is not None:
            own, given = own.of_config(), given.of_config()
        own.check(given, "the profile")

    def check_size(self, layers: int, kv_heads: int, model: str) -> None:
        """Raises ValueError unless it has a share for each KV head of a model of which only the sizes are known."""
        _check_size(self.shares, layers, kv_heads, model)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it to one safetensors file, which replaces an existing one only when it is complete.

        Raises:
            ValueError: the facts cannot be held by JSON.
            OSError: the file cannot be written; an existing one is still there.
        """
        path = Path(path)
        facts = {"fingerprint": dataclasses.asdict(self.model), "measured": self._told()}
        shares = torch.tensor(self.shares, dtype=torch.float64)

        def write(file: BinaryIO) -> str:
            write_tensors(file, _FORMAT, facts, lambda: iter([({_SHARES: shares}, {})]))
            return path.name

        write_whole(path.parent, path.name, write)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a profile that `save` wrote.

        Raises:
            ValueError: the file is no profile, or is damaged.
            OSError: it cannot be read.
        """
        with TensorFile(path) as file:
            file.check_format(_FORMAT, "a profile", "kvcompress profile or measure_profile")
            try:
                facts = json.loads(file.metadata["facts"])
                shares = _rows(file.tensor(_SHARES))
                model, measured = hf.Fingerprint(**facts["fingerprint"]), dict(facts["measured"])
            except (KeyError, TypeError) as error:
                raise ValueError(
                    f"{file.path} holds no profile that this release of kvcompress reads ({error}); measure it again"
                ) from error
        return cls(shares, model, measured)

    def facts(self) -> dict[str, Any]:
        """What a saved cache holds of it, beside its own fingerprint of the model; ValueError as in `save`."""
        return {"shares": [list(row) for row in self.shares], "measured": self._told()}

    def _told(self) -> dict[str, Any]:
        """How it was measured, as a file holds it."""
        return told(self.measured, "how the profile was measured")

    def __repr__(self) -> str:
        every = [share for row in self.shares for share in row]
        size = f"{len(self.shares)} layers x {len(self.shares[0])} KV heads"
        return f"<Profile of {self.model.architecture}: {size}, shares {min(every):.2f} to {max(every):.2f}>"

    def __str__(self) -> str:
        """The model, how it was measured, and the shares of each layer's heads."""
        rows = [
            f"layer {index:>3}  {' '.join(f'{share:6.3f}' for share in row)}" for index, row in enumerate(self.shares)
        ]
        return "\n".join([*self.model.lines(self.measured), *rows])


def heads_that_share(layers: Sequence[hf.LayerHeads], model: str) -> int:
    """The KV heads of each layer of a model that a profile can be of; ValueError where layers differ."""
    counts = sorted({own.kv_heads for own in layers})
    if len(counts) > 1:
        raise ValueError(
            f"a profile has equally many shares for every layer, and {model} has layers of "
            f"{' and '.join(map(str, counts))} KV heads: let heads compete, or use another allocation"
        )
    return counts[0]


def _check_size(shares: tuple[tuple[float, ...], ...], layers: int, kv_heads: int, model: str) -> None:
    """Raises ValueError unless there is a share for each KV head."""
    if (len(shares), len(shares[0])) != (layers, kv_heads):
        raise ValueError(
            f"shares must be [layers={layers}, kv_heads={kv_heads}] for {model}, got [{len(shares)}, {len(shares[0])}]"
        )


def _rows(shares: Any) -> tuple[tuple[float, ...], ...]:
    """Shares as tuples of Python numbers.

    Raises:
        ValueError: they are not [layers, kv_heads], negative or not finite.
    """
    try:
        found = torch.as_tensor(shares, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"shares must be numbers, [layers, kv_heads]: {error}") from error
    if found.dim() != 2 or not found.numel():
        raise ValueError(f"shares must be [layers, kv_heads], got {list(found.shape)}")
    wrong = ~found.isfinite() | (found < 0)
    if bool(wrong.any()):
        layer, head = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"shares must be 0 or more, got {found[layer, head].item():g} for head {head} of layer {layer}"
        )
    return tuple(map(tuple, found.tolist()))
