"""What a call's checks and plan depend on, as a key: a model calls alike in layer after layer."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import torch

from kvkernels.checks import is_transformed

Signature = tuple[Hashable, ...]

# Most entries a cache keyed by signatures keeps. A server meets thousands of batch sizes over time,
# but few at once.
MAX_SIGNATURES = 4096


def layouts(tensors: Iterable[torch.Tensor | None]) -> Signature:
    """Shape, strides, dtype and device of each tensor, None for one that is not there."""
    return tuple(
        [
            None if tensor is None else (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
            for tensor in tensors
        ]
    )


def is_checked_at_launch(tensor: torch.Tensor) -> bool:
    """Whether an op that is given this tensor first checks its inputs itself.

    So it does on a GPU, where it must look up a call's signature anyway. The public functions check
    what never gets there: all that is traced, and what autograd would record or carry tangents of.
    """
    return (
        tensor.is_cuda
        and type(tensor) is torch.Tensor
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not is_transformed()
    )


class CheckedCalls:
    """Layouts of calls that passed an op's checks, none of which looks at values.

    To look them up takes 3 us, to check 5 to 20.
    """

    def __init__(self) -> None:
        self._signatures: set[Signature] = set()

    def has(self, tensors: tuple[torch.Tensor | None, ...]) -> bool:
        """Whether tensors laid out like these were found right.

        Never while something is traced, where a layout may hold symbols, nor where autograd
        records or tangents are carried, which the ops refuse tensor by tensor.
        """
        if (
            torch.compiler.is_compiling()
            or type(tensors[0]) is not torch.Tensor
            or torch.is_grad_enabled()
            or is_transformed()
        ):
            return False
        try:
            return layouts(tensors) in self._signatures
        except AttributeError:  # one is no tensor: the checks say which
            return False

    def add(self, tensors: tuple[torch.Tensor | None, ...]) -> None:
        """Remember that calls with tensors like these are right."""
        if torch.compiler.is_compiling() or type(tensors[0]) is not torch.Tensor:
            return
        if len(self._signatures) >= MAX_SIGNATURES:
            self._signatures.clear()
        self._signatures.add(layouts(tensors))
