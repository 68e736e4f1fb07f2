"""Distillation of a SwiftKV model: the same network with the conversion off is the teacher (arXiv:2410.03960).

    loss = T^2 KL(teacher || student) + MSE of the hidden states before the last layer          T = 2

Only the common norm and the later layers' query, key and value projections are trained. KL is taken over
log-probabilities on both sides, summed over the tokens to be answered (all tokens of a text, the assistant's in a
chat), and divided by the number of all tokens. Runs in one process, or in several under `accelerate launch`; the order
of the data depends only on the seed, so a resumed run continues as if it had not stopped.
"""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from kvcompress.swiftkv.checkpoint import Checkpoint, Run
from kvcompress.swiftkv.data import Row, batches, first_rows
from kvcompress.swiftkv.least_squares import fit
from kvcompress.swiftkv.model import SwiftKVModel, all_fitted, check_has_teacher, trained_parameters
from kvcompress.swiftkv.objective import Objective
from kvcompress.swiftkv.probes import HeldOut, Probes


@dataclass(frozen=True)
class Distillation:
    """Settings of a run; the defaults are the paper's.

    temperature: of both distributions. hidden_weight: of the hidden states' mean squared error.
    learning_rate: the highest; it rises over the first `warmup` share of the steps, then falls by a cosine to 0.
    steps: updates. batch: rows per process and forward. accumulate: forwards per update.
    length: maximum tokens per row. fit_tokens: how many tokens to fit keys and values to by least squares before the
    first update (kvcompress/swiftkv/least_squares.py); 0, as in the paper, for none.
    precision: "no", "bf16" or "fp16", of the forwards under autocast.
    checkpointing: compute layers again in the backward pass, to hold less memory.
    save_every: updates between checkpoints. log_every: updates between lines of progress. seed: of the data's order.
    """

    temperature: float = 2.0
    hidden_weight: float = 1.0
    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = 0.05
    steps: int = 1000
    batch: int = 1
    accumulate: int = 1
    length: int = 2048
    fit_tokens: int = 0
    precision: Literal["no", "bf16", "fp16"] = "no"
    checkpointing: bool = False
    save_every: int = 100
    log_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.fit_tokens < 0:
            raise ValueError(f"fit_tokens must be 0 or more, got {self.fit_tokens}")
        if self.length < 2:
            raise ValueError(f"length must be at least 2 tokens, got {self.length}")
        numbers = (self.temperature, self.learning_rate, self.hidden_weight)
        if not (all(map(math.isfinite, numbers)) and min(numbers[:2]) > 0 <= numbers[2] and 0 <= self.warmup <= 1):
            raise ValueError(
                "temperature and learning_rate must be above 0, hidden_weight 0 or more and warmup in [0, 1], got "
                f"{self.temperature}, {self.learning_rate}, {self.hidden_weight}, {self.warmup}"
            )
        if self.precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"precision must be 'no', 'bf16' or 'fp16', got {self.precision!r}")

    def course(self) -> dict[str, Any]:
        """The settings on which a run's results depend."""
        facts = dataclasses.asdict(self)
        return {name: facts[name] for name in facts if name not in ("save_every", "log_every", "checkpointing")}

    def rate(self, step: int) -> float:
        """The learning rate of an update, counted from 0."""
        warm = math.ceil(self.warmup * self.steps)
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


def distill(
    model: SwiftKVModel,
    rows: Sequence[Row],
    settings: Distillation,
    folder: str | os.PathLike[str],
    on_step: Callable[[dict[str, float]], None] | None = None,
    *,
    held_out: HeldOut | None = None,
    on_score: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, float]]:
    """Trains a converted model in place, and writes losses and checkpoints to a folder; resumes from what it holds.

    Only what `convert` added to the model changes. The rest is shared with the model it was converted from: moving or
    casting one (`to`, as distillation does to the device of its process) moves and casts the other. Afterwards the same
    weights require gradients as before.

    Args:
        model: as returned by `kvcompress.convert`.
        rows: as returned by `read_rows`.
        settings: of the run.
        folder: gets checkpoint.pt, from which a run with the same settings, base model, rows and held-out rows
            resumes; losses.jsonl, with a line per update; losses.png if matplotlib is installed; and with `held_out`
            scores.jsonl.
        on_step: called after every update, in the first process, with its line.
        held_out: what to measure on before the first update and whenever a checkpoint is written, as of `hold_out`. The
            model is then left as it scored best: with the lowest KL(teacher || student) on texts and rows that ask,
            over all of their tokens.
        on_score: called after every measurement, in the first process, with a line of scores.jsonl: step, perplexity
            of each text, found and divergence, as of `probes.Score`, those of the teacher, and whether it is the best
            so far.

    Returns:
        The lines: step, loss, divergence (T^2 KL), hidden (MSE), rate, tokens and seconds.

    Raises:
        ValueError: the model was not converted, or has no teacher or no later layers, there are no rows, what is held
            out is too short to be measured, or the folder holds another run.
    """
    check_has_teacher(model)
    if not rows:
        raise ValueError("there is nothing to learn from: no rows")
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        own_last = model.config.swiftkv_own_last
        with all_fitted(model):
            return _train(model, rows, settings, Path(folder), on_step, held_out, on_score, own_last)
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])


