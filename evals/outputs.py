"""The outputs of a model's attention layers, recorded from outside.

    error of a layer = mean over tokens of |compressed - full| / |full|        Euclidean norms of a token's output

Outputs are taken after the layer's output projection. A layer's input comes from the layers below with the same cache,
so its error includes theirs.
"""

from types import TracebackType
from typing import Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import hf


class AttentionOutputs:
    """While it is open, records the first output of each attention layer since the last `take`.

    with AttentionOutputs(model) as outputs:
        model(tokens)
        first = outputs.take()
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """
        Raises:
            ValueError: the model has no attention layers with a layer number.
        """
        self._modules = hf.attention_modules(model)
        if not self._modules:
            raise ValueError(f"{type(model).__name__} has no modules ...Attention with a layer_idx to record")
        self._captured: hf.Captured | None = None

    def __enter__(self) -> Self:
        # a cache whose tokens are read twice calls a layer again
        self._captured = hf.Captured(outputs=self._modules, first=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._captured is not None
        self._captured.close()

    def take(self) -> list[Tensor]:
        """The outputs since the last call, one [batch, tokens, hidden] per layer, in the order of the layers."""
        assert self._captured is not None
        # if one attention module wraps another, the outer one comes last
        by_layer = {hf.layer_of(module): output for module, output in self._captured.outputs.items()}
        self._captured.clear()
        return [by_layer[index] for index in sorted(by_layer)]


def relative_errors(found: list[Tensor], expected: list[Tensor]) -> Tensor:
    """Sums over the tokens of each layer's relative error, [layers, batch] float64."""
    errors = []
    for one, other in zip(found, expected, strict=True):
        one, other = one.double(), other.double()
        errors.append(((one - other).norm(dim=-1) / other.norm(dim=-1).clamp(min=1e-30)).sum(-1))
    return torch.stack(errors)
