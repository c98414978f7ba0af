"""A Hugging Face model on all that kvkernels has for one on a CPU, in one call.

::

    kvkernels.nn.transformers        attention, and the cache it reads
    kvkernels.nn.batch_invariance    linear layers; a token has the same bits in any batch
    kvkernels.nn.fused_layers        norms, rotations and gates
    kvkernels.nn.decoder_layers      a decoder layer with a paged cache: few calls of C++
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from kvkernels.nn import batch_invariance, decoder_layers, fused_layers, transformers

# Each works on what those before it have put in place.
_PARTS = (transformers, batch_invariance, fused_layers, decoder_layers)


def install(model: Any) -> None:
    """Let a model's layers run on kvkernels, until `uninstall`.

    Fused layers replace what gives the same numbers; what they do not know stays as it is.
    Installed twice, a model stays so until it is uninstalled twice.

    Args:
        model: A `transformers.PreTrainedModel` on a CPU, in evaluation mode.

    Raises:
        UnsupportedError: If its attention cannot be replaced, or it has a layer for which the same
            bits in any batch cannot be promised; it is left as it was.
    """
    with ExitStack() as undo:
        for part in _PARTS:
            part.install(model)
            undo.callback(part.uninstall, model)
        undo.pop_all()


def uninstall(model: Any) -> None:
    """Give a model back the layers it had before `install`; to be called once for each of those."""
    for part in reversed(_PARTS):
        part.uninstall(model)


@contextmanager
def fused_model(model: Any) -> Iterator[Any]:
    """Run a model's layers on kvkernels inside a `with` block; yields the model."""
    install(model)
    try:
        yield model
    finally:
        uninstall(model)
