"""Checks and times the kernels on a CUDA device; see run.sh."""

import importlib.util
import json
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from bench.gpu.check import CHECKS
from bench.gpu.timing import copy_rate, time_cases

# Seconds from the start: no timing begins, and no test goes on, after these.
TIMING_ENDS_S = 270
TESTS_END_S = 500
TOPICS = ("attention", "attention_features", "codecs", "kv_cache", "splits", "triton_batches")
TEST_FILES = [f"tests/ops/test_{topic}.py" for topic in TOPICS]
# One process each: most of the time goes into compiling, on one core a process.
TEST_SHARDS = (
    "triton and float32",
    "triton and bfloat16",
    "triton and float16 and not bfloat16",
    "(triton or splits or batches) and not float",
)


def _commit() -> str | None:
    """The commit that is checked out, where there is a repository and git."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        return None


def describe_machine() -> dict[str, Any]:
    """What the figures depend on."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "num_multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_cache_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def attempt(work: Callable[[], Any]) -> dict[str, Any]:
    """Run `work`; one failure must not cost the rest of the run, so it becomes a row."""
    begin = time.monotonic()
    try:
        row = work() or {}
        row["ok"] = True
    except Exception as error:
        traceback.print_exc()
        row = {"ok": False, "error": f"{type(error).__name__}: {error}"[:2000]}
    return row | {"took_s": round(time.monotonic() - begin, 1)}


def run_tests(begin: float) -> list[dict[str, Any]]:
    """The Triton part of the tests, in processes beside each other."""
    command = [sys.executable, "-m", "pytest", *TEST_FILES, "-q", "-p", "no:cacheprovider", "-k"]
    logs = [Path(f"build/gpu-tests-{index}.log") for index in range(len(TEST_SHARDS))]
    processes = []
    for shard, log in zip(TEST_SHARDS, logs, strict=True):
        with log.open("w") as file:
            processes.append(subprocess.Popen([*command, shard], stdout=file, stderr=file))
    rows = []
    for shard, log, process in zip(TEST_SHARDS, logs, processes, strict=True):
        try:
            status = process.wait(max(0.0, begin + TESTS_END_S - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        text = log.read_text()
        print(text[-3000:])
        rows.append({"name": shard, "ok": status == 0, "status": status, "end": text[-1500:]})
    return rows


def main() -> int:
    """Write the result after every step, so that a run cut short leaves what it had."""
    begin = time.monotonic()
    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 2
    path = Path(sys.argv[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    Path("build").mkdir(exist_ok=True)
    result: dict[str, Any] = {"machine": describe_machine(), "is_complete": False}

    def record(topic: str, row: dict[str, Any]) -> None:
        result.setdefault(topic, []).append(row)
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(topic, json.dumps(row), flush=True)

    print(json.dumps(result["machine"]), flush=True)
    torch.manual_seed(0)
    for name, check in CHECKS.items():
        record("checks", {"name": name} | attempt(check))
    record("copy", attempt(copy_rate))
    for name, work in time_cases():
        if time.monotonic() - begin > TIMING_ENDS_S:
            record("timings", {"name": name, "ok": False, "error": "no time left"})
            continue
        record("timings", {"name": name} | attempt(work))
    if importlib.util.find_spec("pytest"):
        for row in run_tests(begin):
            record("tests", row)
    else:
        result["tests_skipped"] = "pytest is not installed"
    topics = ("checks", "copy", "timings", "tests")
    rows = [row for topic in topics for row in result.get(topic, [])]
    failed = [row.get("name", "copy") for row in rows if not row["ok"]]
    result |= {"is_complete": True, "failed": failed, "took_s": time.monotonic() - begin}
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{len(rows)} steps, failed: {failed or 'none'}; wrote {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
