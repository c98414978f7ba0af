"""The command that checks and times a GPU; without one, only that it starts and says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

RUN = Path(__file__).resolve().parents[2] / "bench" / "gpu" / "run.sh"


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes minutes where there is a device")
def test_says_that_there_is_no_device(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is only on Linux")
    result = tmp_path / "gpu.json"
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run([RUN, result], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "no CUDA device\n")
    assert not result.exists()
