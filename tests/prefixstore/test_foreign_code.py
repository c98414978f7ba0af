"""Which hooks and forwards keep a model's KV from being shared."""

import contextlib
import dataclasses
import functools
import itertools
import sys
import types

import accelerate
import pytest
import torch
from cached_models import tiny_llama
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune
from torch.utils.module_tracker import ModuleTracker

from kvkernels.nn import batch_invariance, decoder_layers, forward_patch, fused_layers
from kvkernels.nn.transformers import paged_attention
from prefixstore import foreign_code
from prefixstore.foreign_code import find_foreign_code


def plain_llama():
    return tiny_llama().cpu()


def mlp_of(model):
    return model.model.layers[0].mlp


class Halving(accelerate.hooks.ModelHook):
    def post_forward(self, module, output):
        return 0.5 * output


def replace_forward(model):
    mlp_of(model).forward = lambda x: x


def skip(model):
    mlp_of(model).forward = torch.nn.Identity().forward


def replace_with_a_function(model):
    mlp_of(model).forward = torch.nn.functional.relu


@dataclasses.dataclass(frozen=True)
class Unhashable:
    """Has a `__hash__` that raises."""

    parts: list

    def __call__(self, x):
        return x


def replace_with_an_object(model):
    mlp_of(model).forward = Unhashable([])


def borrow_a_forward(model):
    norm, mlp = model.model.norm, mlp_of(model)
    mlp.forward = types.MethodType(type(norm).forward, mlp)


def wrap_forward(model):
    """Wrap a forward under its own name."""
    forward = mlp_of(model).forward
    mlp_of(model).forward = functools.wraps(forward)(lambda x: 0.5 * forward(x))


def compile_a_wrapped_forward(model):
    wrap_forward(model)
    mlp_of(model).forward = torch.compile(mlp_of(model).forward)


def cast_forward(model):
    mlp_of(model).forward = torch.autocast("cpu")(mlp_of(model).forward)


def place_a_wrapped_forward(model):
    wrap_forward(model)
    accelerate.hooks.add_hook_to_module(mlp_of(model), accelerate.hooks.AlignDevicesHook())


def hook_by_accelerate(model):
    for hook in (accelerate.hooks.AlignDevicesHook(), Halving()):
        accelerate.hooks.add_hook_to_module(mlp_of(model), hook, append=True)


@pytest.mark.parametrize(
    "change",
    [
        *(replace_forward, skip, replace_with_a_function, replace_with_an_object),
        *(borrow_a_forward, wrap_forward),
        *(compile_a_wrapped_forward, cast_forward, place_a_wrapped_forward, hook_by_accelerate),
    ],
)
def test_finds_forwards_that_may_do_anything(change):
    model = plain_llama()
    change(model)
    assert find_foreign_code(model) == "a forward of its own in model.layers.0.mlp"


def test_finds_a_forward_beneath_ours():
    model = plain_llama()
    with paged_attention(model):
        assert find_foreign_code(model) is None
    model.forward = functools.wraps(model.forward)(lambda *args: None)
    with paged_attention(model):
        assert find_foreign_code(model) == "a forward of its own in the whole model"


class Doubling(torch.nn.Module):
    def forward(self, module, args, output):
        return 2 * output


SCRIPT = """
def double(module: Any, args: Any, output: Tensor) -> Tensor:
    return 2 * output
"""


@pytest.mark.parametrize(
    "hook",
    [
        torch.no_grad()(lambda *_: None),
        torch.jit.CompilationUnit(SCRIPT).double,
        torch.fx.symbolic_trace(Doubling()),
    ],
    ids=["no_grad", "script", "trace"],
)
def test_finds_hooks_whatever_pytorch_makes_of_them(hook):
    model = plain_llama()
    mlp_of(model).register_forward_hook(hook)
    assert find_foreign_code(model) == "a forward hook on model.layers.0.mlp"


def test_finds_hooks_on_all_modules():
    model = plain_llama()
    handle = register_module_forward_hook(functools.partial(lambda *_: None))
    assert find_foreign_code(model) == "a forward hook on all modules"
    handle.remove()
    assert find_foreign_code(model) is None


def set_the_own(model):
    mlp_of(model).forward = mlp_of(model).forward


def compile_forward(model):
    model.forward = torch.compile(model.forward)


def place(model):
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    accelerate.hooks.add_hook_to_module(mlp_of(model), accelerate.hooks.AlignDevicesHook())


@pytest.mark.parametrize("change", [set_the_own, compile_forward, place])
def test_known_forwards_change_nothing(change):
    model = plain_llama()
    change(model)
    assert any("forward" in vars(module) for module in model.modules())
    assert find_foreign_code(model) is None


def test_what_kvkernels_and_pytorch_install_changes_nothing():
    model = plain_llama()
    prune.identity(mlp_of(model).up_proj, "weight")
    with paged_attention(model), batch_invariance.batch_invariant(model):
        assert fused_layers.install(model) > 0
        assert decoder_layers.install(model) > 0
        with ModuleTracker():
            assert find_foreign_code(model) is None


@contextlib.contextmanager
def before_each_line(module, function):
    """Run a function before each line, as another thread might run it there."""

    def trace(frame, event, _):
        if frame.f_code.co_filename != module.__file__:
            return None
        if event == "line":
            function()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def test_what_kvkernels_installs_is_known_at_any_time():
    model, found = torch.nn.Linear(2, 2), []
    with before_each_line(forward_patch, lambda: found.append(find_foreign_code(model))):
        batch_invariance.install(model)
        batch_invariance.uninstall(model)
    assert {*found} == {None}


def test_kvkernels_may_install_while_foreign_code_is_looked_for():
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(2)))
    changes = itertools.cycle([batch_invariance.install, batch_invariance.uninstall])
    with before_each_line(foreign_code, lambda: next(changes)(model)):
        found = [find_foreign_code(model) for _ in range(2)]
    assert found == [None, None]
