"""The drop-in attention: a plain module, and (in `kvkernels.nn.transformers`) Hugging Face's."""

from kvkernels.nn.groups import LayerGroupSpec, PagedGroup, layer_groups
from kvkernels.nn.module import PagedAttention, PagedBatch

__all__ = ["LayerGroupSpec", "PagedAttention", "PagedBatch", "PagedGroup", "layer_groups"]
