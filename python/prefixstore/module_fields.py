"""What modules hold in plain attributes, taken apart as far as that is understood.

::

    self.scaling = 0.25            scaling            0.25
    self.factors = [1.0, 0.5]      factors            2 in builtins.list
                                   factors.0          1.0
                                   factors.1          0.5
    self.params = Params(...)      params             2 in user.Params, a dataclass
                                   params.control     a tensor
                                   params.combine     a lambda: not understood
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from enum import Enum
from functools import partial
from inspect import isroutine
from types import (
    BuiltinFunctionType,
    CellType,
    FunctionType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

import torch

from kvkernels.checks import has_memory, is_plain

# Attributes that are not a module's own: those of PyTorch, those that `foreign_code` looks at, and
# notes of libraries.
_OF_LIBRARIES = frozenset(
    {
        *vars(torch.nn.Module()),
        *("__getstate__", "_attn_implementation", "_compiled_call_impl", "_hf_hook"),
        *("_is_hf_initialized", "_old_forward", "_output_capturing_hooks_installed", "forward"),
    }
)
# Attributes of whole models that repeat the configuration or note how the model was loaded; and
# the shift of positions behind a picture, which each call of `generate` sets for itself.
_OF_WHOLE_MODELS = frozenset(
    {
        *("all_tied_weights_keys", "generation_config", "gradient_checkpointing", "hf_device_map"),
        *("hf_quantizer", "is_quantized", "kernel_config", "loss_type", "name_or_path"),
        *("peft_config", "prepare_inputs_for_generation", "quantization_method"),
        *("rope_deltas", "warnings_issued"),
    }
)
# Objects of this library hold a second copy of the weights from the first pass on.
_QUANTIZER = "bitsandbytes."

SCALARS = (bool, int, float, complex, str, bytes, type(None))

# Fields of a configuration that do not change the arithmetic: names, token ids, output options, and
# the dtype (only a wish; the weights have the real one). All others count, so that a field this
# list does not know makes a miss and never a wrong hit.
IRRELEVANT_SETTINGS = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_internal",
        "_experts_implementation",
        "_experts_implementation_internal",
        "_model_name_or_path",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "label2id",
        "model_name",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "sep_token_id",
        "torch_dtype",
        "transformers_version",
        "unk_token_id",
        "use_cache",
    }
)


@dataclass(frozen=True)
class Unknown:
    """An object of which nobody knows from outside what it does.

    Attributes:
        class_name: Of its class.
        content: What else is seen of it: where two objects differ in that, they do not do the same.
    """

    class_name: str
    content: tuple[Any, ...] = ()


def own_fields(module: torch.nn.Module) -> dict[str, Any]:
    """The attributes of a module that may change what it computes, but for weights and modules."""
    fields = vars(module).copy()  # for another thread may install its forwards meanwhile
    fields = {name: one for name, one in fields.items() if name not in _OF_LIBRARIES}
    if not is_whole_model(module):
        return fields
    return {
        name: one for name, one in fields.items() if name[0] != "_" and name not in _OF_WHOLE_MODELS
    }


def is_whole_model(module: torch.nn.Module) -> bool:
    """Whether it is one of transformers', or a part of a model that is one by itself."""
    return hasattr(module, "from_pretrained")


def holds_others(value: Any) -> bool:
    """Whether `leaves` takes a value apart."""
    return _parts(value) is not None


