"""Has a `PagedCache` forget the tokens of a model's forward pass that fails after all layers.

The cache counts them when the last layer stores its keys and values. That layer's attention and
gate are still to come then, and the head, in which memory may run out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from kvkernels.nn.forward_patch import ForwardPatch, Forwards
from kvkernels.nn.transformers_cache import PagedCache


def install(model: Any) -> None:
    """Watch a model's forward passes until `uninstall`, once for each time it was installed."""
    _patch.install(model)


def uninstall(model: Any) -> None:
    """Watch them no more."""
    _patch.uninstall(model)


def _find_forwards(model: Any) -> Forwards:
    return {model: _undoing(model.forward)}


def _undoing(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(*args: Any, **options: Any) -> Any:
        given = (*args, *options.values())
        cache = next((one for one in given if isinstance(one, PagedCache)), None)
        if cache is None:
            return forward(*args, **options)
        num_tokens = cache.num_tokens
        try:
            return forward(*args, **options)
        except BaseException:  # an interrupt, too
            cache.undo_pass(num_tokens)
            raise

    return run


_patch = ForwardPatch(_find_forwards)
