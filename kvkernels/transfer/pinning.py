"""Host memory of others that a GPU may copy to and from by itself."""

from __future__ import annotations

import contextlib
import logging

import torch

logger = logging.getLogger(__name__)

_FOR_ALL_DEVICES = 1  # cudaHostRegisterPortable


class PinnedMemory:
    """Locks memory in its place until `close`: copies from it to a GPU run at the bus's full rate.

    Out of other memory the driver copies into memory of its own first, on one thread. Where the
    system does not allow it, the memory stays as it was, and a warning is logged.

    Args:
        memory: Contiguous, on the CPU; kept alive.
        device: A GPU that copies. All may, but the runtime opens a context on the current one.

    Attributes:
        is_pinned: Whether it is locked now.
    """

    def __init__(self, memory: torch.Tensor, device: torch.device) -> None:
        self._memory = memory
        self._device = device
        with torch.cuda.device(device):
            status = torch.cuda.cudart().cudaHostRegister(
                memory.data_ptr(), memory.nbytes, _FOR_ALL_DEVICES
            )
        self.is_pinned = int(status) == 0
        if not self.is_pinned:
            logger.warning("%d bytes of host memory not pinned: %s", memory.nbytes, status)
            # CUDA keeps the error and PyTorch raises it at the next launch: let it be this one.
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=device)

    def close(self) -> None:
        """Unlock it, once no copy runs any more. May be called again."""
        if self.is_pinned:
            self.is_pinned = False
            with torch.cuda.device(self._device):
                torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())
