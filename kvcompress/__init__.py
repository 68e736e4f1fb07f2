"""Drop-in Hugging Face caches that keep less and read less."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvcompress.cache import CompressedCache as CompressedCache
    from kvcompress.caches.dense import DenseCache as DenseCache
    from kvcompress.caches.evicting import EvictingCache as EvictingCache
    from kvcompress.caches.evicting import H2OCache as H2OCache
    from kvcompress.caches.evicting import KVzipCache as KVzipCache
    from kvcompress.caches.evicting import SnapKVCache as SnapKVCache
    from kvcompress.caches.evicting import StreamingLLMCache as StreamingLLMCache
    from kvcompress.caches.quantized import GEARCache as GEARCache
    from kvcompress.caches.quantized import KIVICache as KIVICache
    from kvcompress.caches.shadowkv import ShadowKVCache as ShadowKVCache
    from kvcompress.hf import release as release
    from kvcompress.loading import load_model as load_model
    from kvcompress.prefix.cache import HydragenCache as HydragenCache
    from kvcompress.prefix.store import PrefixStore as PrefixStore
    from kvcompress.swiftkv.cache import AcrossKVCache as AcrossKVCache
    from kvcompress.swiftkv.cache import SwiftKVCache as SwiftKVCache
    from kvcompress.swiftkv.model import convert as convert

    __version__: str

# found on first use: transformers takes seconds to import, and the command line must answer a wrong flag at once
_HOMES = {
    "AcrossKVCache": "swiftkv.cache",
    "CompressedCache": "cache",
    "DenseCache": "caches.dense",
    "EvictingCache": "caches.evicting",
    "GEARCache": "caches.quantized",
    "H2OCache": "caches.evicting",
    "HydragenCache": "prefix.cache",
    "KIVICache": "caches.quantized",
    "KVzipCache": "caches.evicting",
    "PrefixStore": "prefix.store",
    "ShadowKVCache": "caches.shadowkv",
    "SnapKVCache": "caches.evicting",
    "StreamingLLMCache": "caches.evicting",
    "SwiftKVCache": "swiftkv.cache",
    "convert": "swiftkv.model",
    "load_model": "loading",
    "release": "hf",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(["__version__", *_HOMES])


def _version() -> str:
    """Of the installed distribution; in a checkout that is not installed, of its pyproject.toml, and marked so."""
    from importlib.metadata import PackageNotFoundError, version
    from pathlib import Path

    try:
        return version(__name__)
    except PackageNotFoundError:
        import tomllib

        project = Path(__file__).parents[1] / "pyproject.toml"
        if not project.is_file():
            return "unknown"
        return f"{tomllib.loads(project.read_text(encoding='utf-8'))['project']['version']}+checkout"
