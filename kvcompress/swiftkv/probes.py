"""What a conversion still knows, measured on what it did not learn from: texts, and rows that ask for what they hold
(retrieval.py).

With `own_last` (model.py), the first half of a text is a prompt, and the second half is measured; of a row that asks,
what comes before the first answer is the prompt. Rows whose prompt is no longer than `own_last`, of which nothing is
skipped, are left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kvcompress import hf
from kvcompress.swiftkv.data import Row, first_rows
from kvcompress.swiftkv.model import SwiftKVModel, as_teacher, entered_at
from kvcompress.swiftkv.objective import TOKENS_AT_ONCE, distillation_loss
from kvcompress.swiftkv.retrieval import retrieval_rows

# first tokens of an answer that must be right; tokens of rows that ask, for each of those to measure a text on
_ANSWER, _ASKED = 8, 4


@dataclass(frozen=True)
class Score:
    """What a model knows of the probes.

    perplexity: of each text. found: the share of answers whose first tokens, up to eight, it each finds likeliest; None
    if nothing was asked. divergence: KL(the base model || it) on the texts, in nats per token.
    """

    perplexity: dict[str, float]
    found: float | None
    divergence: float


@dataclass(frozen=True)
class HeldOut:
    """What a model is measured on. texts: of each, rows of token ids [tokens] int64. asked: rows whose `answered`
    tokens are looked up; none, if that is not measured.

    Raises:
        ValueError: there is no text of two tokens.
    """

    texts: Mapping[str, Sequence[Tensor]]
    asked: Sequence[Row]

    def __post_init__(self) -> None:
        if not any(len(ids) > 1 for parts in self.texts.values() for ids in parts):
            raise ValueError("there is nothing to measure: it takes texts of at least two tokens")

    def rows(self) -> list[Row]:
        """Those of the texts, and those that ask."""
        texts = [Row(ids, torch.ones_like(ids, dtype=torch.bool)) for parts in self.texts.values() for ids in parts]
        return [*texts, *self.asked]


def hold_out(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    texts: Mapping[str, Sequence[Row]] | None = None,
    tokens: int = 2048,
    length: int = 512,
    seed: int = 0,
    asks: bool = True,
) -> tuple[list[Row], HeldOut]:
    """The rows that are left to learn from, and what to measure on: texts, and rows generated of them that ask.

    Args:
        rows: as of `read_rows`.
        tokenizer: the model's.
        texts: rows to measure on, by name; None for the last of `rows`.
        tokens: how many of each text; of rows that ask, four times as many.
        length: the most tokens of a row of generated ones.
        seed: of the choice of rows. With another, rows for training are generated.
        asks: whether to generate rows that ask.

    Raises:
        ValueError: there are too few rows, or as `retrieval_rows`.
    """
    left = list(rows)
    if texts is None:
        held: list[Row] = []
        while left and sum(len(row.ids) for row in held) < tokens:
            held.append(left.pop())
        if not left:
            raise ValueError(
                f"the {len(rows)} rows have too few tokens to hold out {tokens} of them: hold out fewer, or give texts"
            )
        texts = {"held out": held}
    asking = [row for part in texts.values() for row in part]
    return left, HeldOut(
        {name: first_rows(part, tokens, seed) for name, part in texts.items()},
        retrieval_rows(asking, tokenizer, _ASKED * tokens, length, seed + 1) if asks else (),
    )


class Probes:
    """What is held out, and what a model makes of it up to each first layer."""

    @torch.no_grad()
    def __init__(self, model: Any, held: HeldOut, firsts: Sequence[int], own_last: int = 0) -> None:
        """
        Args:
            model: the base model, or one converted from it, which is its own teacher.
            firsts: layers before which the conversions that will be scored compute what the base model does.
            own_last: as of `convert`; the conversions'.

        Raises:
            ValueError: no row is long enough to have a prompt of which anything is skipped.
        """
        self.layers = model.model.layers
        self._own_last = own_last
        self._model = model
        texts = [(name, ids) for name, parts in held.texts.items() for ids in parts if len(ids) > 1]
        texts = [(name, ids) for name, ids in texts if not own_last or len(ids) // 2 > own_last]
        answers = [(row, next(_runs(row.answered), None)) for row in held.asked]
        asked = [row for row, first in answers if first and (not own_last or first[0] - 1 > own_last)]
        left_out = [name for name, parts in held.texts.items() if parts and name not in {name for name, _ in texts}]
        if left_out or bool(held.asked) != bool(asked):
            raise ValueError(
                f"there is nothing to measure of {', '.join(left_out) or 'rows that ask'}: it takes rows of at least "
                f"two tokens, texts of more than twice own_last={own_last}, and prompts of more"
            )
        self._names = [name for name, _ in texts]
        self._rows = [*(Row(ids, torch.zeros(0)) for _, ids in texts), *asked]
        self._entered: list[dict[int, Tensor]] = []
        last = self.layers[-1]
        captures = hf.Captured(inputs=[self.layers[first] for first in firsts], outputs=[last])
        with captures as captured, self._as_base():
            for row in self._rows:
                model.model(row.ids[None].to(hf.input_device(model)), use_cache=False)
                entered = {first: captured.inputs[self.layers[first]] for first in firsts}
                # what leaves the last layer enters none
                self._entered.append(entered | {len(self.layers): captured.outputs[last]})

    @torch.no_grad()
    def base(self) -> Score:
        """The score of the base model."""
        with self._as_base():
            return self.score(self._model, len(self.layers))

    @torch.no_grad()
    def score(self, model: Any, first: int) -> Score:
        """The score of a conversion of the base model, which computes the same before the layer `first`."""
        lost: dict[str, list[Tensor]] = {}
        tokens: dict[str, int] = {}
        divergence, found, asked, measured = 0.0, 0, 0, 0
        for index, (row, entered) in enumerate(zip(self._rows, self._entered, strict=True)):
            ids = row.ids[None].to(hf.input_device(model))
            if index < len(self._names):
                name = self._names[index]
                prompt = len(row.ids) // 2 if self._own_last else 0
                with entered_at(model, first, entered[first]):
                    logits = self._logits(model, ids, prompt)
                with self._as_base(), entered_at(self._model, len(self.layers), entered[len(self.layers)]):
                    wanted_logits = self._logits(self._model, ids, prompt)
                said = ids[0, prompt + 1 :].to(logits.device)
                every = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
                divergence += float(distillation_loss(logits, wanted_logits, every, 1, temperature=1.0))
                parts = zip(logits[:-1].split(TOKENS_AT_ONCE), said.split(TOKENS_AT_ONCE), strict=True)
                lost.setdefault(name, []).extend(cross_entropy(x.float(), y, reduction="sum") for x, y in parts)
                tokens[name] = tokens.get(name, 0) + len(said)
                measured += len(said) + 1
                continue
            answers = [*_runs(row.answered)]
            at = torch.cat([torch.arange(start, stop) for start, stop in answers])
            with entered_at(model, first, entered[first]):
                if self._own_last:
                    prompt = answers[0][0] - 1
                    likeliest = self._logits(model, ids, prompt)[at - 1 - prompt].argmax(-1)
                else:
                    wanted = (at - 1).to(ids.device)
                    likeliest = model(ids, use_cache=False, logits_to_keep=wanted).logits[0].argmax(-1)
            right = (likeliest.cpu() == row.ids[at]).split([stop - start for start, stop in answers])
            found += sum(bool(each.all()) for each in right)
            asked += len(answers)
        perplexity = {name: float((torch.stack(each).sum() / tokens[name]).exp()) for name, each in lost.items()}
        # rounding may leave less than nothing; what is no number stays none
        return Score(perplexity, found / asked if asked else None, max(divergence / measured, 0.0))

    def _as_base(self) -> AbstractContextManager[None]:
        """Within it, the model that the probes were made with is the base model."""
        return as_teacher(self._model) if isinstance(self._model, SwiftKVModel) else nullcontext()

    def _logits(self, model: Any, ids: Tensor, prompt: int) -> Tensor:
        """The logits of what follows the first tokens of a row [1, tokens], [tokens - prompt, vocabulary]."""
        logits: Tensor = model(ids, use_cache=False, logits_to_keep=ids.shape[1] - prompt if prompt else 0).logits[0]
        return logits


def _runs(answered: Tensor) -> Iterator[tuple[int, int]]:
    """Begin and end of each run of answered tokens, [tokens] bool, as far as it counts; never the first token, which
    nothing tells."""
    start = None
    for index, is_answered in enumerate([*answered.tolist(), False]):
        if is_answered and start is None and index:
            start = index
        elif not is_answered and start is not None:
            yield start, min(index, start + _ANSWER)
            start = None
