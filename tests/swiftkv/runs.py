"""Small runs of distillation."""

import pytest
import torch

from kvcompress.swiftkv.conversion import convert
from kvcompress.swiftkv.data import Row
from kvcompress.swiftkv.distill import Distillation, distill
from tests.contract.models import build, prompt

SMALL = {"length": 16, "steps": 6, "batch": 2, "learning_rate": 3e-3}


def student(share=1, first=1, **changes):
    return convert(build("llama", num_hidden_layers=4, **changes), first, share)


def rows(count=12, tokens=16):
    return [Row(prompt(tokens, seed=seed)[0].cpu(), torch.ones(tokens, dtype=torch.bool)) for seed in range(count)]


def interrupted(folder, step=3, data=None, held_out=None, **settings):
    """A folder of a run that was interrupted after so many steps."""

    def stop(line):
        if line["step"] == step:
            raise KeyboardInterrupt

    how = Distillation(**{**SMALL, **settings}, save_every=2)
    with pytest.raises(KeyboardInterrupt):
        distill(student(), data or rows(), how, folder, stop, held_out=held_out)
