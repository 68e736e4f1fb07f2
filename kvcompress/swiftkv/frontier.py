"""What SwiftKV conversions of a model would cost and keep, one for each first layer that prompts could skip.

    flops of the projections, for a prompt of S tokens and one position's logits:
        2 S first (q + k + v + o + mlp) + 2 S (layers - first) / share (k + v) + 2 (layers - first) (q + o + mlp)
        and with own_last: + 2 (layers - first) ((own_last - 1) (q + o + mlp) + own_last (k + v))
        and with skip_between, of n layers: 2 n (own_last (k + v) - (S - own_last) (q + o + mlp)) + 2 S hidden_size^2
    bytes of keys and values, over the full cache's: (first + (layers - first) / share) / layers

One forward of the model for each row gives the least-squares sums of every first layer (least_squares.py), so all fits
come from one pass over the data. They take 8 h (h + c) bytes for each first layer, with hidden_size h and c key and
value channels of the layers from it on, and nothing else grows with the data. The probes (probes.py) pass the early
layers once, and the later ones of every conversion. With `skip_between` the fits take another pass over the data.
"""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvcompress import hf
from kvcompress.swiftkv.conversion import convert
from kvcompress.swiftkv.data import Row, first_rows
from kvcompress.swiftkv.forward import projection
from kvcompress.swiftkv.least_squares import (
    Sums,
    begun_with,
    between_projections,
    check_fit,
    fit_between,
    heard,
    key_value_projections,
    set_weights,
    with_ones,
)
from kvcompress.swiftkv.model import common_norm
from kvcompress.swiftkv.probes import HeldOut, Probes, Score, hold_out
from kvcompress.swiftkv.retrieval import with_retrieval

# what a conversion must keep to be the elbow, over the model's own: of what is asked for, and of perplexity
FOUND, PERPLEXITY = 0.95, 1.12


@dataclass(frozen=True)
class Point:
    """A conversion. prefill: flops of the projections, and kv: bytes of keys and values, over the base model's.

    converted: its score before it is fitted, None if that was not measured. fitted: and after.
    """

    first: int
    share: int
    prefill: float
    kv: float
    converted: Score | None
    fitted: Score


