"""A linear layer whose rows are the same bits in any batch."""

from __future__ import annotations

import torch

from kvkernels import native, native_layers
from kvkernels.checks import (
    FLOAT_DTYPES,
    check_device,
    check_dtype,
    check_inference,
    check_last_stride,
    check_shape,
)
from kvkernels.errors import UnsupportedError
from kvkernels.ops.library import LIBRARY
from kvkernels.reference import linear as reference


def linear(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`torch.nn.functional.linear` with each row's bits independent of the other rows.

    The result of a row depends neither on how many rows there are nor on where it stands among
    them nor on the number of threads. CPU only.

    Args:
        input: ``[..., in_features]``; float32, float16 or bfloat16.
        weight: ``[out_features, in_features]``, dtype of ``input``, last stride 1.
        bias: ``[out_features]``, dtype of ``input``, contiguous; None for none.

    Returns:
        ``[..., out_features]``, contiguous, dtype of ``input``. Sums are of float32.

    Raises:
        ValueError: If shapes, dtypes, devices or strides disagree or a tensor requires grad.
        UnsupportedError: If the tensors are not on the CPU.
    """
    out = native_layers.linear_at_once(input, weight, bias)
    if out is not None:
        return out
    if input.device.type != "cpu":
        raise UnsupportedError(f"input: expected a tensor on the CPU, got {input.device}")
    check_shape("weight", weight, (None, None))
    out_features, in_features = weight.shape
    check_dtype("input", input, *FLOAT_DTYPES)
    if input.dim() == 0 or input.shape[-1] != in_features:
        raise ValueError(
            f"input: expected {in_features} features (those of weight), got shape"
            f" {list(input.shape)}"
        )
    check_last_stride("weight", weight)
    if bias is not None:
        check_shape("bias", bias, (out_features,))
        check_last_stride("bias", bias)
    for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_dtype(name, tensor, input.dtype)
            check_device(name, tensor, input.device)
            check_inference(name, tensor)
    return torch.ops.kvkernels.linear.default(input, weight, bias)


LIBRARY.define("linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor")


@torch.library.impl(LIBRARY, "linear", "CPU")
def _linear_cpu(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    if not native_layers.has_even_rows(input):
        input = input.contiguous()
    implementation = native_layers if native.is_available else reference
    return implementation.linear(input, weight, bias)


@torch.library.register_fake("kvkernels::linear", lib=LIBRARY)
def _linear_fake(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))
