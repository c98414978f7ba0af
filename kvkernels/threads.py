"""How many threads the kernels on a CPU work on, and whose they are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

try:
    import _kvkernels
except ModuleNotFoundError:  # only when the extension is absent: a broken build raises
    _kvkernels = None

_of_this_thread = threading.local()
_lock = threading.Lock()
_num_inside = 0  # threads that are inside `own_threads`


def num_threads() -> int:
    """For a kernel that this thread calls now: `torch.get_num_threads()` outside `own_threads`."""
    # To look at what belongs to this thread takes 5 us after weights and cache were read.
    num_own = getattr(_of_this_thread, "num_own", None) if _num_inside else None
    return num_own or torch.get_num_threads()


def _add_inside(count: int) -> None:
    global _num_inside
    with _lock:
        _num_inside += count


@contextmanager
def own_threads() -> Iterator[None]:
    """Have the kernels that this thread calls inside a `with` block run on threads of their own.

    As many as PyTorch would use. Its own operations run on the calling thread alone meanwhile, for
    its threads keep looking for work for milliseconds after each of them, on processors that ours
    want. Ours are never waited for unless they are at work: a processor that other programs or
    threads keep busy costs its share of the work, where the end of an OpenMP region would stand
    still. So this is for passes that are nearly all kernels of this library. Other threads are not
    concerned.
    """
    before = num_threads()
    if _kvkernels is None or before == 1 or hasattr(_of_this_thread, "num_own"):
        yield
        return
    _of_this_thread.num_own = before
    _add_inside(1)
    _kvkernels.prefer_own_threads(True)
    _kvkernels.set_host_threads(1)
    before_mkl = _kvkernels.set_mkl_threads(1)
    try:
        yield
    finally:
        _kvkernels.set_mkl_threads(before_mkl)
        _kvkernels.set_host_threads(before)
        _kvkernels.prefer_own_threads(False)
        _add_inside(-1)
        del _of_this_thread.num_own
