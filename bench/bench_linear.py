"""Compare kvkernels.linear with PyTorch's, on weights that are in no cache."""

from dataclasses import dataclass
from functools import partial

import torch

import kvkernels
from bench.harness import check_agreement, make_cold, run_case


@dataclass(frozen=True)
class Case:
    name: str
    num_rows: int
    in_features: int
    out_features: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def num_bytes(self) -> int:
        """Bytes of the weight and the input, read, and of the result, written."""
        num_items = (
            self.out_features * self.in_features
            + self.num_rows * self.in_features
            + self.num_rows * self.out_features
        )
        return num_items * self.dtype.itemsize


# Two layers of SmolLM2-135M, in both directions, and one of a model of some billions of parameters.
CASES = [
    Case(f"{name}_x{num_rows}{suffix}", num_rows, *features, dtype)
    for dtype, suffix in ((torch.bfloat16, ""), (torch.float32, "_fp32"))
    for name, features in (("up", (576, 1536)), ("down", (1536, 576)))
    for num_rows in (1, 4, 16, 512)
] + [Case(f"square_x{num_rows}", num_rows, 4096, 4096) for num_rows in (1, 4, 16, 512)]

PROVIDERS = {
    "pytorch": lambda inputs: torch.nn.functional.linear(*inputs),
    "kvkernels": lambda inputs: kvkernels.linear(*inputs),
}


def make_inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.randn(case.num_rows, case.in_features).to(case.dtype),
        (torch.randn(case.out_features, case.in_features) / case.in_features**0.5).to(case.dtype),
    )


@torch.inference_mode()
def main(case_filter: str = "", num_rounds: int = 15) -> None:
    for case in CASES:
        if case_filter not in case.name:
            continue
        inputs = make_cold(partial(make_inputs, case), case.num_bytes)
        results = {name: provider(inputs[0]) for name, provider in PROVIDERS.items()}
        check_agreement(results, "pytorch", 1e-4 if case.dtype == torch.float32 else 2e-2)
        run_case(case.name, PROVIDERS, inputs, num_rounds, case.num_bytes)
