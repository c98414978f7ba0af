"""The public functions: check arguments, then call `torch.ops.kvkernels.*`.

Where PyTorch need not see a call (`checks.needs_dispatcher`), one call of C++ checks and does it
all instead, or leaves what it does not accept to the checks, which say what is wrong by name.
"""

from kvkernels.ops.attention import merge_attention, paged_attention
from kvkernels.ops.codecs import EncodedBlocks, decode_blocks, encode_blocks
from kvkernels.ops.kv_cache import store_kv
from kvkernels.ops.linear import linear
from kvkernels.ops.pointwise import gated_activation, rms_norm, rotary_embedding
from kvkernels.ops.quantize import quantize_blocks
from kvkernels.ops.shared_prefix import SharedPrefixes, shared_prefix_attention

__all__ = [
    "EncodedBlocks",
    "SharedPrefixes",
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
]
