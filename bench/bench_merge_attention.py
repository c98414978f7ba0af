"""Compare merge_attention with the same arithmetic in PyTorch."""

from dataclasses import dataclass
from functools import partial

import torch

import kvkernels
from bench.harness import check_agreement, make_cold, run_case
from kvkernels.reference import attention as reference


@dataclass(frozen=True)
class Case:
    name: str
    num_tokens: int
    num_heads: int = 32
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    @property
    def num_bytes(self) -> int:
        """Bytes of two outputs and two log-sum-exps, read, and of one of each, written."""
        return 3 * self.num_tokens * self.num_heads * (self.head_dim * self.dtype.itemsize + 4)


CASES = [
    Case("merge_4", 4),
    Case("merge_2048", 2048),
    Case("merge_2048_fp16", 2048, dtype=torch.float16),
    Case("merge_2048_fp32", 2048, dtype=torch.float32),
]

PROVIDERS = {
    "pytorch": lambda inputs: reference.merge_attention(*inputs),
    "kvkernels": lambda inputs: kvkernels.merge_attention(*inputs),
}


def make_inputs(case: Case) -> tuple[torch.Tensor, ...]:
    shape = (case.num_tokens, case.num_heads, case.head_dim)
    out_a, out_b = (torch.randn(shape, dtype=case.dtype) for _ in range(2))
    lse_a, lse_b = (torch.randn(shape[:2]) for _ in range(2))
    return out_a, lse_a, out_b, lse_b


@torch.inference_mode()
def main(case_filter: str = "", num_rounds: int = 15) -> None:
    for case in CASES:
        if case_filter not in case.name:
            continue
        inputs = make_cold(partial(make_inputs, case), case.num_bytes)
        results = {name: provider(inputs[0]) for name, provider in PROVIDERS.items()}
        tolerance = 1e-5 if case.dtype == torch.float32 else 2e-2
        check_agreement(results, "pytorch", tolerance)
        run_case(case.name, PROVIDERS, inputs, num_rounds, case.num_bytes)
