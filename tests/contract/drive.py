"""How the tests drive a cache: generate under recording, feed by hand, replay what was recorded."""

from collections.abc import Collection, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache, PreTrainedModel

from kvcompress.hf import cache_argument
from tests.contract.caches import Entry
from tests.contract.models import PAD, places
from tests.contract.oracle import Transcript


def generate(model: PreTrainedModel, cache: Any, ids: Tensor, mask: Tensor | None = None, **settings: Any) -> Tensor:
    """`model.generate` with a cache; greedy and 12 tokens where nothing else is asked. Gives prompt and answer."""
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": PAD, "disable_compile": True, **settings}
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **cache_argument(model, cache), **settings)


def full(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, **settings: Any) -> Tensor:
    """What transformers' own cache generates."""
    return generate(model, DynamicCache(config=model.config), ids, mask, **settings)


def recorded(
    entry: Entry, model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, **settings: Any
) -> tuple[Tensor, Any, Transcript]:
    """Generates through a new cache: the ids, the cache and what went through it."""
    cache = entry.build(model)
    with entry.recording(model, cache) as transcript:
        out = generate(model, cache, ids, mask, **settings)
    return out, cache, transcript


@torch.no_grad()
def feed(
    model: PreTrainedModel, cache: Any, ids: Tensor, mask: Tensor | None = None, position_ids: Tensor | None = None
) -> Tensor:
    """One forward of new tokens; mask [batch, tokens seen + new]. The logits, [batch, new, vocabulary].

    position_ids: [batch, new], None for the places of the tokens in their rows.
    """
    if mask is None:
        mask = torch.ones(ids.shape[0], cache.get_seq_length() + ids.shape[1], dtype=torch.long, device=ids.device)
    if position_ids is None:
        position_ids = places(mask)[:, -ids.shape[1] :]
    return model(ids, attention_mask=mask, position_ids=position_ids, **cache_argument(model, cache)).logits


def replay(model: PreTrainedModel, cache: Any, transcript: Transcript) -> list[Tensor]:
    """Feeds a transcript's tokens, forward by forward, to another cache; the logits of each forward."""
    logits, start = [], 0
    for forward in transcript.forwards:
        logits.append(feed(model, cache, forward.ids, forward.visible.long())[:, -forward.logits.shape[1] :])
        start += forward.queries
    return logits


def counting_graphs() -> tuple[CompileConfig, list[Any]]:
    """A config with which `generate` compiles its steps on any device, and the graphs that it then compiles."""
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    return config, graphs


def compiled_apart(request: pytest.FixtureRequest, sharing: Collection[str] = ()) -> Iterator[None]:
    """A fixture: what a test compiles is forgotten, but for the cases of those in `sharing`, of which each finds what
    those before it have compiled. They must not count it."""
    name = request.node.originalname
    if name not in sharing or name != _compiled_for[0]:
        torch._dynamo.reset()
    _compiled_for[0] = name
    # of one function for as many cases
    limit = 32 if name in sharing else torch._dynamo.config.recompile_limit
    with torch._dynamo.config.patch(recompile_limit=limit):
        yield
    if name not in sharing:
        torch._dynamo.reset()


# the test that what is compiled is for
_compiled_for: list[str | None] = [None]


def tokens_kept(cache: Any) -> list[Tensor]:
    """Tokens kept by layer, [batch, kv_heads]."""
    return cache.memory().tokens_kept


def assert_same_state(entry: Entry, cache: Any, other: Any, rows: Any = slice(None), other_rows: Any = slice(None)):
    """Two caches have seen as much and hold the same tokens."""
    assert cache.get_seq_length() == other.get_seq_length()
    for index, (held, wanted) in enumerate(zip(entry.kept(cache), entry.kept(other), strict=True)):
        if held is not None and wanted is not None:
            assert torch.equal(held[rows], wanted[other_rows]), f"layer {index} holds other tokens"
