"""Names that changed: what says the old one is understood for a release, and saved files for good."""

import json
import warnings
from dataclasses import dataclass

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
