"""Makes Triton's interpreter spend less time outside the kernels.

Results stay the same. Half of the time of the codec tests went into two things:

- Each call of one jitted function by another replaced the functions of `triton.language` again,
  and looked through the module's members for them. Once in a launch is enough.
- Each addition and multiplication of integers was checked for overflow in some ten steps of the
  interpreter. Here NumPy checks it in one.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import operator
from types import FunctionType
from typing import Any

import numpy as np

_OPERATORS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}


@functools.cache
def make_quick() -> None:
    """Call once per process; no effect where kernels are compiled or Triton is missing."""
    if importlib.util.find_spec("triton") is None:  # it exists only on Linux
        return
    import triton

    if not triton.knobs.runtime.interpret:
        return
    from triton.runtime import interpreter

    _patch_once_in_a_launch(interpreter)
    _check_overflow_at_once(interpreter)


def _patch_once_in_a_launch(interpreter: Any) -> None:
    patch, restore = interpreter._patch_lang, interpreter._LangPatchScope.restore
    patched: set[str] = set()

    @functools.cache
    def used_modules(function: FunctionType) -> frozenset[str]:
        modules = filter(inspect.ismodule, function.__globals__.values())
        names = (module.__name__ for module in modules)
        return frozenset(name for name in names if name.startswith("triton.language"))

    def patch_lang(function: FunctionType) -> Any:
        modules = used_modules(function)
        if modules <= patched:
            return interpreter._LangPatchScope()
        patched.update(modules)
        return patch(function)

    # Only a kernel's scope is ever restored, at the end of its launch.
    def restore_all(scope: Any) -> None:
        patched.clear()
        restore(scope)

    interpreter._patch_lang = patch_lang
    interpreter._LangPatchScope.restore = restore_all


def _check_overflow_at_once(interpreter: Any) -> None:
    def check(semantic: Any, left: Any, right: Any, operation: Any) -> None:
        bits = left.type.scalar.int_bitwidth
        if bits >= 64 or not semantic.builder.options.sanitize_overflow:
            return
        limits = left.type.scalar.get_int_min_value(), left.type.scalar.get_int_max_value()
        # 64 bits hold the sum and difference of two 32-bit numbers, and their product where both
        # are signed or small; as in Triton's own check, a larger product wraps.
        name = operation.__name__
        wide = (value.handle.data.astype(np.int64) for value in (left, right))
        exact = _OPERATORS[name](*wide)
        if exact.min() < limits[0] or exact.max() > limits[1]:
            raise AssertionError(f"int{bits} overflow detected for operation {name}")

    interpreter.TritonSemantic.binary_op_sanitize_overflow_impl = check
