"""Counters that are zero before and after every launch that uses them."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import torch
import triton

# By device and stream. Launches on one stream run one after another, so they can share a buffer.
_buffers: dict[tuple[int, int], torch.Tensor] = {}
# By device: counters for launches in captured graphs, and how many have been dealt out. A graph
# keeps its counters for good, since its replays may run beside other streams.
_graph_buffers: dict[int, tuple[torch.Tensor, int]] = {}
_GRAPH_COUNTERS = 1 << 20
_dealing = threading.Lock()  # several threads may capture at once


def zeroed_counters(count: int, tensor: torch.Tensor) -> torch.Tensor:
    """At least `count` int32 zeros on the device of `tensor`, at a multiple of 16 bytes.

    Who counts with them leaves zeros again.
    """
    if count == 0 or tensor.is_meta:
        return tensor.new_empty(count, dtype=torch.int32)
    index = tensor.get_device()
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return _deal_to_graph(count, index, tensor)
    stream = triton.runtime.driver.active.get_current_stream(index) if tensor.is_cuda else 0
    buffer = _buffers.get((index, stream))
    if buffer is None or buffer.numel() < count:
        buffer = _buffers[index, stream] = _new_zeros(max(1024, 2 * count), tensor)
        if tensor.is_cuda:
            _provide_for_graphs(index, tensor)
    return buffer


def _new_zeros(count: int, tensor: torch.Tensor) -> torch.Tensor:
    """Zeros that are kept, filled on the current stream.

    `torch.compile` may have this thread's allocations go to the pool of the graph that it is about
    to capture, which owns all that is in there. So another thread allocates them.
    """

    stream = torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None
    on_stream = contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)

    def allocate() -> torch.Tensor:
        with on_stream:
            return tensor.new_zeros(count, dtype=torch.int32)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(allocate).result()


def _provide_for_graphs(index: int, tensor: torch.Tensor) -> None:
    with _dealing:
        if index not in _graph_buffers:
            _graph_buffers[index] = (_new_zeros(_GRAPH_COUNTERS, tensor), 0)


def _deal_to_graph(count: int, index: int, tensor: torch.Tensor) -> torch.Tensor:
    with _dealing:
        buffer, used = _graph_buffers.get(index, (None, 0))
        if buffer is not None and used + count <= buffer.numel():
            # A multiple of 16 bytes, since Triton compiles another kernel for any other address.
            _graph_buffers[index] = (buffer, used + triton.cdiv(count, 4) * 4)
            return buffer[used : used + count]
    return tensor.new_zeros(count, dtype=torch.int32)  # a fill at every replay
