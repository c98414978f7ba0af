"""Activations that a layer calls as functions, found in the code of its forward.

What is a module of its own can be replaced, a function that a forward calls cannot.
"""

from __future__ import annotations

from kvkernels.nn.forward_code import ForwardCode

# Those of which PyTorch computes what is left over behind the last whole vector by other code, with
# other roundings. Of `tanh`, `exp`, `sin` and `cos` it does not. A `glu` computes half a row at a
# time, but threads may share a row.
_FUNCTIONS = (
    *("celu", "elu", "gelu", "glu", "mish", "selu", "sigmoid", "silu", "softplus"),
    *("arctan2", "arctanh", "atan2", "atanh", "cosh", "exp2", "expit", "sinh"),
    *("logaddexp", "logaddexp2"),
)
_ACTIVATIONS = {name + ending for name in _FUNCTIONS for ending in ("", "_")}
# Powers that are products, quotients and roots; see `inverse_roots` for the inverse root.
_STEADY_EXPONENTS = {-2, -1, -0.5, 0, 0.5, 1, 2, 3}


def find_functional_activation(code: ForwardCode) -> str | None:
    """Name of an activation that a forward calls as a function; None if it seems not to."""
    found = code.names & _ACTIVATIONS
    exponents = {exponent for _, exponent in code.exponents} - _STEADY_EXPONENTS
    found |= {f"pow({exponent})" for exponent in exponents}
    return min(found, default=None)
