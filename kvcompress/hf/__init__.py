"""Everything kvcompress knows of transformers' names, in one package, because they change from release to release.

    calls       how a cache is passed to a model: argument names, hooks around a forward, both spellings
    attention   the attention function and its mask function
    biases      how a model is asked for biases by distance
    masks       the spans of a mask: tokens that see later ones
    latent      multi-head latent attention, from latents
    indexer     what indexers choose that tokens attend to
    configs     what a config says, and which models are supported
    modules     where modules and devices are found
    rotary      how a model computes its rotary embeddings
    parallel    how a model is split over processes
    fingerprint which model it is
    pipelines   the registry of pipelines
    progress    bars while a model is loaded
    working     what a forward takes, found without numbers
    families    the model classes that a SwiftKV model is built on
    versions    which releases were tested

No code outside it matches, reads or passes transformers' names (tests/hf/test_seam.py): a cache among arguments is
found by its type, and if a model was given one that its layers do not find, that is an error, never "no cache".
"""

from kvcompress.hf.attention import IMPLEMENTATION as IMPLEMENTATION
from kvcompress.hf.attention import ONE_TOKEN as ONE_TOKEN
from kvcompress.hf.attention import Attends as Attends
from kvcompress.hf.attention import TokensIndexed as TokensIndexed
from kvcompress.hf.attention import TokensSeen as TokensSeen
from kvcompress.hf.attention import attention_name as attention_name
from kvcompress.hf.attention import release as release
from kvcompress.hf.attention import select_attention as select_attention
from kvcompress.hf.attention import set_attention as set_attention
from kvcompress.hf.attention import tag_key as tag_key
from kvcompress.hf.calls import CACHE_SPELLINGS as CACHE_SPELLINGS
from kvcompress.hf.calls import AttendingCache as AttendingCache
from kvcompress.hf.calls import Cache as Cache
from kvcompress.hf.calls import CacheLayerMixin as CacheLayerMixin
from kvcompress.hf.calls import cache_argument as cache_argument
from kvcompress.hf.calls import cache_in as cache_in
from kvcompress.hf.calls import cache_name as cache_name
from kvcompress.hf.calls import cache_of as cache_of
from kvcompress.hf.calls import full_cache as full_cache
from kvcompress.hf.calls import take_cache as take_cache
from kvcompress.hf.calls import unread as unread
from kvcompress.hf.calls import watch_forwards as watch_forwards
from kvcompress.hf.configs import LayerHeads as LayerHeads
from kvcompress.hf.configs import LayerKind as LayerKind
from kvcompress.hf.configs import all_attend as all_attend
from kvcompress.hf.configs import as_decoder as as_decoder
from kvcompress.hf.configs import attention_windows as attention_windows
from kvcompress.hf.configs import block_of as block_of
from kvcompress.hf.configs import check_served as check_served
from kvcompress.hf.configs import decoder_config as decoder_config
from kvcompress.hf.configs import end_tokens as end_tokens
from kvcompress.hf.configs import filler_tokens as filler_tokens
from kvcompress.hf.configs import has_biases as has_biases
from kvcompress.hf.configs import has_experts as has_experts
from kvcompress.hf.configs import index_width as index_width
from kvcompress.hf.configs import is_multimodal as is_multimodal
from kvcompress.hf.configs import key_widths as key_widths
from kvcompress.hf.configs import latent_part as latent_part
from kvcompress.hf.configs import latent_rank as latent_rank
from kvcompress.hf.configs import latent_ranks as latent_ranks
from kvcompress.hf.configs import layer_heads as layer_heads
from kvcompress.hf.configs import layer_kind as layer_kind
from kvcompress.hf.configs import layer_kinds as layer_kinds
from kvcompress.hf.configs import model_types as model_types
from kvcompress.hf.configs import packed_widths as packed_widths
from kvcompress.hf.configs import pool_of as pool_of
from kvcompress.hf.configs import repeats_keys as repeats_keys
from kvcompress.hf.configs import run_order as run_order
from kvcompress.hf.configs import shares_kv as shares_kv
from kvcompress.hf.configs import sizes as sizes
from kvcompress.hf.configs import takes_one_mask as takes_one_mask
from kvcompress.hf.configs import text_config as text_config
from kvcompress.hf.configs import trained_length as trained_length
from kvcompress.hf.configs import without_windows as without_windows
from kvcompress.hf.fingerprint import Fingerprint as Fingerprint
from kvcompress.hf.indexer import Choice as Choice
from kvcompress.hf.indexer import PlacesTold as PlacesTold
from kvcompress.hf.indexer import index_keys as index_keys
from kvcompress.hf.indexer import index_positions as index_positions
from kvcompress.hf.modules import Captured as Captured
from kvcompress.hf.modules import attention_module as attention_module
from kvcompress.hf.modules import attention_modules as attention_modules
from kvcompress.hf.modules import decoder_of as decoder_of
from kvcompress.hf.modules import defined_with as defined_with
from kvcompress.hf.modules import device_of as device_of
from kvcompress.hf.modules import forget_positions as forget_positions
from kvcompress.hf.modules import input_device as input_device
from kvcompress.hf.modules import layer_device as layer_device
from kvcompress.hf.modules import layer_of as layer_of
from kvcompress.hf.modules import output_projection as output_projection
from kvcompress.hf.modules import text_of as text_of
from kvcompress.hf.modules import watched as watched
from kvcompress.hf.parallel import head_group as head_group
from kvcompress.hf.parallel import spread_over as spread_over
from kvcompress.hf.pipelines import register_pipeline as register_pipeline
from kvcompress.hf.progress import gguf_bars_as_told as gguf_bars_as_told
from kvcompress.hf.rotary import Rotary as Rotary
from kvcompress.hf.rotary import has_rotary as has_rotary
from kvcompress.hf.rotary import has_several_axes as has_several_axes
from kvcompress.hf.rotary import rotary_of as rotary_of
from kvcompress.hf.states import States as States
from kvcompress.hf.working import state_bytes as state_bytes
from kvcompress.hf.working import working_bytes as working_bytes
