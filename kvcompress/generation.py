"""Generation by strings alone: transformers' `custom_generate`, which builds the cache by a method's name.

    model.generate(**inputs, custom_generate=generate_folder(), trust_remote_code=True, cache_method="h2o", budget=512)

transformers runs `custom_generate/generate.py` of the folder; here, that is `generate`.
"""

from pathlib import Path
from typing import Any

from kvcompress.hf import cache_argument, cache_in
from kvcompress.registry import build, parse, refuse_budget


def generate_folder() -> str:
    """The folder that transformers' `generate` takes as `custom_generate`, with `trust_remote_code=True`."""
    return str(Path(__file__).parent)


def generate(model: Any, cache_method: str, budget: int | float | None = None, **arguments: Any) -> Any:
    """`model.generate` through a new cache; `custom_generate` calls it.

    Args:
        model: what `generate` was called on.
        cache_method: a method as on the command line: "h2o", "h2o:sinks=4", "my_policies:MyPolicy".
        budget: tokens kept per sequence and KV head, or a fraction of those seen; None for methods that take none, or
            where `cache_method` says it: "h2o:budget=0.2".
        arguments: of `model.generate`.

    Returns:
        What `model.generate` returns. With `return_dict_in_generate=True` it holds the cache.

    Raises:
        ValueError: an unknown method or setting, a budget that is missing, out of range or given to a method that takes
            none, or a cache beside the method.
    """
    if cache_in(arguments.values()) is not None:
        raise ValueError(f"give a cache or cache_method, not both; got cache_method={cache_method!r}")
    method, _ = parse(cache_method)
    refuse_budget(method, f"the method {method.name}", budget)
    return model.generate(**arguments, **cache_argument(model, build(cache_method, model, budget)))
