"""Paged attention and the block pool it reads: the kernels of a KV cache for PyTorch models."""

from kvkernels.allocator import BlockAllocator, PoolFullError
from kvkernels.errors import UnsupportedError
from kvkernels.layout import KVLayout
from kvkernels.ops import merge_attention, paged_attention, store_kv
from kvkernels.pool import KVPool

__version__ = "0.1.0"

__all__ = [
    "BlockAllocator",
    "KVLayout",
    "KVPool",
    "PoolFullError",
    "UnsupportedError",
    "merge_attention",
    "paged_attention",
    "store_kv",
]
