"""Distillation of a SwiftKV model: the same network, conversion off, teaches the later layers (arXiv:2410.03960).

    loss = T^2 KL(teacher || student) + MSE of the hidden states before the last layer          T = 2

Only the common norm and the later layers' query, key and value projections train. KL is taken over log-probabilities
on both sides, of the tokens to be answered (all tokens of a text, an assistant's in a chat), divided by all tokens.
Runs in one process, or in several under `accelerate launch`; the order of the data depends on the seed alone, so that
an interrupted run goes on as if it had not stopped.
"""

import dataclasses
import hashlib
import json
import math
import os
import pickle
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor, nn

from kvcompress import hf
from kvcompress.storage.durable import write_whole
from kvcompress.swiftkv.data import Row, first_rows
from kvcompress.swiftkv.least_squares import fit
from kvcompress.swiftkv.model import SwiftKVModel, as_teacher, trained_parameters

# tokens whose probabilities are compared at a time: two float32 rows of the vocabulary each
_TOKENS_AT_ONCE = 512
_CHECKPOINT = "checkpoint.pt"
_LOSSES = "losses.jsonl"


@dataclass(frozen=True)
class Distillation:
    """Settings of a run; the defaults are the paper's.

    temperature: of both distributions. hidden_weight: of the hidden states' mean squared error.
    learning_rate: the highest; it rises over the first `warmup` of the steps and falls by a cosine to 0.
    steps: updates. batch: rows a process and forward. accumulate: forwards an update.
    length: tokens of a row at most. fit_tokens: of these, which keys and values are fitted to by least squares
    before the first update (kvcompress/swiftkv/least_squares.py); 0, the paper's, for none.
    precision: "no", "bf16" or "fp16", of the forwards under autocast.
    checkpointing: layers are computed again in the backward pass, to hold less.
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
        if self.temperature <= 0 or self.learning_rate <= 0 or self.hidden_weight < 0 or not 0 <= self.warmup <= 1:
            raise ValueError(
                "temperature and learning_rate must be above 0, hidden_weight 0 or more and warmup in [0, 1], got "
                f"{self.temperature}, {self.learning_rate}, {self.hidden_weight}, {self.warmup}"
            )
        if self.precision not in ("no", "bf16", "fp16"):
            raise ValueError(f"precision must be 'no', 'bf16' or 'fp16', got {self.precision!r}")

    def rate(self, step: int) -> float:
        """The learning rate of an update, counted from 0."""
        warm = math.ceil(self.warmup * self.steps)
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


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
    for ours, theirs in zip(student.split(_TOKENS_AT_ONCE), teacher.split(_TOKENS_AT_ONCE), strict=True):
        ours, theirs = ((x.float() / temperature).log_softmax(-1) for x in (ours, theirs))
        total = total + nn.functional.kl_div(ours, theirs, reduction="sum", log_target=True)
    return temperature**2 * total / tokens


def batches(rows: Sequence[Row], settings: Distillation, rank: int, world: int) -> Iterator[list[Row]]:
    """What one process of a run is fed, forward by forward, without end: each epoch in an order of its own."""
    count, at = settings.batch * world, 0
    order: list[int] = []
    epoch = 0
    while True:
        while len(order) - at < count:
            generator = torch.Generator().manual_seed(settings.seed + epoch)
            order, at, epoch = order[at:] + torch.randperm(len(rows), generator=generator).tolist(), 0, epoch + 1
        yield [rows[index] for index in order[at + rank : at + count : world]]
        at += count


def distill(
    model: SwiftKVModel,
    rows: Sequence[Row],
    settings: Distillation,
    folder: str | os.PathLike[str],
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """Trains a converted model in place, and writes losses and checkpoints to a folder; goes on from what it holds.

    Of the model only what `convert` added changes. The rest is shared with the model it was converted from: what moves
    or casts the one (`to`, as distillation does to the device of its process) moves and casts the other. Which weights
    require gradients is afterwards as it was before.

    Args:
        model: as kvcompress.swiftkv.model.convert gives it.
        rows: what `read_rows` gives.
        settings: of the run.
        folder: checkpoint.pt, of which a run goes on that has the same settings, base model and rows; losses.jsonl, a
            line an update; and losses.png where matplotlib is installed.
        on_step: called after every update, in the first process, with its line.

    Returns:
        The lines: step, loss, divergence (T^2 KL), hidden (MSE), rate, tokens and seconds.

    Raises:
        ValueError: the model has no teacher or no later layers, there are no rows, or the folder holds another run.
    """
    if not model.config.swiftkv_teacher:
        raise ValueError(f"this {type(model).__name__} was published without its teacher; convert the base model")
    if not rows:
        raise ValueError("there is nothing to learn from: no rows")
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        return _train(model, rows, settings, Path(folder), on_step)
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name])


def _train(
    model: SwiftKVModel,
    rows: Sequence[Row],
    settings: Distillation,
    folder: Path,
    on_step: Callable[[dict[str, float]], None] | None,
) -> list[dict[str, float]]:
    """`distill`, which leaves all but what trains without gradients."""
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    set_seed(settings.seed)
    # tokens of an update are averaged by hand: Accelerate only scales and synchronises
    accelerator = Accelerator(mixed_precision=settings.precision, gradient_accumulation_steps=settings.accumulate)
    run = _Run.of(model, rows, settings)
    trained = _freeze(model, settings)
    model.to(accelerator.device)
    if settings.fit_tokens and not (folder / _CHECKPOINT).exists():
        fit(model, first_rows(rows, settings.fit_tokens, settings.seed))
    optimiser = torch.optim.AdamW(trained.values(), lr=settings.rate(0), betas=settings.betas, weight_decay=0.0)
    begun, lines = _resume(folder, trained, optimiser, accelerator.scaler, run, accelerator.device)
    if begun and accelerator.is_main_process:
        # who was killed between the two files
        _write_losses(folder, lines)
    network, optimiser = accelerator.prepare(model, optimiser)
    hidden = _Hidden(model)
    was_training = model.training
    # dropout off, for teacher and student to differ by the conversion alone
    network.train(settings.checkpointing)
    feed = batches(rows, settings, accelerator.process_index, accelerator.num_processes)
    for _ in range(begun * settings.accumulate):
        next(feed)
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    try:
        for step in range(begun, settings.steps):
            for group in optimiser.param_groups:
                group["lr"] = settings.rate(step)
            parts = [next(feed) for _ in range(settings.accumulate)]
            own = sum(len(row.ids) for part in parts for row in part)
            tokens = int(accelerator.reduce(torch.tensor(own, device=accelerator.device), "sum"))
            # every token weighs the same, however many are in its forward; Accelerate takes means over forwards
            share = settings.accumulate * accelerator.num_processes / tokens
            sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
            for part in parts:
                with accelerator.accumulate(network):
                    divergence, error = _compare(network, model, part, hidden, settings, accelerator)
                    accelerator.backward(share * (divergence + settings.hidden_weight * error))
                    optimiser.step()
                    optimiser.zero_grad()
                sums += torch.stack([divergence.detach().double(), error.detach().double()])
            kl, mse = (accelerator.reduce(sums, "sum") / tokens).tolist()
            line = {
                "step": step + 1,
                "loss": kl + settings.hidden_weight * mse,
                "divergence": kl,
                "hidden": mse,
                "rate": settings.rate(step),
                "tokens": tokens,
                "seconds": round(time.perf_counter() - started, 3),
            }
            lines.append(line)
            last = step + 1 == settings.steps
            if accelerator.is_main_process:
                if last or (step + 1) % settings.save_every == 0:
                    _save(folder, trained, optimiser, accelerator.scaler, run, step + 1, lines)
                if on_step is not None:
                    on_step(line)
            if last or (step + 1) % settings.save_every == 0:
                accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            plot_losses(lines, folder / "losses.png")
    finally:
        hidden.close()
        model.train(was_training)
    return lines


def _freeze(model: SwiftKVModel, settings: Distillation) -> dict[str, nn.Parameter]:
    """Leaves gradients to what trains, and gives it, by name."""
    trained = trained_parameters(model)
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


class _Hidden:
    """What enters the first later layer and the last layer, of the latest forward."""

    def __init__(self, model: SwiftKVModel) -> None:
        layers: Any = model.model.layers
        self._later, self._last = layers[model.config.num_key_value_layers], layers[-1]
        self._captured = hf.Captured(inputs={self._later, self._last})
        self.close = self._captured.close

    @property
    def entered(self) -> Tensor:
        return self._captured.inputs[self._later]

    @property
    def latest(self) -> Tensor:
        return self._captured.inputs[self._last]


class _Passed(nn.Module):
    """Stands for an early layer whose output is at hand."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


