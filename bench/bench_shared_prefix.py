"""Compare shared_prefix_attention with paged_attention on the same batch, which reads the prefix
for each sequence: from memory once, and then from the caches, as far as it fits. A row counts each
byte of the batch's KV once.
"""

from dataclasses import dataclass
from functools import partial

import torch

import kvkernels
from bench.harness import check_agreement, make_cold, run_case

BLOCK_SIZE = 64


@dataclass(frozen=True)
class Case:
    """Sequences with a common prefix and one query each."""

    name: str
    num_seqs: int
    prefix_len: int
    own_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 128

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values, the prefix counted once."""
        tokens = self.prefix_len + self.num_seqs * self.own_len
        return 2 * 2 * tokens * self.num_kv_heads * self.head_dim


CASES = [
    Case("16x(4k+256)", 16, 4096, 256, 32, 8),
    Case("16x(4k+256)_8_kv_heads_of_8", 16, 4096, 256, 8, 8),
    Case("16x(4k+256)_32_kv_heads_of_32", 16, 4096, 256, 32, 32),
    Case("64x(4k+256)", 64, 4096, 256, 32, 8),
    Case("4x(256+64)_small", 4, 256, 64, 8, 8),
]


@dataclass
class Inputs:
    arguments: tuple[torch.Tensor, ...]
    prefixes: kvkernels.SharedPrefixes


def make_inputs(case: Case) -> Inputs:
    shared, own = case.prefix_len // BLOCK_SIZE, case.own_len // BLOCK_SIZE
    layout = kvkernels.KVLayout(1, case.num_kv_heads, case.head_dim, BLOCK_SIZE)
    pool = kvkernels.KVPool(layout, shared + case.num_seqs * own, torch.get_default_device())
    pool.data.normal_()
    blocks = torch.randperm(pool.num_blocks).int()
    table = torch.cat(
        [blocks[:shared].expand(case.num_seqs, shared), blocks[shared:].view(-1, own)], dim=1
    )
    lens = torch.full((case.num_seqs,), case.prefix_len + case.own_len, dtype=torch.int32)
    query = torch.randn(case.num_seqs, case.num_heads, case.head_dim, dtype=torch.bfloat16)
    return Inputs(
        (query, pool.key_cache(0), pool.value_cache(0), table.contiguous(), lens),
        kvkernels.SharedPrefixes.find(table, lens, BLOCK_SIZE),
    )


PROVIDERS = {
    "flat": lambda inputs: kvkernels.paged_attention(*inputs.arguments),
    "shared_prefix": lambda inputs: kvkernels.shared_prefix_attention(
        *inputs.arguments, prefixes=inputs.prefixes
    ),
}


@torch.inference_mode()
def main(case_filter: str = "", num_rounds: int = 15) -> None:
    for case in CASES:
        if case_filter not in case.name:
            continue
        inputs = make_cold(partial(make_inputs, case), case.num_bytes)
        results = {name: [provider(inputs[0])] for name, provider in PROVIDERS.items()}
        check_agreement(results, "flat", 2e-2)
        run_case(case.name, PROVIDERS, inputs, num_rounds, case.num_bytes)
