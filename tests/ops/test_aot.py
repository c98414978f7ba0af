"""The Triton kernels compile for GPUs that this machine lacks, without spilling."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is only on Linux")
aot = pytest.importorskip("kvkernels.triton_kernels.aot")

FITTING = aot.Usage(
    90, aot.Shape("decode", "bf16", 128, kinds=("int4",)), "decode_kernel", "16x64", 4,
    255, 0, 71680, 32, 0, 57, 32,
)  # fmt: skip

CODED = ("keys", "values", "lossless")


def test_a_spread_of_the_table_has_every_kind() -> None:
    """The spread is what `.ci/run` compiles."""
    chosen = aot.spread(aot.choose(sorted(aot.SHARED_LIMITS)))
    assert {arch for arch, _ in chosen} == set(aot.SHARED_LIMITS)
    launches = [launch for arch, shape in chosen for launch in aot.plan_shape(arch, shape)]
    kernels = ["store_kv", "merge", "decode", "prefill", "join"]
    kernels += [f"{op}_{what}" for op in ("encode", "decode") for what in CODED]
    kernels += ["copy_channels_out", "copy_channels_in"]
    planned = {launch.kernel.__name__.strip("_") for launch in launches}
    assert planned >= {f"{kernel}_kernel" for kernel in kernels}
    words = {word for _, shape in chosen for word in str(shape).split()}
    assert words >= {"int8", "int4", "float8", "window", "soft_cap"}


def test_the_command_compiles_what_fits(tmp_path: Path) -> None:
    # In another process, since kernels may be interpreted in this one; with a cache of its own,
    # since a cached kernel would not show that it still compiles.
    shape = "decode bf16 d64 block 64 group 4 int4"
    command = [sys.executable, "-m", "kvkernels.triton_kernels.aot", "--arch", "90"]
    command += ["--only", shape, "--jobs", "1"]
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    _, *rows, total = done.stdout.splitlines()
    assert [row.split()[:2] for row in rows] == [["90", "decode_kernel"], ["90", "join_kernel"]]
    assert all(row.endswith(shape) for row in rows)
    assert total == f"Triton {triton.__version__}: 2 kernels compiled, 0 refused"


@pytest.mark.parametrize(
    "change",
    [
        {"local_bytes": 8},
        {"shared_bytes": (227 << 10) + 1},
        {"num_products": 0},
        {"num_plain_dots": 1},
        {"num_wide_loads": 15},  # of 64 tokens' keys and values in bfloat16
        {"num_lop3": 0},
    ],
    ids=[
        *("spills", "needs_too_much_shared_memory", "no_tensor_cores", "a_plain_dot"),
        *("narrow_loads", "no_lop3"),
    ],
)
def test_status_tells_what_was_refused(change: dict, capsys) -> None:
    assert aot.report([[FITTING, dataclasses.replace(FITTING, **change)]]) == 1
    assert capsys.readouterr().out.count("REFUSED") == 1


def test_what_is_almost_wanted_is_not_counted() -> None:
    command = [sys.executable, Path(__file__).with_name("aot_kernels.py")]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    counts = json.loads(done.stdout)
    assert (counts.pop("dots"), counts.pop("plain_dots")) == (2, 1)
    assert counts["mask_and_add"] == 0 < counts["mask_and_put"]


def test_latent_attention_alone_may_spill() -> None:
    latent = aot.Shape("decode", "bf16", 576, 512, group=128, num_kv_heads=1)
    usage = dataclasses.replace(FITTING, shape=latent, tile="64x32", num_warps=8, local_bytes=136)
    assert usage.fault == ""
    assert dataclasses.replace(usage, kernel="join_kernel").fault == "spills"
    other = dataclasses.replace(latent, head_dim=256, value_dim=0)
    assert dataclasses.replace(usage, shape=other).fault == "spills"


def test_what_compiles_is_enough_where_asked_for(capsys) -> None:
    assert aot.report([[dataclasses.replace(FITTING, local_bytes=8)]], compile_only=True) == 0
    assert "REFUSED: spills" in capsys.readouterr().out


def test_what_fits_is_a_success(capsys) -> None:
    plain = aot.Shape("decode", "bf16", 128)
    no_codes = dataclasses.replace(FITTING, shape=plain, num_lop3=0)
    single = dataclasses.replace(FITTING, shape=aot.Shape("prefill", "fp32", 64), num_products=0)
    assert aot.report([[FITTING, no_codes], [single]]) == 0
    assert "REFUSED" not in capsys.readouterr().out


def test_compiling_nothing_is_not_a_success() -> None:
    assert aot.report([]) == 1
