"""A Hugging Face model's norms, rotations and gates in one pass each, on a CPU.

PyTorch runs each of them as a row of small operations, every one of which reads and writes all its
rows: in a small model they take as long as the matrix products. What replaces them is only what
gives the same numbers: `install` tries each layer on numbers drawn at random, small and large, next
to what it would put there, and leaves a layer alone that differs. So it does with a norm or gate
whose code names anything else than theirs do: what clamps or drops out may not show in a trial.
Where gradients are wanted, or tensors of other dtypes or devices come, or angles for a part of each
head alone, or more arguments than a trial has, the layer's own forward runs; so does a gate's whose
activation has hooks, or was replaced or given another forward since.

::

    *RMSNorm.forward                          kvkernels.rms_norm
    apply_rotary_pos_emb, as a global         kvkernels.rotary_embedding
    name in an attention layer's forward
    act_fn(gate_proj(x)) * up_proj(x)         kvkernels.gated_activation
"""

from __future__ import annotations

import dis
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch

from kvkernels import native_layers
from kvkernels.checks import FLOAT_DTYPES, is_plain, is_traced, is_transformed
from kvkernels.nn.forward_code import read_forward
from kvkernels.nn.forward_patch import (
    ForwardPatch,
    Forwards,
    has_own_forward,
    hook_tables,
    without_ours,
)
from kvkernels.ops.pointwise import rotary_embedding_cpu

_NUM_TRIAL_ROWS = 16
# Rows are tried as they are drawn and so many times as large, as where a few channels stand out.
_LARGE = 1000.0
# The largest relative difference (norm of the difference over the norm), in units of the dtype's
# precision, that another order of summation or another place of rounding may make. A layer that
# computes another function is at least ten times as far off.
_MOST_DISTANT = 4.0

_rms_norm: Callable[..., torch.Tensor] = torch.ops.kvkernels.rms_norm.default
_gated_activation: Callable[..., torch.Tensor] = torch.ops.kvkernels.gated_activation.default
_rotary_embedding: Callable[..., torch.Tensor] = torch.ops.kvkernels.rotary_embedding.default

# Every name that the forwards of norms and gates use.
_NORM_NAMES = {
    *("weight", "variance_epsilon", "eps", "_norm", "with_scale"),
    *("torch", "pow", "square", "mean", "rsqrt", "sqrt"),
    *("to", "float", "type_as", "dtype", "float32", "float16", "bfloat16"),
    *("F", "torch.nn.functional", "rms_norm", "normalized_shape"),  # PyTorch's own
}
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}

_ROTATE = "apply_rotary_pos_emb"
_FUSED_ROTATE = f"_kvkernels_{_ROTATE}"
_ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
}


def install(model: torch.nn.Module) -> int:
    """Replace what can be replaced, until `uninstall`; returns how many layers that is.

    A layer that lies on another device, is of another dtype, has been given a forward of its own,
    or computes something else stays as it is. Installed twice, a model stays so until it is
    uninstalled twice.
    """
    return _patch.install(model)


def uninstall(model: torch.nn.Module) -> None:
    """Give a model back the layers it had before `install`; without one, nothing changes."""
    _patch.uninstall(model)


@torch.inference_mode()
def _find_forwards(model: torch.nn.Module) -> Forwards:
    found = {
        module: _find_forward(module) for module in model.modules() if not has_own_forward(module)
    }
    return {module: forward for module, forward in found.items() if forward is not None}


def _find_forward(module: torch.nn.Module) -> Callable[..., Any] | None:
    """What is to replace a module's `forward`; None to leave it."""
    parameter = next(module.parameters(), None)
    if parameter is None or parameter.device.type != "cpu" or parameter.dtype not in FLOAT_DTYPES:
        return None
    kind = type(module).__name__
    if kind.endswith("RMSNorm"):
        return _find_norm(module)
    if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return _find_mlp(module)
    if kind.endswith("Attention"):
        return _find_attention(module)
    return None


# ---- norms -----------------------------------------------------------------------------------


def _find_norm(module: torch.nn.Module) -> Callable[..., Any] | None:
    weight = getattr(module, "weight", None)
    eps_name = "variance_epsilon" if hasattr(module, "variance_epsilon") else "eps"
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1:
        return None
    if not isinstance(vars(module).get(eps_name), float):
        return None
    if not is_plain(weight) or not _names_only(_NORM_NAMES, module):
        return None
    rows = _draw(_NUM_TRIAL_ROWS, len(weight), dtype=weight.dtype)
    forwards = [FusedNorm(module, type(module), eps_name, offset) for offset in (False, True)]
    distances = {forward: _trial_distance(module, forward, rows) for forward in forwards}
    nearest = min(distances, key=distances.__getitem__)
    return nearest if distances[nearest] < _MOST_DISTANT else None


