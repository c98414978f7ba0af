"""Activations that a layer calls as functions, found in the code of its forward.

What is a module of its own can be replaced, a function that a forward calls cannot.
"""

from __future__ import annotations

from kvkernels.nn.forward_code import EXPONENTIAL, POWER, ForwardCode

# PyTorch computes these in vectors, and the elements left over behind the last whole vector by
# other code that rounds differently. (`tanh`, `exp`, `sin` and `cos` round the same in both.) A
# `glu` works on half a row at a time, but threads may share a row.
_FUNCTIONS = (
    *("celu", "elu", "gelu", "glu", "mish", "selu", "sigmoid", "silu", "softplus"),
    *("arctan2", "arctanh", "atan2", "atanh", "cosh", "exp2", "expit", "sinh"),
    *("logaddexp", "logaddexp2"),
)
_ACTIVATIONS = {name + ending for name in _FUNCTIONS for ending in ("", "_")}
_ACTIVATIONS |= {EXPONENTIAL, POWER}
# Powers that PyTorch computes as products, quotients and roots, which round the same in both; see
# `inverse_roots` for -0.5.
_STEADY_EXPONENTS = {-2, -1, -0.5, 0, 0.5, 1, 2, 3}


def find_functional_activation(code: ForwardCode) -> str | None:
    """Name of an activation that a forward calls as a function; None if it seems not to."""
    found = code.names & _ACTIVATIONS
    exponents = {exponent for _, exponent in code.exponents} - _STEADY_EXPONENTS
    found |= {f"pow({exponent})" for exponent in exponents}
    return min(found, default=None)
