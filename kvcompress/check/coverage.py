"""Which model types of the installed transformers are served: a tiny model of each, through the caches that differ."""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import transformers
from transformers import PreTrainedModel

from kvcompress import hf
from kvcompress.check.check import check, is_refusal
from kvcompress.check.models import small_model
from kvcompress.check.outcome import FULL, Checked
from kvcompress.loading import ModelUnavailableError, first_line

# one cache that keeps every token, one that evicts, one that packs, one that undoes rotations
CORE = ("none", "h2o", "gear", "shadowkv")

_NO_MODEL = "no small model could be made: "

Served = Literal["served", "partly", "refused", "fault", "unknown"]

# the kinds of types, as on the page
_DECODERS = {"text": "Text", "multimodal": "Multimodal"}
_OTHERS = {
    "other": (
        "No decoder-only language models",
        "What transformers lists with those that generate text as well: encoders (its masked language models, and "
        "`bert-generation`), told here to decode; `xlnet`, which permutes its tokens; `trocr`, the decoder of an "
        "encoder-decoder; drafters (`gemma4_assistant`, `gemma4_unified_assistant`); `pi0`, which moves a robot.",
    ),
    "states": ("Without keys and values", "States of a fixed size in their place: there is nothing to compress."),
}


@dataclass(frozen=True)
class Covered:
    """What came of a model type.

    kind: as `hf.model_types` has it. outcomes: of each cache, OK, REFUSED or FAULT; empty where no tiny model could be
    made, or none is to be served. reason: why not all is OK, and what the model was not asked. release: of
    transformers.
    """

    type: str
    kind: str
    outcomes: Mapping[str, str]
    reason: str = ""
    release: str = transformers.__version__

    @property
    def served(self) -> Served:
        """served: every cache, or all but one that undoes rotations, which the model's forbid. partly: some other is
        refused. refused: all, by name. unknown: transformers' own cache is at fault too, or there is no tiny model."""
        outcomes = {name: outcome for name, outcome in self.outcomes.items() if name != FULL}
        if not outcomes:
            return "refused" if self.reason and not self.reason.startswith("no small model") else "unknown"
        if set(outcomes.values()) == {"REFUSED"}:
            return "refused"
        if self.outcomes.get(FULL, "OK") != "OK":
            return "unknown"
        if "FAULT" in outcomes.values():
            return "fault"
        others = {outcome for name, outcome in outcomes.items() if name != "shadowkv"}
        return "served" if others == {"OK"} else "partly"


def cover(name: str, kind: str = "text") -> Covered:
    """What comes of a type: each cache of CORE is checked with a tiny model of random weights."""
    try:
        model = small_model(name)
    except ModelUnavailableError as error:
        return Covered(name, kind, {}, first_line(error).partition("; check the real one")[0])
    except ValueError as error:
        ours = is_refusal(error)
        return Covered(name, kind, {}, f"{'' if ours else _NO_MODEL}{first_line(error)}")
    except Exception as error:
        return Covered(name, kind, {}, f"{_NO_MODEL}{type(error).__name__}: {first_line(error)}")
    rows = check(model, CORE)
    outcomes: dict[str, str] = {row.cache: row.outcome for row in rows}
    if "FAULT" in outcomes.values() and not _generates(model):
        outcomes[FULL] = "FAULT"
    return Covered(name, kind, outcomes, _reason(rows))


def _generates(model: PreTrainedModel) -> bool:
    """Whether a model goes through `generate` with transformers' own cache."""
    generative: Any = model
    hf.release(model)
    try:
        generative.generate(torch.arange(3, 19)[None], max_new_tokens=2, do_sample=False, pad_token_id=0)
    # whatever it is, it is not kvcompress's
    except Exception:
        return False
    return True


def cover_all(known: Iterable[Covered] = (), tell: Callable[[Covered], None] = lambda covered: None) -> list[Covered]:
    """What comes of every type.

    Args:
        known: types that were covered before, which are not done again.
        tell: called with each further one as it comes.
    """
    before = {each.type: each for each in known}
    found = []
    for name, kind in hf.model_types().items():
        covered = before.get(name)
        if covered is None:
            covered = cover(name, kind)
            tell(covered)
        covered = dataclasses.replace(covered, kind=kind)
        # what is an encoder-decoder is only seen when its config is built
        if "is an encoder-decoder model" not in covered.reason:
            found.append(covered)
    return found


def line(covered: Covered) -> str:
    """A covered type as a line of JSON."""
    return json.dumps(dataclasses.asdict(covered))


def read(text: str) -> list[Covered]:
    """What `line` wrote, line by line."""
    return [Covered(**json.loads(each)) for each in text.splitlines() if each.strip()]


def table(rows: Iterable[Covered]) -> str:
    """The rows as a page in Markdown."""
    kinds = [*_DECODERS, *_OTHERS]
    rows = sorted(rows, key=lambda row: (kinds.index(row.kind), row.type))
    releases = ", ".join(sorted({row.release for row in rows}))
    decoders = [row for row in rows if row.kind in _DECODERS]
    served = sum(row.served == "served" for row in decoders)
    parts = [
        "# Model types",
        "",
        f"Of {len(decoders)} types of decoder-only language models in transformers {releases}, {served} are served.",
        "",
        "A tiny model with random weights of each type that generates text with a decoder alone goes through four",
        "caches, and is compared with itself run without one: `kvcompress check --all --out coverage.jsonl`.",
        "Multimodal ones are given text here; images are tested for LLaVA, Qwen2-VL, Gemma 3 and 4, PaliGemma 1 and 2,",
        "Llama 4, Inkling, Qwen4, HY V4, dots3-note and Mistral Large 4. *served*: all caches, or all but `shadowkv`,",
        "which undoes rotations that some models do not have or do in their own way. *unknown*: transformers' cache",
        "differs from the model too, or no tiny model could be made.",
        "",
    ]
    for kind in dict.fromkeys(row.kind for row in rows):
        of_kind = [row for row in rows if row.kind == kind]
        title, about = _OTHERS.get(kind) or (_DECODERS[kind], "")
        parts += [f"## {title}", "", f"{counted(of_kind)}.", ""]
        if about:
            parts += [about, ""]
        parts += [f"| {' | '.join(('type', 'is', *CORE, 'why'))} |", f"|{' --- |' * (len(CORE) + 3)}"]
        for row in of_kind:
            cells = [f"`{row.type}`", row.served, *(row.outcomes.get(name, "") for name in CORE), _cell(row.reason)]
            parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def counted(rows: Sequence[Covered]) -> str:
    """How many rows there are, and of each outcome."""
    found = [row.served for row in rows]
    counts = ", ".join(f"{found.count(each)} {each}" for each in get_args(Served) if each in found)
    return f"{len(rows)} types: {counts}"


def _reason(rows: Sequence[Checked]) -> str:
    reasons = {row.cache: row.reason for row in rows if row.outcome != "OK" and row.cache != FULL}
    several = len(set(reasons.values())) > 1
    said = [f"{name}: {reason}" if several else reason for name, reason in reasons.items()]
    return "; ".join(dict.fromkeys([*said, *(row.limits for row in rows if row.limits)]))


def _cell(text: str) -> str:
    text = re.sub(r"[|<>]", " ", text).replace("*", r"\*").replace("_", r"\_")
    return text if len(text) <= 240 else text[:239] + "…"
