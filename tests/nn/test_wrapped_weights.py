"""Weights that have no memory of their own: no kernel gets their address."""

import pytest
import tiny_models
import torch
from packed_forward import PackedModel

import kvkernels
from kvkernels import UnsupportedError, native
from kvkernels.nn import batch_invariance, decoder_layers, fused_layers
from kvkernels.nn.batch_invariance import batch_invariant
from kvkernels.nn.transformers import paged_attention
from wrapped_weights import wrap, wrap_linears

TOKENS = torch.arange(20)[None]


def test_batch_invariance_refuses_wrapped_weights():
    model = tiny_models.llama()
    wrap_linears(model)
    with pytest.raises(UnsupportedError, match=r"plain tensors.*got WrappedWeight in .*q_proj"):
        batch_invariance.install(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_batch_invariance_refuses_such_a_bias():
    layer = torch.nn.Linear(3, 4)
    layer.bias = wrap(layer.bias)
    with pytest.raises(UnsupportedError, match="got WrappedWeight"):
        batch_invariance.install(layer)


@torch.inference_mode()
def test_fused_layers_work_beside_them():
    model = tiny_models.llama()
    wrap_linears(model)
    model.model.layers[1].input_layernorm.weight = wrap(model.model.norm.weight)
    norm = model.model.norm
    assert fused_layers.install(model.model.layers[0]) == 4
    assert fused_layers.install(model.model.layers[1]) == 3  # all but that norm
    assert fused_layers.install(norm) == 1
    norm.weight = wrap(norm.weight)
    with pytest.raises(NotImplementedError):  # raised by the layer's own forward
        norm(torch.ones(2, 64))


@torch.inference_mode()
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_those_that_come_later_decide_for_themselves(name):
    """The weight's class decides what an unknown operator does; here it raises."""
    layer = torch.nn.Linear(3, 4)
    with batch_invariant(layer):
        setattr(layer, name, wrap(getattr(layer, name)))
        with pytest.raises(NotImplementedError, match=r"kvkernels\.linear"):
            layer(torch.ones(2, 3))


@pytest.mark.skipif(not native.is_available, reason="the kernels are in the extension")
def test_decoder_layers_refuse_those_that_come_later():
    model = tiny_models.llama()
    with paged_attention(model), batch_invariant(model):
        fused_layers.install(model)
        assert decoder_layers.install(model) == 3
        down = model.model.layers[1].mlp.down_proj
        down.weight = wrap(down.weight)
        packed = PackedModel(model, tiny_models.make_groups(model), [TOKENS[0]])
        with pytest.raises(ValueError, match=r"mlp\.down_proj\.weight: expected .* memory"):
            packed.run_whole()
        decoder_layers.uninstall(model)
        fused_layers.uninstall(model)


def emptied(tensor):
    """A tensor whose memory was freed, as sharding libraries do between passes."""
    tensor.untyped_storage().resize_(0)
    return tensor


@pytest.mark.skipif(not native.is_available, reason="the kernels are in the extension")
@pytest.mark.parametrize("name", ["query", "key_cache", "block_table"])
def test_attention_refuses_tensors_without_memory(name):
    inputs = {
        "query": torch.zeros(1, 2, 16),
        "key_cache": torch.zeros(3, 2, 16, 16),
        "value_cache": torch.zeros(3, 2, 16, 16),
        "block_table": torch.zeros(1, 1, dtype=torch.int32),
        "seq_lens": torch.ones(1, dtype=torch.int32),
    }
    emptied(inputs[name])
    with pytest.raises(ValueError, match=f"{name}: expected a tensor with memory of its own"):
        kvkernels.paged_attention(**inputs)


@pytest.mark.skipif(not native.is_available, reason="the kernels are in the extension")
@pytest.mark.parametrize("name", ["key", "value_cache", "slot_mapping"])
def test_storing_refuses_tensors_without_memory(name):
    inputs = {
        "key": torch.zeros(1, 2, 16),
        "value": torch.zeros(1, 2, 16),
        "key_cache": torch.zeros(3, 2, 16, 16),
        "value_cache": torch.zeros(3, 2, 16, 16),
        "slot_mapping": torch.zeros(1, dtype=torch.int64),
    }
    emptied(inputs[name])
    with pytest.raises(ValueError, match=f"{name}: expected a tensor with memory of its own"):
        kvkernels.store_kv(**inputs)
