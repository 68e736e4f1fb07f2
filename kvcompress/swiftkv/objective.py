"""What a SwiftKV model learns from its teacher: the same probabilities, and the same input to the last layer.

    divergence = T^2 KL(teacher || student)        error = MSE of the hidden states before the last layer

KL is taken over log-probabilities on both sides, of the tokens to be answered (all tokens of a text, the assistant's
in a chat).
"""

from typing import Any

import torch
from torch import Tensor, nn

from kvcompress import hf
from kvcompress.swiftkv.data import Row
from kvcompress.swiftkv.model import SwiftKVModel, as_teacher, entered_at

# how many tokens' probabilities are compared at a time: each takes two float32 rows of the vocabulary's size
TOKENS_AT_ONCE = 512


def distillation_loss(
    student: Tensor, teacher: Tensor, answered: Tensor, tokens: Tensor | int, temperature: float = 2.0
) -> Tensor:
    """T^2 KL(teacher || student), summed over the tokens to be answered and divided by `tokens`.

    Args:
        student, teacher: logits [batch, positions, vocabulary]; the logits at a position are those of the next token.
        answered: [batch, positions] bool, positions whose next token counts.
        tokens: what to divide by.
    """
    total = student.new_zeros((), dtype=torch.float32)
    student, teacher = student[answered], teacher[answered]
    for ours, theirs in zip(student.split(TOKENS_AT_ONCE), teacher.split(TOKENS_AT_ONCE), strict=True):
        ours, theirs = ((x.float() / temperature).log_softmax(-1) for x in (ours, theirs))
        total = total + nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True)
    return temperature**2 * total / tokens


class Objective:
    """Divergence and hidden error between a student and the same model as its teacher."""

    def __init__(self, network: nn.Module, model: SwiftKVModel, temperature: float, accelerator: Any) -> None:
        """
        Args:
            network: the model as Accelerate prepared it.
            temperature: of both distributions.
        """
        self.network = network
        self._model = model
        self._temperature = temperature
        self._accelerator = accelerator
        layers: Any = model.model.layers
        self._later, self._last = layers[model.config.num_key_value_layers], layers[-1]
        # the inputs of the first later layer and of the last layer, in the latest forward
        self._captured = hf.Captured(inputs={self._later, self._last})
        self.close = self._captured.close

    def terms(self, rows: list[Row]) -> tuple[Tensor, Tensor]:
        """Divergence and hidden error of one forward, each summed over its tokens."""
        model, device, entered = self._model, self._accelerator.device, self._captured.inputs
        ids = nn.utils.rnn.pad_sequence([row.ids for row in rows], batch_first=True).to(device)
        answered = nn.utils.rnn.pad_sequence([row.answered for row in rows], batch_first=True).to(device)
        lengths = torch.tensor([len(row.ids) for row in rows], device=ids.device)
        real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        inputs = {"input_ids": ids, "attention_mask": real.long(), "use_cache": False}
        if bool(real.all()):
            del inputs["attention_mask"]
        with torch.no_grad(), as_teacher(model), self._accelerator.autocast():
            teacher = model(**inputs).logits
            theirs = entered[self._last]
        # teacher and student have the early layers in common
        with entered_at(model, model.config.num_key_value_layers, entered[self._later]):
            student = self.network(**inputs).logits
        # the logits at a position are about the next token
        counted = nn.functional.pad(answered[:, 1:], (0, 1))
        divergence = distillation_loss(student, teacher, counted, 1, self._temperature)
        error = (entered[self._last].float() - theirs.float())[real].square().mean(-1).sum()
        return divergence, error
