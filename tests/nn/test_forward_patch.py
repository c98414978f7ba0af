"""Several threads install into one model at once: it is patched once, and restored once."""

import copy
import gc
import operator
import pickle
import sys
import threading
import time
import weakref

import pytest
import tiny_models
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

from kvkernels.nn import batch_invariance, decoder_layers, fused_layers, fused_model
from kvkernels.nn.batch_invariance import batch_invariant
from kvkernels.nn.forward_patch import ForwardPatch
from kvkernels.nn.transformers import paged_attention


@pytest.fixture
def _eager_switches():
    """Make threads switch as often as Python allows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def run_in_threads(function, num_threads=2):
    """Call `function` in several threads at once; returns the errors that they end with."""
    barrier, errors = threading.Barrier(num_threads), []

    def run():
        barrier.wait()
        try:
            function()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_layers_stay_replaced_until_the_last_thread_is_done():
    def find(model):
        time.sleep(0.05)  # long enough for all threads to arrive
        return {model: model.forward}

    patch, model = ForwardPatch(find), torch.nn.Linear(2, 2)
    assert not run_in_threads(lambda: patch.install(model), num_threads=3)
    assert [patch.uninstall(model) for _ in range(2)] == [False, False]
    assert "forward" in vars(model)
    assert patch.uninstall(model)
    assert "forward" not in vars(model)


def skip(x):
    return x


def replace(layer):
    layer.forward = skip


def remove(layer):
    del layer.forward


@pytest.mark.parametrize(("change", "left"), [(replace, {"forward": skip}), (remove, {})])
def test_what_is_put_in_the_place_of_a_replaced_forward_is_left_alone(change, left):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    own_names = set(vars(model[0]))
    with batch_invariant(model):
        change(model[0])
    assert {name: vars(model[0])[name] for name in set(vars(model[0])) - own_names} == left
    assert set(vars(model[1])) == own_names
    vars(model[0]).pop("forward", None)
    with batch_invariant(model):
        assert all("forward" in vars(layer) for layer in model)


def test_a_forward_that_a_hook_left_behind_is_that_of_the_class():
    model = tiny_models.llama()
    for module in model.modules():
        add_hook_to_module(module, ModelHook())
    remove_hook_from_module(model, recurse=True)
    before = [vars(module)["forward"] for module in model.modules()]
    tokens = torch.arange(20)[None]
    with torch.inference_mode(), paged_attention(model), batch_invariant(model):
        whole = model(tokens).logits
        assert torch.equal(model(tokens[:, :7]).logits, whole[:, :7])
    after = [vars(module)["forward"] for module in model.modules()]
    assert all(map(operator.is_, after, before))


@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
@torch.inference_mode()
def test_a_copy_is_a_model_as_it_was_made(make_copy):
    model, tokens = tiny_models.llama(), torch.arange(20)[None]
    own = model(tokens).logits
    with paged_attention(model), batch_invariant(model):
        fused_layers.install(model)
        assert decoder_layers.install(model) == 3
        replaced = model(tokens).logits
        copied = make_copy(model)
        assert torch.equal(model(tokens).logits, replaced)
        decoder_layers.uninstall(model)
        fused_layers.uninstall(model)
    names = [set(vars(module)) for module in model.modules()]
    assert [set(vars(module)) for module in copied.modules()] == names
    assert not any("forward" in own_names for own_names in names)
    assert not any(map(batch_invariance.is_batch_invariant, copied.modules()))
    copied.set_attn_implementation(model.config._attn_implementation)
    assert torch.equal(copied(tokens).logits, own)
    with batch_invariant(copied):
        assert fused_layers.install(copied) > 0
        fused_layers.uninstall(copied)


def test_a_shallow_copy_of_a_layer_is_one_of_its_class():
    layer = torch.nn.Linear(2, 2)
    with batch_invariant(layer):
        copied = copy.copy(layer)
    assert "forward" not in vars(copied)
    assert copied.weight is layer.weight


def test_a_model_that_is_never_uninstalled_is_freed():
    model = tiny_models.llama(num_hidden_layers=1)
    fused_model.install(model)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("serve", [paged_attention, batch_invariant])
@pytest.mark.usefixtures("_eager_switches")
def test_threads_that_come_and_go_leave_the_model_as_it_was(serve):
    model = tiny_models.llama()
    before = model.config._attn_implementation

    def come_and_go():
        with serve(model):
            pass

    for _ in range(50):
        assert not run_in_threads(come_and_go)
        assert model.config._attn_implementation == before
        assert not any("forward" in vars(module) for module in model.modules())
