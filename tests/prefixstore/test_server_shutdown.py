"""How a server shuts down: accepted requests are finished, and pending writes are written."""

import json
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from scripted_server import serve, write_until_signal
from serving import MODEL, in_thread, wait_until

TEXT = {"model": MODEL, "prompt": "Hello"}


class Process:
    """A server in its own process.

    Args:
        context: Context of `multiprocessing` that makes the process.
        folder: Where its output goes.
        engine: Arguments of a `ScriptedEngine`.
        server: Arguments of a `ServerConfig`.
    """

    def __init__(self, context, folder, engine=None, server=None):
        self._out, self._log = folder / "out", folder / "log"
        arguments = (self._out, self._log, engine or {}, server or {})
        self.process = context.Process(target=serve, args=arguments)
        self.process.start()
        wait_until(lambda: self._log.exists() and self._out.read_text().endswith("\n"), 60)
        ready = json.loads(self._out.read_text())
        assert ready["event"] == "ready" and ready["pid"] == self.process.pid
        self.url = ready["url"]

    def signal(self, number=signal.SIGTERM):
        os.kill(self.process.pid, number)

    def wait(self):
        """Wait for its end; returns exit status, prints after the first line, and log lines."""
        self.process.join(60)
        out = self._out.read_text().partition("\n")[2]
        lines = self._log.read_text().splitlines()
        return self.process.exitcode, out, [json.loads(line) for line in lines]

    def kill(self):
        self.process.kill()
        self.process.join()


@pytest.fixture(scope="module")
def context():
    """Forks each server from one process with all imports done, as these take seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scripted_server"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        yield context


@pytest.fixture
def start(context, tmp_path):
    processes = []

    def start_one(**settings):
        processes.append(Process(context, tmp_path, **settings))
        return processes[-1]

    yield start_one
    for process in processes:
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_an_idle_server_ends_at_once_and_flushes(start, number):
    server = start()
    assert httpx.get(server.url + "/health/ready").status_code == 200
    server.signal(number)
    status, out, lines = server.wait()
    assert status == 0
    assert json.loads(out) == {"was_flushed": True, "was_closed": True}
    assert f"{signal.Signals(number).name}: finishing what was accepted" in [
        line["message"] for line in lines
    ]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_what_was_accepted_is_finished_and_nothing_else_is_taken(start, stream):
    server = start(engine={"is_endless": True, "step_s": 0.5})
    body = {**TEXT, "max_tokens": 40, "stream": stream}
    thread, answers = in_thread(
        lambda: httpx.post(server.url + "/v1/completions", json=body, timeout=60)
    )
    wait_until(lambda: _is_busy(server))
    server.signal()
    wait_until(lambda: httpx.get(server.url + "/health/ready").status_code == 503)
    assert httpx.get(server.url + "/health/live").status_code == 200
    refused = httpx.post(server.url + "/v1/completions", json=TEXT)
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "shutting_down"
    assert refused.headers["connection"] == "close"
    server.signal(signal.SIGUSR1)  # from here on the engine's steps take no time
    thread.join()
    assert answers[0].status_code == 200
    if stream:
        assert answers[0].text.endswith("data: [DONE]\n\n")
    else:
        assert answers[0].json()["usage"]["completion_tokens"] == 40
    assert server.wait()[0] == 0


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_what_takes_too_long_is_cut_off_and_told(start, stream):
    server = start(
        engine={"is_endless": True, "step_s": 0.02, "max_model_len": 100_000},
        server={"drain_timeout_s": 0.3},
    )
    body = {**TEXT, "max_tokens": 90_000, "stream": stream}
    thread, answers = in_thread(
        lambda: httpx.post(server.url + "/v1/completions", json=body, timeout=60)
    )
    wait_until(lambda: _is_busy(server))
    server.signal()
    thread.join()
    if stream:
        last = answers[0].text.strip().split("\n\n")[-1]
        error = json.loads(last.removeprefix("data: "))["error"]
    else:
        assert answers[0].status_code == 503
        error = answers[0].json()["error"]
    assert error["code"] == "shutting_down"
    status, _, lines = server.wait()
    assert status == 0
    assert "cut off 1 requests after 0.3 s" in [line["message"] for line in lines]


def test_a_second_signal_ends_it_at_once(start):
    server = start(
        engine={"is_endless": True, "step_s": 0.02, "max_model_len": 100_000},
        server={"drain_timeout_s": 60},
    )
    body = {**TEXT, "max_tokens": 90_000, "stream": True}
    with httpx.stream("POST", server.url + "/v1/completions", json=body):
        server.signal()
        wait_until(lambda: httpx.get(server.url + "/health/ready").status_code == 503)
        begun = time.monotonic()
        server.signal()
        assert server.wait()[0] == 128 + signal.SIGTERM
        assert time.monotonic() - begun < 20


def test_a_second_signal_ends_it_in_the_middle_of_a_log_line_too(context, tmp_path):
    log = tmp_path / "log"
    os.mkfifo(log)
    process = context.Process(target=write_until_signal, args=(log,))
    process.start()
    with log.open("rb", buffering=0) as reading:
        wait_until(lambda: select.select([reading], [], [], 0)[0], 60)
        wait_until(lambda: _is_blocked_in_write(process.pid))
        os.kill(process.pid, signal.SIGTERM)
        process.join(10)
    assert process.exitcode == 128 + signal.SIGTERM


def test_under_load_no_accepted_request_is_lost(start):
    """Every request is answered whole, gets a 503 or cannot connect; none is cut off."""
    server = start(engine={"is_endless": True, "step_s": 0.001, "max_running": 8})
    outcomes = []
    is_over = threading.Event()

    def ask(stream):
        body = {**TEXT, "max_tokens": 25, "stream": stream}
        while not is_over.is_set():
            try:
                answer = httpx.post(server.url + "/v1/completions", json=body, timeout=60)
            except (httpx.ConnectError, httpx.ReadError):
                return  # no longer listening, or stopped while this one was in the backlog
            if answer.status_code == 503:
                outcomes.append("refused")
                continue
            assert answer.status_code == 200
            is_whole = "[DONE]" in answer.text if stream else bool(answer.json()["usage"])
            outcomes.append("whole" if is_whole else "broken")

    threads = [in_thread(lambda stream=n % 2 == 0: ask(stream))[0] for n in range(12)]
    wait_until(lambda: outcomes.count("whole") > 30, 60)
    server.signal()
    for thread in threads:
        thread.join(60)
    is_over.set()
    status, _, lines = server.wait()
    assert status == 0
    assert "broken" not in outcomes
    # Every request that the server accepted was answered to its client.
    answered = [line["status"] for line in lines if line["message"] == "request"]
    assert answered.count(200) == outcomes.count("whole")
    assert answered.count(503) == outcomes.count("refused") == len(answered) - answered.count(200)


def _is_busy(server):
    """Whether the server has begun a request; the log shows a request only at its end."""
    metrics = httpx.get(server.url + "/metrics").text
    return any(
        line.startswith("kvkernels_requests_running ") and not line.endswith(" 0.0")
        for line in metrics.splitlines()
    )


def _is_blocked_in_write(pid):
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state == "S"