@contextmanager
def _later_only(model: SwiftKVModel) -> Iterator[None]:
    """Within it `inputs_embeds` is what enters the first later layer; the early ones, which nobody trains, rest."""
    layers: Any = model.model.layers
    first = model.config.num_key_value_layers
    model.model.layers = nn.ModuleList([*(_Passed() for _ in range(first)), *layers[first:]])
    try:
        yield
    finally:
        model.model.layers = layers


def _compare(
    network: nn.Module, model: SwiftKVModel, rows: list[Row], hidden: _Hidden, settings: Distillation, accelerator: Any
) -> tuple[Tensor, Tensor]:
    """Divergence and hidden error of one forward, each summed over its tokens."""
    ids = nn.utils.rnn.pad_sequence([row.ids for row in rows], batch_first=True).to(accelerator.device)
    answered = nn.utils.rnn.pad_sequence([row.answered for row in rows], batch_first=True).to(accelerator.device)
    lengths = torch.tensor([len(row.ids) for row in rows], device=ids.device)
    real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    inputs = {"input_ids": ids, "attention_mask": real.long(), "use_cache": False}
    if bool(real.all()):
        del inputs["attention_mask"]
    with torch.no_grad(), as_teacher(model), accelerator.autocast():
        teacher = model(**inputs).logits
        theirs = hidden.latest
    # teacher and student have the early layers in common
    del inputs["input_ids"]
    with _later_only(model):
        student = network(inputs_embeds=hidden.entered, **inputs).logits
    # the logits at a position are about the next token
    counted = nn.functional.pad(answered[:, 1:], (0, 1))
    divergence = distillation_loss(student, teacher, counted, 1, settings.temperature)
    error = (hidden.latest.float() - theirs.float())[real].square().mean(-1).sum()
    return divergence, error


