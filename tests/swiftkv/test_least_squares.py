"""The start of a conversion by least squares: it is the minimum, and it is all that changes."""

import pytest
import torch

from kvcompress.swiftkv.conversion import convert
from kvcompress.swiftkv.data import Row
from kvcompress.swiftkv.distill import Distillation, distill
from kvcompress.swiftkv.frontier import Survey
from kvcompress.swiftkv.least_squares import fit
from kvcompress.swiftkv.model import as_teacher, trained_parameters
from tests.contract.models import build, prompt
from tests.swiftkv.test_model import base


def rows(count=30, tokens=24):
    return [prompt(tokens, seed=seed)[0].cpu() for seed in range(count)]


def seen(model, data):
    """The common norm's output and each later layer's teacher keys and values, all tokens in one matrix."""
    captured = {}
    first = model.config.num_key_value_layers
    with torch.no_grad(), as_teacher(model):
        x, y = [], []
        for row in data:
            hidden = model(row[None].to(model.device), output_hidden_states=True).hidden_states
            x.append(model.model.norm_swiftkv(hidden[first])[0].double())
            at = []
            for index, layer in enumerate(model.model.layers[first:], first):
                own = getattr(layer, "input_layernorm", torch.nn.Identity())(hidden[index])[0]
                if hasattr(layer.self_attn, "qkv_proj"):
                    # heads and KV heads of the tiny models
                    widths = [heads * layer.self_attn.head_dim for heads in (4, 2, 2)]
                    _, k, v = layer.self_attn.qkv_proj(own).double().split(widths, -1)
                    at.append({"k": k, "v": v})
                else:
                    at.append({kind: getattr(layer.self_attn, f"{kind}_proj")(own).double() for kind in "kv"})
            y.append(at)
    for kind in "kv":
        captured[kind] = [torch.cat([at[index][kind] for at in y]) for index in range(len(y[0]))]
    return torch.cat(x), captured


# docs: With `--fit-tokens` it first fits the later keys and values by least squares
@pytest.mark.parametrize(
    ("family", "share"),
    [("llama", 1), ("qwen2", 1), ("qwen3", 3), ("mistral", 3), ("gemma3", 1), ("olmo2", 3), ("phi3", 3)],
)
def test_the_fit_is_the_least_squares_solution_of_the_groups_mean(family, share):
    model = convert(base(family, kinds=[0, 1, 0, 1], num_hidden_layers=4), 1, share)
    x, wanted = seen(model, rows())
    errors = fit(model, rows(), ridge=1e-9)
    for start in range(0, 3, share):
        attention = model.model.layers[1 + start].self_attn
        for kind in "kv":
            projection = getattr(attention, f"{kind}_proj_swiftkv")
            y = torch.stack(wanted[kind][start : start + share]).mean(0)
            inputs = x if projection.bias is None else torch.cat([x, torch.ones_like(x[:, :1])], 1)
            best = torch.linalg.lstsq(inputs, y).solution
            left = (inputs @ best - y).square().sum() / y.square().sum()
            with torch.no_grad():
                ours = (projection(x.float()).double() - y).square().sum() / y.square().sum()
            before, after = errors[f"model.layers.{1 + start}.self_attn.{kind}_proj_swiftkv"]
            torch.testing.assert_close(ours, left, rtol=1e-3, atol=1e-7)
            assert after == pytest.approx(float(ours), rel=1e-3, abs=1e-7)
            assert after <= before + 1e-9


def test_a_strong_ridge_leaves_the_weights_where_they_began_and_a_weak_one_does_not():
    begun, held, free = (convert(build("llama", num_hidden_layers=4), 2) for _ in range(3))
    fit(held, rows(), ridge=1e9)
    fit(free, rows())
    for name, weight in trained_parameters(begun).items():
        torch.testing.assert_close(trained_parameters(held)[name], weight, rtol=1e-5, atol=1e-6)
        # the first later layer's keys and values are the teacher's as they are
        moves = ("k_proj" in name or "v_proj" in name) and "layers.3." in name
        assert (not torch.allclose(trained_parameters(free)[name], weight, rtol=1e-3, atol=1e-4)) == moves, name


def test_the_teacher_and_what_is_frozen_stay_to_the_bit():
    model = convert(build("qwen2", num_hidden_layers=4), 2, 2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    fit(model, rows(4))
    for name, parameter in model.named_parameters():
        if not ("k_proj_swiftkv" in name or "v_proj_swiftkv" in name):
            assert torch.equal(parameter, before[name]), name
    assert model.single_input
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_fitted_start_is_nearer_to_the_teacher(tmp_path):
    data = [Row(row, torch.ones(len(row), dtype=torch.bool)) for row in rows()]
    settings = {"steps": 1, "length": 24, "batch": 30}
    plain, fitted = (convert(build("llama", num_hidden_layers=4), 1) for _ in range(2))
    (before,) = distill(plain, data, Distillation(**settings), tmp_path / "plain")
    (after,) = distill(fitted, data, Distillation(**settings, fit_tokens=30 * 24), tmp_path / "fitted")
    assert after["hidden"] < 0.7 * before["hidden"]


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match="no later layers"):
        fit(convert(build("llama", num_hidden_layers=2), 1.0), rows(1))
    with pytest.raises(ValueError, match="no rows"):
        fit(convert(build("llama", num_hidden_layers=2), 1), [])
    with pytest.raises(ValueError, match="ridge must be above 0, got 0"):
        fit(convert(build("llama", num_hidden_layers=2), 1), rows(1), ridge=0)
    base = build("llama", num_hidden_layers=2)
    with pytest.raises(ValueError, match="a converted model is needed, .* got LlamaForCausalLM"):
        fit(base, rows(1))
    for wrong, named in (
        (Row(rows(1)[0], torch.ones(24, dtype=torch.bool)), "Row"),
        ("text", "str"),
        (rows(1)[0][None], "torch.int64 .1, 24."),
        (rows(1)[0].float(), "torch.float32 .24."),
    ):
        for begun in (lambda given: fit(convert(base, 1), given), lambda given: Survey(base, given)):
            with pytest.raises(ValueError, match=f"rows must be token ids, .* got {named}"):
                begun([rows(1)[0], wrong])
