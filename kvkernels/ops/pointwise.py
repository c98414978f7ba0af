"""What a model does between its matrix products, in one pass over memory each. CPU only."""

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
from kvkernels.reference import pointwise as reference

_implementation = native_layers if native.is_available else reference


def rms_norm(
    input: torch.Tensor, weight: torch.Tensor, eps: float, *, is_offset: bool = False
) -> torch.Tensor:
    """Each row over the root of the mean of its squares, times a weight.

    A row's bits depend on nothing but the row. Computed in float32.

    Args:
        input: ``[..., size]``; float32, float16 or bfloat16.
        weight: ``[size]``, dtype of ``input``, contiguous.
        eps: Added to the mean.
        is_offset: Multiply by ``1 + weight`` and round once, as Gemma does, instead of rounding
            before the weight, as Llama does.

    Returns:
        ``[..., size]``, contiguous, dtype of ``input``.

    Raises:
        ValueError: If shapes, dtypes, devices or strides disagree or a tensor requires grad.
        UnsupportedError: If the tensors are not on the CPU.
    """
    out = native_layers.rms_norm_at_once(input, weight, eps, is_offset)
    if out is not None:
        return out
    _check("input", input, input)
    if input.dim() == 0:
        raise ValueError("input: expected at least one dimension, got a scalar")
    check_shape("weight", weight, (input.shape[-1],))
    _check("weight", weight, input)
    return torch.ops.kvkernels.rms_norm.default(input, weight, eps, is_offset)


def rotary_embedding(input: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of elements that lie half a head apart.

    Source: Su et al., RoFormer (2021), in the order of GPT-NeoX. Products are rounded to the
    dtype before they are added.

    Args:
        input: ``[batch_size, num_heads, num_tokens, head_dim]``, last stride 1; float32, float16
            or bfloat16. ``head_dim`` is even.
        cos: ``[batch_size or 1, num_tokens, head_dim]``, dtype of ``input``, last stride 1.
        sin: Like ``cos``.

    Returns:
        Like ``input``, a transposed view of ``[batch_size, num_tokens, num_heads, head_dim]``.

    Raises:
        ValueError: If shapes, dtypes, devices or strides disagree or a tensor requires grad.
        UnsupportedError: If the tensors are not on the CPU.
    """
    check_shape("input", input, (None, None, None, None))
    batch_size, _, num_tokens, head_dim = input.shape
    if head_dim % 2:
        raise ValueError(f"input: expected an even head_dim, got {head_dim}")
    _check("input", input, input)
    check_last_stride("input", input)
    check_shape("cos", cos, (1 if cos.shape[:1] == (1,) else batch_size, num_tokens, head_dim))
    check_shape("sin", sin, cos.shape)
    for name, tensor in (("cos", cos), ("sin", sin)):
        _check(name, tensor, input)
        check_last_stride(name, tensor)
    return torch.ops.kvkernels.rotary_embedding.default(input, cos, sin)


def gated_activation(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """``activation(gate) * up``, with the activation rounded to the dtype.

    An element's bits depend on nothing but the two elements.

    Args:
        gate: ``[..., size]``; float32, float16 or bfloat16.
        up: Like ``gate``.
        activation: ``"silu"``, or ``"gelu_tanh"`` for the approximation by a tanh.

    Returns:
        Like ``gate``, contiguous.

    Raises:
        ValueError: If shapes, dtypes or devices disagree, a tensor requires grad or the activation
            is another one.
        UnsupportedError: If the tensors are not on the CPU.
    """
    if activation not in reference.ACTIVATIONS:
        raise ValueError(
            f"activation: expected one of {tuple(reference.ACTIVATIONS)}, got {activation!r}"
        )
    out = native_layers.gated_activation_at_once(gate, up, activation)
    if out is not None:
        return out
    _check("gate", gate, gate)
    check_shape("up", up, gate.shape)
    _check("up", up, gate)
    return torch.ops.kvkernels.gated_activation.default(gate, up, activation)


def _check(name: str, tensor: torch.Tensor, first: torch.Tensor) -> None:
    if tensor.device.type != "cpu":
        raise UnsupportedError(f"{name}: expected a tensor on the CPU, got {tensor.device}")
    check_dtype(name, tensor, *((first.dtype,) if tensor is not first else FLOAT_DTYPES))
    check_device(name, tensor, first.device)
    check_inference(name, tensor)


LIBRARY.define("rms_norm(Tensor input, Tensor weight, float eps, bool is_offset) -> Tensor")
LIBRARY.define("rotary_embedding(Tensor input, Tensor cos, Tensor sin) -> Tensor")
LIBRARY.define("gated_activation(Tensor gate, Tensor up, str activation) -> Tensor")


@torch.library.impl(LIBRARY, "rms_norm", "CPU")
def _rms_norm_cpu(
    input: torch.Tensor, weight: torch.Tensor, eps: float, is_offset: bool
) -> torch.Tensor:
    if not input.numel():
        return torch.empty_like(input)
    rows = _rows(input)
    return _implementation.rms_norm(rows, weight.contiguous(), eps, is_offset).view(input.shape)


@torch.library.impl(LIBRARY, "rotary_embedding", "CPU")
def rotary_embedding_cpu(input: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """What the operator does, for callers that know their tensors."""
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    batch_size, num_heads, num_tokens, head_dim = input.shape
    out = input.new_empty((batch_size, num_tokens, num_heads, head_dim)).transpose(1, 2)
    if not native.is_available:
        return out.copy_(reference.rotary_embedding(input, cos, sin))
    native_layers.rotary_embedding(input, cos, sin, out)
    return out


@torch.library.impl(LIBRARY, "gated_activation", "CPU")
def _gated_activation_cpu(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    if not gate.numel():
        return torch.empty_like(gate)
    out = _implementation.gated_activation(_rows(gate), _rows(up), activation)
    return out.view(gate.shape)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    rows = tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1)
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


@torch.library.register_fake("kvkernels::rms_norm", lib=LIBRARY)
def _rms_norm_fake(
    input: torch.Tensor, weight: torch.Tensor, eps: float, is_offset: bool
) -> torch.Tensor:
    return input.new_empty(input.shape)


@torch.library.register_fake("kvkernels::rotary_embedding", lib=LIBRARY)
def _rotary_embedding_fake(
    input: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    batch_size, num_heads, num_tokens, head_dim = input.shape
    return input.new_empty((batch_size, num_tokens, num_heads, head_dim)).transpose(1, 2)


@torch.library.register_fake("kvkernels::gated_activation", lib=LIBRARY)
def _gated_activation_fake(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    return gate.new_empty(gate.shape)
