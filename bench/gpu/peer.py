"""The interface of other attention implementations that are timed."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from bench.attention_cases import Case, Inputs
from bench.attention_providers import Call


@dataclass(frozen=True)
class Peer:
    """One way to compute a case's attention on a CUDA device.

    Attributes:
        prepare: Takes a case and its inputs and returns the call that is timed, which returns an
            output like ``query`` and can be captured in a graph. The preparation is not timed.
        form: Layout of the keys and values that the call gets, and what is not timed.
        serves: Which cases it can run.
        context: Context manager around its calls and their capture.
    """

    prepare: Callable[[Case, Inputs], Call]
    form: str
    serves: Callable[[Case], bool] = lambda case: True
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
