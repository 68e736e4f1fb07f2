"""What the loss is."""

import pytest
import torch

from kvcompress.swiftkv.conversion import convert
from kvcompress.swiftkv.data import Row
from kvcompress.swiftkv.distill import Distillation, distill
from kvcompress.swiftkv.model import as_teacher
from kvcompress.swiftkv.objective import distillation_loss
from tests.swiftkv.runs import rows
from tests.swiftkv.test_model import base

pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("no_precision_of_an_earlier_run")


def test_the_divergence_is_the_definition_and_finite_where_a_probability_is_zero():
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 5, 7, dtype=torch.float64), torch.randn(2, 5, 7, dtype=torch.float64)
    answered = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]]).bool()
    p, q = (theirs / 3).softmax(-1), (ours / 3).softmax(-1)
    expected = 9 * ((p * (p / q).log()).sum(-1) * answered).sum() / 10
    torch.testing.assert_close(distillation_loss(ours, theirs, answered, 10, 3.0), expected.float())
    assert distillation_loss(ours, ours, answered, 10) == 0
    ours = torch.zeros(1, 1, 4, requires_grad=True)
    theirs = torch.tensor([[[300.0, -300.0, 0.0, -1000.0]]])
    loss = distillation_loss(ours, theirs, torch.ones(1, 1, dtype=torch.bool), 1)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(ours.grad).all()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3", "granite", "olmo2", "phi3"])
def test_the_losses_are_those_of_two_whole_forwards_and_early_layers_run_once(family, tmp_path):
    model = convert(base(family, kinds=[0, 1, 0, 1], num_hidden_layers=4), 2)
    # rows of several lengths, the shorter ones padded
    data = [Row(row.ids[: 10 + 2 * index], row.answered[: 10 + 2 * index]) for index, row in enumerate(rows(4))]
    divergence = error = torch.zeros(())
    total = sum(len(row.ids) for row in data)
    for row in data:
        with torch.no_grad():
            ids = row.ids[None].to(model.device)
            ours = model(ids, output_hidden_states=True)
            with as_teacher(model):
                theirs = model(ids, output_hidden_states=True)
        answered = torch.nn.functional.pad(row.answered[1:], (0, 1))[None].to(model.device)
        divergence = divergence + distillation_loss(ours.logits, theirs.logits, answered, total).cpu()
        error = error + (ours.hidden_states[3] - theirs.hidden_states[3]).square().mean(-1).sum().cpu() / total
    calls = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_, index=layer.self_attn.layer_idx: calls.append(index))
    (line,) = distill(model, data, Distillation(steps=1, batch=4, length=16), tmp_path)
    assert line["divergence"] == pytest.approx(divergence.item(), rel=1e-4)
    assert line["hidden"] == pytest.approx(error.item(), rel=1e-4)
    assert sorted(calls) == [0, 1, 2, 2, 3, 3]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]
