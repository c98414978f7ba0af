"""Forwards of a model's layers that are replaced for a while."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

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


@dataclass
class _Patched:
    fields: dict[torch.nn.Module, dict[str, Any]]
    # Attributes of the same names that the modules had before.
    before: dict[torch.nn.Module, dict[str, Any]]
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
                forwards = self._find(model)
                patched = _Patched(
                    {one: _fields(one, own) for one, own in forwards.items()},
                    {
                        one: {n: vars(one)[n] for n in _REPLACED if n in vars(one)}
                        for one in forwards
                    },
                )
                for module, fields in patched.fields.items():
                    # Before the module changes: other threads may look at it at any moment.
                    _installed[id(fields["forward"])] = fields["forward"]
                    vars(module).update(fields)
                self._patched[model] = patched
            patched.num_users += 1
            return len(patched.fields)

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
            for module, fields in patched.fields.items():
                before = patched.before[module]
                for name, value in fields.items():
                    if vars(module).get(name) is not value:
                        continue
                    if name in before:
                        vars(module)[name] = before[name]
                    else:
                        vars(module).pop(name, None)
            del self._patched[model]
            return True


def has_own_forward(module: torch.nn.Module) -> bool:
    """Whether something has replaced the forward of its class already."""
    return "forward" in vars(module)


def is_installed(forward: object) -> bool:
    """Whether the forward of a layer is one that a `ForwardPatch` put there."""
    return forward is not None and _installed.get(id(forward)) is forward


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


def _fields(module: torch.nn.Module, forward: Callable[..., Any]) -> dict[str, Any]:
    """What a layer is given: `copy` and `pickle` ask an object, not its class, for the state that
    they take with them."""
    return dict(zip(_REPLACED, (forward, partial(_own_state, module)), strict=True))


def _own_state(module: torch.nn.Module) -> dict[str, Any]:
    """What a layer is without what was replaced in it."""
    get_state = getattr(type(module), "__getstate__", vars)  # every class has it since Python 3.11
    state: dict[str, Any] = get_state(module)
    return {name: value for name, value in state.items() if name not in _REPLACED}
