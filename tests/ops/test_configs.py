"""Which launch configuration a call gets."""

import pytest
import torch

from kvkernels import UnsupportedError

configs = pytest.importorskip("kvkernels.triton_kernels.configs", reason="Triton is only on Linux")
shapes = pytest.importorskip("kvkernels.triton_kernels.shapes")
launch = pytest.importorskip("kvkernels.triton_kernels.launch")

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


@pytest.mark.parametrize("op", ["decode", "prefill"])
@pytest.mark.parametrize("arch", [8, 9, 10])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 128), (128, 256), (64, 512)])
def test_values_wider_than_keys_choose_the_tile(arch, head_dim, value_dim, op):
    def tile(*widths):
        shape = shapes.Shape(op, "bf16", *widths, num_queries=512 if op == "prefill" else 1)
        first, *_ = shapes.plan(shape, launch.Device(arch, 132))
        sizes = first.arguments["TILE_M"], first.arguments["TILE_N"]
        return sizes, first.num_warps, first.num_stages

    assert tile(head_dim, value_dim) == tile(value_dim)


@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_refuses_values_wider_than_any_tile(op):
    with pytest.raises(UnsupportedError, match=r"^value_cache: .* up to 576, got 640"):
        shapes.plan(shapes.Shape(op, "bf16", 64, 640), launch.Device(9, 132))
