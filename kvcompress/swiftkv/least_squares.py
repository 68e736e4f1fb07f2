"""A start for a SwiftKV conversion: later keys and values fitted by least squares, without gradients.

    W_j = argmin over W of  sum_t |W x_t - y_jt|^2 + ridge * mean(diag X^T X) * |W - W0_j|^2

x_t is the common norm's output for token t, y_jt the output for it of the teacher's key or value projection in later
layer j, before RoPE, and W0_j the weights that the conversion began with. All layers have x in common, so one forward
of the teacher and one factorisation suffice. In a group of layers that share keys and values, y is the group's mean.

Of a span that is skipped before the later layers, keys and values are fitted in the same way, and the map that stands
in for its layers is fitted to what they add to the residual stream. Then x_t of the later layers is that of tokens that
skipped the span, which takes another pass over the data.
arXiv:2410.03960 has no such step: there training begins from the layers' own weights, as `convert` leaves them.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvcompress import hf
from kvcompress.swiftkv.forward import Between, projection
from kvcompress.swiftkv.model import SwiftKVModel, as_teacher, check_has_teacher, entered_at


class Sums:
    """X^T X [in, in], X^T Y [in, out] and the column sums of Y^2 [out], float64, over the tokens that were added."""

    inner: Tensor
    cross: Tensor
    energy: Tensor

    def __init__(self) -> None:
        self.is_empty = True

    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds the inputs [tokens, in] and the outputs [tokens, out] of some tokens."""
        parts = [(x.T @ x).double(), (x.T @ y).double(), y.square().sum(0).double()]
        if self.is_empty:
            self.inner, self.cross, self.energy = parts
            self.is_empty = False
            return
        for total, part in zip((self.inner, self.cross, self.energy), parts, strict=True):
            total.add_(part)

    def solution(self, begun: Tensor, ridge: float) -> Tensor:
        """The weights [in, out] that fit best, pulled toward those they begin with."""
        held = ridge * self.inner.diagonal().mean() * torch.eye(len(self.inner)).to(self.inner)
        return begun + torch.linalg.solve(self.inner + held, self.cross - self.inner @ begun)


@torch.no_grad()
def fit(model: SwiftKVModel, rows: Sequence[Tensor], ridge: float = 1e-4) -> dict[str, tuple[float, float]]:
    """Fits the later layers' key and value projections to the teacher's outputs, in place; before them, what stands in
    for a span that prompts skip.

    Sums are float64: for hidden_size h and c key and value channels of all groups, 8 h (h + c) bytes.

    Args:
        model: as returned by `kvcompress.convert`.
        rows: token ids, each [tokens] int64; about 16k tokens in all, such as `first_rows(read_rows(...), 16384)` of
            kvcompress.swiftkv.data.
        ridge: how strongly the fit is pulled toward the current weights; above 0.

    Returns:
        For each projection, by name, its squared error on these rows over the squared norm of the teacher's output,
        before and after.

    Raises:
        ValueError: the model was not converted, or has no teacher or no later layers, there are no rows, they are no
            token ids, or ridge is not above 0.
    """
    check_has_teacher(model)
    config = model.config
    first, share = config.num_key_value_layers, config.key_value_group_size
    later: Any = model.model.layers[first:]
    if not len(later):
        raise ValueError("the model has no later layers, so there is nothing to fit")
    check_fit(rows, ridge)
    between = model.model.between_swiftkv
    found = {} if between is None else fit_between(model, rows, ridge)
    sums = Sums()
    with as_teacher(model):
        for entered, made in heard(model, [first], rows, between):
            means = [torch.stack(made[start : start + share]).mean(0) for start in range(0, len(made), share)]
            x = model.model.norm_swiftkv(entered[first])
            sums.add(with_ones(x, projection(later[0].self_attn, "k")[0]), torch.cat(means, 1))
    return found | _solved(dict(key_value_projections(model)), sums, ridge)


@torch.no_grad()
def fit_between(model: Any, rows: Sequence[Tensor], ridge: float = 1e-4) -> dict[str, tuple[float, float]]:
    """Fits what stands in for the span that a model's prompts skip before its later layers, in place.

    Args:
        model: as returned by `kvcompress.convert`, with skip_between.
        rows, ridge: as of `fit`.

    Returns:
        As `fit`; of the map, the error of what the span adds to the residual stream.
    """
    between = model.model.between_swiftkv
    students = dict(between_projections(model))
    (_, key), *_, (name, mapped) = students.items()
    key_values, moved = Sums(), Sums()
    with as_teacher(model):
        for entered, made in heard(model, [between.start, between.stop], rows):
            x = between.norm(entered[between.start])
            key_values.add(with_ones(x, key), torch.cat(made[: between.stop - between.start], 1))
            added = entered[between.stop].float() - entered[between.start].float()
            moved.add(with_ones(x, mapped), added)
    del students[name]
    return _solved(students, key_values, ridge) | _solved({name: mapped}, moved, ridge)


def _solved(students: dict[str, Any], sums: Sums, ridge: float) -> dict[str, tuple[float, float]]:
    """Sets projections of a common input to the solution of their sums; returns what `fit` does."""
    begun = _begun(students.values())
    solved = sums.solution(begun, ridge)
    widths = [student.out_features for student in students.values()]
    found = {}
    for name, before, after, products, total in zip(
        students, *(each.split(widths, -1) for each in (begun, solved, sums.cross, sums.energy)), strict=True
    ):
        # what is nothing may come out below it; what is no number stays none
        errors = [
            max(float((total - 2 * (w * products).sum(0) + (w * (sums.inner @ w)).sum(0)).sum()), 0.0)
            for w in (before, after)
        ]
        found[name] = errors[0] / float(total.sum()), errors[1] / float(total.sum())
    set_weights([*students.values()], solved)
    return found


