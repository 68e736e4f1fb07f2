"""Drop-in Hugging Face caches that keep less and read less."""

from kvcompress import hf
from kvcompress.dense import DenseCache as DenseCache
from kvcompress.evicting import EvictingCache as EvictingCache
from kvcompress.evicting import H2OCache as H2OCache
from kvcompress.evicting import SnapKVCache as SnapKVCache
from kvcompress.evicting import StreamingLLMCache as StreamingLLMCache
from kvcompress.loading import load_model as load_model

hf.register()
