"""Which launch configuration a call gets."""

import pytest
import torch

configs = pytest.importorskip("kvkernels.triton_kernels.configs", reason="Triton is only on Linux")

BFLOAT16 = torch.bfloat16


@pytest.mark.parametrize(
    ("is_heavy", "rows_per_multiprocessor", "tile_m"),
    [(False, 1023, 64), (False, 1024, 128), (False, None, 128), (True, 1023, 128)],
)
def test_a_large_tile_takes_many_rows_a_multiprocessor(is_heavy, rows_per_multiprocessor, tile_m):
    config = configs.prefill_config(9, BFLOAT16, 64, 4096, is_heavy, rows_per_multiprocessor)
    assert config.tile_m == tile_m


@pytest.mark.parametrize(
    ("head_dim", "group", "tile_m", "num_warps"),
    [(256, 16, 16, 4), (256, 17, 32, 8), (576, 32, 32, 8), (576, 33, 64, 8), (128, 17, 32, 2)],
)
def test_many_heads_have_configurations_of_their_own(head_dim, group, tile_m, num_warps):
    config = configs.decode_config(9, BFLOAT16, head_dim, group)
    assert (config.tile_m, config.num_warps) == (tile_m, num_warps)
