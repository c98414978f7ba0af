"""The device bench ends in time, ends all its processes, and keeps its rows."""

import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

run_main = pytest.importorskip("bench.gpu.__main__", reason="Triton is only on Linux")

# Starts a child of its own, like setup.py its compilers or pytest its workers.
WITH_CHILD = """
import subprocess, sys
child = subprocess.Popen(["sleep", "600"])
open(sys.argv[1] + ".new", "w").write(str(child.pid))
import os; os.rename(sys.argv[1] + ".new", sys.argv[1])
child.wait()
"""


@pytest.fixture(autouse=True)
def logs(monkeypatch, tmp_path):
    monkeypatch.setattr(run_main, "LOGS", tmp_path)
    monkeypatch.setattr(run_main, "describe_machine", dict)


@pytest.fixture
def with_child(tmp_path):
    return [sys.executable, "-c", WITH_CHILD, str(tmp_path / "child")]


def wait_for_child(folder):
    while not (folder / "child").exists():
        time.sleep(0.01)
    return int((folder / "child").read_text())


def is_running(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def assert_ends(pid):
    for _ in range(1000):  # killed, but perhaps not yet gone
        if not is_running(pid):
            return
        time.sleep(0.01)
    raise AssertionError(f"process {pid} still runs")


def test_a_process_without_time_ends_with_its_children(with_child, tmp_path):
    status, _ = run_main.run_logged(with_child, "build", 3.0)
    assert status == run_main.NO_TIME
    assert_ends(wait_for_child(tmp_path))


@pytest.mark.timeout(120)
def test_processes_beside_each_other_end_with_a_signal(with_child, tmp_path, monkeypatch):
    def build(run):
        run_main.run_logged(with_child, "build", 100.0)
        return {"name": "build", "ok": True}

    def signal_twice():
        wait_for_child(tmp_path)
        for _ in range(2):  # as `timeout` does
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(run_main, "build_extension", build)
    threading.Thread(target=signal_twice).start()
    with pytest.raises(run_main.Ended), run_main.ended_by_signal():
        run_main.prepare(run_main.Run(tmp_path / "result.json"), [], [])
    assert_ends(wait_for_child(tmp_path))


def test_rows_of_all_processes_are_kept(monkeypatch):
    """The first process ends with a device error, the second is asked to end."""
    calls = []

    def run_logged(command, log, timeout_s):
        file, names = command[3], command[4:]
        calls.append(names)
        done, status = (names[:2], run_main.DEVICE_ERROR) if len(calls) == 1 else (names[:5], None)
        rows = [{"name": name, "ok": True} for name in done]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if status is None:
            raise run_main.Ended
        return status, ""

    monkeypatch.setattr(run_main, "run_logged", run_logged)
    names, rows = [f"timings/{number}" for number in range(20)], []
    with pytest.raises(run_main.Ended):
        run_main.run_steps(names, 100.0, rows)
    assert [row["name"] for row in rows] == names[:7]


def test_a_run_without_time_for_a_row_is_not_complete(tmp_path):
    rows = []
    run_main.run_steps(["timings/a", "timings/b"], 0.1, rows)
    assert [row["status"] for row in rows] == [run_main.NO_TIME] * 2
    result = tmp_path / "result.json"
    for kept, is_ended, is_complete in (([], False, True), ([], True, False), (rows, False, False)):
        run = run_main.Run(result)
        run.record("timings", {"name": "timings/done", "ok": True})
        for row in kept:
            run.record("timings", row)
        run.finish(is_ended)
        assert json.loads(result.read_text())["is_complete"] is is_complete


def test_a_run_ends_within_nine_minutes():
    text = (Path(run_main.__file__).parent / "run.sh").read_text()
    [(kill_after_s, limit_s)] = re.findall(r"timeout --kill-after=(\d+) (\d+) ", text)
    assert int(limit_s) + int(kill_after_s) <= 9 * 60
    assert int(limit_s) >= run_main.TIMED_S + 20
