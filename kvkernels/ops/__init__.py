"""The public functions: check arguments, call `torch.ops.kvkernels.*`."""

from kvkernels.ops.attention import merge_attention, paged_attention
from kvkernels.ops.kv_cache import store_kv

__all__ = ["merge_attention", "paged_attention", "store_kv"]