def check_fit(rows: Sequence[Any], ridge: float) -> None:
    """
    Raises:
        ValueError: there are no rows, they are no token ids, or ridge is not above 0.
    """
    if not len(rows):
        raise ValueError("there is nothing to fit to: no rows")
    for row in rows:
        if not (isinstance(row, Tensor) and row.dim() == 1 and row.numel() and row.dtype == torch.int64):
            got = f"{row.dtype} {list(row.shape)}" if isinstance(row, Tensor) else type(row).__name__
            raise ValueError(
                f"rows must be token ids, each [tokens] int64, such as first_rows(read_rows(...), 16384); got {got}"
            )
    if ridge <= 0:
        raise ValueError(f"ridge must be above 0, got {ridge}")


def key_value_projections(model: Any) -> Iterator[tuple[str, Any]]:
    """The key and the value projection of each group of a converted model, by name, in the order of the layers."""
    first, share = model.config.num_key_value_layers, model.config.key_value_group_size
    for layer in range(first, len(model.model.layers), share):
        for kind in "kv":
            name = f"model.layers.{layer}.self_attn.{kind}_proj_swiftkv"
            yield name, model.get_submodule(name)


@torch.no_grad()
def begun_with(model: Any) -> Tensor:
    """The weights of a converted model's key and value projections, [in, out of all] float64."""
    return _begun(student for _, student in key_value_projections(model))


def between_projections(model: Any) -> Iterator[tuple[str, Any]]:
    """Of the span that a converted model's prompts skip before its later layers, the key and the value projection of
    each layer, by name, and at last the map."""
    between = model.model.between_swiftkv
    for layer in range(between.start, between.stop):
        for kind in "kv":
            name = f"model.layers.{layer}.self_attn.{kind}_proj_swiftkv"
            yield name, model.get_submodule(name)
    yield "model.between_swiftkv.map", between.map


def heard(
    model: Any, firsts: Sequence[int], rows: Sequence[Tensor], between: Between | None = None
) -> Iterator[tuple[dict[int, Tensor], list[Tensor]]]:
    """For each row, what a model computes of it.

    Args:
        model: a teacher, or one that is not converted.
        firsts: layers; with `between`, behind its span.
        between: what stands in for a span, fitted.

    Yields:
        The inputs [tokens, hidden_size] of some layers, and for each layer from the first of these on, its keys and
        values before RoPE [tokens, channels]. With `between` the inputs are those of tokens that skipped the span.
    """
    layers = model.model.layers
    inputs = firsts if between is None else [between.start]
    attentions = [layer.self_attn for layer in layers[min(firsts) :]]
    parts = [[projection(attention, kind) for kind in "kv"] for attention in attentions]
    device = parts[0][0][0].weight.device
    modules = {module for pair in parts for module, _ in pair}
    with hf.Captured(inputs=[layers[index] for index in inputs], outputs=modules) as captured:
        for row in rows:
            model.model(row[None].to(device), use_cache=False)
            out = captured.outputs
            made = [torch.cat([out[module][0][:, at].float() for module, at in pair], 1) for pair in parts]
            entered = {index: captured.inputs[layers[index]] for index in inputs}
            if between is not None:
                entered = _behind(model, firsts, row[None].to(device), between, entered[between.start])
            yield {first: entered[first][0] for first in firsts}, made


def _behind(model: Any, firsts: Sequence[int], ids: Tensor, between: Between, entering: Tensor) -> dict[int, Tensor]:
    """The inputs [1, tokens, hidden_size] of some layers behind a span, of tokens [1, tokens] that skip it."""
    layers = model.model.layers
    hidden = between(entering, between.norm(entering))
    with (
        hf.Captured(outputs=[layers[first - 1] for first in firsts]) as captured,
        entered_at(model, between.stop, hidden, max(firsts)),
    ):
        model.model(ids, use_cache=False)
    return {first: captured.outputs[layers[first - 1]] for first in firsts}


def with_ones(x: Tensor, linear: Any) -> Tensor:
    """The common input [tokens, hidden_size] in float32, with a column of ones if a projection of it has a bias."""
    x = x.float()
    return x if linear.bias is None else torch.cat([x, torch.ones_like(x[:, :1])], 1)


@torch.no_grad()
def set_weights(students: Sequence[nn.Linear], solved: Tensor) -> None:
    """Sets projections to weights [in, out of all], whose last row is the bias if they have one."""
    for student, weight in zip(students, solved.split([each.out_features for each in students], 1), strict=True):
        student.weight.copy_(weight[: student.in_features].T)
        if student.bias is not None:
            student.bias.copy_(weight[-1])


def _begun(students: Iterable[Any]) -> Tensor:
    """The weights of some projections, [in, out of all] float64."""
    return torch.cat([_weights(student) for student in students], 1)


def _weights(projection: Any) -> Tensor:
    """The weights, [in, out] float64, with the bias as the last row."""
    weight: Tensor = projection.weight.T.double()
    return weight if projection.bias is None else torch.cat([weight, projection.bias[None].double()])
