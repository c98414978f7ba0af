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


def num_threads() -> int:
    """For a kernel that this thread calls now: `torch.get_num_threads()` outside `own_threads`."""
    return getattr(_of_this_thread, "num_own", None) or torch.get_num_threads()


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
    _kvkernels.prefer_own_threads(True)
    _kvkernels.set_host_threads(1)
    before_mkl = _kvkernels.set_mkl_threads(1)
    try:
        yield
    finally:
        _kvkernels.set_mkl_threads(before_mkl)
        _kvkernels.set_host_threads(before)
        _kvkernels.prefer_own_threads(False)
        del _of_this_thread.num_own
