"""The pool's views are the block's bytes, and sizes agree with the layout."""

from types import SimpleNamespace

import pytest
import torch

from kvkernels import KVLayout, KVPool

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=8, block_size=16, dtype=torch.float16)


def test_block_bytes_are_what_the_tensor_holds():
    pool = KVPool(LAYOUT, num_blocks=5)
    assert LAYOUT.block_bytes == pool.data[0].numel() * pool.data.element_size()
    assert LAYOUT.block_bytes == LAYOUT.num_layers * LAYOUT.layer_bytes
    assert pool.capacity_bytes == pool.data.numel() * pool.data.element_size()


def test_a_block_is_one_contiguous_span_shared_by_all_views():
    pool = KVPool(LAYOUT, num_blocks=4)
    pool.data.zero_()
    pool.key_cache(1)[2, 1, 5] = 1.0
    pool.value_cache(2)[2, 0, 3] = 2.0
    block = pool.block_data(2).view(torch.float16).view(LAYOUT.block_shape)
    assert pool.block_data(2).is_contiguous()
    assert block[1, 0, 1, 5].eq(1.0).all()
    assert block[2, 1, 0, 3].eq(2.0).all()
    assert block.count_nonzero() == 2 * LAYOUT.head_dim
    assert pool.block_data(1).count_nonzero() == 0


def test_layout_is_read_from_a_config():
    config = SimpleNamespace(
        num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2, hidden_size=96
    )
    layout = KVLayout.from_config(config, block_size=32, dtype=torch.float32)
    assert layout == KVLayout(4, 2, 16, 32, torch.float32)


def test_refuses_a_config_without_heads():
    with pytest.raises(ValueError, match="config: expected an attribute num_attention_heads"):
        KVLayout.from_config(SimpleNamespace(num_hidden_layers=4))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_layers", 0, "num_layers: expected a positive integer, got 0"),
        ("num_kv_heads", -1, "num_kv_heads: expected a positive integer, got -1"),
        ("head_dim", 2.5, "head_dim: expected a positive integer, got 2.5"),
        ("block_size", 48, "block_size: expected one of"),
        ("dtype", torch.int8, "dtype: expected torch.float32"),
    ],
)
def test_refuses_a_layout_out_of_range(field, value, message):
    fields = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 64, field: value}
    with pytest.raises(ValueError, match=message):
        KVLayout(**fields)


def test_refuses_blocks_and_layers_out_of_range():
    pool = KVPool(LAYOUT, num_blocks=2)
    with pytest.raises(ValueError, match="layer: expected 0 to 2, got 3"):
        pool.key_cache(3)
    with pytest.raises(ValueError, match="layer: expected 0 to 2, got -1"):
        pool.value_cache(-1)
    with pytest.raises(ValueError, match="block_id: expected 0 to 1, got 2"):
        pool.block_data(2)
    with pytest.raises(ValueError, match="num_blocks: expected a positive integer, got 0"):
        KVPool(LAYOUT, num_blocks=0)