def _train(
    model: SwiftKVModel,
    rows: Sequence[Row],
    settings: Distillation,
    folder: Path,
    on_step: Callable[[dict[str, float]], None] | None,
    held_out: HeldOut | None,
    on_score: Callable[[dict[str, Any]], None] | None,
    own_last: int,
) -> list[dict[str, float]]:
    """`distill`, which turns gradients off for everything that is not trained."""
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    set_seed(settings.seed)
    # tokens of an update are averaged by hand: Accelerate only scales and synchronises
    accelerator = Accelerator(mixed_precision=settings.precision, gradient_accumulation_steps=settings.accumulate)
    run = Run.of(model, rows, settings.course(), [] if held_out is None else held_out.rows())
    trained = _freeze(model, settings, has_own=bool(own_last))
    model.to(accelerator.device)
    optimiser = torch.optim.AdamW(trained.values(), lr=settings.rate(0), betas=settings.betas, weight_decay=0.0)
    checkpoint = Checkpoint(folder, run, trained, optimiser, accelerator.scaler)
    if settings.fit_tokens and not checkpoint.is_there():
        fit(model, first_rows(rows, settings.fit_tokens, settings.seed))
    begun, lines, scores = checkpoint.resume()
    # all have read what the first may soon replace
    accelerator.wait_for_everyone()
    if begun and accelerator.is_main_process:
        # for a run that was killed between the files
        checkpoint.write_lines(lines, scores)
    network, prepared = accelerator.prepare(model, optimiser)
    feed = batches(rows, settings.batch, accelerator.process_index, accelerator.num_processes, settings.seed)
    for _ in range(begun * settings.accumulate):
        next(feed)
    folder.mkdir(parents=True, exist_ok=True)
    was_training = model.training
    judge = None
    if held_out is not None and accelerator.is_main_process:
        judge = _Judge(model, held_out, own_last, checkpoint, accelerator, scores, on_score)
        if not scores or scores[-1]["step"] != begun:
            judge.measure(begun)
            checkpoint.save(begun, lines, scores)
    objective = Objective(network, model, settings.temperature, accelerator)
    # dropout is off, so that teacher and student differ only by the conversion
    network.train(settings.checkpointing)
    started = time.perf_counter()
    try:
        for step in range(begun + 1, settings.steps + 1):
            parts = [next(feed) for _ in range(settings.accumulate)]
            line = {"step": step, **_update(step, parts, objective, prepared, settings, accelerator)}
            lines.append(line | {"seconds": round(time.perf_counter() - started, 3)})
            saves = step == settings.steps or step % settings.save_every == 0
            if accelerator.is_main_process:
                if saves:
                    if judge is not None:
                        judge.measure(step)
                    checkpoint.save(step, lines, scores)
                if on_step is not None:
                    on_step(lines[-1])
            if saves:
                accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            plot_losses(lines, folder / "losses.png", scores)
        if held_out is not None:
            accelerator.wait_for_everyone()
            checkpoint.load_best()
    finally:
        objective.close()
        model.train(was_training)
    return lines


