"""The model without a cache and with some attention forbidden, to compare a cache's answers with."""

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvcompress.hf.attention import release
from kvcompress.hf.configs import block_of, decoder_config, layer_heads, repeats_keys
from kvcompress.hf.modules import attention_module, layer_of, run_offset, text_of

# the implementation that takes masks [batch, heads, queries, tokens], and supports softcaps and sinks
_PLAIN = "eager"
# by which layers without an indexer are given what an earlier layer's chose
_TAKEN = "prev_topk_indices"


def judge_of(model: PreTrainedModel) -> PreTrainedModel:
    """A second model on the same weights, with transformers' plainest attention."""
    shared: dict[int, Any] = {id(held): held for held in (*model.parameters(), *model.buffers())}
    judge = copy.deepcopy(model, shared)
    release(judge)
    text_of(judge).set_attn_implementation(_PLAIN)
    return judge


@contextlib.contextmanager
def forbidden(judge: PreTrainedModel, layer: int, forbids: Tensor) -> Iterator[None]:
    """Within it, a layer's queries do not attend to these tokens, nor to those that the model itself forbids.

    Args:
        judge: a model that `judge_of` made, to be run without a cache.
        forbids: [kv_heads, queries, tokens] bool, True where a query must not attend.

    Raises:
        RuntimeError: on entering or in the forward, if the layer takes no mask.
    """
    attention = attention_module(judge, layer)
    if attention is None:
        raise RuntimeError(f"layer {layer} of {type(judge).__name__} has no attention module that takes a mask")
    takes = _TAKEN in inspect.signature(attention.forward).parameters and getattr(attention, "indexer", None) is None
    indexer = _indexer_before(judge, layer) if takes else None
    heads = layer_heads(decoder_config(judge))[layer].heads
    group = heads // forbids.shape[0]
    copies = forbids.repeat(group, 1, 1) if repeats_keys(decoder_config(judge)) else forbids.repeat_interleave(group, 0)
    forbids = copies[None]
    # an indexer of blocks asks what one head may see, and goes by that for all
    blocks: Any = getattr(attention, "indexer", None) if block_of(decoder_config(judge)) is not None else None

    def put(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = inspect.signature(module.forward).bind(*args, **kwargs)
        number: int | None = layer_of(module)
        if number not in (None, -1) and run_offset(given.arguments) + number != layer:
            # another run of the same module
            return args, kwargs
        mask: Any = given.arguments.get("attention_mask")
        # one for all layers, or by the kinds of layers
        masks = mask if isinstance(mask, dict) else {"": mask}
        masked = {}
        for kind, each in masks.items():
            masked[kind] = each
            if isinstance(each, Tensor) and each.dim() == 4:
                least = False if each.dtype == torch.bool else torch.finfo(each.dtype).min
                masked[kind] = each.masked_fill(forbids.to(each.device), least)
        if all(masked[kind] is each for kind, each in masks.items()):
            raise RuntimeError(f"{type(module).__name__} was given no mask [batch, 1, queries, tokens]")
        given.arguments["attention_mask"] = masked if isinstance(mask, dict) else masked[""]
        if indexer is not None:
            # a layer without an indexer takes what an earlier one chose, from what that layer may see
            args, kwargs = asked[-1]
            of_indexer = inspect.signature(indexer.forward).bind(*args, **kwargs)
            of_indexer.arguments["attention_mask"] = masked[""][:, 0]
            given.arguments[_TAKEN] = type(indexer).forward(indexer, *of_indexer.args, **of_indexer.kwargs)
        return given.args, given.kwargs

    asked: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        asked.append((args, kwargs))

    def choose_by_head(*args: Any, **kwargs: Any) -> Tensor:
        given = inspect.signature(type(blocks).forward).bind(blocks, *args, **kwargs)
        mask = given.arguments["attention_mask"]
        chosen = []
        for head in range(0, mask.shape[1], group):
            given.arguments["attention_mask"] = mask[:, head : head + 1]
            chosen.append(type(blocks).forward(*given.args, **given.kwargs).expand(-1, group, -1, -1))
        return torch.cat(chosen, 1)

    if blocks is not None:
        blocks.forward = choose_by_head
    hooks = [attention.register_forward_pre_hook(put, with_kwargs=True)]
    if indexer is not None:
        hooks.append(indexer.register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield
    finally:
        if blocks is not None:
            del blocks.forward
        for hook in hooks:
            hook.remove()


def _indexer_before(judge: PreTrainedModel, layer: int) -> nn.Module | None:
    """The indexer that chooses for a layer which has none, of an earlier layer; None if there is none."""
    earlier = (getattr(attention_module(judge, index), "indexer", None) for index in range(layer - 1, -1, -1))
    return next((found for found in earlier if found is not None), None)
