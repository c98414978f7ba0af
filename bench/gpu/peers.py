"""The available peers, and how their kernels are compiled before anything is timed.

`python -m bench.gpu.peers NAME` compiles one of `builds`, whose result stays in a cache on disk.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import attention_cases
from bench.gpu.flashinfer_peers import FLASHINFER_PEERS, FLOAT8_PEERS, MODULES, is_installed
from bench.gpu.peer import Peer
from bench.gpu.processes import started
from bench.gpu.torch_peers import FLEX_PEERS

# Processes of nvcc at once, in each build.
NUM_JOBS = 6


def flashinfer_peers() -> dict[str, Peer]:
    return FLASHINFER_PEERS if is_installed() else {}


def float8_peers() -> dict[str, Peer]:
    """Peers with float8 caches."""
    return FLOAT8_PEERS if is_installed() else {}


@torch.inference_mode()
def _compile_flex() -> None:
    for case in attention_cases.CASES:
        for peer in FLEX_PEERS.values():
            if peer.serves(case):
                with torch.device("cuda"):
                    inputs = attention_cases.make_inputs(case)
                peer.prepare(case, inputs)()
    torch.cuda.synchronize()


def _compile_module(name: str) -> None:
    MODULES[name]().build(verbose=False)


def builds() -> dict[str, Callable[[], Any]]:
    """Builds by name; the first ones get more of the processors."""
    found: dict[str, Callable[[], Any]] = {"flex": _compile_flex}
    if is_installed():
        found |= {f"flashinfer_{name}": partial(_compile_module, name) for name in MODULES}
    return found


def digest(log: str) -> str:
    """The first lines with errors in a compiler's output, and its end."""
    errors = [line[:200] for line in log.splitlines() if "error" in line.lower()][:4]
    return "\n".join([*errors, log[-400:]])


def prepare(limit_s: float = 240.0) -> dict[str, str]:
    """Compile all that the peers need, in parallel processes.

    Builds that take longer than `limit_s` seconds are ended.

    Returns:
        For each build that failed the end of its output; empty if none did.
    """
    ends_at = time.monotonic() + limit_s
    failed = {}
    environment = {"MAX_JOBS": str(NUM_JOBS)} | os.environ
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        logs = {name: Path(folder) / name for name in builds()}
        processes = {}
        for niceness, (name, log) in enumerate(logs.items()):
            command = ["nice", "-n", str(niceness), sys.executable, "-m", "bench.gpu.peers", name]
            processes[name] = stack.enter_context(started(command, log, environment))
        for name, process in processes.items():
            try:
                status = process.wait(max(0.0, ends_at - time.monotonic()))
            except subprocess.TimeoutExpired:
                failed[name] = f"not done within {limit_s:.0f} s"
                continue
            if status:
                failed[name] = digest(logs[name].read_text(errors="replace"))
    return failed


if __name__ == "__main__":
    builds()[sys.argv[1]]()
