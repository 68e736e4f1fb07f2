"""A start for a SwiftKV conversion: later keys and values fitted by least squares, without gradients.

    W_j = argmin over W of  sum_t |W x_t - y_jt|^2 + ridge * mean(diag X^T X) * |W - W0_j|^2

x_t is the common norm's output for token t, y_jt the output for it of the teacher's key or value projection in later
layer j, before RoPE, and W0_j the weights that the conversion began with. All layers have x in common, so one forward
of the teacher and one factorisation suffice. In a group of layers that share keys and values, y is the group's mean.
arXiv:2410.03960 has no such step: there training begins from the layers' own weights, as `convert` leaves them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvcompress import hf
from kvcompress.swiftkv.model import SwiftKVModel, as_teacher


@torch.no_grad()
def fit(model: SwiftKVModel, rows: Sequence[Tensor], ridge: float = 1e-4) -> dict[str, tuple[float, float]]:
    """Fits the later layers' key and value projections to the teacher's outputs, in place.

    Sums are float64: for hidden_size h and c key and value channels of all groups, 8 h (h + c) bytes.

    Args:
        model: as returned by `kvcompress.convert`.
        rows: token ids, each [tokens] int64; about 16k tokens in all.
        ridge: how strongly the fit is pulled toward the current weights; above 0.

    Returns:
        For each projection, by name, its squared error on these rows over the squared norm of the teacher's output,
        before and after.

    Raises:
        ValueError: the model has no teacher or no later layers, there are no rows, or ridge is not above 0.
    """
    config = model.config
    if not config.swiftkv_teacher:
        raise ValueError(f"this {type(model).__name__} was published without its teacher; convert the base model")
    first, share = config.num_key_value_layers, config.key_value_group_size
    later: Any = model.model.layers[first:]
    if not len(later):
        raise ValueError("the model has no later layers, so there is nothing to fit")
    if not rows:
        raise ValueError("there is nothing to fit to: no rows")
    if ridge <= 0:
        raise ValueError(f"ridge must be above 0, got {ridge}")
    fitted = {
        f"model.layers.{first + start}.self_attn.{kind}_proj_swiftkv": [
            layer.self_attn.projection(kind) for layer in later[start : start + share]
        ]
        for start in range(0, len(later), share)
        for kind in "kv"
    }
    students = {name: model.get_submodule(name) for name in fitted}
    inner, cross, energy = _sums(model, rows, later[0], list(fitted.values()))
    begun = torch.cat([_weights(student) for student in students.values()], 1)
    held = ridge * inner.diagonal().mean() * torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
    solved = begun + torch.linalg.solve(inner + held, cross - inner @ begun)
    widths = [student.out_features for student in students.values()]
    found = {}
    for (name, student), before, after, products, total in zip(
        students.items(), *(each.split(widths, -1) for each in (begun, solved, cross, energy)), strict=True
    ):
        errors = [float((total - 2 * (w * products).sum(0) + (w * (inner @ w)).sum(0)).sum()) for w in (before, after)]
        found[name] = errors[0] / float(total.sum()), errors[1] / float(total.sum())
        student.weight.copy_(after[: student.in_features].T)
        if student.bias is not None:
            student.bias.copy_(after[-1])
    return found


def _sums(
    model: Any, rows: Sequence[Tensor], entered: Any, groups: list[list[tuple[Any, slice]]]
) -> tuple[Tensor, Tensor, Tensor]:
    """X^T X, X^T Y and the column sums of Y^2 over all tokens, of inputs [tokens, in] and outputs [tokens, out].

    groups: for each part of Y, the projections whose mean it is, and which of their outputs. If the projections have
    biases, the last column of X is ones.
    """
    projections = [module for group in groups for module, _ in group]
    has_bias = projections[0].bias is not None
    device = projections[0].weight.device
    sums: list[Tensor] | None = None
    with hf.Captured(inputs=[entered], outputs={*projections}) as captured:
        for row in rows:
            with as_teacher(model):
                model.model(row[None].to(device), use_cache=False)
            x = model.model.norm_swiftkv(captured.inputs[entered])[0].float()
            if has_bias:
                x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
            heard = captured.outputs
            means = (torch.stack([heard[module][0][:, at].float() for module, at in group]).mean(0) for group in groups)
            y = torch.cat([*means], 1)
            parts = [(x.T @ x).double(), (x.T @ y).double(), y.square().sum(0).double()]
            sums = parts if sums is None else [total.add_(part) for total, part in zip(sums, parts, strict=True)]
    assert sums is not None
    return sums[0], sums[1], sums[2]


def _weights(projection: Any) -> Tensor:
    """The weights, [in, out] float64, with the bias as the last row."""
    weight = projection.weight.T.double()
    return weight if projection.bias is None else torch.cat([weight, projection.bias[None].double()])
