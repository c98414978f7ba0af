"""Meaning of what a model does between its matrix products, with PyTorch's roundings."""

import torch

ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu_tanh": lambda gate: torch.nn.functional.gelu(gate, approximate="tanh"),
}


def rms_norm(
    input: torch.Tensor, weight: torch.Tensor, eps: float, is_offset: bool
) -> torch.Tensor:
    """See `kvkernels.rms_norm`."""
    wide = torch.promote_types(input.dtype, torch.float32)
    rows = input.to(wide)
    rows = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps)
    if is_offset:
        return (rows * (1 + weight.to(wide))).to(input.dtype)
    return rows.to(input.dtype) * weight


def rotary_embedding(input: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """See `kvkernels.rotary_embedding`."""
    first, second = input.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return input * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


def gated_activation(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """See `kvkernels.gated_activation`."""
    return ACTIVATIONS[activation](gate) * up
