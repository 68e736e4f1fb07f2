"""What a model's attention layers give out, watched from outside.

    error of a layer = mean over tokens of |compressed - full| / |full|        Euclidean norms of a token's output

Outputs are taken behind the layer's output projection. A layer is fed what the layers below made of the same cache, so
its error includes theirs.
"""

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel


class AttentionOutputs:
    """While it is open, the first output of each attention layer since the last were taken.

    with AttentionOutputs(model) as outputs:
        model(tokens)
        first = outputs.take()
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """
        Raises:
            ValueError: the model has no attention layers that transformers numbers.
        """
        self._modules = [
            module
            for module in model.modules()
            if type(module).__name__.endswith("Attention") and isinstance(getattr(module, "layer_idx", None), int)
        ]
        if not self._modules:
            raise ValueError(f"{type(model).__name__} has no modules ...Attention with a layer_idx to watch")
        self._taken: dict[Any, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        for module in self._modules:
            self._hooks.append(module.register_forward_hook(self._keep))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _keep(self, module: Any, arguments: Any, output: Any) -> None:
        # a cache that has its tokens read twice comes back
        self._taken.setdefault(module, output[0] if isinstance(output, tuple) else output)

    def take(self) -> list[Tensor]:
        """The outputs since the last call, [batch, tokens, hidden] a layer, in the order of the layers."""
        # where one attention module wraps another, the outer one comes last
        by_layer = {module.layer_idx: output for module, output in self._taken.items()}
        self._taken = {}
        return [by_layer[index] for index in sorted(by_layer)]


def relative_errors(found: list[Tensor], expected: list[Tensor]) -> Tensor:
    """Sums over the tokens of each layer's relative error, [layers, batch] float64."""
    errors = []
    for one, other in zip(found, expected, strict=True):
        one, other = one.double(), other.double()
        errors.append(((one - other).norm(dim=-1) / other.norm(dim=-1).clamp(min=1e-30)).sum(-1))
    return torch.stack(errors)