def leaves(name: str, value: Any, around: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    """A value under its name; of one that holds others also these, under names that begin so.

    Args:
        name: Of the attribute.
        value: Of the attribute.
        around: Numbers of the objects that hold the value, for it may hold one of them.
    """
    parts = _parts(value)
    if id(value) in around:
        yield name, f"the {class_name(value)} that holds it"
        return
    if parts is None:
        yield name, value
        return
    yield name, f"{len(parts)} in {class_name(value)}"
    for part_name, part in parts:
        yield from leaves(f"{name}.{part_name}", part, (*around, id(value)))


def describe(value: Any) -> str | torch.Tensor | Unknown:
    """What counts of a leaf, the same in every process."""
    if isinstance(value, Enum):
        return f"{class_name(value)}.{value.name}"
    if isinstance(value, SCALARS):
        return f"{class_name(value)} {value!r}"
    if isinstance(value, torch.Tensor):
        return _describe_tensor(value)
    if isinstance(value, torch.dtype):
        return str(value)
    # The class is enough: configurations are digested separately, and results do not depend on the
    # device.
    if isinstance(value, torch.device) or _is_config(value) or _is_of_quantizer(value):
        return class_name(value)
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        name = _importable_name(value)
        if name is not None:
            return name
    return Unknown(class_name(value), _content(value))


def class_name(value: Any) -> str:
    """The full name of a value's class."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _describe_tensor(tensor: torch.Tensor) -> str | torch.Tensor | Unknown:
    if tensor.is_meta:  # it has no values, so nothing can be computed with it
        return f"{tensor.dtype} {tuple(tensor.shape)} without values"
    if not is_plain(tensor) or tensor.layout is not torch.strided or tensor.is_quantized:
        return Unknown(class_name(tensor))
    return tensor if has_memory(tensor) else Unknown(class_name(tensor))


def _parts(value: Any) -> list[tuple[Any, Any]] | None:
    """What a value holds, by name; None if it is to be taken as one."""
    if isinstance(value, torch.Tensor) or _is_config(value) or _is_of_quantizer(value):
        return None
    if isinstance(value, Mapping):
        return [*value.items()]
    if isinstance(value, list | tuple):
        return [*enumerate(value)]
    if isinstance(value, set | frozenset):
        return [*enumerate(sorted(value, key=repr))]
    if isinstance(value, partial):
        return [("func", value.func), ("args", value.args), ("keywords", value.keywords)]
    if isinstance(value, SimpleNamespace) or (
        is_dataclass(value) and not isinstance(value, type | torch.nn.Module)
    ):
        return [*vars(value).items()] if hasattr(value, "__dict__") else None
    return None


def _content(value: Any, around: tuple[int, ...] = ()) -> tuple[Any, ...]:
    """What is seen of an unknown object: the code of a function, and what it was made with; of
    others their fields.

    Args:
        value: The object.
        around: Numbers of the functions that it is made with, for one may hold itself.
    """
    if isinstance(value, MethodType):
        return class_name(value.__self__), _glance(value.__func__, around)
    if isinstance(value, FunctionType):
        cells = [cell for cell in value.__closure__ or () if cell != CellType()]  # one that is set
        held = [
            *(value.__defaults__ or ()),
            *(value.__kwdefaults__ or {}).values(),
            *(cell.cell_contents for cell in cells),
        ]
        return value.__code__, *(_glance(one, (*around, id(value))) for one in held)
    if isroutine(value):
        return (value.__qualname__,)
    if isinstance(value, ModuleType):
        return (value.__name__,)
    if isinstance(value, torch.nn.Module) or not hasattr(value, "__dict__"):
        return ()
    return tuple((name, _glance(one, around)) for name, one in sorted(vars(value).items()))


def _glance(value: Any, around: tuple[int, ...]) -> Any:
    """A number or a text, what is seen of a function, or but the class of anything else."""
    if isinstance(value, SCALARS):
        return f"{class_name(value)} {value!r}"
    if isroutine(value) and id(value) not in around:
        return class_name(value), _content(value, around)
    return class_name(value)


def _is_config(value: Any) -> bool:
    return hasattr(type(value), "model_type") and hasattr(type(value), "to_dict")


def _is_of_quantizer(value: Any) -> bool:
    return type(value).__module__.startswith(_QUANTIZER)


def _importable_name(value: Any) -> str | None:
    """Of a class or a function that is found under it, as lambdas and bound methods are not."""
    name = f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, BuiltinFunctionType):
        return name if isinstance(value.__self__, ModuleType | None) else None
    found: Any = sys.modules.get(value.__module__)
    for part in value.__qualname__.split("."):
        found = getattr(found, part, None)
    return name if found is value else None