@dataclass(frozen=True)
class _Run:
    """What the course of a run depends on. base: the model without what trains. rows: how much there is, a digest."""

    settings: dict[str, Any]
    base: hf.Fingerprint
    rows: str

    @classmethod
    def of(cls, model: SwiftKVModel, rows: Sequence[Row], settings: Distillation) -> "_Run":
        facts = dataclasses.asdict(settings)
        for name in ("save_every", "log_every", "checkpointing"):
            del facts[name]
        digest = hashlib.sha256()
        for row in rows:
            # the length first, so that rows cannot run into each other
            digest.update(len(row.ids).to_bytes(8, "little"))
            digest.update(row.ids.long().cpu().numpy().tobytes() + row.answered.cpu().numpy().tobytes())
        tokens = sum(len(row.ids) for row in rows)
        known: Any = model
        return cls(
            json.loads(json.dumps(facts)),
            hf.Fingerprint.of(known, without=frozenset(trained_parameters(model))),
            f"{len(rows)} rows of {tokens} tokens, {digest.hexdigest()[:16]}",
        )

    def check(self, state: dict[str, Any], folder: Path) -> None:
        """
        Raises:
            ValueError: the state of a folder is of another run.
        """
        then = json.loads(json.dumps(state["settings"]))
        differ = [name for name, value in self.settings.items() if value != then.get(name)]
        if differ:
            raise ValueError(f"{folder} holds another run, which differs in {', '.join(differ)}; choose another folder")
        if "base" not in state:
            warnings.warn(
                f"{folder} was written by an earlier kvcompress, and does not say of which base model and data",
                stacklevel=4,
            )
            return
        hf.Fingerprint(**state["base"]).check(self.base, f"the run in {folder}")
        if state["rows"] != self.rows:
            raise ValueError(
                f"{folder} holds a run on other data: {state['rows']}, got {self.rows}; choose another folder"
            )