@dataclass(frozen=True, eq=False)
class FusedNorm:
    """In place of the forward of a norm; see `kvkernels.rms_norm`."""

    module: torch.nn.Module
    kind: type[torch.nn.Module]
    eps_name: str
    is_offset: bool

    @property
    def eps(self) -> Any:
        """That of the module now."""
        return vars(self.module)[self.eps_name]

    def __call__(self, *args: Any, **options: Any) -> Any:
        eps = self.eps
        is_as_tried = type(self.module) is self.kind and isinstance(eps, float)
        if len(args) != 1 or options or not is_as_tried:
            return type(self.module).forward(self.module, *args, **options)
        (hidden_states,) = args
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)
        out = native_layers.rms_norm_at_once(hidden_states, weight, eps, self.is_offset)
        if out is not None:
            return out
        if (
            not is_plain(weight)
            or not _are_served(hidden_states, weight)
            or hidden_states.shape[-1] != len(weight)
        ):
            return type(self.module).forward(self.module, hidden_states)
        return _rms_norm(hidden_states, weight, eps, self.is_offset)


# ---- gates -----------------------------------------------------------------------------------


def _find_mlp(module: torch.nn.Module) -> Callable[..., Any] | None:
    act_fn: Any = module.act_fn
    activation = _activation_name(act_fn)
    in_features = getattr(module.gate_proj, "in_features", None)
    if activation is None or not isinstance(in_features, int):
        return None
    forward = FusedMLP(module, activation)
    if not forward.serves() or not _names_only(_MLP_PARTS, module):
        return None
    rows = _draw(1, _NUM_TRIAL_ROWS, in_features, dtype=next(module.parameters()).dtype)
    return forward if _trial_distance(module, forward, rows) < _MOST_DISTANT else None


def _activation_name(act_fn: Any) -> str | None:
    if isinstance(act_fn, torch.nn.GELU):
        return "gelu_tanh" if act_fn.approximate == "tanh" else None
    return _ACTIVATIONS.get(type(act_fn).__name__)


class FusedMLP:
    """In place of the forward of three linear layers; see `kvkernels.gated_activation`."""

    def __init__(self, module: Any, activation: str) -> None:
        self.activation = activation
        self._module, self._act_fn = module, module.act_fn
        self._kinds = type(module), type(module.act_fn)

    def __call__(self, *args: Any, **options: Any) -> Any:
        module = self._module
        if len(args) != 1 or options or not self.serves():
            return type(module).forward(module, *args, **options)
        (x,) = args
        gate, up = module.gate_proj(x), module.up_proj(x)
        gated = native_layers.gated_activation_at_once(gate, up, self.activation)
        if gated is None and _are_served(gate, up) and gate.shape == up.shape:
            gated = _gated_activation(gate, up, self.activation)
        return module.down_proj(module.act_fn(gate) * up if gated is None else gated)

    def serves(self) -> bool:
        """Whether the module and its activation have been given nothing that the kernel skips."""
        act_fn = self._module.act_fn
        return (
            act_fn is self._act_fn
            and (type(self._module), type(act_fn)) == self._kinds
            and without_ours(vars(act_fn).get("forward")) is None
            and not any(hook_tables(act_fn))
        )


# ---- rotations -------------------------------------------------------------------------------


def _find_attention(module: torch.nn.Module) -> Callable[..., Any] | None:
    """The class's forward, in which the function that rotates has another name."""
    forward = type(module).forward
    if not isinstance(forward, FunctionType) or not _refers_to_global(forward, _ROTATE):
        return None
    rotate, head_dim = forward.__globals__.get(_ROTATE), getattr(module, "head_dim", None)
    if not callable(rotate) or not isinstance(head_dim, int) or head_dim % 2:
        return None
    dtype = next(module.parameters()).dtype
    query, key = (_draw(1, _NUM_TRIAL_ROWS, n, head_dim, dtype=dtype) for n in (2, 1))
    cos, sin = (_draw(1, _NUM_TRIAL_ROWS, head_dim, dtype=dtype) for _ in range(2))
    args = (query.transpose(1, 2), key.transpose(1, 2), cos, sin)
    rotated = _try(rotate, *args)
    if not isinstance(rotated, tuple) or len(rotated) != 2:
        return None
    fused = partial(_rotate, rotate)
    if any(_distance(*pair) > _MOST_DISTANT for pair in zip(rotated, fused(*args), strict=True)):
        return None
    return MethodType(_rename_global(forward, _ROTATE, _FUSED_ROTATE, fused), module)


