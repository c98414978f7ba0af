"""Models whose results are the same bits however their tokens are batched, on a CPU.

A token's logits then depend on the tokens before it alone: not on where a prompt is cut, how much
of it came from a cache, what else is in the forward pass or how many threads work on it.

::

    linear layers  kvkernels.linear: one order of summation for any number of rows; under
                   `torch.autocast` in the dtype of that
    attention      paged_attention(batch_invariant=True): one order of keys for any cut
    activations    of elements: PyTorch's own, on whole vectors: what is left over at the end of a
                   tensor, or of a thread's share, goes through other code there, with other
                   roundings; softmax of rows: as it is
    all else       rows on their own (norms, cosines), or single roundings (sums, products); that
                   PyTorch gives these the same bits was found by trying (bench_batch_invariance),
                   and norms that need not compute in float32 are tried when a model is made so
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch

from kvkernels.checks import is_plain
from kvkernels.errors import UnsupportedError
from kvkernels.nn.forward_code import (
    LINEAR,
    MATRIX_PRODUCT,
    SCALED_SUM,
    ForwardCode,
    read_forward,
)
from kvkernels.nn.forward_patch import (
    ForwardPatch,
    Forwards,
    has_own_forward,
    install_lock,
    is_of_class,
    without_ours,
)
from kvkernels.nn.functional_activations import find_functional_activation
from kvkernels.nn.inverse_roots import HALF_DTYPES, find_unsteady_root
from kvkernels.ops import linear

# PyTorch's loops over elements take two vectors of the widest kind at a time, and give a thread no
# less than so many elements.
_VECTOR_ITEMS = 64
_GRAIN_ITEMS = 32768

_ACTIVATION_MODULES = ("torch.nn.modules.activation", "transformers.activations")
# By name: transformers is not imported here, and its versions have different ones.
_ELEMENT_WISE = {
    *("CELU", "ELU", "GELU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyReLU"),
    *("LogSigmoid", "Mish", "ReLU", "ReLU6", "RReLU", "SELU", "Sigmoid", "SiLU", "Softplus"),
    *("Softshrink", "Softsign", "Tanh", "Tanhshrink", "Threshold"),
    *("AccurateGELUActivation", "ClippedGELUActivation", "FastGELUActivation", "GELUActivation"),
    *("GELUTanh", "LaplaceActivation", "LinearActivation", "MishActivation", "NewGELUActivation"),
    *("PytorchGELUTanh", "QuickGELUActivation", "ReLUSquaredActivation", "SiLUActivation"),
    *("SqrtSoftplusActivation", "XIELUActivation"),
}
# Along the last dimension PyTorch computes each row on its own.
_ROW_WISE = {"LogSoftmax", "Softmax", "Softmin"}

# Products of matrices, for which PyTorch takes kernels by their shapes.
_PRODUCTS = {
    *(MATRIX_PRODUCT, "matmul", "__matmul__", "mm", "bmm", "mv", "inner", "einsum", "tensordot"),
    *("multi_dot", "chain_matmul", "bilinear", "cdist", "convolution", "_convolution"),
    *("_scaled_mm", "_weight_int8pack_mm", "_weight_int4pack_mm"),
    *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)),
    *(name + ending for name in ("addmm", "addmv", "addbmm", "baddbmm") for ending in ("", "_")),
}

# Frequencies of these go by the length of the forward pass, so no batching can be without effect.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


_invariant_modules: WeakSet[torch.nn.Module] = WeakSet()


def install(model: torch.nn.Module) -> None:
    """Make a model's results independent of batching, until `uninstall`.

    Its attention is to run on kvkernels (`kvkernels.nn.transformers.install`, or modules of
    `kvkernels.nn.PagedAttention`) or to ask for `batch_invariant=True` itself. Installed twice, a
    model stays so until it is uninstalled twice.

    Raises:
        UnsupportedError: If the model has a layer for which this cannot be promised; it is left as
            it was.
    """
    with install_lock:
        _patch.install(model)
        _invariant_modules.update(model.modules())


def uninstall(model: torch.nn.Module) -> None:
    """Give a model back the layers it had before `install`; without one, nothing changes."""
    with install_lock:
        if _patch.uninstall(model):
            _invariant_modules.difference_update(model.modules())


@contextmanager
def batch_invariant(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Make a model's results independent of batching inside a `with` block; yields the model."""
    install(model)
    try:
        yield model
    finally:
        uninstall(model)


