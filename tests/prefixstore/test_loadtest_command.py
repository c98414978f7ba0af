"""`kvkernels bench serve` from its options to its files, against scripted servers."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

pytest.importorskip("httpx")

import scripted_openai
from ports import free_ports
from scripted_openai import Reply, remember_prompts, serving

import prefixstore.extras
from prefixstore.commands import kvkernels

PYTHON = sys.executable
SCRIPT = scripted_openai.__file__


def run(*arguments: object) -> Result:
    return CliRunner().invoke(kvkernels, ["bench", "serve", *map(str, arguments)])


def read(out: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((out / "serve.json").read_text())
    return summary


def start_command(port: int) -> str:
    return f"{PYTHON} {SCRIPT} {port}"


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_measures_cold_and_warm(tmp_path: Path) -> None:
    with serving(remember_prompts()) as server:
        result = run(
            *("--url", server.url, "--workload", "chats", "--requests", 6, "--max-tokens", 3),
            *("--concurrency", 2, "--out", tmp_path),
        )
    assert result.exit_code == 0, result.output
    summary = read(tmp_path)
    cold, warm = summary["rows"]
    assert (cold["phase"], warm["phase"]) == ("cold", "warm")
    assert (cold["cached_tokens"], warm["cached_tokens"]) == (0, 6 * 64)
    assert cold["ttft_s"]["p50"] >= 0.1
    (ratios,) = summary["faster_when_warm"]
    assert ratios["ttft_s"]["median"] > 1.2
    assert "processor" in summary["machine"]
    assert {"python", "httpx"} <= set(summary["versions"])
    assert set(summary["load_average"]) == {"before", "after"}
    assert summary["arguments"]["requests"] == 6
    assert (tmp_path / "serve.png").read_bytes().startswith(b"\x89PNG")
    # A first short request, then the same six twice.
    sent = [seen.body["messages"] for seen in server.seen]
    assert sent[0] == [{"role": "user", "content": "Say yes."}]
    assert sorted(map(str, sent[1:7])) == sorted(map(str, sent[7:]))


def test_compares_servers_in_turns(tmp_path: Path) -> None:
    order: list[str] = []

    def reply(name: str, first_s: float) -> Any:
        def make_reply(body: dict[str, Any]) -> Reply:
            order.append(name)
            return Reply(first_s=first_s)

        return make_reply

    with serving(reply("a", 0.02)) as ours, serving(reply("b", 0.2)) as theirs:
        result = run(
            *("--url", ours.url, "--name", "a", "--against", f"b={theirs.url}"),
            *("--workload", "tau", "--requests", 2, "--rounds", 2, "--phase", "cold"),
            *("--out", tmp_path),
        )
    assert result.exit_code == 0, result.output
    assert order == ["a"] * 3 + ["b"] * 6 + ["a"] * 3
    (ratios,) = read(tmp_path)["faster_than"]
    assert ratios["ttft_s"]["num_rounds"] == 2
    assert ratios["ttft_s"]["low"] > 1
    prompts = [str(seen.body["messages"]) for seen in ours.seen]
    assert prompts[1] != prompts[4]  # the second round begins cold
    assert prompts[1:3] == [str(seen.body["messages"]) for seen in theirs.seen][1:3]


def test_starts_a_server_and_starts_it_again(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    result = run(
        *("--url", f"http://127.0.0.1:{port}/v1", "--start", start_command(port)),
        *("--workload", "chats", "--requests", 2, "--out", tmp_path),
        *("--phase", "warm", "--phase", "restart"),
    )
    assert result.exit_code == 0, result.output
    cached = {row["phase"]: row["cached_tokens"] for row in read(tmp_path)["rows"]}
    assert cached == {"cold": 0, "warm": 128, "restart": 0}  # a restart empties this cache
    assert not listens(port)
    assert (tmp_path / "server.log").exists()


def test_ends_what_it_started_when_it_is_terminated(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    arguments = [
        *("--url", f"http://127.0.0.1:{port}/v1", "--start", start_command(port)),
        *("--workload", "chats", "--requests", "160", "--out", str(tmp_path)),
    ]
    program = "from prefixstore.cli import main; main()"
    process = subprocess.Popen(
        [PYTHON, "-c", program, "bench", "serve", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while not listens(port) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert listens(port)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    assert not listens(port)


def test_errors_of_some_requests_are_reported(tmp_path: Path) -> None:
    numbers = iter(range(100))
    # The first is the short one.
    with serving(lambda body: Reply(status=429 if next(numbers) % 2 else 200)) as server:
        result = run(
            *("--url", server.url, "--workload", "tau", "--requests", 4, "--phase", "cold"),
            *("--out", tmp_path),
        )
    assert result.exit_code == 0, result.output
    assert read(tmp_path)["rows"][0]["errors"] == {"http 429": 2}
    assert "server, cold: 2 x http 429" in result.output


def test_errors_of_all_requests_are_an_error(tmp_path: Path) -> None:
    numbers = iter(range(100))
    with serving(lambda body: Reply(status=503 if next(numbers) else 200)) as server:
        result = run("--url", server.url, "--workload", "tau", "--out", tmp_path)
    assert result.exit_code == 1
    assert "requests: expected answers, got errors only" in result.output


def test_a_server_that_refuses_the_first_request(tmp_path: Path) -> None:
    with serving(lambda body: Reply(status=404)) as server:
        result = run("--url", server.url, "--out", tmp_path)
    assert result.exit_code == 1
    assert "server: expected an answer to a first short request, got http 404" in result.output


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    result = run("--url", f"http://127.0.0.1:{port}/v1", "--out", tmp_path)
    assert result.exit_code == 1
    assert f"server: expected a list of models from http://127.0.0.1:{port}/v1" in result.output


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"{PYTHON} -c 'import sys; sys.exit(\"no such model\")'", "no such model"),
        ("/nonexistent/server", "expected a command that runs"),
    ],
)
def test_a_server_that_does_not_start(tmp_path: Path, command: str, message: str) -> None:
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}/v1"
    result = run("--url", url, "--start", command, "--out", tmp_path)
    assert result.exit_code == 1
    assert message in result.output


def test_what_was_measured_outlives_a_server_that_fails_later(tmp_path: Path) -> None:
    with serving(remember_prompts()) as server:
        result = run(
            *("--url", server.url, "--against", "b=http://127.0.0.1:1/v1"),
            *("--start", "b=/nonexistent/server", "--workload", "chats", "--requests", 2),
            *("--out", tmp_path),
        )
    assert result.exit_code == 1
    assert "b: expected a command that runs" in result.output
    rows = read(tmp_path)["rows"]
    assert [(row["target"], row["phase"]) for row in rows] == [
        ("server", "cold"),
        ("server", "warm"),
    ]


URL = ("--url", "http://127.0.0.1:1/v1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Missing option '--url'"),
        (("--url", "ftp://here/v1"), "url: expected http://HOST:PORT/v1, got 'ftp://here/v1'"),
        (("--url", "http://h:port/v1"), "url: expected a URL"),
        ((*URL, "--against", "there"), "against: expected NAME=URL, got 'there'"),
        ((*URL, "--against", "b=there"), "against: expected http://HOST:PORT/v1, got 'there'"),
        (
            (*URL, "--against", "server=http://h:1/v1"),
            "against: expected a name of its own for each, got 'server' twice",
        ),
        ((*URL, "--start", ""), "start: expected a command, got ''"),
        ((*URL, "--start", "a 'b"), 'start: expected a command, got "a \'b"'),
        ((*URL, "--start", "a", "--start", "b"), "start: expected one command for server"),
        ((*URL, "--phase", "restart"), "phase: expected --start for server beside restart"),
        ((*URL, "--workload", "chats", "--requests", "161"), "requests: expected at most 160"),
        ((*URL, "--requests", "0"), "'--requests': 0 is not in the range"),
        ((*URL, "--rate", "0"), "'--rate': 0"),
        ((*URL, "--rate", "1", "--concurrency", "2"), "expected no --concurrency beside it"),
        ((*URL, "--endpoint", "token-ids"), "endpoint: expected --tokenizer beside token-ids"),
        ((*URL, "--workload", "nothing"), "'--workload': 'nothing' is not one of"),
        ((*URL, "--prefix-tokens", "9000"), "prefix-tokens: expected at most"),
    ],
)
def test_refuses_wrong_options(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments, "--out", tmp_path)
    assert result.exit_code != 0
    assert message in result.output
    assert not (tmp_path / "serve.json").exists()


def test_refuses_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    result = run(*URL, "--tokenizer", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "tokenizer: expected a model's folder" in result.output


def test_names_the_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prefixstore.extras, "find_spec", lambda name: None)
    result = run(*URL, "--out", tmp_path)
    assert result.exit_code == 1
    assert "expected httpx to be installed; run: pip install 'kvkernels[bench]'" in result.output
