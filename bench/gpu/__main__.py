"""Checks and times the kernels on a CUDA device; see run.sh.

First, in parallel on all processors, what mostly takes time for compiling: the C++ extension, the
checks, a rehearsal of what is timed, the tests. Then the timings, alone on the device.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton

from bench.gpu import peers
from bench.gpu.processes import end_all, started
from bench.gpu.steps import DEVICE_ERROR, steps
from bench.gpu.summary import summarise

PARTS = ("checks", "peers", "tests", "timings", "engine")
REHEARSED = ("timings", "tune")
COMPILED_APART = ("_flashinfer", "_flex")  # by `peers.prepare`
# Seconds from the start until the parallel part ends, and until the timings end. run.sh allows a
# little more, to start and to write the result.
PREPARED_S = 300
TIMED_S = 500
STEP_S = 120
NO_TIME = "no time left"
LOGS = Path("build/gpu")
Row = dict[str, Any]
TOPICS = (
    "attention",
    "attention_features",
    "codecs",
    "kv_cache",
    "splits",
    "triton_batches",
    "triton_replay",
)
TEST_FILES = [f"tests/ops/test_{topic}.py" for topic in TOPICS]
TESTS = "triton or splits or batches"


def _commit() -> str | None:
    """The commit that is checked out; needs a repository and git."""
    try:
        command = ["git", "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        return None


def _driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:
        return None


def describe_machine() -> dict[str, Any]:
    """The machine and versions that the figures depend on."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "num_multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_cache_bytes": properties.L2_cache_size,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "num_processors": os.cpu_count(),
        "commit": os.environ.get("KVKERNELS_COMMIT") or _commit(),
    }


class Run:
    """The result so far, written after every step, so that a run cut short leaves what it had."""

    def __init__(self, path: Path) -> None:
        self.begin = time.monotonic()
        self._path = path
        self.result: dict[str, Any] = {"machine": describe_machine(), "is_complete": False}

    def left_s(self, until_s: float) -> float:
        return max(0.0, self.begin + until_s - time.monotonic())

    def record(self, topic: str, row: Row) -> None:
        row |= {"name": row["name"].rpartition("/")[2]}
        self.result.setdefault(topic, []).append(row)
        self.write()

    def rows(self) -> list[Row]:
        return [row for value in self.result.values() if isinstance(value, list) for row in value]

    def finish(self, is_ended: bool) -> list[str]:
        """Write whether the run is complete, unless it was ended before; returns what failed."""
        rows = self.rows()
        failed = [row["name"] for row in rows if not row["ok"]]
        self.result |= {
            "is_complete": not is_ended and all(row.get("status") != NO_TIME for row in rows),
            "failed": failed,
            "took_s": round(time.monotonic() - self.begin, 1),
        }
        self.write()
        return failed

    def write(self) -> None:
        self._path.write_text(json.dumps(self.result, indent=1) + "\n")


def topic_of(name: str) -> str:
    return name.partition("/")[0]


class Ended(Exception):
    """The process was asked to end; raised so that the figures so far are kept."""


