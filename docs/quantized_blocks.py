"""Attention over blocks of which all but the newest are quantised.

Run it: python docs/quantized_blocks.py
"""

import torch

import kvkernels
from kvkernels import KVLayout, KVPool, QuantizedPool

NUM_HEADS, BLOCK_SIZE, SEQ_LEN = 8, 64, 1000


def main() -> None:
    torch.manual_seed(0)
    layout = KVLayout(num_layers=1, num_kv_heads=2, head_dim=64, block_size=BLOCK_SIZE)
    num_blocks = -(-SEQ_LEN // BLOCK_SIZE)
    pool = KVPool(layout, num_blocks)
    pool.data.normal_()
    cold = QuantizedPool(layout, "int8", num_blocks)
    query = torch.randn(1, NUM_HEADS, layout.head_dim, dtype=layout.dtype)
    table = torch.randperm(num_blocks).int()[None]
    seq_lens = torch.tensor([SEQ_LEN], dtype=torch.int32)
    caches = pool.key_cache(0), pool.value_cache(0)
    exact = kvkernels.paged_attention(query, *caches, table, seq_lens)

    # The last block is not full: it stays as it is.
    full = table[0, :-1].long()
    ids = torch.arange(len(full))
    kvkernels.quantize_blocks(pool, full, cold, ids)
    pool.data[full] = torch.nan  # their place may be used for others now
    table[0, :-1] = kvkernels.tag_blocks(ids.int(), "int8")

    out = kvkernels.paged_attention(query, *caches, table, seq_lens, int8_cache=cold.cache(0))
    error = (out - exact).float().norm() / exact.float().norm()
    kept = cold.layer_bytes / layout.layer_bytes
    print(f"{kept:.2f} of the bytes; the output differs by {error:.2%}")


if __name__ == "__main__":
    main()
