"""Paged attention and the block pool it reads: the kernels of a KV cache for PyTorch models."""

from kvkernels.allocator import BlockAllocator, PoolFullError
from kvkernels.codecs import CODECS, BlockFormat, Codec
from kvkernels.errors import UnsupportedError
from kvkernels.layout import KVLayout
from kvkernels.ops import (
    EncodedBlocks,
    SharedPrefixes,
    decode_blocks,
    encode_blocks,
    gated_activation,
    linear,
    merge_attention,
    paged_attention,
    quantize_blocks,
    rms_norm,
    rotary_embedding,
    shared_prefix_attention,
    store_kv,
)
from kvkernels.pool import KVPool
from kvkernels.quantized_cache import QuantizedCache, tag_blocks
from kvkernels.quantized_pool import QuantizedPool

__version__ = "0.1.0"

__all__ = [
    "CODECS",
    "BlockAllocator",
    "BlockFormat",
    "Codec",
    "EncodedBlocks",
    "KVLayout",
    "KVPool",
    "PoolFullError",
    "QuantizedCache",
    "QuantizedPool",
    "SharedPrefixes",
    "UnsupportedError",
    "decode_blocks",
    "encode_blocks",
    "gated_activation",
    "linear",
    "merge_attention",
    "paged_attention",
    "quantize_blocks",
    "rms_norm",
    "rotary_embedding",
    "shared_prefix_attention",
    "store_kv",
    "tag_blocks",
]
