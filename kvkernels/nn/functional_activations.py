"""Activations that a layer calls as functions, found in the code of its forward.

What is a module of its own can be replaced, a function that a forward calls cannot.
"""

from __future__ import annotations

from kvkernels.nn.forward_code import ForwardCode

# Those of which PyTorch computes what is left over behind the last whole vector by other code, with
# other roundings. Of `tanh`, `exp`, `sin` and `cos` it does not.
_ACTIVATIONS = {
    *(
        name + ending
        for name in ("celu", "elu", "gelu", "mish", "selu", "sigmoid", "silu", "softplus")
        for ending in ("", "_")
    ),
    *("atan2", "atanh", "cosh", "exp2", "expit", "logaddexp", "logaddexp2", "sinh"),
}
# Powers that are products, quotients and roots; see `inverse_roots` for the inverse root.
_STEADY_EXPONENTS = {-2, -1, -0.5, 0, 0.5, 1, 2, 3}


def find_functional_activation(code: ForwardCode) -> str | None:
    """Name of an activation that a forward calls as a function; None if it seems not to."""
    found = code.names & _ACTIVATIONS
    exponents = {exponent for _, exponent in code.exponents} - _STEADY_EXPONENTS
    found |= {f"pow({exponent})" for exponent in exponents}
    return min(found, default=None)
