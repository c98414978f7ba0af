"""Inverse roots of half numbers, as norms take them, whose bits may depend on the batch.

For what is left over behind the last whole vector PyTorch rounds the root to the half type before
it inverts it. Norms that compute in float32 do not have that; whether one does is tried.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from kvkernels.nn.forward_code import ForwardCode

HALF_DTYPES = (torch.bfloat16, torch.float16)

# Whole vectors on every instruction set; with one row less, some elements are left over.
_NUM_TRIAL_ROWS = 64
_FEWER_ROWS = (1, _NUM_TRIAL_ROWS - 1)
# Used where no parameter tells how wide rows are; a root is then taken of one number a row.
_ANY_WIDTH = 64

# What modules raise whose input is not just a batch of rows.
_TRIAL_ERRORS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def find_unsteady_root(
    module: torch.nn.Module, code: ForwardCode, dtypes: Iterable[torch.dtype]
) -> str | None:
    """What a module takes inverse roots with whose bits depend on the number of rows; None if it
    seems to do no such thing.

    Args:
        code: That of the module's forward.
        dtypes: Half types of the rows that the module may be given.
    """
    forms = {form for form, exponent in code.exponents if exponent == -0.5}
    forms |= code.names & {"rsqrt", "rsqrt_"}
    # `**` is also applied to plain numbers: many attentions write `head_dim**-0.5`.
    is_of_tensors = forms != {"**"}
    for dtype in dtypes if forms else ():
        is_steady = _try_rows(module, dtype)
        if is_steady is False or (is_steady is None and is_of_tensors):
            return max(forms)
    return None


@torch.no_grad()
def _try_rows(module: torch.nn.Module, dtype: torch.dtype) -> bool | None:
    """Whether rows get the same bits beside other numbers of rows; None if that cannot be tried."""
    if module._modules:  # a linear layer inside would change bits by itself until it is replaced
        return None
    parameter = next(module.parameters(), None)
    width = _ANY_WIDTH if parameter is None or not parameter.dim() else parameter.shape[-1]
    rows = torch.randn(1, _NUM_TRIAL_ROWS, width, generator=torch.Generator().manual_seed(0))
    rows = (rows * torch.linspace(0.1, 10, _NUM_TRIAL_ROWS)[:, None]).to(dtype)
    forward = type(module).forward
    try:
        whole = forward(module, rows)
        parts = {num_rows: forward(module, rows[:, :num_rows]) for num_rows in _FEWER_ROWS}
    except _TRIAL_ERRORS:
        return None
    if not isinstance(whole, torch.Tensor) or whole.shape != rows.shape:
        return None
    return all(torch.equal(part, whole[:, :num_rows]) for num_rows, part in parts.items())
