"""Records what a function queues on a GPU, so that it can be queued again in one call."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvkernels import UnsupportedError

# Beginning a capture synchronises the device, which CUDA forbids while another capture runs.
_one_at_a_time = threading.Lock()


class Recorder(Protocol):
    """Records functions of no arguments and no result that work on tensors of fixed addresses."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """What does again on the device what `function` does there.

        `function` runs a few times. What is returned reads the same addresses and writes the same
        ones, on the current stream of whoever calls it.
        """
        ...


class CudaGraphRecorder:
    """Records CUDA graphs, one at a time; their temporary memory is shared.

    Graphs of one recorder are to be replayed one after another, for that reason.

    Args:
        device: A GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # PyTorch hands out the streams of one priority in turns from a small pool, so another
        # thread could get this same stream, and its work would end up in the graph. Nothing else
        # here asks for this priority. It is recorded with the kernels: copies and codecs beside a
        # replay give way to it.
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """See `Recorder`.

        Raises:
            UnsupportedError: If `function` waits for the device.
            RuntimeError: If it does anything else that no graph can hold, or memory does not
                suffice.
        """
        caller = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(caller)
        try:
            # `torch.cuda.graph` sets the stream as well, but leaves it set if the capture fails.
            with torch.cuda.stream(self._stream):
                # Warm-up: kernels are compiled and libraries allocate workspaces, which a capture
                # must not do.
                with WithoutWaiting(self._device):
                    function()
                function()
                with _one_at_a_time:
                    graph = self._capture(function)
        finally:
            caller.wait_stream(self._stream)
        return graph.replay

    def _capture(self, function: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        try:
            # "thread_local": other threads may allocate and copy meanwhile, on other streams.
            with torch.cuda.graph(
                graph, self._pool, self._stream, capture_error_mode="thread_local"
            ):
                function()
        except RuntimeError:
            # Before PyTorch 2.12 a failed capture leaves the allocator in capture mode, and it
            # never returns memory to the device again. Later versions end it themselves, and raise
            # here.
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
            raise
        return graph


def find_recorder(device: torch.device) -> Recorder | None:
    """A recorder for work on a device; None if it has no graphs."""
    return CudaGraphRecorder(device) if device.type == "cuda" else None


class WithoutWaiting(TorchDispatchMode):
    """Inside it, an operator that has the processor wait for the device raises UnsupportedError.

    A graph cannot hold that. An attempt to record it fails as well, but leaves more behind.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        tensors = _tensors((*args, *kwargs.values()))
        is_there = any(tensor.device == self._device for tensor in tensors)
        if is_there and _waits(func, tensors):
            raise UnsupportedError(
                f"model: expected a pass that does not wait for the device, got {func}"
            )
        # In inference mode composite operators arrive here undecomposed: look at their parts.
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        if func.overloadpacket in _COPIES:
            devices = {tensor.device for tensor in (*tensors, *_tensors((result,)))}
            if self._device in devices and len(devices) > 1:
                raise UnsupportedError(
                    f"model: expected a pass on {self._device} alone, got {func} between"
                    f" {sorted(map(str, devices))}"
                )
        return result


_COPIES = (torch.ops.aten.copy_, torch.ops.aten._to_copy)
# The result's shape depends on values only if an index is a mask.
_INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
_READING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def _waits(func: Any, tensors: list[torch.Tensor]) -> bool:
    # Made from Python numbers, and copied to the device.
    if func.overloadpacket is torch.ops.aten.lift_fresh:
        return tensors[0].device.type != "cpu"
    if func.overloadpacket in _INDEXING:
        return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors[1:])
    return not _READING.isdisjoint(func.tags)


def _tensors(values: tuple[Any, ...]) -> list[torch.Tensor]:
    """Those in some arguments of an operator, and in lists among them."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [item for item in value if isinstance(item, torch.Tensor)]
    return found
