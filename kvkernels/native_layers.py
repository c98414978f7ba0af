"""Turns checked tensors into addresses and sizes for the C++ kernels of a model's layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from kvkernels.checks import address_of
from kvkernels.native import DTYPES, extension, isa, optional_address, reads_tensors
from kvkernels.threads import num_threads

_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1}


def has_even_rows(tensor: torch.Tensor) -> bool:
    """Whether rows are dense and a constant stride apart, as the functions below want them."""
    return tensor.is_contiguous() or (tensor.dim() == 2 and tensor.stride(1) == 1)


# ---- in one call that checks the tensors, too; None: PyTorch has to see the call, or it is wrong


def linear_at_once(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """See `kvkernels.linear`."""
    if not reads_tensors or is_dynamo_compiling():
        return None
    out: torch.Tensor | None = extension.linear_tensors(input, weight, bias, isa(), num_threads())
    return out


def rms_norm_at_once(
    input: torch.Tensor, weight: torch.Tensor, eps: float, is_offset: bool
) -> torch.Tensor | None:
    """See `kvkernels.rms_norm`."""
    if not reads_tensors or is_dynamo_compiling():
        return None
    out: torch.Tensor | None = extension.rms_norm_tensors(
        input, weight, eps, is_offset, isa(), num_threads()
    )
    return out


def gated_activation_at_once(
    gate: torch.Tensor, up: torch.Tensor, activation: str
) -> torch.Tensor | None:
    """See `kvkernels.gated_activation`."""
    if not reads_tensors or is_dynamo_compiling():
        return None
    out: torch.Tensor | None = extension.gated_activation_tensors(
        gate, up, _ACTIVATIONS[activation], isa(), num_threads()
    )
    return out


# ---- on tensors that were checked ------------------------------------------------------------


def _row_stride(tensor: torch.Tensor) -> int:
    return tensor.stride(0) if tensor.dim() == 2 else tensor.shape[-1]


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """See `kvkernels.linear`, for an input that `has_even_rows`."""
    return linear_layers(input, ((weight, bias),))[0]


def linear_layers(
    input: torch.Tensor, layers: Sequence[tuple[torch.Tensor, torch.Tensor | None]]
) -> list[torch.Tensor]:
    """What `linear` makes of one input with each of the weights and biases, in one call."""
    features, leading = input.shape[-1], input.shape[:-1]
    outs = [input.new_empty((*leading, weight.shape[0])) for weight, _ in layers]
    extension.linear(
        (address_of("input", input), leading.numel(), features, _row_stride(input)),
        [
            (
                address_of("weight", weight),
                optional_address("bias", bias),
                out.data_ptr(),
                *weight.shape,
                weight.stride(0),
            )
            for (weight, bias), out in zip(layers, outs, strict=True)
        ],
        DTYPES[input.dtype],
        isa(),
        num_threads(),
    )
    return outs


def rms_norm(
    input: torch.Tensor, weight: torch.Tensor, eps: float, is_offset: bool
) -> torch.Tensor:
    """See `kvkernels.rms_norm`, for an input that `has_even_rows`, none of them empty."""
    out = input.new_empty(input.shape)
    size = input.shape[-1]
    extension.rms_norm(
        (address_of("input", input), address_of("weight", weight), out.data_ptr()),
        (input.numel() // size, size, _row_stride(input)),
        eps,
        is_offset,
        DTYPES[input.dtype],
        isa(),
        num_threads(),
    )
    return out


def rotary_embedding(
    input: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor
) -> None:
    """See `kvkernels.rotary_embedding`; the strides of `cos` and `sin` are equal.

    Raises:
        ValueError: If `cos` or `sin` has another shape than that of the angles of `input`.
    """
    extension.rotary_embedding(
        (
            address_of("input", input),
            address_of("cos", cos),
            address_of("sin", sin),
            out.data_ptr(),
        ),
        input.shape,
        (cos.shape, sin.shape),
        input.stride()[:3],
        out.stride()[:3],
        (cos.stride(0) if len(cos) > 1 else 0, cos.stride(1)),
        DTYPES[input.dtype],
        isa(),
        num_threads(),
    )


def gated_activation(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """See `kvkernels.gated_activation`, for tensors as in `rms_norm`."""
    out = gate.new_empty(gate.shape)
    size = gate.shape[-1]
    extension.gated_activation(
        (address_of("gate", gate), address_of("up", up), out.data_ptr()),
        (gate.numel() // size, size, _row_stride(gate), _row_stride(up)),
        _ACTIVATIONS[activation],
        DTYPES[gate.dtype],
        isa(),
        num_threads(),
    )
    return out


def decoder_layer(
    sizes: tuple[int, int, int, int, int],
    norms: Sequence[tuple[int, float, bool]],
    linears: Sequence[tuple[int, int, int, int]],
    activation: str,
    scales: tuple[float, float],
    dtype: torch.dtype,
) -> Any:
    """The kernels of a decoder layer, on weights at the given addresses.

    Args:
        sizes: Hidden size, heads, KV heads, head_dim and intermediate size.
        norms: Address, epsilon and whether 1 is added to the weight, of six; 0 for none.
        linears: Addresses of weight and bias, features that come out and the weight's stride, of
            seven.
        activation: See `kvkernels.gated_activation`.
        scales: Scale and soft cap of the scores.
        dtype: Of all tensors.
    """
    return extension.DecoderLayer(
        sizes, norms, linears, _ACTIVATIONS[activation], scales, DTYPES[dtype]
    )
