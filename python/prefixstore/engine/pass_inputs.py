"""The index tensors of a forward pass on their way to the device: one copy for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

# Kernels are compiled for addresses at multiples of 16 bytes, and anew for others.
_ALIGNMENT = 16

_DTYPES = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64}


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """The arrays as tensors on a device.

    On a GPU nobody waits: they are there for what is queued next on the current stream. Each copy
    from memory that is not pinned would wait for the stream and cost a call of its own.

    Args:
        arrays: Of any shapes, contiguous, int32 or int64; on a CPU the tensors share their memory.
        device: Where.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    packed = pack(arrays, pin_memory=device.type == "cuda")
    return unpack(packed.to(device, non_blocking=True), arrays)


def pack(arrays: Sequence[np.ndarray], pin_memory: bool) -> torch.Tensor:
    """``[num_bytes]``, uint8: the arrays one after another, each at a multiple of 16 bytes.

    Pinned memory comes from PyTorch's cache of it, which gives it to nobody else before copies
    out of it are done.
    """
    ends = _ends(arrays)
    packed = torch.empty(ends[-1] if ends else 0, dtype=torch.uint8, pin_memory=pin_memory)
    memory = packed.numpy()
    for array, end in zip(arrays, ends, strict=True):
        start = end - _room(array)
        memory[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    return packed


def unpack(packed: torch.Tensor, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
    """Views of what `pack` made of `arrays`, wherever it was copied."""
    views = []
    for array, end in zip(arrays, _ends(arrays), strict=True):
        start = end - _room(array)
        view = packed[start : start + array.nbytes].view(_DTYPES[array.dtype])
        views.append(view.view(array.shape))
    return views


def _room(array: np.ndarray) -> int:
    return -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT


def _ends(arrays: Sequence[np.ndarray]) -> list[int]:
    ends: list[int] = np.cumsum([_room(array) for array in arrays], dtype=np.int64).tolist()
    return ends
