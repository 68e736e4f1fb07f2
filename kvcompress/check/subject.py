"""What a check feeds a model, and the model's logits without a cache.

Two rows of random tokens, of different lengths and with a common beginning, each followed by a few single tokens, a
second turn, and single tokens again.
"""

import contextlib
import functools
import itertools
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from kvcompress import hf
from kvcompress.hf import judge
from kvcompress.swiftkv.conversion import convert, first_later
from kvcompress.swiftkv.model import SwiftKVModel

# the rows' common beginning, their lengths, and what they are then fed: single tokens, a second turn, single tokens
DOCUMENT, PROMPTS, FED = 64, (200, 153), (1, 1, 1, 9, 1, 1)
# what a model that goes on from a cache as it should may differ by, over the largest logit, in full and half precision
_GOES_ON, _GOES_ON_HALF = 1e-3, 5e-2


class Subject:
    """A model, what it is fed, and its logits without a cache.

    What a model cannot do with transformers' own cache is not asked of it: see `told_positions` and `one_at_a_time`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @functools.cached_property
    def rows(self) -> list[Tensor]:
        """What each row is fed, [tokens]."""
        return rows_of(self.model)

    @functools.cached_property
    def batch(self) -> tuple[Tensor, Tensor]:
        """The rows padded on the left: ids and mask, [batch, columns]."""
        return padded(self.rows, pad_token(self.model))

    @functools.cached_property
    def judge(self) -> PreTrainedModel:
        """The model without a cache, with attention that takes a mask for each head."""
        return judge.judge_of(self.model)

    @functools.cached_property
    def converted(self) -> "Subject":
        """The same subject with the model converted to SwiftKV."""
        if isinstance(self.model, SwiftKVModel):
            return self
        return Subject(convert(self.model, share=smallest_share(self.model.config)))

    @functools.cached_property
    def attending(self) -> list[int]:
        """The layers that keep keys and values."""
        config = hf.decoder_config(self.model)
        kinds = hf.layer_kinds(config)
        return [index for index in hf.run_order(config) if kinds[index].attends]

    @functools.cached_property
    def readers(self) -> list[list[int]]:
        """For each layer that keeps keys and values, which layers attend to them: it, and those that share them."""
        kinds = hf.layer_kinds(hf.decoder_config(self.model))
        return [[at, *(index for index, kind in enumerate(kinds) if kind.kv_source == at)] for at in self.attending]

    @functools.cached_property
    def told_positions(self) -> bool:
        """Whether the positions of rows without padding are passed too, as `generate` passes them.

        Some models do not go on from the tokens that a cache has seen: they begin anew in each forward, or count from
        the id of their padding on, and leave it out.
        """
        return not self._goes_on((1, 1), told=False)

    @functools.cached_property
    def one_at_a_time(self) -> bool:
        """Whether a second turn is fed token by token, as the model begins one of several with empty states."""
        return not self._goes_on((9,), told=self.told_positions)

    @functools.cached_property
    def stops(self) -> tuple[int, ...]:
        """Columns at which forwards end."""
        fed = (1,) * sum(FED) if self.one_at_a_time else FED
        return tuple(itertools.accumulate(fed, initial=PROMPTS[0]))

    @property
    def limits(self) -> str:
        """What the model cannot do with any cache, in words; empty, if nothing."""
        said = []
        if self.told_positions:
            said.append("it needs position_ids, as generate passes them, to go on from what a cache has seen")
        if self.one_at_a_time:
            said.append("it goes on token by token: it begins a second turn of several with empty states")
        return f"with any cache of transformers, {'; '.join(said)}" if said else ""

    def positions(self, tokens: int, told: bool | None = None) -> dict[str, Tensor]:
        """The argument for the positions of the first tokens of a row, [1, tokens], where they are passed."""
        if not (self.told_positions if told is None else told):
            return {}
        return {"position_ids": torch.arange(tokens, device=self.rows[0].device)[None]}

    @torch.no_grad()
    def _goes_on(self, fed: tuple[int, ...], told: bool) -> bool:
        """Whether the model, with transformers' own cache, goes on from a text as it does without a cache.

        Args:
            fed: how many tokens come in each forward after the first. told: whether positions are passed.
        """
        row = self.rows[0][: DOCUMENT + sum(fed)]
        logits, start = [], 0
        try:
            cache = hf.full_cache(self.judge)
            truth = self.judge(row[None], use_cache=False, **self.positions(len(row), True)).logits[0]
            for stop in itertools.accumulate(fed, initial=DOCUMENT):
                positions = {name: each[:, start:] for name, each in self.positions(stop, told).items()}
                piece = row[None, start:stop]
                out = self.judge(piece, use_cache=True, **positions, **hf.cache_argument(self.judge, cache))
                logits.append(out.logits[0])
                start = stop
        # whatever it is, the check itself will meet it
        except Exception:
            return True
        most = _GOES_ON if truth.dtype in (torch.float32, torch.float64) else _GOES_ON_HALF
        return float((torch.cat(logits) - truth).abs().max()) <= most * float(truth.abs().max())

    @functools.cached_property
    def truth(self) -> list[Tensor]:
        """For each row, the logits without a cache, [tokens, vocabulary]."""
        return [self.without_cache(row) for row in self.rows]

    @functools.cached_property
    def first_layer(self) -> list[tuple[Tensor, Tensor]]:
        """For each row, the keys and values that the first layer is fed, [kv_heads, tokens, head_dim]."""
        fed = []
        for row in self.rows:
            cache: Any = hf.full_cache(self.judge, windows=False)
            with torch.no_grad():
                positions = self.positions(len(row))
                self.judge(row[None], use_cache=True, **positions, **hf.cache_argument(self.judge, cache))
            first = cache.layers[self.attending[0]]
            fed.append((first.keys[0], first.values[0]))
        return fed

    @functools.cached_property
    def worth(self) -> float:
        """What the prompt is worth to what follows it, in nats per token."""
        follows = sum(FED)
        without = [self.without_cache(row[-follows:]) for row in self.rows]
        worth = torch.stack(
            [divergence(known[-follows:], bare) for known, bare in zip(self.truth, without, strict=True)]
        )
        # a model that ignores its prompt could not be checked by its logits
        return max(float(worth.mean()), 1e-4)

    @torch.no_grad()
    def without_cache(self, row: Tensor, allowed: list[Tensor] | None = None) -> Tensor:
        """The logits of one row [tokens] without a cache, [tokens, vocabulary].

        Args:
            allowed: for each layer that keeps keys and values, which token may attend to which, within the model's own
                mask, as bool [kv_heads, tokens, tokens].
        """
        with contextlib.ExitStack() as stack:
            for layers, seen in zip(self.readers, allowed or (), strict=allowed is not None):
                for layer in layers:
                    stack.enter_context(judge.forbidden(self.judge, layer, ~seen))
            return self.judge(row[None], use_cache=False, **self.positions(len(row))).logits[0]


def pads_before(row: int) -> int:
    """How many columns of padding precede a row of the batch."""
    return PROMPTS[0] - PROMPTS[row]


def rows_of(model: PreTrainedModel) -> list[Tensor]:
    """Two rows of tokens with a common beginning, the longer one first."""
    device, vocabulary = hf.input_device(model), hf.sizes(hf.decoder_config(model)).vocabulary
    follows = sum(FED)
    lengths = [prompt + follows for prompt in PROMPTS]
    generator = torch.Generator().manual_seed(7)
    # no token twice if there are enough: policies may score equal tokens alike up to rounding
    needed = sum(lengths) - DOCUMENT
    drawn = torch.cat([torch.randperm(vocabulary, generator=generator) for _ in range(-(-needed // vocabulary))])
    start = DOCUMENT
    rows = []
    for length in lengths:
        own = length - DOCUMENT
        rows.append(torch.cat([drawn[:DOCUMENT], drawn[start : start + own]]).to(device))
        start += own
    return rows


def padded(rows: list[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """Rows as one batch padded on the left: ids and mask, [batch, columns]."""
    columns = max(map(len, rows))
    ids = torch.stack([torch.cat([row.new_full((columns - len(row),), pad), row]) for row in rows])
    mask = torch.stack([torch.cat([row.new_zeros(columns - len(row)), torch.ones_like(row)]) for row in rows])
    return ids, mask


def pad_token(model: PreTrainedModel) -> int:
    pad = getattr(hf.decoder_config(model), "pad_token_id", None)
    return pad if isinstance(pad, int) and 0 <= pad < hf.sizes(hf.decoder_config(model)).vocabulary else 0


def divergence(truth: Tensor, got: Tensor) -> Tensor:
    """Mean KL divergence of logits [tokens, vocabulary] from the true ones, in nats per token."""
    true, said = (logits.float().log_softmax(-1) for logits in (truth, got.to(truth.device)))
    return (true.exp() * (true - said)).sum(-1).mean()


def smallest_share(config: PreTrainedConfig) -> int:
    """The fewest later layers, two or more, that a group may have."""
    layers = hf.sizes(config).layers
    later = layers - first_later(0.5, layers)
    return next((share for share in range(2, later + 1) if later % share == 0), 1)
