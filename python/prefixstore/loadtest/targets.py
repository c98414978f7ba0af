"""The servers that are asked: where they are, and how to start and stop those that are ours to."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from prefixstore.errors import ConfigError, StoreError
from prefixstore.loadtest.client import Asked, Client
from prefixstore.loadtest.prompts import MakePrompt

POLL_S = 0.1
STOP_TIMEOUT_S = 30.0
LOG_LINES = 5  # of a server that did not come up are shown


class TargetUnavailable(StoreError):
    """A server did not come up, or does not answer a first short request."""


@dataclass(frozen=True)
class Target:
    """A server that speaks OpenAI's protocol.

    Attributes:
        name: In tables and pictures.
        url: Ends with the version, such as "http://127.0.0.1:8000/v1".
        model: As the server calls it; None for the first that it names.
        api_key: Sent as a bearer token.
        command: Starts it; None for a server that runs already.
    """

    name: str
    url: str
    model: str | None = None
    api_key: str | None = None
    command: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Served:
    """A server that answers: a client of it, and what it calls the model."""

    client: Client
    model: str


def parse_targets(
    name: str,
    url: str,
    against: tuple[str, ...],
    start: tuple[str, ...],
    model: str | None = None,
    api_key: str | None = None,
) -> list[Target]:
    """The servers that the options name, that of `--url` first.

    Args:
        name: Of the server at `url`.
        url: Where it is.
        against: "NAME=URL" of others.
        start: "NAME=COMMAND", or the command of the server at `url` alone.
        model: For all of them.
        api_key: For all of them.

    Raises:
        ConfigError: If one is not of its form, or names come twice.
    """
    urls = {name: _check_url("url", url)}
    for pair in against:
        other, separator, other_url = pair.partition("=")
        if not separator or not other:
            raise ConfigError(f"against: expected NAME=URL, got {pair!r}")
        if other in urls:
            raise ConfigError(f"against: expected a name of its own for each, got {other!r} twice")
        urls[other] = _check_url("against", other_url)
    commands = _parse_commands(name, urls, start)
    return [
        Target(one, urls[one], model=model, api_key=api_key, command=commands.get(one))
        for one in urls
    ]


def check_restart(targets: list[Target]) -> None:
    """Refuse to start servers again that are not ours to start.

    Raises:
        ConfigError: If there are any.
    """
    unstarted = [target.name for target in targets if target.command is None]
    if unstarted:
        raise ConfigError(
            f"phase: expected --start for {', '.join(unstarted)} beside restart, got none"
        )


@asynccontextmanager
async def running(
    target: Target, make_prompt: MakePrompt, log: Path, timeout_s: float
) -> AsyncIterator[Served]:
    """A server that answers; it is started first, and ended after, if it is ours to.

    Args:
        target: The server.
        make_prompt: The form of prompts.
        log: Gets what a server that is started prints.
        timeout_s: How long it may take to come up.

    Raises:
        TargetUnavailable: If it does not come up or does not answer.
    """
    process = None
    if target.command is not None:
        with log.open("ab") as output:
            try:
                process = await asyncio.create_subprocess_exec(
                    *target.command,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,  # a group of its own, so that all of it can be ended
                )
            except OSError as error:
                raise TargetUnavailable(
                    f"{target.name}: expected a command that runs, got {target.command[0]}"
                    f" ({error.strerror})"
                ) from error
    client = Client(target.url, make_prompt, target.api_key)
    try:
        model = await _wait_up(target, client, process, log, timeout_s)
        await _ask_first(target, client, model, timeout_s)
        yield Served(client, model)
    finally:
        await client.close()
        if process is not None:
            await _stop(process)


async def _wait_up(
    target: Target,
    client: Client,
    process: asyncio.subprocess.Process | None,
    log: Path,
    timeout_s: float,
) -> str:
    """Wait until the server names its models; returns the one to ask for."""
    deadline = time.monotonic() + timeout_s
    while True:
        if process is not None and process.returncode is not None:
            last = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
            raise TargetUnavailable(
                f"{target.name}: expected a server, got exit status {process.returncode}; the end"
                f" of {log}:\n" + "\n".join(last)
            )
        try:
            models = await client.list_models(timeout_s)
            if target.model is not None:
                return target.model
            if models:
                return models[0]
            reason = "no models"
        except (httpx.HTTPError, ValueError) as error:
            reason = str(error) or type(error).__name__
        # Only a server that was just started is given time.
        if process is None or time.monotonic() > deadline:
            raise TargetUnavailable(
                f"{target.name}: expected a list of models from {target.url}, got: {reason}"
            )
        await asyncio.sleep(POLL_S)


async def _ask_first(target: Target, client: Client, model: str, timeout_s: float) -> None:
    """One short request, so that what servers do on the first one is not measured."""
    messages = [{"role": "user", "content": "Say yes."}]
    answer = await client.ask(messages, Asked(model, max_tokens=2, timeout_s=timeout_s))
    if answer.error is not None:
        raise TargetUnavailable(
            f"{target.name}: expected an answer to a first short request, got {answer.error}:"
            f" {answer.error_text}"
        )


async def _stop(process: asyncio.subprocess.Process) -> None:
    """End a server, and then whatever it started and left."""
    if process.returncode is None:
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
        except asyncio.TimeoutError:
            process.kill()
            await process.wait()
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # nothing was left


def _check_url(option: str, url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigError(f"{option}: expected a URL, got {url!r} ({error})") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"{option}: expected http://HOST:PORT/v1, got {url!r}")
    return url.rstrip("/")


def _parse_commands(
    name: str, urls: dict[str, str], start: tuple[str, ...]
) -> dict[str, tuple[str, ...]]:
    """The commands by server; one that begins with no server's name is that of `name`."""
    commands: dict[str, tuple[str, ...]] = {}
    for text in start:
        target, separator, command = text.partition("=")
        if not separator or target not in urls:
            target, command = name, text
        if target in commands:
            raise ConfigError(f"start: expected one command for {target}, got another: {text!r}")
        commands[target] = _split("start", command)
    return commands


def _split(option: str, command: str) -> tuple[str, ...]:
    try:
        words = tuple(shlex.split(command))
    except ValueError as error:
        raise ConfigError(f"{option}: expected a command, got {command!r} ({error})") from error
    if not words:
        raise ConfigError(f"{option}: expected a command, got {command!r}")
    return words
