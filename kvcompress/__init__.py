"""Drop-in Hugging Face caches that take less memory and read less of it per step."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvcompress.asking import ask as ask
    from kvcompress.cache import CompressedCache as CompressedCache
    from kvcompress.caches.attention_matching import AttentionMatchingCache as AttentionMatchingCache
    from kvcompress.caches.basis import Basis as Basis
    from kvcompress.caches.calibration import measure_basis as measure_basis
    from kvcompress.caches.dense import DenseCache as DenseCache
    from kvcompress.caches.evicting import EvictingCache as EvictingCache
    from kvcompress.caches.evicting import H2OCache as H2OCache
    from kvcompress.caches.evicting import KVzipCache as KVzipCache
    from kvcompress.caches.evicting import SnapKVCache as SnapKVCache
    from kvcompress.caches.evicting import StreamingLLMCache as StreamingLLMCache
    from kvcompress.caches.profile import Profile as Profile
    from kvcompress.caches.profiling import measure_profile as measure_profile
    from kvcompress.caches.quantized import GEARCache as GEARCache
    from kvcompress.caches.quantized import KIVICache as KIVICache
    from kvcompress.caches.shadowkv import ShadowKVCache as ShadowKVCache
    from kvcompress.caches.transform_codec import TransformCodec as TransformCodec
    from kvcompress.choosing import auto_cache as auto_cache
    from kvcompress.generation import generate_folder as generate_folder
    from kvcompress.hf import release as release
    from kvcompress.loading import load_model as load_model
    from kvcompress.policies.attention_matching import AttentionMatching as AttentionMatching
    from kvcompress.policies.chunkkv import ChunkKV as ChunkKV
    from kvcompress.policies.expected_attention import ExpectedAttention as ExpectedAttention
    from kvcompress.policies.gear import GEAR as GEAR
    from kvcompress.policies.h2o import H2O as H2O
    from kvcompress.policies.keydiff import KeyDiff as KeyDiff
    from kvcompress.policies.knorm import Knorm as Knorm
    from kvcompress.policies.kvzip import KVzip as KVzip
    from kvcompress.policies.method import register as register
    from kvcompress.policies.policy import Candidates as Candidates
    from kvcompress.policies.policy import Policy as Policy
    from kvcompress.policies.snapkv import SnapKV as SnapKV
    from kvcompress.policies.streaming_llm import StreamingLLM as StreamingLLM
    from kvcompress.policies.tova import TOVA as TOVA
    from kvcompress.prefix.cache import HydragenCache as HydragenCache
    from kvcompress.prefix.store import PrefixStore as PrefixStore
    from kvcompress.scoring import logprobs as logprobs
    from kvcompress.swiftkv.cache import AcrossKVCache as AcrossKVCache
    from kvcompress.swiftkv.cache import SwiftKVCache as SwiftKVCache
    from kvcompress.swiftkv.conversion import convert as convert
    from kvcompress.watching import watch_memory as watch_memory

    __version__: str

# imported on first use: transformers takes seconds to import, and the command line must answer a wrong flag at once
_HOMES = {
    "AcrossKVCache": "swiftkv.cache",
    "AttentionMatchingCache": "caches.attention_matching",
    "Basis": "caches.basis",
    "Candidates": "policies.policy",
    "CompressedCache": "cache",
    "DenseCache": "caches.dense",
    "EvictingCache": "caches.evicting",
    "GEAR": "policies.gear",
    "GEARCache": "caches.quantized",
    "H2OCache": "caches.evicting",
    "HydragenCache": "prefix.cache",
    "KIVICache": "caches.quantized",
    "KVzipCache": "caches.evicting",
    "Policy": "policies.policy",
    "PrefixStore": "prefix.store",
    "Profile": "caches.profile",
    "ShadowKVCache": "caches.shadowkv",
    "SnapKVCache": "caches.evicting",
    "StreamingLLMCache": "caches.evicting",
    "SwiftKVCache": "swiftkv.cache",
    "TransformCodec": "caches.transform_codec",
    "ask": "asking",
    "auto_cache": "choosing",
    "convert": "swiftkv.conversion",
    "generate_folder": "generation",
    "load_model": "loading",
    "logprobs": "scoring",
    "measure_basis": "caches.calibration",
    "measure_profile": "caches.profiling",
    "register": "policies.method",
    "release": "hf",
    "watch_memory": "watching",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name == "__all__":
        return sorted([*_HOMES, *_policies()])
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    # policies are classes, whose names begin with a capital; submodules' names do not
    if name[:1].isupper() and name in (policies := _policies()):
        return policies[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(["__version__", *_HOMES, *_policies()])


def _policies() -> dict[str, type[Any]]:
    """Every policy of this package, by class name."""
    from kvcompress.policies.method import own_policies

    return {kind.__name__: kind for kind in own_policies()}


def _version() -> str:
    """The installed distribution's version; in a checkout that is not installed, pyproject.toml's, with `+checkout`."""
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
