"""Random cases: a cache with random settings, a tiny model, a batch, and calls in random order, all from one seed."""

import dataclasses
import random
from dataclasses import dataclass
from typing import Any

import transformers
from packaging.version import Version
from transformers import PreTrainedModel

from kvcompress import GEAR, EvictingCache, GEARCache, HydragenCache, Policy, ShadowKVCache, registry
from tests.contract.caches import ENTRIES, POLICIES, SHADOW, Entry, basis_of, by_name, closed_up, uneven
from tests.contract.models import FAMILIES, IN_NODES

# how often each call is drawn; those that move rows or copy are worth most where something has been fed
CALLS = {
    "feed": 6,
    "decode": 6,
    "generate": 2,
    "hide": 2,
    "reorder_cache": 1,
    "batch_select_indices": 1,
    "batch_repeat_interleave": 1,
    "crop": 2,
    "clone": 1.5,
    "save": 1,
    "reset": 0.5,
    "share": 0.7,
}
LATER = ["h2o_profile", "h2o_packed_heads", "attention_matching_packed", "h2o_rolled_heads", "gear_basis"]
# and of a tree of prefixes
LEVELS = {"fork": 2, "push": 2, "pop": 1, "share": 1}

# families that came later are drawn apart too: those whose layers differ in their heads, share keys and values, or
# attend in chunks; and for each how many KV heads there may be
LATER_FAMILIES = {
    "gemma3n": (1, 2, 4),
    "gemma4": (1, 2, 4),
    "laguna": (1, 2),
    "llama4": (1, 2, 4),
    "mimo_v2_flash": (1, 2),
}
_PLAYED = [name for name in FAMILIES if name not in LATER_FAMILIES]


@dataclass(frozen=True)
class Call:
    """What to do next; what is random about it follows from its own seed, so that calls before it can be left out."""

    name: str
    seed: int


@dataclass(frozen=True)
class Case:
    """A cache, a model and what is done with them.

    settings: how the cache differs from its entry in tests/contract/caches.py, to be read. sizes: what is changed of
    the family's tiny model. slack: tokens that sliding layers keep beyond their window, None for as many as they do:
    more than a case feeds.
    """

    seed: int
    entry: Entry
    settings: dict[str, Any]
    family: str
    sizes: dict[str, Any]
    batch: int
    calls: tuple[Call, ...]
    slack: int | None
    positions: str = "counted"
    ends: bool = False
    shows_filler: bool = False
    spoils: bool = False
    inference: float = 0.0
    autocast: float = 0.0

    def __str__(self) -> str:
        calls = " ".join(call.name for call in self.calls)
        about = "" if self.slack is None else f", slack {self.slack}"
        about += "" if self.positions == "counted" else f", positions {self.positions}"
        for name in ("ends", "shows_filler", "spoils", "inference", "autocast"):
            about += f", {name} {getattr(self, name)}" if getattr(self, name) else ""
        return f"{self.entry.name} {self.settings} on {self.family} {self.sizes}, batch {self.batch}{about}: {calls}"

    def only(self, indices: list[int]) -> "Case":
        return dataclasses.replace(self, calls=tuple(self.calls[index] for index in indices))


