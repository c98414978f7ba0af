"""What another implementation of attention must offer to be timed beside ours."""

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
        prepare: From a case and its inputs, what is timed: a call that gives an output like
            ``query`` and may be captured in a graph. What it does before is not timed.
        form: How the keys and values lie that the call gets, and what is not timed.
        serves: Which cases it can run.
        context: What its calls, and their capture, run within.
    """

    prepare: Callable[[Case, Inputs], Call]
    form: str
    serves: Callable[[Case], bool] = lambda case: True
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
