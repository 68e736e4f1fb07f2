"""What a cache shows of itself: help, repr, and notebooks."""

import html
import inspect
import pydoc
import textwrap

import pytest

import kvcompress
from kvcompress import GEAR, AcrossKVCache, CompressedCache, EvictingCache, H2OCache
from kvcompress.hf import release
from tests.contract.caches import every_variant
from tests.contract.drive import feed
from tests.contract.models import prompt, tiny

SHORT = [EvictingCache, *EvictingCache.__subclasses__()]
# what hooks, layers and models call
PLUMBING = ("update", "forward_begins", "forward_ended", "is_traceable", "prompt_begins", "queries_watched")


@pytest.mark.parametrize("kind", SHORT, ids=lambda kind: kind.__name__)
def test_help_begins_with_an_example_that_runs(kind, monkeypatch):
    model = tiny()
    monkeypatch.setattr(kvcompress, "load_model", lambda: (model, lambda text, return_tensors: inputs), raising=False)
    inputs = {"input_ids": prompt(9)}
    shown = pydoc.render_doc(kind, renderer=pydoc.plaintext).replace(" |  ", "")
    lines = inspect.getdoc(kind).splitlines()
    example = textwrap.dedent("\n".join(lines[2 : lines.index("", 2) if "" in lines[2:] else None]))
    assert shown.index(example.splitlines()[0].strip()) < shown.index("Method resolution order")
    names = {"kvcompress": kvcompress, "model": model, "inputs": inputs, "TOVA": kvcompress.TOVA}
    names |= {each.__name__: each for each in SHORT}
    exec(example, names)
    assert type(names["cache"]) is kind
    assert names["output"].shape[1] > 9
    assert names["cache"].get_seq_length() >= 9
    release(model)


def test_help_says_in_one_line_what_users_need_not_call():
    for kind in (CompressedCache, *SHORT):
        for name in PLUMBING:
            said = inspect.getdoc(getattr(kind, name))
            assert said, f"{kind.__name__}.{name}"
            assert len(said.splitlines()) == 1, f"{kind.__name__}.{name}: {said}"


@every_variant
def test_repr_is_one_block_that_names_the_settings_and_what_is_held(entry):
    model = tiny()
    cache = entry.build(model)
    first, second = repr(cache).splitlines()
    assert first.startswith(f"{type(cache).__name__}(")
    assert second == "for LlamaForCausalLM, 3 layers: empty"
    feed(model, cache, prompt(20, 2))
    lines = repr(cache).splitlines()
    assert lines[0] == first
    assert lines[1].startswith("for LlamaForCausalLM, 3 layers: batch 2, tokens seen 20, kept per layer and head ")
    assert "\n".join(lines[1:]).endswith(str(cache.memory()))
    assert max(map(len, lines)) < 340


def test_repr_of_a_cache_names_its_policy():
    model = tiny()
    cache = H2OCache(model, budget=8, sinks=2, packed=GEAR(bits=8))
    assert repr(cache).startswith(
        "H2OCache(policy=H2O(recent=0.5, sinks=2, second_stage=0.0), budget=8, allocation='uniform', rerotated="
    )
    assert "packed=GEAR(bits=8, " in repr(cache)
    with pytest.warns(UserWarning, match="diagnostic"):
        assert repr(AcrossKVCache(model, skip_from=1)).startswith("AcrossKVCache(first=1, share=2)\n")
    cache._model = lambda: None
    assert "for a model that is gone, 3 layers: empty" in repr(cache)


def test_notebooks_show_the_same_block():
    model = tiny()
    cache = H2OCache(model, budget=8)
    feed(model, cache, prompt(20))
    for shown in (cache, cache.memory()):
        code = shown._repr_html_()
        assert code.startswith("<pre>")
        assert code.endswith("</pre>")
        assert html.unescape(code[5:-6]) == repr(shown)
        assert not set("<>") & set(code[5:-6])
    # what a name holds is no markup
    cache._shown = lambda: {"name": "<script>"}
    assert "<script>" not in cache._repr_html_()
    assert "&lt;script&gt;" in cache._repr_html_()


NAMED = [
    kind
    for kind in (getattr(kvcompress, name) for name in kvcompress.__all__)
    if isinstance(kind, type) and issubclass(kind, CompressedCache) and kind is not CompressedCache
]


@pytest.mark.parametrize("kind", NAMED, ids=lambda kind: kind.__name__)
def test_a_setting_that_a_cache_does_not_take_is_named_beside_those_it_takes(kind):
    with pytest.raises(TypeError) as caught:
        kind(tiny(), foo=1)
    known = [name for name in inspect.signature(kind).parameters if name != "model"]
    assert str(caught.value) == f"foo is no setting of {kind.__name__}; it takes {', '.join(known) or 'none'}"


def test_the_setting_that_is_spelled_most_like_one_that_is_not_known_is_proposed():
    with pytest.raises(
        TypeError, match="^budgt is no setting of H2OCache; did you mean budget. It takes budget, recen"
    ):
        H2OCache(tiny(), budgt=64)
    with pytest.raises(TypeError, match="^rolled is no setting of DenseCache; it takes none"):
        kvcompress.DenseCache(tiny(), rolled=True)


def test_a_cache_of_ones_own_says_which_settings_it_takes():
    class Own(H2OCache):
        def __init__(self, model, *, strict=True, **settings):
            super().__init__(model, **settings)

    class Bare(Own):
        pass

    assert Bare(tiny(), budget=8, strict=False).budget == 8
    # those that it hands on are told by the one that takes them
    with pytest.raises(TypeError, match="^sink is no setting of Bare; did you mean sinks"):
        Bare(tiny(), budget=8, sink=2)
    with pytest.warns(FutureWarning, match="rolled is now called rerotated"):
        assert Bare(tiny(), budget=8, rolled=True).rerotated