def draw(seed: int, name: str | None = None) -> Case:
    """The case of a seed; name: of one cache, where only that one is to be tried."""
    rng = random.Random(seed)
    family = rng.choice([*_PLAYED, "llama", "llama"])
    # trees can do most
    # entries that came later are drawn apart, so that seeds keep their cases
    known = [entry for entry in ENTRIES if entry.name not in LATER]
    entry = by_name[name] if name else rng.choice([*known, by_name["hydragen"], by_name["hydragen"]])
    later = random.Random(~seed)
    if name is None and later.random() < len(LATER) / len(ENTRIES):
        entry = by_name[later.choice(LATER)]
    sizes: dict[str, Any] = {}
    if family not in ("opt", "gpt_neox"):
        sizes["num_key_value_heads"] = rng.choice([1, 2, 2, 4])
    if "sliding_window" in FAMILIES[family]:
        sizes["sliding_window"] = FAMILIES[family]["sliding_window"] and rng.choice([3, 12, 12, 30])
    while FAMILIES[family]["model_type"] in entry.refuses:
        family, sizes = rng.choice(_PLAYED), {}
    if "layer_types" not in FAMILIES[family]:
        # a first and a last layer are mostly enough, and take less time
        sizes["num_hidden_layers"] = rng.choice([2, 2, 2, 3])
    family, sizes = _later_family(random.Random(f"family {seed}"), entry, family, sizes)
    settings: dict[str, Any] = {}
    if rng.random() < 0.7:
        entry, settings = _varied(rng, entry)
    often = CALLS | (LEVELS if entry.name == "hydragen" else {})
    names, weights = list(often), list(often.values())
    calls = ["feed" if rng.random() < 0.8 else "generate", *rng.choices(names, weights, k=rng.randint(3, 12))]
    return Case(
        seed,
        entry,
        settings,
        family,
        sizes,
        rng.randint(1, 4),
        tuple(Call(name, rng.getrandbits(32)) for name in calls),
        rng.choice([None, 5]) if sizes.get("sliding_window") else None,
        **_kinds(rng, family),
    )