@contextmanager
def ended_by_signal() -> Iterator[None]:
    """Raise `Ended` inside when the process is asked to end; its children are then ended."""

    def end(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout` sends it twice
        raise Ended

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_logged(command: Sequence[str | Path], log: str, timeout_s: float) -> tuple[int | str, str]:
    """A process's exit status, or why there is none, and the end of its output."""
    path = LOGS / f"{log.replace('/', '-')}.log"
    with started(command, path) as process:
        try:
            status: int | str = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            status = NO_TIME
    return status, path.read_text(errors="replace")[-2000:]


def run_steps(names: Sequence[str], timeout_s: float, rows: list[Row], *flags: str) -> None:
    """Add the steps' rows to `rows`, from one process and, after each device error, another.

    Each row is written to a file beside the logs at once, and rows in the file get into `rows`
    however this call ends.
    """
    end = time.monotonic() + timeout_s
    while len(rows) < len(names):
        rest = names[len(rows) :]
        file = rows_file(rest[0])
        file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "bench.gpu.steps", file, *rest, *flags]
        try:
            status, text = run_logged(command, rest[0], max(0.1, end - time.monotonic()))
        finally:
            rows += read_rows(file)
        if len(rows) < len(names) and status != DEVICE_ERROR:
            rows.append(
                {"name": names[len(rows)], "ok": False, "status": status, "error": text[-600:]}
            )
        if isinstance(status, str):
            rows += map(row_without_time, names[len(rows) :])


def row_without_time(name: str) -> Row:
    return {"name": name, "ok": False, "status": NO_TIME, "error": NO_TIME}


def rows_file(first: str) -> Path:
    """The file where a process that begins with this step writes its rows, one per line."""
    return LOGS / f"{first.replace('/', '-')}.jsonl"


def read_rows(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def build_extension(run: Run) -> Row:
    """Build the C++ extension in place; if that fails, what needs it is left out."""
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    status, text = run_logged(command, "build", run.left_s(PREPARED_S))
    row = {"name": "build", "ok": status == 0, "took_s": time.monotonic() - run.begin}
    return row if status == 0 else row | {"status": status, "error": text[-600:]}


def run_tests(run: Run) -> Row:
    """Run the Triton part of the tests."""
    begin = time.monotonic()
    command = [sys.executable, "-m", "pytest", *TEST_FILES, "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(max(2, (os.cpu_count() or 2) // 2))]
    # -v names each test as it ends, so that a run that is cut short shows how far it came.
    command += ["-k", TESTS, "--no-header", "-v", "-rfE", "--tb=line"]
    status, text = run_logged(command, "tests", run.left_s(PREPARED_S))
    took_s = round(time.monotonic() - begin, 1)
    return {"name": TESTS, "ok": status == 0, "status": status, "took_s": took_s, "end": text}


def prepare(run: Run, parts: Sequence[str], names: Sequence[str]) -> None:
    """Run the parallel part, in processes that end with this call."""
    with ThreadPoolExecutor(max(2, (os.cpu_count() or 2) - 2)) as pool:
        topics = {pool.submit(build_extension, run): "build"}
        if "peers" in parts:
            topics[pool.submit(_prepare_peers, run)] = "peers"
        if "tests" in parts and importlib.util.find_spec("pytest"):
            topics[pool.submit(run_tests, run)] = "tests"
        for name in names:
            topic = topic_of(name)
            is_compiled_apart = name.endswith(COMPILED_APART)
            if topic in parts and topic in ("checks", *REHEARSED) and not is_compiled_apart:
                flags = ["--rehearse"] if topic in REHEARSED else []
                topics[pool.submit(_run_one, run, name, flags)] = topic
        try:
            _record(run, topics)
        except BaseException:  # also a signal's: do not wait for what still runs
            pool.shutdown(wait=False, cancel_futures=True)
            end_all()
            raise


def _record(run: Run, topics: Mapping[Future[Row], str]) -> None:
    for future in as_completed(topics):
        topic, row = topics[future], future.result()
        if topic not in REHEARSED:  # a rehearsal's error shows again when it is timed
            run.record(topic, row)
        elif not row["ok"]:
            print("rehearsal", json.dumps(row)[:500], flush=True)


def _run_one(run: Run, name: str, flags: list[str]) -> Row:
    timeout_s = min(STEP_S, run.left_s(PREPARED_S))
    if timeout_s < 1:
        return row_without_time(name)
    rows: list[Row] = []
    run_steps([name], timeout_s, rows, *flags)
    return rows[0]


def _prepare_peers(run: Run) -> Row:
    failed = peers.prepare(run.left_s(PREPARED_S))
    row = {"name": "peers", "ok": not failed, "took_s": round(time.monotonic() - run.begin, 1)}
    return row | ({"error": json.dumps(failed)[:2000]} if failed else {})


def choose(parts: Sequence[str], wanted: re.Pattern[str]) -> list[str]:
    """The steps that run alone on the device."""
    topics = ("rates", *(topic for topic in ("tune", "timings", "engine") if topic in parts))
    chosen = [name for name in steps() if topic_of(name) in topics and wanted.search(name)]
    if "peers" not in parts:
        chosen = [name for name in chosen if not name.endswith(COMPILED_APART)]
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--parts", nargs="*", choices=(*PARTS, "tune"), default=PARTS)
    parser.add_argument("--only", default="", help="only steps whose name this expression finds")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 2
    options.file.parent.mkdir(parents=True, exist_ok=True)
    LOGS.mkdir(parents=True, exist_ok=True)
    wanted = re.compile(options.only)
    run = Run(options.file)
    print(json.dumps(run.result["machine"]), flush=True)
    timed: list[Row] = []
    is_ended = True
    with ended_by_signal():
        try:
            prepare(run, options.parts, [name for name in steps() if wanted.search(name)])
            # After the extension is built, as only then `steps` has the engine's.
            run_steps(choose(options.parts, wanted), run.left_s(TIMED_S), timed)
            is_ended = False
        except Ended:
            print("ended before its time", file=sys.stderr)
    for row in timed:
        run.record(topic_of(row["name"]), row)
    failed, rows = run.finish(is_ended), run.rows()
    print(summarise(run.result))
    print(f"{len(rows)} steps, failed: {failed or 'none'}; wrote {options.file}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
