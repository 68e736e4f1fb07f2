"""What a run of distillation writes to its folder: a checkpoint to resume from, which holds what scored best, and its
losses and scores."""

import dataclasses
import hashlib
import json
import pickle
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from kvcompress import hf
from kvcompress.storage.durable import write_whole
from kvcompress.swiftkv.data import Row
from kvcompress.swiftkv.model import SwiftKVModel, trained_parameters

_CHECKPOINT = "checkpoint.pt"
_LOSSES = "losses.jsonl"
_SCORES = "scores.jsonl"


@dataclass(frozen=True)
class Run:
    """What a run's results depend on.

    base: the model without what is trained. rows: how many, and a digest. held_out: a digest of what it is measured on,
    or None.
    """

    settings: dict[str, Any]
    base: hf.Fingerprint
    rows: str
    held_out: str | None = None

    @classmethod
    def of(
        cls, model: SwiftKVModel, rows: Sequence[Row], settings: Mapping[str, Any], held_out: Sequence[Row] = ()
    ) -> "Run":
        """
        Args:
            settings: those on which the run's results depend.
            held_out: what it is measured on.
        """
        tokens = sum(len(row.ids) for row in rows)
        known: Any = model
        return cls(
            json.loads(json.dumps(settings)),
            hf.Fingerprint.of(known, without=frozenset(trained_parameters(model))),
            f"{len(rows)} rows of {tokens} tokens, {_digest(rows)}",
            _digest(held_out) if held_out else None,
        )

    def check(self, state: dict[str, Any], folder: Path) -> None:
        """
        Raises:
            ValueError: the folder's state is of another run.
        """
        then = json.loads(json.dumps(state["settings"]))
        differ = [name for name, value in self.settings.items() if value != then.get(name)]
        if differ:
            raise ValueError(f"{folder} holds another run, which differs in {', '.join(differ)}; choose another folder")
        if "base" not in state:
            warnings.warn(
                f"{folder} was written by an earlier kvcompress, and does not say for which base model and data",
                stacklevel=4,
            )
            return
        hf.Fingerprint(**state["base"]).check(self.base, f"the run in {folder}")
        if state["rows"] != self.rows:
            raise ValueError(
                f"{folder} holds a run on other data: {state['rows']}, got {self.rows}; choose another folder"
            )
        if self.held_out is not None and state.get("held_out") not in (None, self.held_out):
            raise ValueError(
                f"{folder} holds a run that was measured on other rows, whose scores do not compare; measure on the "
                "same texts, or choose another folder"
            )


def _digest(rows: Sequence[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        # the length first, so that rows cannot run into each other
        digest.update(len(row.ids).to_bytes(8, "little"))
        digest.update(row.ids.long().cpu().numpy().tobytes() + row.answered.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class Checkpoint:
    """The state of a run, in a folder."""

    def __init__(
        self, folder: Path, run: Run, trained: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer, scaler: Any
    ) -> None:
        """
        Args:
            folder: may hold the state of an interrupted run.
            trained: the parameters that are trained, by name.
            scaler: for gradients in float16, or None.
        """
        self._folder = folder
        self._run = run
        self._trained = trained
        self._optimiser = optimiser
        self._scaler = scaler
        self._held_out = run.held_out
        self._best: dict[str, Any] | None = None

    def is_there(self) -> bool:
        """Whether the folder holds the state of a run."""
        return (self._folder / _CHECKPOINT).exists()

    def save(self, step: int, lines: list[dict[str, float]], scores: list[dict[str, Any]]) -> None:
        """Writes everything needed to resume after so many updates, and then losses and scores for a reader."""
        state = {
            "trained": {name: parameter.detach().cpu() for name, parameter in self._trained.items()},
            "best": self._best,
            "held_out": self._held_out,
            "optimiser": self._optimiser.state_dict(),
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
            "settings": self._run.settings,
            "base": dataclasses.asdict(self._run.base),
            "rows": self._run.rows,
            "step": step,
            "lines": lines,
            "scores": scores,
        }

        def write_state(file: BinaryIO) -> str:
            torch.save(state, file)
            return _CHECKPOINT

        write_whole(self._folder, _CHECKPOINT, write_state)
        self.write_lines(lines, scores)

    def write_lines(self, lines: list[dict[str, float]], scores: list[dict[str, Any]]) -> None:
        """Writes losses and scores for a reader; what there is none of has no file."""
        for name, written in ((_LOSSES, lines), (_SCORES, scores)):
            text = "".join(json.dumps(line) + "\n" for line in written)

            def write(file: BinaryIO, name: str = name, text: str = text) -> str:
                file.write(text.encode())
                return name

            if written:
                write_whole(self._folder, name, write)
            else:
                (self._folder / name).unlink(missing_ok=True)

    def keep_best(self) -> None:
        """What is trained now is the best so far; `save` writes it too."""
        self._best = {name: parameter.detach().cpu().clone() for name, parameter in self._trained.items()}

    def load_best(self) -> None:
        """Sets what is trained to the best that was written."""
        best = _read_state(self._folder / _CHECKPOINT)["best"]
        self._set(best)

    def _set(self, values: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._trained.items():
                parameter.copy_(values[name])

    def resume(self) -> tuple[int, list[dict[str, float]], list[dict[str, Any]]]:
        """Restores what the folder holds of the run; returns the updates done, their lines, and the scores so far.

        Raises:
            ValueError: it holds another run, or is damaged.
        """
        if not self.is_there():
            return 0, [], []
        folder = self._folder
        state = _read_state(folder / _CHECKPOINT)
        self._run.check(state, folder)
        if set(state["trained"]) != set(self._trained):
            raise ValueError(f"{folder} holds another run, which differs in the layers trained; choose another folder")
        self._set(state["trained"])
        self._optimiser.load_state_dict(state["optimiser"])
        if self._scaler is not None:
            self._scaler.load_state_dict(state["scaler"])
        scores = state.get("scores", [])
        self._best = state.get("best")
        self._held_out = self._held_out or state.get("held_out")
        if "lines" in state:
            return state["step"], state["lines"], scores
        # before checkpoints had them
        lines = [json.loads(line) for line in (folder / _LOSSES).read_text("utf-8").splitlines()]
        return state["step"], lines[: state["step"]], scores


def _read_state(path: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: the checkpoint is not as it was written.
    """
    try:
        # torch reads its archives without checking their checksums
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is None:
            # into host memory, whichever device it was on: parameters and the optimiser's state are copied from there
            return torch.load(path, map_location="cpu", weights_only=True)
    except (
        zipfile.BadZipFile,
        zlib.error,
        pickle.UnpicklingError,
        NotImplementedError,
        RuntimeError,
        EOFError,
    ) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to start over") from error
    raise ValueError(f"{path} is damaged ({damaged} within it); delete it to start over")
