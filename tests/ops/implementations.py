"""Every implementation of the ops, with the reference functions' signatures."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

import kvkernels
from kvkernels import native


@dataclass(frozen=True)
class Implementation:
    """One way to run the three ops.

    Attributes:
        name: For the test's id.
        is_slow: Whether only shapes marked small are worth the time (Triton's interpreter).
        checks_values: Whether values inside index tensors are checked.
    """

    name: str
    store_kv: Callable[..., Any]
    paged_attention: Callable[..., Any]
    merge_attention: Callable[..., Any]
    is_slow: bool = False
    checks_values: bool = True


def _on_isa(isa: str, op: Callable[..., Any], *args: Any, **options: Any) -> Any:
    with native.use_isa(isa):
        return op(*args, **options)


def _public_paged_attention(*args: Any, **caches: Any) -> Any:
    """The public function with an implementation's signature."""
    *tensors, scoring, return_lse = args
    rules = scoring._asdict()
    for name in ("window", "soft_cap"):
        rules[name] = rules[name] or None
    result = kvkernels.paged_attention(*tensors, **rules, return_lse=return_lse, **caches)
    return result if return_lse else (result, torch.empty(0, tensors[0].shape[1]))


def _find_implementations() -> list[Implementation]:
    public = (kvkernels.store_kv, _public_paged_attention, kvkernels.merge_attention)
    # Without the extension the op is the reference itself.
    found = [] if native.is_available else [Implementation("reference", *public)]
    found += [
        Implementation(isa, *(partial(_on_isa, isa, op) for op in public))
        for isa in native.available_isas()
    ]
    try:
        cache = importlib.import_module("kvkernels.triton_kernels.kv_cache")
        attention = importlib.import_module("kvkernels.triton_kernels.attention")
    except ModuleNotFoundError:  # Triton is only on Linux
        return found
    launchers = (cache.store_kv, attention.paged_attention, attention.merge_attention)
    found.append(
        Implementation(
            "triton", *launchers, is_slow=not torch.cuda.is_available(), checks_values=False
        )
    )
    return found


IMPLEMENTATIONS = _find_implementations()


def every_implementation(argument: str = "implementation") -> Any:
    """Parametrise a test over all implementations."""
    return pytest.mark.parametrize(argument, IMPLEMENTATIONS, ids=lambda found: found.name)
