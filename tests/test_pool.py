"""The pool's views are the block's bytes, and sizes agree with the layout."""

from types import SimpleNamespace

import pytest
import torch

from kvkernels import BlockAllocator, KVLayout, KVPool, store_kv
from kvkernels.nn import PagedGroup
from kvkernels.nn.block_tables import BlockTables

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


def make_pool_in_inference_mode():
    with torch.inference_mode():
        pool = KVPool(LAYOUT, num_blocks=2)
    pool.data.fill_(torch.nan)
    return pool


def test_a_pool_made_in_inference_mode_can_be_stored_into_outside():
    pool = make_pool_in_inference_mode()
    key = torch.randn(1, LAYOUT.num_kv_heads, LAYOUT.head_dim, dtype=LAYOUT.dtype)
    store_kv(key, key + 1, pool.key_cache(1), pool.value_cache(1), torch.tensor([18]))
    assert torch.equal(pool.key_cache(1)[1, :, 2], key[0])
    assert torch.equal(pool.value_cache(1)[1, :, 2], key[0] + 1)
    assert (~pool.data.isnan()).sum() == 2 * key.numel()


def test_a_shared_block_of_a_pool_made_in_inference_mode_is_copied_outside():
    pool, allocator = make_pool_in_inference_mode(), BlockAllocator(2)
    layers = tuple(range(LAYOUT.num_layers))
    group = PagedGroup(pool=pool, allocator=allocator, layers=layers, window=None)
    (block_id,) = allocator.allocate(1)
    allocator.share([block_id])
    pool.data[block_id] = 3.0
    tables = BlockTables(group, [[block_id]], allocator.allocate)
    tables.own_last_block(num_tokens=5)
    ((copy,),) = tables.ids
    assert copy != block_id
    assert pool.data[copy].eq(3.0).all()


def test_layout_is_read_from_a_config():
    config = SimpleNamespace(
        num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2, hidden_size=96
    )
    layout = KVLayout.from_config(config, block_size=32, dtype=torch.float32)
    assert layout == KVLayout(4, 2, 16, 32, torch.float32)


def test_latents_are_keys_and_their_first_channels_values():
    layout = KVLayout(2, 1, 24, 16, torch.float16, latent_dim=16)
    pool = KVPool(layout, num_blocks=3)
    assert pool.data.shape == (3, *layout.block_shape) == (3, 2, 1, 1, 16, 24)
    assert layout.block_bytes == pool.data[0].numel() * 2 == 2 * layout.layer_bytes
    pool.data.normal_()
    keys, values = pool.key_cache(1), pool.value_cache(1)
    assert torch.equal(keys, pool.data[:, 1, 0])
    assert torch.equal(values, keys[..., :16])
    assert values.data_ptr() == keys.data_ptr()
    assert KVPool.over(layout, pool.data).value_cache(0).shape == (3, 1, 16, 16)


def test_a_layout_of_latents_is_read_from_a_config():
    config = SimpleNamespace(
        num_hidden_layers=61,
        num_attention_heads=128,
        num_key_value_heads=128,
        hidden_size=7168,
        head_dim=64,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
    )
    layout = KVLayout.from_config(config, dtype=torch.bfloat16)
    assert layout == KVLayout(61, 1, 576, 64, torch.bfloat16, latent_dim=512)
    del config.qk_rope_head_dim
    with pytest.raises(ValueError, match="config: expected an attribute qk_rope_head_dim"):
        KVLayout.from_config(config)


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
        ("latent_dim", 0, "latent_dim: expected 1 to 64, got 0"),
        ("latent_dim", 65, "latent_dim: expected 1 to 64, got 65"),
        ("latent_dim", 2.0, "latent_dim: expected 1 to 64, got 2.0"),
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