@dataclass(frozen=True)
class Frontier:
    """What was measured of conversions of one model. prompt: tokens of the prompt that prefill is about. own_last and
    skip_between: as of `convert`."""

    layers: int
    prompt: int
    base: Score
    points: tuple[Point, ...]
    own_last: int = 0
    skip_between: tuple[int, int] | None = None

    def perplexity(self, score: Score) -> float:
        """A score's perplexity over the base model's, the geometric mean over the texts."""
        logs = [math.log(value / self.base.perplexity[text]) for text, value in score.perplexity.items()]
        return math.exp(sum(logs) / len(logs))

    def found(self, score: Score) -> float:
        """What a score found of what was asked for, over what the base model found."""
        return (score.found or 0.0) / max(self.base.found or 0.0, 1e-9)

    def elbow(self, found: float = FOUND, perplexity: float = PERPLEXITY) -> Point | None:
        """The cheapest fitted conversion that finds this share of what the base model finds, at no more than this
        perplexity over its own; None if there is none."""
        good = [
            point
            for point in self.points
            if self.found(point.fitted) >= found and self.perplexity(point.fitted) <= perplexity
        ]
        return min(good, key=lambda point: (point.prefill, point.kv), default=None)

    def table(self) -> str:
        """The points in Markdown, the elbow in bold."""
        head = ["first skipped", "share", "prefill", "KV bytes", "perplexity", "found", "KL, nats"]
        head += ["unfitted: perplexity", "found"]
        lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
        elbow = self.elbow()
        for point in self.points:
            cells = [f"{point.first} of {self.layers}", f"{point.share}", f"{point.prefill:.3f}x", f"{point.kv:.3f}x"]
            for score in (point.fitted, point.converted):
                cells += ["", ""] if score is None else [f"{self.perplexity(score):.3f}x", f"{self.found(score):.2f}x"]
                if score is point.fitted:
                    cells.append(f"{score.divergence:.3f}")
            lines.append(f"| {' | '.join(f'**{cell}**' if point is elbow and cell else cell for cell in cells)} |")
        return "\n".join(lines)

    def facts(self) -> dict[str, Any]:
        """The frontier as JSON can hold it."""
        elbow = self.elbow()
        return asdict(self) | {"elbow": None if elbow is None else {"first": elbow.first, "share": elbow.share}}

    def plot(self, path: str | os.PathLike[str]) -> bool:
        """Plots perplexity and what was found against the cost of prefill; False if matplotlib is missing."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return False
        figure = Figure(figsize=(8, 6), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        elbow = self.elbow()
        for share in sorted({point.share for point in self.points}):
            points = [point for point in self.points if point.share == share]
            costs = [point.prefill for point in points]
            above.plot(costs, [self.perplexity(each.fitted) for each in points], "o-", label=f"share {share}, fitted")
            below.plot(costs, [self.found(each.fitted) for each in points], "o-", label=f"share {share}, fitted")
        for axes, height in ((above, PERPLEXITY), (below, FOUND)):
            axes.axhline(height, color="gray", linestyle=":")
            if elbow is not None:
                axes.axvline(elbow.prefill, color="gray", linestyle="--", label=f"elbow: layer {elbow.first}")
            axes.legend()
        above.set(ylabel="perplexity over the model's", yscale="log")
        below.set(ylabel="found over the model's", xlabel="flops of a prefill over the model's")
        figure.savefig(Path(path), dpi=150)
        return True


def usual_firsts(layers: int, skip_between: tuple[int, int] | None = None) -> range:
    """The first layers that are looked at: those from a third of the layers on, and behind what is skipped between."""
    return range(max(1 if skip_between is None else max(skip_between) + 1, layers // 3), layers)


def conversions(layers: int, firsts: Sequence[int], shares: Sequence[int]) -> list[tuple[int, int]]:
    """Each first layer with each share that divides what it skips."""
    return [(first, share) for first in firsts for share in shares if not (layers - first) % share]


class Survey:
    """The least-squares sums of a model, for several first layers, from one pass over some rows."""

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        rows: Sequence[Tensor],
        firsts: Sequence[int] | None = None,
        ridge: float = 1e-4,
        skip_between: tuple[int, int] | None = None,
    ) -> None:
        """
        Args:
            model: one that `convert` takes.
            rows: token ids to fit to, each [tokens] int64; about 32k tokens in all.
            firsts: the first layers, each from 1 to the last layer; None for those from a third of the layers on, and
                behind what is skipped between.
            ridge: as of `fit`.
            skip_between: as of `convert`; its conversions then all need own_last.

        Raises:
            ValueError: there are no rows or firsts, or as `convert`.
        """
        check_fit(rows, ridge)
        layers = hf.sizes(model.config).layers
        self.firsts = sorted(usual_firsts(layers, skip_between) if firsts is None else firsts)
        if not self.firsts and skip_between is not None:
            raise ValueError(f"skip_between={tuple(skip_between)} leaves no layer behind it that could be skipped")
        if not self.firsts or not 1 <= self.firsts[0] <= self.firsts[-1] < layers:
            raise ValueError(f"first layers must be from 1 to {layers - 1}, got {self.firsts}")
        # refuses what cannot be converted before anything is computed
        begun = convert(model, self.firsts[0], own_last=0 if skip_between is None else 1, skip_between=skip_between)
        self.model, self.skip_between, self._ridge = model, skip_between, ridge
        started = time.perf_counter()
        between = begun.model.between_swiftkv
        if between is not None:
            fit_between(begun, rows, ridge)
        self._between = None if between is None else [fitted for _, fitted in between_projections(begun)]
        self._sums = {first: Sums() for first in self.firsts}
        own: Any = model
        norms = {first: common_norm(own.model.layers, first) for first in self.firsts}
        key = projection(own.model.layers[self.firsts[0]].self_attn, "k")[0]
        for entered, made in heard(own, self.firsts, rows, between):
            for first, sums in self._sums.items():
                sums.add(with_ones(norms[first](entered[first]), key), torch.cat(made[first - self.firsts[0] :], 1))
        # of the pass over the data
        self.seconds = time.perf_counter() - started

    @torch.no_grad()
    def converted(self, first: int, share: int = 1, own_last: int = 0) -> Any:
        """The fitted conversion that skips from this layer on, as `convert` and `fit` make it of the same rows."""
        model = convert(self.model, first, share, own_last=own_last, skip_between=self.skip_between)
        if self._between is not None:
            for (_, to), of in zip(between_projections(model), self._between, strict=True):
                to.load_state_dict(of.state_dict())
        sums = self._sums[first]
        grouped = Sums()
        grouped.inner = sums.inner
        # the mean over the layers of a group
        layers = len(model.model.layers) - first
        channels = sums.cross.shape[1] // layers
        grouped.cross = sums.cross.unflatten(1, (layers // share, share, channels)).mean(2).flatten(1)
        set_weights(
            [student for _, student in key_value_projections(model)], grouped.solution(begun_with(model), self._ridge)
        )
        return model

    def measure(
        self,
        texts: Mapping[str, Sequence[Tensor]],
        asked: Sequence[Row],
        shares: Sequence[int] = (1,),
        *,
        prompt: int = 4096,
        own_last: int = 0,
        unfitted: bool = True,
        on_point: Callable[[Point], None] | None = None,
    ) -> Frontier:
        """Scores the conversions of all first layers, and of all shares that divide what they skip.

        Args:
            texts: of each, rows of token ids [tokens] that were not fitted to.
            asked: rows whose `answered` tokens are looked up, as of `retrieval_rows`.
            prompt: tokens of the prompt that the formula for prefill is about.
            own_last: as of `convert`.
            unfitted: score conversions before they are fitted, too.
            on_point: called with each point.
        """
        if not any(bool(row.answered[1:].any()) for row in asked):
            raise ValueError("there is nothing to measure: it takes texts, and rows that ask for something")
        between = self.skip_between
        # where what a conversion computes is no longer what the model does
        changed = {first: first if between is None else between[0] for first in self.firsts}
        probes = Probes(self.model, HeldOut(texts, asked), sorted({*changed.values()}), own_last)
        layers = len(probes.layers)
        config = self.model.config
        whole = projection_flops(config, prompt)
        points = []
        for first, share in conversions(layers, self.firsts, shares):
            begun = convert(self.model, first, share, own_last=own_last, skip_between=between)
            before = probes.score(begun, changed[first]) if unfitted else None
            cost = projection_flops(config, prompt, first, share, own_last=own_last, skip_between=between)
            points.append(
                Point(
                    first,
                    share,
                    cost / whole,
                    (first + (layers - first) // share) / layers,
                    before,
                    probes.score(self.converted(first, share, own_last), changed[first]),
                )
            )
            if on_point is not None:
                on_point(points[-1])
        return Frontier(layers, prompt, probes.base(), tuple(points), own_last, between)


def diagnose(
    model: PreTrainedModel,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    texts: Mapping[str, Sequence[Row]] | None = None,
    firsts: Sequence[int] | None = None,
    shares: Sequence[int] = (1,),
    fit_tokens: int = 32768,
    probe_tokens: int = 2048,
    length: int = 512,
    retrieval: float = 0.5,
    own_last: int = 0,
    skip_between: tuple[int, int] | None = None,
    seed: int = 0,
    on_point: Callable[[Point], None] | None = None,
) -> tuple[Frontier, Survey]:
    """What conversions of a model would cost and keep, and the fits behind it: `frontier, survey = diagnose(...)`.

    Args:
        model: one that `convert` takes.
        tokenizer: the model's.
        rows: to fit to, and without `texts` to measure on, as of `read_rows`.
        texts: rows to measure on, by name; None for the last of `rows`, which are then not fitted to.
        firsts: the first layers that prompts could skip; None for those from a third of the layers on.
        shares: how many later layers share keys and values.
        fit_tokens: how many tokens to fit to. probe_tokens: how many of each text to measure on; of rows that ask, four
            times as many.
        length: the most tokens of a row of generated ones. retrieval: their share of the tokens to fit to.
        own_last: as of `convert`; then `shares` can only be 1. skip_between: as of `convert`.
        on_point: called with each point.

    Raises:
        ValueError: there are too few rows, or as `Survey`.
    """
    rows, held = hold_out(rows, tokenizer, texts=texts, tokens=probe_tokens, length=length, seed=seed)
    # rows for the fit, a share of them generated of the others
    of_prose = first_rows(rows, round(fit_tokens * (1 - retrieval)), seed)
    prose = [Row(ids, torch.ones_like(ids, dtype=torch.bool)) for ids in of_prose]
    fitted_to = [row.ids for row in with_retrieval(prose, tokenizer, length, retrieval, seed)]
    survey = Survey(model, fitted_to, firsts, skip_between=skip_between)
    return survey.measure(held.texts, held.asked, shares, own_last=own_last, on_point=on_point), survey


def best_conversion(
    model: PreTrainedModel, tokenizer: Any, rows: Sequence[Row], share: int = 1, own_last: int = 0, **how: Any
) -> Any:
    """The fitted conversion at the elbow of the model's frontier.

    Args:
        rows: as of `diagnose`, which takes the other arguments.

    Raises:
        ValueError: no conversion keeps enough; the message has the best.
    """
    frontier, survey = diagnose(model, tokenizer, rows, shares=(share,), own_last=own_last, **how)
    elbow = frontier.elbow()
    if elbow is None:
        nearest = max(
            frontier.points, key=lambda point: (frontier.found(point.fitted), -frontier.perplexity(point.fitted))
        )
        raise ValueError(
            f"no conversion with share={share} finds {FOUND} of what the model finds within {PERPLEXITY} times its "
            f"perplexity; the best, from layer {nearest.first} on, finds {frontier.found(nearest.fitted):.2f} within "
            f"{frontier.perplexity(nearest.fitted):.2f}: name a layer, and train the conversion"
        )
    return survey.converted(elbow.first, elbow.share, own_last)


def projection_flops(
    config: Any,
    tokens: int,
    first: int | None = None,
    share: int = 1,
    logits: int = 1,
    own_last: int = 0,
    skip_between: tuple[int, int] | None = None,
) -> int:
    """Flops of all projections of a prefill, by formula; `first` is the first layer skipped, None for no conversion."""
    of = hf.sizes(config)
    hidden, layers = of.hidden, of.layers
    query = hidden * of.heads * of.head_dim
    key_value = 2 * hidden * of.kv_heads * of.head_dim
    rest = 2 * query + 3 * hidden * of.intermediate
    first = layers if first is None else first
    head = 2 * logits * hidden * of.vocabulary
    early = 2 * tokens * first * (rest + key_value)
    later = 2 * tokens * ((layers - first) // share) * key_value + 2 * logits * (layers - first) * rest
    running = min(tokens, own_last + logits - 1)
    if own_last:
        # they run the later layers, and are projected twice
        later += 2 * (layers - first) * ((running - logits) * rest + running * key_value)
    if skip_between is not None:
        skipped = skip_between[1] - skip_between[0]
        early -= 2 * (tokens - running) * skipped * rest
        # they are projected twice here, too; and the map that stands in
        early += 2 * running * skipped * key_value + 2 * tokens * hidden * hidden
    return early + later + head
