"""The plain attention module, `PagedAttention`, and the index tensors it needs."""

import itertools
import runpy
from pathlib import Path

import pytest
import torch

from kvkernels import BlockAllocator, KVLayout, KVPool
from kvkernels.nn import PagedAttention, PagedBatch, PagedGroup
from kvkernels.nn.batch_invariance import batch_invariant

OWN_MODEL = Path(__file__).parents[2] / "docs" / "own_model.py"
HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 4, 2, 16, 16


def dense(query, key, value, num_new, window):
    """The expected output of one sequence's last `num_new` tokens, in float64."""
    seq_len = key.shape[0]
    distance = torch.arange(seq_len - num_new, seq_len)[:, None] - torch.arange(seq_len)
    mask = (distance >= 0) & (distance < (window or seq_len))
    parts = (part.double().transpose(0, 1)[None] for part in (query, key, value))
    out = torch.nn.functional.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1).float()


@pytest.mark.parametrize("window", [None, 5, 20])
def test_mixed_batch_equals_dense_attention(window):
    """A prefill, an extend across a block border and a decode in one call."""
    layout = KVLayout(1, KV_HEADS, HEAD_DIM, BLOCK_SIZE, torch.float32)
    pool, allocator = KVPool(layout, 16), BlockAllocator(16)
    pool.data.fill_(torch.nan)
    caches = pool.key_cache(0), pool.value_cache(0)
    attention = PagedAttention(HEADS, KV_HEADS, HEAD_DIM, window=window)
    seq_lens, query_lens = [7, 37, 17], [7, 9, 1]
    tables = [allocator.allocate(-(-length // BLOCK_SIZE)) for length in seq_lens]
    keys = [torch.randn(length, KV_HEADS, HEAD_DIM) for length in seq_lens]
    values = [torch.randn(length, KV_HEADS, HEAD_DIM) for length in seq_lens]
    queries = [torch.randn(length, HEADS, HEAD_DIM) for length in query_lens]

    def run(lengths, num_new):
        """Feed the tokens before `lengths` and return the last call's output by sequence."""
        batch = PagedBatch.build(tables, lengths, num_new, BLOCK_SIZE)
        spans = [slice(end - new, end) for end, new in zip(lengths, num_new, strict=True)]
        key = torch.cat([part[span] for part, span in zip(keys, spans, strict=True)])
        value = torch.cat([part[span] for part, span in zip(values, spans, strict=True)])
        query = torch.cat(queries) if num_new == query_lens else torch.zeros(sum(num_new), 4, 16)
        return attention(query, key, value, *caches, batch).split(num_new)

    before = [length - new for length, new in zip(seq_lens, query_lens, strict=True)]
    run(before, before)
    for index, out in enumerate(run(seq_lens, query_lens)):
        want = dense(queries[index], keys[index], values[index], query_lens[index], window)
        torch.testing.assert_close(out, want)


class OwnModel(torch.nn.Module):
    """A layer that uses its queries as keys."""

    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)
        self.attention = PagedAttention(KV_HEADS, KV_HEADS, HEAD_DIM)

    def run(self, rows, cuts):
        """Outputs of one sequence whose prompt is run in pieces that end at `cuts`."""
        num_blocks = -(-len(rows) // BLOCK_SIZE)
        pool = KVPool(KVLayout(1, KV_HEADS, HEAD_DIM, BLOCK_SIZE, rows.dtype), num_blocks)
        outs = []
        for begin, end in itertools.pairwise([0, *cuts]):
            batch = PagedBatch.build([range(num_blocks)], [end], [end - begin], BLOCK_SIZE)
            states = self.project(rows[begin:end]).view(-1, KV_HEADS, HEAD_DIM)
            caches = pool.key_cache(0), pool.value_cache(0)
            outs.append(self.attention(states, states, states, *caches, batch))
        return torch.cat(outs)


@torch.inference_mode()
def test_is_batch_invariant_where_its_model_is():
    model, rows = OwnModel(), torch.randn(700, KV_HEADS * HEAD_DIM)
    with batch_invariant(model):
        whole = model.run(rows, [700])
        for cuts in ([699, 700], [300, 690, 700]):
            assert torch.equal(model.run(rows, cuts), whole), cuts


def test_decode_batch_needs_no_query_bounds():
    batch = PagedBatch.build([[3, 1], [2]], [20, 5], [1, 1], BLOCK_SIZE)
    assert batch.cu_seqlens_q is None
    assert batch.block_table.tolist() == [[3, 1], [2, -1]]
    assert batch.slot_mapping.tolist() == [1 * 16 + 3, 2 * 16 + 4]
    assert batch.seq_lens.tolist() == [20, 5]


def test_new_tokens_of_unequal_sequences_get_their_slots():
    batch = PagedBatch.build([[3], [0, 2]], [2, 18], [2, 3], BLOCK_SIZE)
    assert batch.cu_seqlens_q.tolist() == [0, 2, 5]
    assert batch.slot_mapping.tolist() == [48, 49, 15, 32, 33]


@pytest.mark.parametrize(
    ("tables", "seq_lens", "query_lens", "message"),
    [
        ([[0]], [1, 2], [1], "seq_lens: expected 1"),
        ([[0]], [1], [1, 1], "query_lens: expected 1"),
        ([[0]], [2], [3], "query_lens: expected 0 to seq_len 2, got 3"),
        ([[0]], [2], [-1], "query_lens: expected 0 to seq_len 2, got -1"),
        ([[0]], [17], [1], "block_tables: expected 2 blocks for 17 tokens, got 1"),
        ([[0, -3]], [17], [1], "block_tables: expected block ids of 0 or more for new tokens"),
    ],
)
def test_refuses_a_batch_whose_lengths_and_blocks_disagree(tables, seq_lens, query_lens, message):
    with pytest.raises(ValueError, match=message):
        PagedBatch.build(tables, seq_lens, query_lens, BLOCK_SIZE)


def test_a_batch_of_no_sequences_gives_no_rows():
    batch = PagedBatch.build([], [], [], BLOCK_SIZE)
    assert batch.block_table.shape == (0, 0)
    pool = KVPool(KVLayout(1, KV_HEADS, HEAD_DIM, BLOCK_SIZE, torch.float32), 1)
    key = torch.zeros(0, KV_HEADS, HEAD_DIM)
    out = PagedAttention(HEADS, KV_HEADS, HEAD_DIM)(
        torch.zeros(0, HEADS, HEAD_DIM), key, key, pool.key_cache(0), pool.value_cache(0), batch
    )
    assert out.shape == (0, HEADS, HEAD_DIM)


def test_batch_refuses_a_block_without_slots():
    with pytest.raises(ValueError, match="block_size: expected a positive integer, got 0"):
        PagedBatch.build([[0]], [1], [1], 0)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((4, 3, 16), {}, "num_heads: expected a multiple of num_kv_heads 3, got 4"),
        ((0, 2, 16), {}, "num_heads: expected a multiple"),
        ((4, 0, 16), {}, "num_kv_heads: expected a positive integer, got 0"),
        ((4, 2, 0), {}, "head_dim: expected a positive integer, got 0"),
        ((4, 2, 16), {"window": 0}, "window: expected 1 or more"),
    ],
)
def test_refuses_a_module_with_a_size_out_of_range(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        PagedAttention(*arguments, **options)


def test_module_refuses_to_train():
    pool = KVPool(KVLayout(1, KV_HEADS, HEAD_DIM, BLOCK_SIZE, torch.float32), 1)
    batch = PagedBatch.build([[0]], [1], [1], BLOCK_SIZE)
    key = torch.zeros(1, KV_HEADS, HEAD_DIM, requires_grad=True)
    attention = PagedAttention(HEADS, KV_HEADS, HEAD_DIM)
    query = torch.zeros(1, HEADS, HEAD_DIM)
    with pytest.raises(ValueError, match="inference only"):
        attention(query, key, key, pool.key_cache(0), pool.value_cache(0), batch)


def test_group_refuses_a_pool_of_another_shape():
    pool = KVPool(KVLayout(2, KV_HEADS, HEAD_DIM, BLOCK_SIZE, torch.float32), 4)
    with pytest.raises(ValueError, match="layers: expected 2"):
        PagedGroup(pool, BlockAllocator(4), [0])
    with pytest.raises(ValueError, match="allocator: expected 4 blocks"):
        PagedGroup(pool, BlockAllocator(3), [0, 1])


def test_example_of_an_own_model_agrees_with_dense_attention(capsys):
    runpy.run_path(str(OWN_MODEL), run_name="__main__")
    line = capsys.readouterr().out.strip()
    assert line.startswith("60 tokens")
    assert float(line.rsplit(" ", 1)[1]) < 1e-4


def test_import_of_nn_leaves_transformers_alone():
    import subprocess
    import sys

    code = "import sys, kvkernels.nn; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
