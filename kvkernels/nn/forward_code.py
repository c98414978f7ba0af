"""What the code of a module's forward names and calls, read without running it.

Read are the forward, and as far as these name them: methods that its class has or inherits,
functions that the module or a closure holds, functions within functions, and those of the same
file, but for the attention that ours is installed in place of. Behind decorators, methods and
partial arguments is the function that counts.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import pairwise
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import torch

# Stands for `torch.nn.functional.linear` among the names of a forward. Plain "linear" would not do:
# modules have attributes of that name, too.
LINEAR = "functional.linear"

# What such a function is called by: `torch.ops.aten` and `torch._C._nn` have the same one.
_HAVE_LINEAR = ("F", "functional", "aten", "_nn")

# Stands for a sum with a factor in one operation, such as `torch.add(x, y, alpha=0.5)`.
SCALED_SUM = "add(alpha)"

# Stands for a number raised to a tensor's power, or to anything else that is in a variable.
EXPONENTIAL = "pow(number, ...)"

# Stands for anything raised to a tensor's power, or to what else is in a variable.
POWER = "pow(..., ...)"

# Stands for a product of matrices written with the operator.
MATRIX_PRODUCT = "@"

_SUMS = {name + ending for name in ("add", "sub", "subtract") for ending in ("", "_")} | {"rsub"}
_POWERS = ("pow", "pow_", "float_power", "float_power_")

_NUMBERS = ("LOAD_CONST", "LOAD_SMALL_INT")
_OPERATIONS = {  # before Python 3.11
    "**": ("BINARY_POWER", "INPLACE_POWER"),
    "@": ("BINARY_MATRIX_MULTIPLY", "INPLACE_MATRIX_MULTIPLY"),
}

# Of transformers: the attention of a model for which no other one is installed.
_NOT_READ = "eager_attention_forward"


@dataclass
class ForwardCode:
    """What a module's forward names.

    Args:
        names: Of anything but submodules, and those that functions have by themselves.
        exponents: Of powers, where the code tells them, with "pow" or "**" for how they are
            written: the second is that of Python's numbers too.
        is_compiled: Whether `torch.compile` was put around it, or around what it names.
    """

    names: set[str] = field(default_factory=set)
    exponents: set[tuple[str, float]] = field(default_factory=set)
    is_compiled: bool = False


def read_forward(module: torch.nn.Module) -> ForwardCode:
    """Read it, and what it may call."""
    code = ForwardCode(is_compiled=_is_compiled(type(module).forward))
    found: set[FunctionType] = set()
    waiting = [_unwrap(type(module).forward)]
    while waiting:
        function = waiting.pop()
        if not isinstance(function, FunctionType) or function in found:
            continue
        found.add(function)
        names, exponents = _read(function.__code__)
        for name in names - {_NOT_READ}:
            values = [*_held(module, function, name), function.__globals__.get(name)]
            code.is_compiled |= any(map(_is_compiled, values))
            held = [*filter(callable, map(_unwrap, values[:-1]))]
            of_file = _unwrap(values[-1])
            if not held and getattr(of_file, "__module__", None) == function.__module__:
                waiting.append(of_file)
            waiting += held
            if name not in module._modules:
                code.names.add(name)  # and below the function's own name, as in self.act = F.silu
                named = held or [of_file]
                code.names.update(str(getattr(value, "__name__", name)) for value in named)
                if any(value is torch.nn.functional.linear for value in named):
                    code.names.add(LINEAR)
        for form, exponent in exponents:
            value = exponent
            if isinstance(exponent, str):
                value = inspect.getattr_static(module, exponent, None)
            if not isinstance(value, (int, float)):
                code.names.add(EXPONENTIAL if form == EXPONENTIAL else POWER)
            elif form != EXPONENTIAL:  # else of Python's numbers
                code.exponents.add((form, value))
    return code


def _is_compiled(value: Any) -> bool:
    """Whether `torch.compile` was put around a function, and nothing that has it run as it is."""
    marks = getattr(value, "__dict__", {})
    return "_torchdynamo_orig_callable" in marks and not marks.get("_torchdynamo_disable")


def _held(module: torch.nn.Module, function: FunctionType, name: str) -> Iterator[Any]:
    """What a name in a function may stand for, of what a module, its class and a closure have."""
    yield vars(module).get(name)
    kinds = [kind for kind in type(module).__mro__ if kind not in torch.nn.Module.__mro__]
    of_class = [vars(kind)[name] for kind in kinds if name in vars(kind)]
    yield from of_class if "super" in function.__code__.co_names else of_class[:1]
    if name in function.__code__.co_freevars:
        yield _content((function.__closure__ or ())[function.__code__.co_freevars.index(name)])


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing is assigned to it yet
        return None


def _unwrap(value: Any) -> Any:
    while True:
        if isinstance(value, partial):
            value = value.func
        elif isinstance(value, (MethodType, classmethod, staticmethod)):
            value = value.__func__
        elif isinstance(value, FunctionType) and hasattr(value, "__wrapped__"):
            value = inspect.unwrap(value)
        else:
            return value


@lru_cache(maxsize=1024)
def _read(code: CodeType) -> tuple[frozenset[str], frozenset[tuple[str, float | str]]]:
    """Names in a function and those within it, and exponents: numbers, or names of attributes."""
    names = {*code.co_names, *code.co_freevars}
    steps = list(dis.get_instructions(code))
    for module, function in pairwise(steps):
        if module.argval in _HAVE_LINEAR and function.argval == "linear":
            names.add(LINEAR)
    if any(
        step.argval in _SUMS and "alpha" in _keywords(code, steps, at)
        for at, step in enumerate(steps)
    ):
        names.add(SCALED_SUM)
    if any(_is_operator(step, "@") for step in steps):
        names.add(MATRIX_PRODUCT)
    exponents = set()
    for form, base, exponent in _find_powers(code, steps):
        if base is None:
            exponents.add((form, "" if exponent is None else exponent))
        elif not isinstance(exponent, (int, float)):
            exponents.add((EXPONENTIAL, exponent or ""))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner_names, inner_exponents = _read(constant)
            names |= inner_names
            exponents |= inner_exponents
    return frozenset(names), frozenset(exponents)


def _keywords(code: CodeType, steps: list[dis.Instruction], at: int) -> tuple[str, ...]:
    """Names in the call of what is loaded at one step."""
    return _split_call(code, steps, _find_call(steps, at))[1]


def _split_call(
    code: CodeType, steps: list[dis.Instruction], end: int
) -> tuple[int, tuple[str, ...]]:
    """Where the arguments of the call at the step `end` end, and the names of the last of them: a
    tuple just before the call, if there are any.
    """
    for at in range(max(0, end - 2), end):
        step = steps[at]
        # For KW_NAMES, `dis` of Python 3.11 gives only the index of the constant.
        value = code.co_consts[step.arg or 0] if step.opname == "KW_NAMES" else step.argval
        if type(value) is tuple:
            return at, value
    return end, ()


def _find_powers(
    code: CodeType, steps: list[dis.Instruction]
) -> Iterator[tuple[str, float | None, float | str | None]]:
    """Powers: how each is written, its base and its exponent; None of what the code does not tell.

    A base is told if it is a number, an exponent also if it is an attribute: by its name.
    """
    for at, step in enumerate(steps):
        names: tuple[str, ...] = ()
        if _is_operator(step, "**"):
            form, end = "**", at
        elif step.opname.startswith("LOAD_") and step.argval in _POWERS:
            if at and steps[at - 1].argval == "math":  # takes plain numbers, never tensors
                continue
            form = "pow"
            end, names = _split_call(code, steps, _find_call(steps, at))
        else:
            continue
        for name in reversed(names):
            if name == "exponent":
                break
            end = _find_begin(steps, end)
        base, exponent = steps[_find_begin(steps, end) - 1], steps[end - 1]
        is_number = base.opname.startswith(_NUMBERS) and type(base.argval) in (int, float)
        is_told = exponent.opname.startswith((*_NUMBERS, "LOAD_ATTR"))
        yield form, base.argval if is_number else None, exponent.argval if is_told else None


def _is_operator(step: dis.Instruction, operator: str) -> bool:
    if step.opname == "BINARY_OP":
        return step.argrepr in (operator, f"{operator}=")
    return step.opname in _OPERATIONS[operator]


def _find_begin(steps: list[dis.Instruction], end: int) -> int:
    """Where an expression begins whose value is on top of the stack before the step `end`."""
    depth = 0
    for at in reversed(range(end)):
        depth += dis.stack_effect(steps[at].opcode, steps[at].arg, jump=False)
        if depth > 0:
            return at
    return 0


def _find_call(steps: list[dis.Instruction], at: int) -> int:
    """Where what is loaded at one step is called: all that was loaded since is gone then."""
    depth = 0
    for later in range(at + 1, len(steps)):
        step = steps[later]
        depth += dis.stack_effect(step.opcode, step.arg, jump=False)
        if depth <= 0 and "CALL" in step.opname:
            return later
    return 0
