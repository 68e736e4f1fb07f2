"""The states of layers that do not attend: linear attention, state spaces, convolutions."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer


class States:
    """One layer's states, kept as transformers keeps them: of a size that no token changes, written in place.

    transformers' own layer does the work; here is what it lacks: rows, files, and a count of bytes.
    """

    def __init__(self, number: int) -> None:
        """
        Args:
            number: of states.
        """
        self.number = number
        self.held: Any = LinearAttentionLayer(number_of_states=number)

    def tensors(self) -> dict[str, Tensor]:
        """The states by name, [batch, ...]."""
        return {
            f"{name}.{index}": tensor
            for name, held in self._by_name().items()
            for index, tensor in held.items()
            if tensor is not None
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `tensors` returned."""
        self.reset()
        for name, tensor in tensors.items():
            kind, _, index = name.partition(".")
            self._put(kind, int(index), tensor)

    def reset(self) -> None:
        """Forgets everything, and frees the memory."""
        self.held = LinearAttentionLayer(number_of_states=self.number)

    def map_tensors(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replaces each state by `change(state)`."""
        for name, held in self._by_name().items():
            for index, tensor in held.items():
                if tensor is not None:
                    self._put(name, index, change(tensor))

    def can_crop(self) -> bool:
        """Whether the last tokens can be taken back: of a convolution, if it was told before that they may be."""
        return bool(self.held.record_past) and self.held.is_croppable

    def _by_name(self) -> dict[str, dict[int, Tensor | None]]:
        return _by_name(self.held)

    def _put(self, name: str, index: int, tensor: Tensor) -> None:
        held = self.held
        if name == "conv":
            held.conv_states[index], held.is_conv_states_initialized[index] = tensor, True
            held.has_previous_state[index] = True
            held.conv_kernel_size[index] = held.conv_kernel_size[index] or tensor.shape[-1]
        else:
            held.recurrent_states[index], held.is_recurrent_states_initialized[index] = tensor, True
        if held.device is None:
            held.dtype, held.device = tensor.dtype, tensor.device


def states_in(layer: Any) -> list[Tensor]:
    """The states that a layer of transformers' caches keeps."""
    if not hasattr(layer, "conv_states"):
        return []
    return [tensor for held in _by_name(layer).values() for tensor in held.values() if tensor is not None]


def _by_name(layer: Any) -> dict[str, dict[int, Tensor | None]]:
    return {"conv": layer.conv_states, "recurrent": layer.recurrent_states}
