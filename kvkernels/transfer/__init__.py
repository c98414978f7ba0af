"""Blocks on their way between a pool and host memory, while the model goes on computing."""

from kvkernels.transfer.block_transfer import BlockTransfer, Eviction, Restoration

__all__ = ["BlockTransfer", "Eviction", "Restoration"]
