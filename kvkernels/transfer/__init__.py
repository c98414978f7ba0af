"""Blocks on their way between a pool and host memory, while the model goes on computing."""

from kvkernels.transfer.block_transfer import BlockTransfer, Eviction, Restoration
from kvkernels.transfer.lanes import all_done
from kvkernels.transfer.pinning import PinnedMemory

__all__ = ["BlockTransfer", "Eviction", "PinnedMemory", "Restoration", "all_done"]
