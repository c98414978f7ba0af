"""Dense keys and values seen as a pool: both views, whatever the tensors' strides."""

import pytest
import torch

from kvkernels import paged_attention
from kvkernels.nn.dense import as_pool, sequences_as_blocks, tokens_as_blocks


@pytest.mark.parametrize("make_pool", [as_pool, sequences_as_blocks, tokens_as_blocks])
@pytest.mark.parametrize("tokens_first", [False, True], ids=["heads first", "tokens first"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (3, 2, 21, 16)], ids=str)
def test_attention_over_the_view_equals_dense_attention(make_pool, tokens_first, shape):
    batch_size, num_kv_heads, num_keys, head_dim = shape
    key, value = torch.randn(2, *shape)
    if tokens_first:  # as a projection lays them out
        key = key.transpose(1, 2).contiguous().transpose(1, 2)
    query = torch.randn(batch_size, 2 * num_kv_heads, 1, head_dim)
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    key_cache, value_cache, block_table = make_pool(key, value)
    seq_lens = torch.full((batch_size,), num_keys, dtype=torch.int32)
    got = paged_attention(query[:, :, 0], key_cache, value_cache, block_table, seq_lens)
    torch.testing.assert_close(got, want[:, :, 0])


def test_dense_tensors_are_not_copied():
    key, value = torch.randn(2, 3, 2, 21, 16)
    for make_pool in (as_pool, sequences_as_blocks, tokens_as_blocks):
        assert [part.data_ptr() for part in make_pool(key, value)[:2]] == [
            key.data_ptr(),
            value.data_ptr(),
        ]


def test_keys_from_a_later_position_on_give_the_bits_of_all():
    key, value = torch.randn(2, 2, 2, 150, 16)
    query = torch.randn(2, 4, 16)
    seq_lens = torch.full((2,), 150, dtype=torch.int32)
    first = 150 - 40 - 3
    want, got = (
        paged_attention(query, *pool, seq_lens, window=40, batch_invariant=True)
        for pool in (
            as_pool(key, value),
            as_pool(key[:, :, first:], value[:, :, first:], first),
        )
    )
    assert torch.equal(got, want)
