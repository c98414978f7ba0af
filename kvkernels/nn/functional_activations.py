"""Activations that a layer calls as functions, found in the code of its forward.

What is a module of its own can be replaced, a function that a forward calls cannot.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import FunctionType

import torch

# Those of which PyTorch computes what is left over behind the last whole vector by other code, with
# other roundings. Of `tanh`, `exp`, `sin` and `cos` it does not.
_ACTIVATIONS = {
    name + ending
    for name in ("celu", "elu", "gelu", "mish", "selu", "sigmoid", "silu", "softplus")
    for ending in ("", "_")
}


def find_functional_activation(module: torch.nn.Module) -> str | None:
    """Name of an activation that the module's forward calls as a function; None if it seems not to.

    Looked through are the forward, the methods of its class and the functions of its file that it
    names, and so on.
    """
    submodules = module._modules.keys()
    attributes = vars(module)
    for function in _reachable(module):
        for name in function.__code__.co_names:
            if name in _ACTIVATIONS and name not in submodules:
                return name
            called = getattr(attributes.get(name), "__name__", None)  # as of self.act = F.silu
            if called in _ACTIVATIONS:
                return called
    return None


def _reachable(module: torch.nn.Module) -> Iterator[FunctionType]:
    kind = type(module)
    forward = inspect.unwrap(kind.forward)
    if not isinstance(forward, FunctionType):
        return
    found, waiting = {forward}, [forward]
    while waiting:
        function = waiting.pop()
        yield function
        for name in function.__code__.co_names:
            named = getattr(kind, name, None) or function.__globals__.get(name)
            named = inspect.unwrap(named) if isinstance(named, FunctionType) else None
            if named is not None and named.__module__ == forward.__module__ and named not in found:
                found.add(named)
                waiting.append(named)
