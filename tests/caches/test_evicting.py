"""Names that changed: what says the old one is understood for a release, and saved files for good."""

import json
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kvcompress import H2O, EvictingCache, H2OCache, Policy, StreamingLLMCache
from tests.contract.drive import feed, generate
from tests.contract.models import prompt, tiny
from tests.policies.scene import scene


@pytest.mark.parametrize(
    "build",
    [
        lambda model, **how: H2OCache(model, budget=8, **how),
        lambda model, **how: StreamingLLMCache(model, budget=8, **how),
        lambda model, **how: EvictingCache(model, policy=H2O(), budget=8, **how),
    ],
)
def test_rolled_is_an_old_name_of_rerotated(build):
    model = tiny()
    with pytest.warns(FutureWarning, match="rolled is now called rerotated, .*: write rerotated=True") as caught:
        assert build(model, rolled=True).rerotated
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.raises(TypeError, match="rolled is the old name of rerotated: pass rerotated alone"):
        build(model, rolled=True, rerotated=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not build(model).rerotated


def test_a_file_that_says_rolled_loads(tmp_path):
    model, ids = tiny(), prompt(20)
    cache = H2OCache(model, budget=8, rerotated=True)
    feed(model, cache, ids)
    cache.save(tmp_path / "now")
    tensors = load_file(tmp_path / "now")
    with safe_open(tmp_path / "now", "pt") as file:
        facts = json.loads(file.metadata()["facts"])
    assert facts["settings"].pop("rerotated")
    # as files of 0.1.0 are, which had no checksums
    old = {"cache": facts["cache"], "settings": facts["settings"] | {"rolled": True}}
    old |= {"layers": facts["parts"][: facts["layers"]]}
    save_file(tensors, tmp_path / "old", {"format": "kvcompress-cache-1", "facts": json.dumps(old)})
    with pytest.warns(UserWarning, match="earlier kvcompress"):
        loaded = H2OCache.load(tmp_path / "old", model)
    assert loaded.rerotated
    assert torch.equal(*(generate(model, each, torch.cat([ids, prompt(3)], 1)) for each in (loaded, cache)))


def test_policies_that_use_old_names_are_told_the_new_ones():
    with pytest.warns(FutureWarning, match="Policy.memory is called decay now: rename it in Old"):

        @dataclass(frozen=True, kw_only=True)
        class Old(Policy):
            @property
            def memory(self):
                return 1.0

    candidates = scene(Old(), 3).candidates
    with pytest.warns(FutureWarning, match="Candidates.queries is called tokens_fed now"):
        assert candidates.queries == candidates.tokens_fed == 3


class Flat(Policy):
    """Scores of the wrong shape."""

    def score(self, candidates):
        return candidates.scores.sum(1)


@dataclass(frozen=True, kw_only=True)
class Early(Policy):
    """The earlier tokens, as `change` of their places says."""

    change: Any
    fixed: bool = False

    def score(self, candidates):
        return self.change(-candidates.positions.float())


class EarlyFixed(Early):
    """Its scores never change."""

    static: ClassVar[bool] = True


@pytest.mark.parametrize("kind", [Early, EarlyFixed])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64])
def test_scores_of_any_real_numbers_choose_alike(kind, dtype):
    model, ids = tiny(), prompt(20, batch=2)
    kept = []
    for change in (lambda scores: scores, lambda scores: scores.to(dtype)):
        cache = EvictingCache(model, policy=kind(change=change, recent=2), budget=8)
        feed(model, cache, ids[:, :17])
        for place in range(17, 20):
            feed(model, cache, ids[:, place : place + 1])
        kept.append([layer.slots.positions.clone() for layer in cache.layers])
    assert all(map(torch.equal, *kept))


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda scores: None, "got None"),
        (lambda scores: 1.0, "got 1.0"),
        (lambda scores: scores.tolist(), r"got \[\["),
        (lambda scores: scores.to(torch.complex64), r"got \[1, 2, \d+\], complex64 on cpu"),
        (lambda scores: scores.to("meta"), r"got \[1, 2, \d+\], float32 on meta"),
    ],
)
def test_what_is_no_score_is_named(change, got):
    model = tiny()
    cache = EvictingCache(model, policy=Early(change=change), budget=8)
    with pytest.raises(ValueError, match=f"Early.score must return a score per candidate.*{got}"):
        feed(model, cache, prompt(20)[:1])


@pytest.mark.parametrize("kind", [Early, EarlyFixed])
def test_infinite_scores_leave_what_always_stays(kind):
    model, ids = tiny(), prompt(30, batch=2)
    worst = lambda scores: torch.full_like(scores, -torch.inf)  # noqa: E731
    for change in (lambda scores: torch.full_like(scores, torch.inf), worst):
        cache = EvictingCache(model, policy=kind(change=change, recent=2, sinks=3), budget=8)
        feed(model, cache, ids[:, :20])
        for seen in range(20, 30):
            for layer in cache.layers:
                places = layer.slots.positions
                for token in (0, 1, 2, seen - 2, seen - 1):
                    assert bool((places == token).any(-1).all()), (seen, token)
                assert bool(((places >= 0).sum(-1) == 8).all())
            feed(model, cache, ids[:, seen : seen + 1])


def test_a_policy_that_scores_in_another_shape_is_named():
    model = tiny()
    cache = EvictingCache(model, policy=Flat(), budget=8)
    with pytest.raises(
        ValueError, match=r"Flat.score must return a score per candidate.* = \[1, 2, \d+\], got \[1, \d+\]"
    ):
        feed(model, cache, prompt(20))


@pytest.mark.parametrize("what", [lambda model: model.config, lambda model: "org/name"], ids=["config", "name"])
def test_a_cache_for_something_else_than_a_model_is_refused(what):
    with pytest.raises(TypeError, match="pass the model itself"):
        H2OCache(what(tiny()), budget=8)


def test_packed_that_is_no_encoding_is_refused():
    with pytest.raises(TypeError, match=r"GEAR\(bits=4\), got 4"):
        H2OCache(tiny(), budget=8, packed=4)