def _refers_to_global(function: FunctionType, name: str) -> bool:
    """Whether it has a global of that name, and neither attribute nor method."""
    uses = [one.opname for one in dis.get_instructions(function) if one.argval == name]
    return bool(uses) and set(uses) == {"LOAD_GLOBAL"}


def _rename_global(forward: FunctionType, name: str, other_name: str, value: Any) -> FunctionType:
    """The same function, for which the value of a global name is another one.

    The value stays among the function's globals under a name of its own. In a copy of them, what
    torch.compile adds to the module's would be missing, and what anybody replaces there be ignored.
    """
    forward.__globals__[other_name] = value
    names = (other_name if one == name else one for one in forward.__code__.co_names)
    renamed = FunctionType(
        forward.__code__.replace(co_names=tuple(names)),
        forward.__globals__,
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    renamed.__kwdefaults__ = forward.__kwdefaults__
    return renamed


def _rotate(
    rotate: Callable[..., Any],
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *others: Any,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's own `rotate`, or the same in one pass."""
    tensors = (query, key, cos, sin)
    if others or options or not _are_served(*tensors) or not _are_whole_rotations(*tensors):
        return rotate(*tensors, *others, **options)
    goes_straight = all(type(tensor) is torch.Tensor for tensor in tensors) and not is_traced()
    rotate_one = rotary_embedding_cpu if goes_straight else _rotary_embedding
    return rotate_one(query, cos, sin), rotate_one(key, cos, sin)


def _are_whole_rotations(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> bool:
    """Whether all of every head is rotated. Some models rotate the first elements of each alone:
    their angles are as narrow as that part, and the kernel reads one for each element."""
    if query.dim() != 4 or key.dim() != 4 or any(t.stride(-1) != 1 for t in (query, key, cos, sin)):
        return False
    batch_size, _, num_tokens, head_dim = query.shape
    one, each = (1, num_tokens, head_dim), (batch_size, num_tokens, head_dim)
    return (
        (key.shape[0], *key.shape[2:]) == each
        and cos.shape == sin.shape
        and cos.shape in (one, each)
        and head_dim % 2 == 0
    )


def _are_served(*tensors: torch.Tensor) -> bool:
    dtype = tensors[0].dtype
    return (
        dtype in FLOAT_DTYPES
        and not torch.is_grad_enabled()
        and not is_transformed()
        and all(tensor.dtype == dtype and tensor.device.type == "cpu" for tensor in tensors)
    )


# ---- trials ----------------------------------------------------------------------------------


def _draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers that are the same in every process, and leave PyTorch's own generator alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _names_only(known: set[str], module: torch.nn.Module) -> bool:
    """Whether its forward, and what that calls, names nothing else, parts of the module included.

    Another name may stand for what shows in no trial.
    """
    return read_forward(module).names | module._modules.keys() <= known


def _trial_distance(
    module: torch.nn.Module, forward: Callable[..., Any], rows: torch.Tensor
) -> float:
    """How far a module's forward is from what may replace it, for rows as drawn and large ones."""
    distance = _distance(_try(module.forward, rows), _try(forward, rows))
    if not distance < _MOST_DISTANT:
        return distance
    scale = _LARGE
    while not module.forward(scale * rows).isfinite().all():  # beyond float16's range
        scale /= 2
    expected = module.forward(scale * rows)
    return max(distance, _distance(expected, forward(scale * rows)))


def _try(function: Callable[..., Any], *args: torch.Tensor) -> Any:
    """What a layer makes of them; None if it wants other arguments."""
    try:
        return function(*args)
    except (TypeError, ValueError, RuntimeError):
        return None


def _distance(expected: Any, actual: Any) -> float:
    """Between two results that should be one: see `_MOST_DISTANT`."""
    both = (expected, actual)
    if not all(isinstance(one, torch.Tensor) for one in both) or expected.shape != actual.shape:
        return torch.inf
    difference = (actual.double() - expected.double()).norm() / expected.double().norm()
    distance = float(difference) / torch.finfo(expected.dtype).eps
    return distance if distance == distance else torch.inf  # NaN is no agreement


_patch = ForwardPatch(_find_forwards)