def _later_family(rng: random.Random, entry: Entry, family: str, sizes: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Now and then one of the families that came later, in place of a family and what is changed of it."""
    if rng.random() >= len(LATER_FAMILIES) / len(FAMILIES):
        return family, sizes
    later = rng.choice([*LATER_FAMILIES])
    is_known = Version(transformers.__version__) >= Version(FAMILIES[later].get("since", "0"))
    in_nodes = entry.name != "hydragen" or later in IN_NODES
    if not (is_known and in_nodes) or FAMILIES[later]["model_type"] in entry.refuses:
        return family, sizes
    changed = {"num_key_value_heads": rng.choice(LATER_FAMILIES[later])}
    if "sliding_window" in FAMILIES[later]:
        changed["sliding_window"] = rng.choice([3, 12, 12, 30])
    return later, changed


def _kinds(rng: random.Random, family: str) -> dict[str, Any]:
    """What is unusual about a case."""
    ends = rng.random() < 0.25
    # a router of experts may choose others where it is rounded, and Gemma 4's logits are large
    routes = not {"num_local_experts", "num_experts"}.isdisjoint(FAMILIES[family])
    rounds = not routes and family != "gemma4" and rng.random() < 0.1
    return {
        "positions": rng.choices(["counted", "shifted", "gaps"], [6, 1, 3])[0],
        "ends": ends,
        "shows_filler": ends and rng.random() < 0.3,
        "spoils": rng.random() < 0.12,
        "inference": rng.choice([0.0, 0.0, 0.3, 1.0]),
        "autocast": 0.6 if rounds else 0.0,
    }


def _varied(rng: random.Random, entry: Entry) -> tuple[Entry, dict[str, Any]]:
    """The entry with other settings, and which."""
    kind: Any
    if entry.name == "hydragen":
        kind, settings = HydragenCache, {"min_tokens": rng.randint(1, 9)}
    elif entry.name == "gear_basis":
        kind, settings = GEARCache, _packing(rng) | {"rank": 0, "rank_decode": 0, "outliers": 0.0, "backbone": "kivi"}
        settings["bits"] = min(settings["bits"], 4)
    elif entry.name.startswith(("gear", "kivi")):
        kind, settings = GEARCache, _packing(rng)
    elif entry.name == "shadowkv":
        kind, settings = ShadowKVCache, SHADOW | _shadow(rng)
    elif entry.budget is not None:
        kind, settings = EvictingCache, _evicting(rng, entry)
        changed = entry.decoded is None and (settings["rerotated"] or settings["packed"])
        entry = dataclasses.replace(entry, budget=None, decoded=closed_up if changed else entry.decoded)
    else:
        return entry, {}

    def make(model: PreTrainedModel) -> Any:
        of_model: dict[str, Any] = {"allocation": uneven(model)} if settings.get("allocation") == "profile" else {}
        if entry.of_one_model:
            of_model["basis"] = basis_of(model)
        return kind(model, **settings | of_model)

    return dataclasses.replace(entry, make=make), settings


def _packing(rng: random.Random) -> dict[str, Any]:
    buffer = rng.choice([8, 8, 16, 32])
    return {
        "bits": rng.choice([2, 3, 4, 8]),
        "buffer": buffer,
        "group_size": rng.choice([size for size in (8, 16, 32) if size <= buffer]),
        "rank": rng.choice([0, 0, 1, 4]),
        "rank_decode": rng.choice([0, 0, 1, 3]),
        "outliers": rng.choice([0.0, 0.0, 0.05, 0.3]),
        "backbone": rng.choice(["kivi", "whole"]),
        "sinks": rng.choice([0, 0, 1, 4]),
        "value_bits": rng.choice([None, None, 2, 8]),
        "tail_bits": rng.choice([8, 8, None]),
    }


def _shadow(rng: random.Random) -> dict[str, Any]:
    chunk = rng.choice([1, 2, 3, 4])
    return {
        "budget": rng.choice([chunk, 2 * chunk, 4 * chunk + 1, 0.3]),
        "rank": rng.choice([1, 8, 12, 16]),
        "chunk": chunk,
        "outlier_chunks": rng.choice([0, 1, 3]),
        "local_chunks": rng.choice([1, 2, 4]),
        "fold": rng.choice([1, 4, 12]),
        "dense_below": rng.choice([None, 0, 10]),
        "drift": rng.choice([1.0, 1.5, 100.0]),
        "group": rng.choice(["max", "mean", "sum"]),
    }


def _allocation(rng: random.Random, policy: Policy) -> str:
    heads = ["heads"] if policy.compares != "no" else []
    layers = ["global"] if policy.compares == "layers" else []
    return rng.choice(["uniform", "uniform", "pyramid", *heads, *layers])


def _evicting(rng: random.Random, entry: Entry) -> dict[str, Any]:
    # a model may be refused to a policy that uses its rotary embedding, and other settings to one that reads twice
    names = [name for name, policy in POLICIES.items() if not policy.uses_rotary and policy.rereads is None]
    base = {
        "kvzip_global": "kvzip",
        "kvzip_answers": "kvzip",
        "attention_matching_packed": "attention_matching",
    }.get(entry.name, entry.name)
    if base in POLICIES and base not in names:
        names = [base]
    is_packed = "_packed" in entry.name
    if entry.name.startswith("h2o_packed"):
        names = [*names, "kvzip"]
    method = registry.METHODS[rng.choice(names)]
    assert method.kind is not None
    own = {setting: rng.choice(values) for setting, values in method.tried.items()}
    if entry.name == "kvzip_answers":
        own["keeps_answers"] = True
    elif is_packed and "keeps_answers" in own:
        # answers are packed by the forward that attends to them; attention_matching_packed is read then
        own["keeps_answers"] = False
    protected = {"recent": rng.choice([1, 2, 0.25, 0.5, 1.0]), "sinks": rng.choice([0, 0, 1, 3])}
    policy: Policy = method.kind(**own | protected)
    packed = None
    if is_packed:
        backbone = rng.choice(["kivi", "whole"])
        outliers = rng.choice([0.0, 0.1])
        packed = GEAR(bits=rng.choice([2, 3, 4, 8]), group_size=8, outliers=outliers, backbone=backbone)
    least = policy.least_budget()
    return {
        "policy": policy,
        "budget": rng.choice([least, least + 1, least + 5, least + 17, 0.1, 0.5, 1.0]),
        "allocation": "profile" if entry.name == "h2o_profile" else _allocation(rng, policy),
        "rerotated": entry.name.startswith("h2o_rolled"),
        "packed": packed,
    }
