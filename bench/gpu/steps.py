"""Runs single steps, each a row of the result: ``python -m bench.gpu.steps FILE NAME...``.

Appends a row for each to FILE, one JSON document per line. After a device error a process cannot
use the device any more, so the first one ends it with status 3; the caller starts another process
for the remaining steps.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.gpu import events
from bench.gpu.check import CHECKS
from bench.gpu.rates import copy_rate, matmul_rate
from bench.gpu.timing import time_cases
from bench.gpu.tune import tune_cases

DEVICE_ERROR = 3
Step = Callable[[], dict[str, Any] | None]


def has_engine() -> bool:
    """Whether the engine's requirements are installed: the C++ extension, and transformers."""
    importlib.invalidate_caches()  # the extension may just have been built
    return all(importlib.util.find_spec(name) for name in ("_kvkernels", "redis", "transformers"))


def steps() -> dict[str, Step]:
    """Every step by topic and name, as in ``checks/store``, in the order in which they run."""
    named = {f"checks/{name}": check for name, check in CHECKS.items()}
    named |= {"rates/copy": copy_rate, "rates/matmul": matmul_rate}
    named |= {f"timings/{name}": work for name, work in time_cases()}
    named |= {f"tune/{name}": work for name, work in tune_cases()}
    if has_engine():
        from bench.gpu.engine import engine_cases

        named |= {f"engine/{name}": work for name, work in engine_cases()}
    return named


def run_step(name: str, step: Step) -> dict[str, Any]:
    """The step's row; an error becomes a row too, so that it does not cost the later steps."""
    begin = time.monotonic()
    row: dict[str, Any] = {"name": name}
    torch.manual_seed(0)
    try:
        row |= step() or {}
        torch.cuda.synchronize()  # an asynchronous error belongs to this step
        row["ok"] = True
    except Exception as error:
        traceback.print_exc()
        row |= {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}
    return row | {"took_s": round(time.monotonic() - begin, 1)}


def is_device_lost() -> bool:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("names", nargs="+")
    parser.add_argument("--rehearse", action="store_true", help="compile; the times mean nothing")
    options = parser.parse_args()
    if options.rehearse:
        events.NUM_ROUNDS = 1
    known = steps()
    for name in options.names:
        row = run_step(name, known[name])
        with options.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
        if not row["ok"] and is_device_lost():
            return DEVICE_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
