"""Compare store_kv with PyTorch's indexed assignment."""

from dataclasses import dataclass
from functools import partial

import torch

import kvkernels
from bench.harness import check_agreement, make_cold, run_case
from kvkernels.reference import kv_cache as reference


@dataclass(frozen=True)
class Case:
    name: str
    num_tokens: int
    num_kv_heads: int
    head_dim: int
    block_size: int = 64
    dtype: torch.dtype = torch.bfloat16

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values, read and written."""
        return 4 * self.num_tokens * self.num_kv_heads * self.head_dim * self.dtype.itemsize


CASES = [
    Case("decode_1", 1, 8, 128),
    Case("decode_64", 64, 8, 128),
    Case("prefill_4k", 4096, 8, 128),
    Case("prefill_4k_d64", 4096, 3, 64),
    Case("prefill_16k", 16384, 8, 128),
]

PROVIDERS = {
    "index_put": lambda inputs: reference.store_kv(*inputs),
    "kvkernels": lambda inputs: kvkernels.store_kv(*inputs),
}
MAX_INPUTS = 64  # small cases would need thousands to exceed the cache


def make_inputs(case: Case) -> tuple[torch.Tensor, ...]:
    shape = (case.num_tokens, case.num_kv_heads, case.head_dim)
    key, value = (torch.randn(shape, dtype=case.dtype) for _ in range(2))
    num_blocks = 2 * -(-case.num_tokens // case.block_size)
    cache_shape = (num_blocks, case.num_kv_heads, case.block_size, case.head_dim)
    key_cache, value_cache = (torch.zeros(cache_shape, dtype=case.dtype) for _ in range(2))
    blocks = torch.randperm(num_blocks)[: num_blocks // 2]
    slots = (blocks[:, None] * case.block_size + torch.arange(case.block_size)).flatten()
    return key, value, key_cache, value_cache, slots[: case.num_tokens]


def check_stores(inputs: tuple[torch.Tensor, ...]) -> None:
    """Raise RuntimeError unless all providers write the same bytes."""
    results = {}
    for name, provider in PROVIDERS.items():
        caches = [torch.zeros_like(cache) for cache in inputs[2:4]]
        provider((*inputs[:2], *caches, inputs[4]))
        results[name] = caches
    check_agreement(results, "index_put", 0.0)


@torch.inference_mode()
def main(case_filter: str = "", num_rounds: int = 15) -> None:
    for case in CASES:
        if case_filter not in case.name:
            continue
        inputs = make_cold(
            partial(make_inputs, case), max(case.num_bytes, (96 << 20) // MAX_INPUTS)
        )
        check_stores(inputs[0])
        run_case(case.name, PROVIDERS, inputs, num_rounds, case.num_bytes)
