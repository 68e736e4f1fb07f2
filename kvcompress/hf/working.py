"""What a forward takes beside weights and cache, found by running a model's layers without numbers."""

import contextlib
import copy
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PreTrainedConfig,
)

from kvcompress.hf.calls import cache_argument, full_cache
from kvcompress.hf.configs import block_of, layer_kinds
from kvcompress.hf.small import layers_of_each_kind, with_layers
from kvcompress.hf.states import states_in

_T = TypeVar("_T")

_SIZES_ONLY = "kvcompress_sizes"
# both are whole chunks of every linear attention
_TOKENS = (256, 512)


class Living(TorchDispatchMode):
    """Counts the bytes of tensors that operations have returned, while they live: those held now, and the most."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, Any] = {}
        self.held = self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                # from before, or counted
                self._note(tensor.untyped_storage(), 0)
        found = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        self.most = max(self.most, self.held)
        return found

    def _note(self, storage: torch.UntypedStorage, size: int) -> None:
        if id(storage) not in self.known:
            self.known[id(storage)] = weakref.finalize(storage, self._forget, id(storage), size)
            self.held += size

    def _forget(self, name: int, size: int) -> None:
        del self.known[name]
        self.held -= size


def peak_of_tensors(run: Callable[[], Any]) -> tuple[int, Any]:
    """The most bytes of tensors that lived beside those from before at a time of `run()`, without what an operation
    takes while it runs, and what it returned."""
    with Living() as living:
        result = run()
    return living.most, result


def working_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int | None:
    """Bytes per token that a forward over many tokens takes beside weights and cache, at most.

    They are those of the tensors of a few layers, one of each kind, in which nothing is computed. In the attention
    lie queries, keys and values as they came, keys and half of the values again for the cache, and the output.

    Returns:
        None where layers cannot be run without numbers, or step through the tokens one by one (Mamba 1).
    """
    if any(kind.states for kind in layer_kinds(config)) and hasattr(config, "mamba_dt_rank"):
        return None
    found = _without_numbers(config, dtype, lambda decoder: [_peak(decoder, tokens) for tokens in _TOKENS])
    # the products of experts are defined without numbers in bfloat16 alone
    if found is None and dtype is not torch.bfloat16:
        of_half = working_bytes(config, torch.bfloat16)
        return None if of_half is None else of_half * dtype.itemsize // torch.bfloat16.itemsize
    return None if found is None else (found[1] - found[0]) // (_TOKENS[1] - _TOKENS[0])


def state_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int | None:
    """Bytes of the states of all layers that keep some, per sequence; None where layers cannot be run without
    numbers."""
    count = sum(kind.states > 0 for kind in layer_kinds(config))
    if not count:
        return 0

    def states_of(decoder: Any) -> int:
        cache = full_cache(decoder)
        # indexers of blocks ask for numbers, behind layers with states
        ends_early: tuple[type[Exception], ...] = (Exception,) if block_of(config) is not None else ()
        with contextlib.suppress(*ends_early):
            decoder(input_ids=torch.zeros(1, 8, dtype=torch.long), **cache_argument(decoder, cache))
        # MiniMax keeps them beside its layers
        each = [states_in(layer) for layer in cache.layers] + [[*held] for held in getattr(cache, "linear_cache", [])]
        return sum(tensor.nbytes for tensor in next(held for held in each if held))

    if block_of(config) is not None:
        # what its few layers with n-grams keep of them is left out
        config = copy.deepcopy(config)
        config.ple_layer_ids = []
    each = _without_numbers(config, dtype, states_of)
    if each is None:
        # a layer that shares its weights with the next of its kind is not made alone (Zamba)
        each = _without_numbers(config, dtype, states_of, times=2)
    return None if each is None else count * each


def _without_numbers(
    config: PreTrainedConfig, dtype: torch.dtype, run: Callable[[Any], _T], times: int = 1
) -> _T | None:
    """What `run` finds of a decoder that has a few layers, one of each kind, or the first of them, so many times as
    many, and no numbers; None if that fails."""
    AttentionInterface.register(_SIZES_ONLY, _attention)
    AttentionMaskInterface.register(_SIZES_ONLY, _no_mask)
    few = _with_few_layers(config, times)
    try:
        with FakeTensorMode(), torch.no_grad():
            model = AutoModelForCausalLM.from_config(few, dtype=dtype, attn_implementation=_SIZES_ONLY)
            return run(model.base_model.eval())
    # of whichever kind: what models ask of their numbers is their own
    except Exception:
        return None


def _peak(decoder: Any, tokens: int) -> int:
    ids = torch.zeros(1, tokens, dtype=torch.long)
    return peak_of_tensors(lambda: decoder(input_ids=ids, use_cache=False))[0]


def _with_few_layers(config: PreTrainedConfig, times: int) -> PreTrainedConfig:
    layers = layers_of_each_kind(config)
    if times > 1:
        layers = list(range(min(config.num_hidden_layers, times * len(layers))))
    few = with_layers(config, layers)
    vars(few).pop("quantization_config", None)
    return few


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    _for_cache = torch.empty_like(key), torch.empty_like(value[..., ::2])
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[-1]), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None
