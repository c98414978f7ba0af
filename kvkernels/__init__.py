"""Paged attention and the block pool it reads: the kernels of a KV cache for PyTorch models."""

from kvkernels.allocator import BlockAllocator, PoolFullError
from kvkernels.errors import UnsupportedError
from kvkernels.layout import KVLayout
from kvkernels.ops import (
    SharedPrefixes,
    merge_attention,
    paged_attention,
    quantize_blocks,
    shared_prefix_attention,
    store_kv,
)
from kvkernels.pool import KVPool
from kvkernels.quantized_cache import QuantizedCache, tag_blocks
from kvkernels.quantized_pool import QuantizedPool

__version__ = "0.1.0"

__all__ = [
    "BlockAllocator",
    "KVLayout",
    "KVPool",
    "PoolFullError",
    "QuantizedCache",
    "QuantizedPool",
    "SharedPrefixes",
    "UnsupportedError",
    "merge_attention",
    "paged_attention",
    "quantize_blocks",
    "shared_prefix_attention",
    "store_kv",
    "tag_blocks",
]
