"""Code that a model runs besides its classes' own: forward hooks, and forwards put in their place.

What such code computes nobody can tell from outside. Of some libraries it is known to change
nothing that weights and settings do not tell::

    model.forward    torch.compile's, of the model's own          known
    mlp.forward      accelerate's, of a function of the user's    foreign, for that function
    mlp.forward      the method of another module                 foreign, whosever it is
    o_proj           a hook of the user's, under torch.no_grad()  foreign
    all modules      hooks of torch.utils.module_tracker          known
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch.nn.modules import module as torch_module

from kvkernels.nn.forward_patch import is_of_class, without_ours

# All of these are prefixes of full module names.
_OF_KNOWN_HOOKS = ("accelerate.", "kvkernels.", "prefixstore.", "torch.", "transformers.")
# A forward that these modules put in place calls the original one, or was tried against it. Of
# PyTorch only `torch.compile` does; `torch.autocast` as a decorator computes something else.
_OF_KNOWN_FORWARDS = ("accelerate.", "torch._dynamo.", "transformers.")
# Objects of these classes hold no code of others; those of `torch.jit` and `torch.fx` do.
_OF_TORCH_OBJECTS = ("torch.nn.utils.",)


def find_foreign_code(model: torch.nn.Module) -> str | None:
    """What there is of it and where, in words; None if there is none."""
    if foreign_global_hooks():
        return "a forward hook on all modules"
    for name, module in model.named_modules():
        where = name or "the whole model"
        if foreign_hooks(module):
            return f"a forward hook on {where}"
        if foreign_forward(module) is not None:
            return f"a forward of its own in {where}"
    return None


def foreign_hooks(module: torch.nn.Module) -> list[Callable[..., Any]]:
    """Those of one module."""
    return _foreign([*module._forward_hooks.values(), *module._forward_pre_hooks.values()])


def foreign_global_hooks() -> list[Callable[..., Any]]:
    """Those of all modules in this process."""
    hooks, pre_hooks = torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks
    return _foreign([*hooks.values(), *pre_hooks.values()]) if hooks or pre_hooks else []


def foreign_forward(module: torch.nn.Module) -> Callable[..., Any] | None:
    """What a module computes with in place of its class's forward, unless that is known."""
    # Read once: other threads install theirs meanwhile.
    forward = without_ours(vars(module).get("forward"))
    for part in _with_wrapped(forward):
        if isinstance(part, MethodType):
            if is_of_class(module, part):
                break
            return part
        if not _is_of(_OF_KNOWN_FORWARDS, part):
            return part
    # Anybody may write one; accelerate's own forward calls it.
    hooks = _accelerate_hooks(vars(module).get("_hf_hook"))
    return next((hook for hook in hooks if not _is_of(_OF_KNOWN_HOOKS, hook)), None)


def _foreign(hooks: list[Callable[..., Any]]) -> list[Callable[..., Any]]:
    return [
        hook
        for hook in hooks
        if not all(_is_of(_OF_KNOWN_HOOKS, part) for part in _with_wrapped(hook))
    ]


def _with_wrapped(function: Callable[..., Any] | None) -> Iterator[Callable[..., Any]]:
    """A function, and what it was put around, as far as decorators tell."""
    while function is not None:
        wrapped = getattr(function, "__wrapped__", None)
        while isinstance(function, partial):
            function = function.func
        yield function
        function = wrapped


def _is_of(libraries: tuple[str, ...], function: Callable[..., Any]) -> bool:
    """Whether its code is: a decorator gives it the name of what it is put around."""
    function = getattr(function, "__func__", function)
    names = getattr(function, "__globals__", None)
    origin = f"{type(function).__module__ if names is None else names.get('__name__')}."
    if names is None and origin.startswith("torch.") and not origin.startswith(_OF_TORCH_OBJECTS):
        return False
    return origin.startswith(libraries)


def _accelerate_hooks(hook: Any) -> Iterator[Any]:
    if hook is not None:
        yield hook
        for one in getattr(hook, "hooks", ()):
            yield from _accelerate_hooks(one)
