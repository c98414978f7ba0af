"""What a model runner changes in its model, and restores."""

import contextlib
import sys

import pytest
import torch
from cached_models import tiny_llama

from kvkernels import BlockAllocator, KVPool
from kvkernels.nn import PagedGroup, layer_groups
from kvkernels.nn.transformers import paged_attention
from prefixstore.engine.runner import ModelRunner

BLOCK_SIZE = 16


def open_runner(model):
    groups = []
    for spec in layer_groups(model.config, BLOCK_SIZE, torch.float32):
        pool = KVPool(spec.layout, 8, model.device)
        groups.append(PagedGroup(pool, BlockAllocator(8), spec.layers, spec.window))
    return contextlib.closing(ModelRunner(model, groups, BLOCK_SIZE))


def replaced(model):
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.fixture
def model():
    """A model on the CPU, the only device where layers are replaced."""
    return tiny_llama().cpu()


def test_replaces_later_what_could_not_be_replaced_before(model):
    """The first runner finds a hook in each layer, or another dtype; the second does not."""
    with paged_attention(model):
        of_attention = replaced(model)
        with open_runner(model):
            every_name = replaced(model)
        layers = model.model.layers
        hooks = [layer.mlp.register_forward_hook(lambda *args: None) for layer in layers]
        with open_runner(model):
            assert not any(name.endswith("layers.0") for name in replaced(model))
        for hook in hooks:
            hook.remove()
        with open_runner(model.double()):
            assert not any("norm" in name for name in replaced(model))
        assert replaced(model) == of_attention
        with open_runner(model.float()):
            assert replaced(model) == every_name
        assert replaced(model) == of_attention
    assert not replaced(model)


def test_gives_a_model_back_when_it_cannot_be_opened(model, monkeypatch):
    def fail(device):
        raise RuntimeError("no recorder")

    monkeypatch.setattr(sys.modules[ModelRunner.__module__], "find_recorder", fail)
    with paged_attention(model):
        of_attention = replaced(model)
        with pytest.raises(RuntimeError, match="no recorder"):
            open_runner(model)
        assert replaced(model) == of_attention
    assert not replaced(model)
