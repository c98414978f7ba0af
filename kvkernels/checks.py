"""Argument checks shared by every op: each names the argument, what was expected and what came."""

from collections.abc import Sequence

import torch
from torch import is_grad_enabled
from torch._C import _is_tracing, _len_torch_dispatch_stack, _len_torch_function_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import _profiler_enabled, forward_ad
from torch.compiler import is_compiling

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)


def is_plain(tensor: torch.Tensor | None) -> bool:
    """Whether a tensor is what its dtype, device and strides say.

    A subclass may say so of numbers that it keeps elsewhere and otherwise, as quantised weights do,
    and have no memory itself.
    """
    return type(tensor) in _PLAIN_TYPES


def is_traced() -> bool:
    """Whether somebody writes down what is called, and knows operators alone, no addresses.

    Modes of dispatch are such: that of `make_fx` has plain tensors in its hands.
    """
    return is_compiling() or torch.jit.is_tracing() or _len_torch_dispatch_stack() > 0


def is_transformed() -> bool:
    """Whether tensors may stand for others: for many at once (`vmap`), or for one and its tangent.

    Tangents are carried without gradients, too, and nothing of a tensor tells of them cheaply.
    """
    return forward_ad._current_level >= 0 or peek_interpreter_stack() is not None


def needs_dispatcher() -> bool:
    """Whether PyTorch's dispatcher has to see what this thread calls now.

    So it has where autograd, a graph that is being recorded, a mode, a transform (`vmap`, tangents)
    or the profiler is to see the call. Else an op may call its CPU implementation directly: the
    dispatcher takes some 5 us of a call, and 50 us after weights and cache were read, because those
    push its code out of the processor's caches.
    """
    return (
        is_grad_enabled()
        or _is_tracing()
        or _len_torch_dispatch_stack() > 0
        or _len_torch_function_stack() > 0
        or is_transformed()
        or _profiler_enabled()
    )


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor's elements lie where it says they do; see `is_plain`."""
    return _address(tensor) != 0 or tensor.numel() == 0


def address_of(name: str, tensor: torch.Tensor) -> int:
    """Where a tensor's elements lie, for C++; raises ValueError if it has no memory."""
    address = _address(tensor)
    if address == 0 and tensor.numel():
        raise ValueError(
            f"{name}: expected a tensor with memory of its own, got a {type(tensor).__name__}"
            " without"
        )
    return address


def _address(tensor: torch.Tensor) -> int:
    """0 without memory: then PyTorch counts from there to where the tensor began in its storage."""
    address: int = tensor.data_ptr()
    return 0 if address == tensor.storage_offset() * tensor.element_size() else address


def _shape_text(shape: Sequence[int | None]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"


def check_shape(name: str, tensor: torch.Tensor, expected: Sequence[int | None]) -> None:
    """Raise ValueError unless `tensor` has the expected shape; None accepts any size."""
    shape = tensor.shape
    if len(shape) != len(expected) or any(
        want is not None and got != want for got, want in zip(shape, expected, strict=False)
    ):
        raise ValueError(
            f"{name}: expected shape {_shape_text(expected)}, got {_shape_text(tuple(shape))}"
        )


def check_dtype(name: str, tensor: torch.Tensor, *expected: torch.dtype) -> None:
    """Raise ValueError unless the dtype of `tensor` is one of those expected."""
    if tensor.dtype not in expected:
        wanted = " or ".join(str(dtype) for dtype in expected)
        raise ValueError(f"{name}: expected dtype {wanted}, got {tensor.dtype}")


def check_device(name: str, tensor: torch.Tensor, expected: torch.device) -> None:
    """Raise ValueError unless `tensor` lies on the expected device."""
    if tensor.device != expected:
        raise ValueError(f"{name}: expected device {expected}, got {tensor.device}")


def check_last_stride(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError unless neighbours along the last dimension are neighbours in memory."""
    if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}: expected stride 1 in the last dimension, got {tensor.stride()}")


def check_inference(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError where autograd would want a gradient or a tangent: the ops compute none."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name}: expected a tensor that needs no gradient (inference only),"
            " got requires_grad=True; call under torch.no_grad()"
        )
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        raise ValueError(
            f"{name}: expected a tensor without a tangent (inference only), got one with"
        )


def check_caches(key_cache: torch.Tensor, value_cache: torch.Tensor) -> None:
    """Check one layer's two caches, `[num_blocks, num_kv_heads, block_size, head_dim]`."""
    check_shape("key_cache", key_cache, (None, None, None, None))
    check_dtype("key_cache", key_cache, *FLOAT_DTYPES)
    check_last_stride("key_cache", key_cache)
    check_shape("value_cache", value_cache, tuple(key_cache.shape))
    check_dtype("value_cache", value_cache, key_cache.dtype)
    check_device("value_cache", value_cache, key_cache.device)
    check_last_stride("value_cache", value_cache)
    check_inference("key_cache", key_cache)
    check_inference("value_cache", value_cache)
    if key_cache.shape[2] == 0:
        raise ValueError("key_cache: expected at least one slot in a block, got block_size 0")
    if key_cache.shape[3] == 0:
        raise ValueError("key_cache: expected a head_dim of 1 or more, got 0")
