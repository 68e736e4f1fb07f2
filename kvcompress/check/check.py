"""Whether kvcompress works here, with one model: compares every cache with the same model run without a cache.

Two rows of random tokens, of different lengths and with a common beginning, are read, continued by a few single tokens,
and fed a second turn: each row alone, both as a left-padded batch, and by `generate` with either name of the cache's
argument. What must hold depends on the cache:

    every token kept      the logits of the model without a cache, to float tolerance
    tokens evicted        those of the model with each layer's attention to evicted tokens masked out, head by head;
                          as many tokens kept as the budget says; fewer bytes than the full cache
    tokens packed         the prompt's logits exact, as it attends to itself unpacked; then lost / worth within a bound,
                          and in the first layer, whose input is the full cache's, codes close to what they encode
    selected (ShadowKV)   the prompt's logits exact; all logits if all chunks are selected at full rank
    layers shared         on a converted model its own logits; elsewhere, at share 1, those of the full cache
    all                   a padded row equals the row alone; all tokens fed are seen; memory() equals the live tensors

    worth = KL(with the prompt || without it)    lost = KL(without a cache || with it), both means over what follows it

An evicting or selecting cache must also equal the full cache if its budget is above the length, and a packing one must
lose next to nothing at 8 bits (with a basis, which has no more, little at 4).
"""

import linecache
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel

from kvcompress import hf, registry
from kvcompress.check.caches import default_caches, known_caches
from kvcompress.check.inspection import Inspection
from kvcompress.check.outcome import FULL, Checked, Fault, Outcome
from kvcompress.check.subject import Subject
from kvcompress.registry import Method


def check(
    model: PreTrainedModel,
    caches: Sequence[str] | None = None,
    tell: Callable[[Checked], None] = lambda checked: None,
) -> list[Checked]:
    """Runs caches on a model, and compares their logits with those of the model without a cache.

        for checked in check(model, ["h2o", "gear:bits=2"]):
            print(checked.cache, checked.outcome, checked.reason)

    The last row is transformers' own DynamicCache, unless all caches refuse the model: if that is at fault, nothing
    above it can be trusted. The model's attention is restored afterwards. `small_model` makes a model that is checked
    in seconds.

    Args:
        caches: as the registry writes them, and `across`, `swiftkv` and `prefix`; None for all of them and variants.
        tell: called with each result as it comes.

    Raises:
        ValueError: an unknown cache.
    """
    specs = list(default_caches() if caches is None else caches)
    asked = read_specs(specs)
    attention = hf.attention_name(model)
    subject = Subject(model)
    rows: list[Checked] = []
    try:
        for spec, method, settings in asked:
            rows.append(_checked(spec, method, settings, subject))
            tell(rows[-1])
        if any(row.outcome != "REFUSED" for row in rows):
            rows.append(_checked(FULL, None, {}, subject))
            tell(rows[-1])
    finally:
        if attention is not None and attention != hf.attention_name(model):
            hf.set_attention(model, attention)
    return rows


def read_specs(specs: Sequence[str]) -> list[tuple[str, Method, dict[str, Any]]]:
    """Caches with their methods and settings.

    Raises:
        ValueError: an unknown cache or setting, or a budget, which a check chooses itself.
    """
    asked = [(spec, *registry.parse(spec, known_caches())) for spec in specs]
    if own := [spec for spec, _, settings in asked if "budget" in settings]:
        raise ValueError(f"a check gives caches its own budgets: leave budget= out of {', '.join(own)}")
    return asked


def _checked(spec: str, method: Method | None, settings: dict[str, Any], subject: Subject) -> Checked:
    hf.forget_positions(subject.model)
    inspection = Inspection(subject, method, settings)
    outcome: Outcome = "OK"
    reason = trace = ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inspection.run()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        if inspection.may_refuse and is_refusal(error, inspection.building):
            outcome, reason = "REFUSED", lines[0]
        else:
            said = lines[0] if isinstance(error, Fault) else f"{type(error).__name__}: {lines[0]}"
            outcome, reason = "FAULT", f"{inspection.whose}{inspection.stage}: {said}"
        trace = "".join(traceback.format_exception(error))
    promises, limits = inspection.promises, "" if outcome == "REFUSED" else subject.limits
    return Checked(spec, outcome, reason, promises.difference, promises.lost, trace, limits)


def is_refusal(error: Exception, building: bool = True) -> bool:
    """True if kvcompress itself refused the model, and did not fail by accident."""
    if not isinstance(error, ValueError | TypeError) or error.__traceback__ is None:
        return False
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    module = frame.f_globals.get("__name__", "")
    raised = linecache.getline(frame.f_code.co_filename, line).lstrip().startswith("raise ")
    # once built, only what stands between a model and its cache knows what else the model asks for
    return raised and (module.startswith("kvcompress.") if building else module.startswith(f"{hf.__name__}."))