class _Judge:
    """Measures the model of a run, in its first process, and keeps what scored best."""

    def __init__(
        self,
        model: SwiftKVModel,
        held_out: HeldOut,
        own_last: int,
        checkpoint: Checkpoint,
        accelerator: Any,
        scores: list[dict[str, Any]],
        on_score: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        """
        Args:
            own_last: the conversion's, which is 0 in its config while it is trained.
            scores: of the run so far; gets what is measured.
        """
        # every token of both counts as much
        name = "rows that ask"
        while name in held_out.texts:
            name += ", generated"
        both = {**held_out.texts, name: [row.ids for row in held_out.asked]} if held_out.asked else held_out.texts
        self._model, self._own_last, self._accelerator = model, own_last, accelerator
        self._checkpoint, self._scores, self._on_score = checkpoint, scores, on_score
        self._first = model.config.num_key_value_layers
        with self._as_used():
            self._probes = Probes(model, HeldOut(both, held_out.asked), [self._first], own_last)
            self._teacher = dataclasses.asdict(self._probes.base())

    def measure(self, step: int) -> None:
        """Scores the model as it is after so many updates; the checkpoint keeps it if none before was better."""
        with self._as_used():
            score = {"step": step, **dataclasses.asdict(self._probes.score(self._model, self._first))}
        finite = [each["divergence"] for each in self._scores if math.isfinite(each["divergence"])]
        best = not self._scores or score["divergence"] <= min(finite, default=math.inf)
        if best:
            self._checkpoint.keep_best()
        self._scores.append(score | {"teacher": self._teacher, "best": best})
        if self._on_score is not None:
            self._on_score(self._scores[-1])

    @contextmanager
    def _as_used(self) -> Iterator[None]:
        """Within it, the model is as it will be used: not in training, and its last tokens with their own keys."""
        model, was_training = self._model, self._model.training
        model.config.swiftkv_own_last = self._own_last
        model.eval()
        try:
            with self._accelerator.autocast():
                yield
        finally:
            model.config.swiftkv_own_last = 0
            model.train(was_training)


def _update(
    step: int, parts: list[list[Row]], objective: Objective, optimiser: Any, settings: Distillation, accelerator: Any
) -> dict[str, float]:
    """One update, number `step` counted from 1, on the rows of some forwards; returns its line, as `distill` does."""
    rate = settings.rate(step - 1)
    for group in optimiser.param_groups:
        group["lr"] = rate
    own = sum(len(row.ids) for part in parts for row in part)
    tokens = int(accelerator.reduce(torch.tensor(own, device=accelerator.device), "sum"))
    # every token counts the same, however many are in its forward; Accelerate takes means over forwards
    share = settings.accumulate * accelerator.num_processes / tokens
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for part in parts:
        with accelerator.accumulate(objective.network):
            divergence, error = objective.terms(part)
            accelerator.backward(share * (divergence + settings.hidden_weight * error))
            optimiser.step()
            optimiser.zero_grad()
        sums += torch.stack([divergence.detach().double(), error.detach().double()])
    kl, mse = (accelerator.reduce(sums, "sum") / tokens).tolist()
    return {
        "loss": kl + settings.hidden_weight * mse,
        "divergence": kl,
        "hidden": mse,
        "rate": rate,
        "tokens": tokens,
    }


def _freeze(model: SwiftKVModel, settings: Distillation, has_own: bool) -> dict[str, nn.Parameter]:
    """Turns on gradients for what is trained alone, and returns it, by name: no queries, if tokens have their own."""
    trained = trained_parameters(model)
    if has_own:
        trained = {name: each for name, each in trained.items() if ".q_" not in name}
    if not any("proj" in name for name in trained):
        raise ValueError("the model has no later layers, so there is nothing to train")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    if settings.precision != "no":
        # small updates of 16-bit weights would round away
        for parameter in trained.values():
            parameter.data = parameter.data.float()
    if settings.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    return trained


def plot_losses(lines: Sequence[dict[str, float]], path: Path, scores: Sequence[dict[str, Any]] = ()) -> bool:
    """Plots loss, divergence and hidden error against the tokens learned from, and below them what was measured on what
    is held out; False if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 7 if scores else 4), layout="constrained")
    axes, *below = figure.subplots(2 if scores else 1, 1, sharex=True, squeeze=False)[:, 0]
    tokens = torch.tensor([line["tokens"] for line in lines]).cumsum(0).tolist()
    for name, label in (("loss", "loss"), ("divergence", "T² KL"), ("hidden", "hidden MSE")):
        axes.plot(tokens, [line[name] for line in lines], label=label)
    axes.set(xlabel="tokens", ylabel="loss", yscale="log" if all(line["hidden"] > 0 for line in lines) else "linear")
    axes.legend()
    for under in below:
        learned = [0, *tokens]
        at = [learned[score["step"]] for score in scores]
        beside = under.twinx()
        drawn = under.plot(at, [score["divergence"] for score in scores], "o-", label="KL of what is held out, nats")
        if scores[0]["found"] is not None:
            drawn += beside.plot(at, [score["found"] for score in scores], "s--", color="C1", label="found")
        axes.set(xlabel="")
        under.set(xlabel="tokens", ylabel="KL, nats")
        beside.set(ylabel="found", ylim=(0, 1.05))
        under.legend(handles=drawn)
    figure.savefig(path, dpi=150)
    return True
