"""The Triton kernels compile for GPUs that are not here, without spilling."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

aot = pytest.importorskip("kvkernels.triton_kernels.aot", reason="Triton is only on Linux")

FITTING = aot.Usage(aot.Case(90, "decode", "bf16", 128), "decode_kernel", "16x64", 4, 255, 0, 71680)


def test_a_spread_of_the_table_compiles_and_fits(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    # A process of its own: in this one the kernels may be interpreted. A cache of its own: what
    # was compiled before would not show that it still compiles.
    command = [sys.executable, "-m", "kvkernels.triton_kernels.aot", "--every", "7"]
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    record_property("in_summary", done.stdout)
    rows = [line.split() for line in done.stdout.splitlines()[1:-1]]
    assert {row[0] for row in rows} == {str(arch) for arch in aot.SHARED_LIMITS}
    kernels = ("store_kv", "merge", "decode", "combine", "prefill")
    assert {row[1] for row in rows} == {f"{kernel}_kernel" for kernel in kernels}


@pytest.mark.parametrize(
    ("change", "status"),
    [({}, 0), ({"local_bytes": 8}, 1), ({"shared_bytes": (227 << 10) + 1}, 1)],
    ids=["fits", "spills", "needs_too_much_shared_memory"],
)
def test_status_tells_what_was_refused(change: dict, status: int, capsys) -> None:
    usage = dataclasses.replace(FITTING, **change)
    assert aot.report([[FITTING, usage]]) == status
    assert ("REFUSED" in capsys.readouterr().out) == bool(status)


def test_compiling_nothing_is_not_a_success() -> None:
    assert aot.report([]) == 1
