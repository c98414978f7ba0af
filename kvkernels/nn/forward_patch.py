"""Forwards of a model's layers that are replaced for a while."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary, ref

import torch
from torch.nn.modules import module as torch_module

# Held during the whole of an install or uninstall of any kind. Each inspects, tries and replaces
# layers in many steps and must not see another thread's half-done ones; and a trial of decoder
# layers replaces the attention function of all models for a moment.
install_lock = threading.RLock()

Forwards = dict[torch.nn.Module, Callable[..., Any]]

_REPLACED = ("forward", "__getstate__")

# The forwards that are in place now, by `id`, since they are looked up with objects that may not be
# hashable. Weak references, because a forward refers to its layer.
_installed: WeakValueDictionary[int, Callable[..., Any]] = WeakValueDictionary()


class _Replacement:
    """What a layer is given, and what it had before.

    Only the layer itself refers to it, so that a model goes with its last user even if it was never
    uninstalled.
    """

    def __init__(self, module: torch.nn.Module, forward: Callable[..., Any]) -> None:
        self._module = module
        # `copy` and `pickle` ask an object, not its class, for the state that they take with them.
        self._fields = dict(zip(_REPLACED, (forward, self._own_state), strict=True))
        self._before = {name: vars(module)[name] for name in _REPLACED if name in vars(module)}

    def put(self) -> None:
        # Before the module changes: other threads may look at it at any moment.
        _installed[id(self._fields["forward"])] = self._fields["forward"]
        vars(self._module).update(self._fields)

    def take_back(self) -> None:
        """Leave what somebody else has put in its place since."""
        for name, value in self._fields.items():
            if vars(self._module).get(name) is not value:
                continue
            if name in self._before:
                vars(self._module)[name] = self._before[name]
            else:
                vars(self._module).pop(name, None)

    def _own_state(self) -> dict[str, Any]:
        """What the layer is without what was replaced in it."""
        # Every class has it since Python 3.11.
        get_state = getattr(type(self._module), "__getstate__", vars)
        state: dict[str, Any] = get_state(self._module)
        return {name: value for name, value in state.items() if name not in _REPLACED}


@dataclass
class _Patched:
    replacements: list[ref[_Replacement]]
    num_users: int = 0


class ForwardPatch:
    """Replaces the `forward` of some of a model's layers until the last user is done.

    A copy of the model, or of a layer, has the forwards of its classes, and so has what is pickled.

    Any thread may install and uninstall, one at a time (`install_lock`).

    Args:
        find: What to put in place of which layers' forwards; it may refuse a model by raising.
    """

    def __init__(self, find: Callable[[torch.nn.Module], Forwards]) -> None:
        self._find = find
        self._patched: WeakKeyDictionary[torch.nn.Module, _Patched] = WeakKeyDictionary()

    def install(self, model: torch.nn.Module) -> int:
        """Replace them, unless that is done; returns how many."""
        with install_lock:
            patched = self._patched.get(model)
            if patched is None:
                replacements = [_Replacement(*pair) for pair in self._find(model).items()]
                for replacement in replacements:
                    replacement.put()
                patched = _Patched([*map(ref, replacements)])
                self._patched[model] = patched
            patched.num_users += 1
            return len(patched.replacements)

    def uninstall(self, model: torch.nn.Module) -> bool:
        """Give the layers of the last user's model back; whether this was it.

        What somebody else has put in the place of a replaced forward since then stays.
        """
        with install_lock:
            patched = self._patched.get(model)
            if patched is None:
                return False
            patched.num_users -= 1
            if patched.num_users:
                return False
            for reference in patched.replacements:
                replacement = reference()
                if replacement is not None:
                    replacement.take_back()
            del self._patched[model]
            return True


def has_own_forward(module: torch.nn.Module) -> bool:
    """Whether something has replaced the forward of its class already."""
    return "forward" in vars(module)


def is_installed(forward: object) -> bool:
    """Whether the forward of a layer is one that a `ForwardPatch` put there."""
    return forward is not None and _installed.get(id(forward)) is forward


def without_ours(forward: Any) -> Any:
    """A layer's own forward beneath those of a `ForwardPatch`; None if there is none.

    Those of ours that call what they were put around name it as their `__wrapped__`.
    """
    while is_installed(forward):
        forward = getattr(forward, "__wrapped__", None)
    return forward


def is_of_class(module: torch.nn.Module, forward: object) -> bool:
    """Whether it is the forward of a module's class, as libraries put it back into the module."""
    return (
        isinstance(forward, MethodType)
        and forward.__self__ is module
        and forward.__func__ is type(module).forward
    )


def hook_tables(*modules: torch.nn.Module) -> list[dict[int, Callable[..., Any]]]:
    """Where the forward hooks of these modules are and will be, with those of all models."""
    of_all = torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks
    own = ((module._forward_hooks, module._forward_pre_hooks) for module in modules)
    return [*of_all, *chain.from_iterable(own)]