def _save(
    folder: Path,
    trained: dict[str, nn.Parameter],
    optimiser: Any,
    scaler: Any,
    run: _Run,
    step: int,
    lines: list[dict[str, float]],
) -> None:
    """Writes the checkpoint, which has all that a run goes on from, and then the losses for a reader."""
    state = {
        "trained": {name: parameter.detach().cpu() for name, parameter in trained.items()},
        "optimiser": optimiser.state_dict(),
        "scaler": None if scaler is None else scaler.state_dict(),
        "settings": run.settings,
        "base": dataclasses.asdict(run.base),
        "rows": run.rows,
        "step": step,
        "lines": lines,
    }

    def write_state(file: BinaryIO) -> str:
        torch.save(state, file)
        return _CHECKPOINT

    write_whole(folder, _CHECKPOINT, write_state)
    _write_losses(folder, lines)


def _write_losses(folder: Path, lines: list[dict[str, float]]) -> None:
    def write(file: BinaryIO) -> str:
        file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        return _LOSSES

    write_whole(folder, _LOSSES, write)


def _resume(
    folder: Path,
    trained: dict[str, nn.Parameter],
    optimiser: Any,
    scaler: Any,
    run: _Run,
    device: torch.device,
) -> tuple[int, list[dict[str, float]]]:
    """Takes on what a folder holds of a run: the updates done, and their lines."""
    if not (folder / _CHECKPOINT).exists():
        return 0, []
    state = _read_state(folder / _CHECKPOINT, device)
    run.check(state, folder)
    if set(state["trained"]) != set(trained):
        raise ValueError(f"{folder} holds another run, which differs in the layers that train; choose another folder")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(state["trained"][name])
    optimiser.load_state_dict(state["optimiser"])
    if scaler is not None:
        scaler.load_state_dict(state["scaler"])
    if "lines" in state:
        return state["step"], state["lines"]
    # before checkpoints had them
    lines = [json.loads(line) for line in (folder / _LOSSES).read_text("utf-8").splitlines()]
    return state["step"], lines[: state["step"]]


def _read_state(path: Path, device: torch.device) -> dict[str, Any]:
    """
    Raises:
        ValueError: the checkpoint is not as it was written.
    """
    try:
        # torch reads its archives without looking at their checksums
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is None:
            return torch.load(path, map_location=device, weights_only=True)
    except (
        zipfile.BadZipFile,
        zlib.error,
        pickle.UnpicklingError,
        NotImplementedError,
        RuntimeError,
        EOFError,
    ) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to begin anew") from error
    raise ValueError(f"{path} is damaged ({damaged} within it); delete it to begin anew")


def plot_losses(lines: Sequence[dict[str, float]], path: Path) -> bool:
    """Draws loss, divergence and hidden error against the tokens learned from; False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    tokens = torch.tensor([line["tokens"] for line in lines]).cumsum(0).tolist()
    for name, label in (("loss", "loss"), ("divergence", "T² KL"), ("hidden", "hidden MSE")):
        axes.plot(tokens, [line[name] for line in lines], label=label)
    axes.set(xlabel="tokens", ylabel="loss", yscale="log" if all(line["hidden"] > 0 for line in lines) else "linear")
    axes.legend()
    figure.savefig(path, dpi=150)
    return True
