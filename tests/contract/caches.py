"""Every cache that signs the contract: one line each, which says what the cache promises."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kvcompress import DenseCache, EvictingCache, H2OCache
from kvcompress.policies.expected_attention import ExpectedAttention
from kvcompress.policies.h2o import H2O
from kvcompress.policies.keydiff import KeyDiff
from kvcompress.policies.knorm import Knorm
from kvcompress.policies.policy import Policy
from kvcompress.policies.snapkv import SnapKV
from kvcompress.policies.streaming_llm import StreamingLLM
from kvcompress.policies.tova import TOVA
from tests.contract.oracle import Kept

BUDGET = 8
LARGE = 10_000


@dataclass(frozen=True)
class Entry:
    """A cache and what it promises.

    build: makes one for a model.
    exact: it equals the full cache, to float tolerance.
    croppable: it takes back tokens exactly; else it must refuse and stay as it was.
    compileable: its decode step compiles to one graph.
    chunk_free: how a prompt is cut into chunks does not change what is kept.
    roomy: the same cache with more room than any test fills; it must equal the full cache.
    budget: the most tokens it may keep a layer, sequence and KV head, given the layer and the prompt's real tokens.
    kept: which places each layer holds, for the oracle.
    decoded: keys and values as a lossy cache gives them, for the oracle; None where it keeps what it was fed.
    """

    name: str
    build: Callable[[PreTrainedModel], Any]
    kept: Callable[[Cache], Kept]
    exact: bool = False
    croppable: bool = False
    compileable: bool = False
    chunk_free: bool = False
    roomy: Callable[[PreTrainedModel], Any] | None = None
    budget: Callable[[int, int], int] | None = None
    decoded: Callable[[Cache], list[tuple[Tensor, Tensor]]] | None = None


def everything(cache: Any) -> Kept:
    """A cache that holds all it has seen."""
    return [None for _ in cache.layers]


def slots(cache: Any) -> Kept:
    """What lies in the slots of an evicting cache."""
    kept: Kept = []
    for layer in cache.layers:
        positions = layer.slots.positions.long()
        held = torch.zeros(*positions.shape[:2], layer.get_seq_length() + 1, dtype=torch.bool, device=positions.device)
        # an empty slot points past the end
        held.scatter_(2, positions.masked_fill(positions < 0, held.shape[-1] - 1), True)
        kept.append(held[..., :-1])
    return kept


def _evicting(name: str, policy: Policy, budget: int | float = BUDGET, **settings: Any) -> Entry:
    def build(model: PreTrainedModel, budget: int | float = budget) -> EvictingCache:
        return EvictingCache(model, policy=policy, budget=budget, **settings)

    def limit(layer: int, tokens: int) -> int:
        return budget if isinstance(budget, int) else max(1, int(budget * tokens))

    return Entry(
        name,
        build,
        kept=slots,
        compileable=True,
        roomy=lambda model: build(model, LARGE if isinstance(budget, int) else 1.0),
        budget=limit,
    )


def _pyramid(layer: int, tokens: int) -> int:
    # one token for each of three layers, and 1.95, 1 and 0.05 times what is left of the budget
    return (15, 8, 1)[layer]


ENTRIES = [
    Entry("dense", DenseCache, kept=everything, exact=True, croppable=True, chunk_free=True),
    Entry(
        "h2o",
        lambda model: H2OCache(model, budget=BUDGET),
        kept=slots,
        compileable=True,
        roomy=lambda model: H2OCache(model, budget=LARGE),
        budget=lambda layer, tokens: BUDGET,
    ),
    _evicting("h2o_fraction", H2O(sinks=1), 0.5),
    Entry(
        "h2o_pyramid",
        lambda model: EvictingCache(model, policy=H2O(), budget=BUDGET, allocation="pyramid"),
        kept=slots,
        compileable=True,
        roomy=lambda model: EvictingCache(model, policy=H2O(), budget=LARGE, allocation="pyramid"),
        budget=_pyramid,
    ),
    _evicting("snapkv", SnapKV(window=3, recent=3, kernel=3)),
    _evicting("tova", TOVA()),
    _evicting("streaming", StreamingLLM(sinks=2)),
    _evicting("keydiff", KeyDiff()),
    _evicting("knorm", Knorm()),
    _evicting("expected", ExpectedAttention()),
]

by_name = {entry.name: entry for entry in ENTRIES}

every_cache = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)


def caches(*names: str) -> pytest.MarkDecorator:
    """These caches by default, and the others too where slow tests run."""
    return pytest.mark.parametrize(
        "entry",
        [
            pytest.param(entry, marks=() if entry.name in names else pytest.mark.slow, id=entry.name)
            for entry in ENTRIES
        ],
    )


def those(promise: Callable[[Entry], Any]) -> pytest.MarkDecorator:
    """The caches that promise something."""
    return pytest.mark.parametrize(
        "entry", [entry for entry in ENTRIES if promise(entry)], ids=lambda entry: entry.name
    )