def is_batch_invariant(module: torch.nn.Module) -> bool:
    """Whether a module belongs to a model that `install` was called for."""
    return module in _invariant_modules


def _find_forwards(model: torch.nn.Module) -> Forwards:
    _refuse_unserved(model)
    found = {module: _find_forward(name, module) for name, module in model.named_modules()}
    return {module: forward for module, forward in found.items() if forward is not None}


def _refuse_unserved(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu":
            raise UnsupportedError(
                f"model: expected all parameters on the CPU, got {name} on {parameter.device}"
            )
        owner = model.get_submodule(name.rpartition(".")[0])
        if parameter.dim() > 1 and not isinstance(owner, (torch.nn.Linear, torch.nn.Embedding)):
            raise UnsupportedError(
                "model: expected matrices in linear and embedding layers only, got"
                f" {name} in {type(owner).__name__}"
            )
    halves = sorted({p.dtype for p in model.parameters()} & {*HALF_DTYPES}, key=str)
    for name, module in model.named_modules():
        code = read_forward(module)
        if _is_compiled(module) or code.is_compiled:
            raise UnsupportedError(
                "model: expected modules that are not compiled (code of another batch size may"
                f" round otherwise), got {name or 'a model'} that is"
            )
        if any(isinstance(value, torch._C.ScriptObject) for value in vars(module).values()):
            raise UnsupportedError(
                "model: expected weights that are tensors, got packed ones in"
                f" {name or 'the model'} of {type(module).__name__}"
            )
        own = without_ours(vars(module).get("forward"))
        if not (own is None or is_of_class(module, own)):
            raise UnsupportedError(
                "model: expected modules with the forward of their class, got"
                f" {name or 'a model'} with a {type(own).__name__} of {_origin(own)}"
            )
        rope_type = getattr(module, "rope_type", None)
        used = set(rope_type.values()) if isinstance(rope_type, dict) else {rope_type}
        if used & _LENGTH_DEPENDENT_ROPE:
            raise UnsupportedError(
                "model: expected rotary frequencies that do not depend on the length, got"
                f" {rope_type!r} in {name}"
            )
        if type(module).__module__ not in _ACTIVATION_MODULES:
            _refuse_functions(name or "the model", module, code, halves)


def _refuse_functions(
    name: str, module: torch.nn.Module, code: ForwardCode, halves: list[torch.dtype]
) -> None:
    activation = find_functional_activation(code)
    if activation is not None:
        raise UnsupportedError(
            "model: expected activations that are modules, got a forward that calls"
            f" {activation} as a function: {name} of {type(module).__name__}"
        )
    if LINEAR in code.names and not isinstance(module, torch.nn.Linear):
        raise UnsupportedError(
            "model: expected linear layers that are modules, got a forward that calls linear as a"
            f" function: {name} of {type(module).__name__}"
        )
    product = min(code.names & _PRODUCTS, default=None)
    if product is not None and not _has_angles(module):
        raise UnsupportedError(
            "model: expected products of matrices in linear layers and attention only, got"
            f" {product} in {name} of {type(module).__name__}"
        )
    if halves and SCALED_SUM in code.names:
        raise UnsupportedError(
            "model: expected sums of half numbers without a factor (with one their bits depend on"
            f" the batch), got {SCALED_SUM} in {name} of {type(module).__name__}"
        )
    root = find_unsteady_root(module, code, halves)
    if root is not None:
        raise UnsupportedError(
            "model: expected inverse roots of float32 (those of half numbers depend on the batch),"
            f" got {root} in {name} of {type(module).__name__}"
        )


def _has_angles(module: torch.nn.Module) -> bool:
    """Whether it makes rotary angles: by products of matrices, too, but of single numbers."""
    names = [name for name, _ in module.named_buffers(recurse=False)]
    is_bare = not module._modules and not module._parameters
    return is_bare and any(name.endswith("inv_freq") for name in names)


def _is_compiled(module: torch.nn.Module) -> bool:
    """Whether it is so by its `compile()`, or is what `torch.compile` makes of a module."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def _origin(forward: Any) -> str:
    """The file of its code: a decorator gives it the name of what it is put around."""
    while isinstance(forward, partial):
        forward = forward.func
    function = getattr(forward, "__func__", forward)
    names = getattr(function, "__globals__", {"__name__": type(function).__module__})
    return str(names["__name__"])


def _find_forward(name: str, module: torch.nn.Module) -> Callable[..., Any] | None:
    """What is to replace a module's `forward`; None to leave it."""
    kind = type(module)
    forward: Callable[..., Any]
    if isinstance(module, torch.nn.Linear):
        if kind is not torch.nn.Linear:
            raise UnsupportedError(
                f"model: expected linear layers of torch.nn.Linear, got {name} of {kind.__name__}"
            )
        for tensor in (module.weight, module.bias):
            if tensor is not None and not is_plain(tensor):
                raise UnsupportedError(
                    "model: expected linear layers with plain tensors for weights, got"
                    f" {type(tensor).__name__} in {name}"
                )
            if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
                raise UnsupportedError(
                    "model: expected linear layers with weights of stride 1 in the last dimension,"
                    f" got {tensor.stride()} in {name}"
                )
        forward = partial(_apply_linear, module)
    elif kind.__module__ in _ACTIVATION_MODULES and not _keeps_bits(module):
        if kind.__name__ not in _ELEMENT_WISE:
            raise UnsupportedError(
                "model: expected activations of elements or of rows (the last dimension), got"
                f" {name} of {kind.__name__}"
            )
        forward = partial(_activate, module, kind)
    else:
        return None
    if has_own_forward(module) and not is_of_class(module, vars(module)["forward"]):
        raise UnsupportedError(
            f"model: expected layers with the forward of their class, got {name} with another"
        )
    return forward


def _keeps_bits(module: torch.nn.Module) -> bool:
    """Whether PyTorch's own activation gives an element the same bits in any batch."""
    kind = type(module).__name__
    # Of a PReLU an element becomes itself or one product.
    return kind == "PReLU" or (kind in _ROW_WISE and getattr(module, "dim", None) == -1)


def _apply_linear(module: torch.nn.Linear, input: torch.Tensor) -> torch.Tensor:
    if type(module).forward is not torch.nn.Linear.forward:  # it was given another class since
        return type(module).forward(module, input)
    weight: torch.Tensor = module.weight
    bias: torch.Tensor | None = module.bias
    if torch.is_autocast_enabled("cpu") and torch.float64 not in (input.dtype, weight.dtype):
        # As PyTorch's own layers do. What casts is the dispatcher, which knows only PyTorch's ops.
        dtype = torch.get_autocast_dtype("cpu")
        input, weight = input.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return linear(input, weight, bias)


def _activate(
    module: torch.nn.Module, kind: type[torch.nn.Module], input: torch.Tensor
) -> torch.Tensor:
    """An element-wise function of a tensor that is padded to whole vectors for every thread."""
    forward = type(module).forward
    size = input.numel()
    padded = _whole_vectors(size)
    # A class that it was given since may work on more than elements.
    if type(module) is not kind or (padded == size and input.is_contiguous()):
        return forward(module, input)
    flat = input.new_zeros(padded)
    flat[:size] = input.reshape(-1)
    result = forward(module, flat)[:size].view(input.shape)
    return input.copy_(result) if getattr(module, "inplace", False) else result


def _whole_vectors(size: int) -> int:
    """The least number of elements from `size` on that PyTorch shares out in whole vectors."""
    size = -(-size // _VECTOR_ITEMS) * _VECTOR_ITEMS
    while True:
        num_parts = min(torch.get_num_threads(), -(-size // _GRAIN_ITEMS)) or 1
        if -(-size // num_parts) % _VECTOR_ITEMS == 0:
            return size
        size += _VECTOR_ITEMS


_patch = ForwardPatch(_find_forwards)
