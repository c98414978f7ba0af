"""`kvkernels bench serve`: its options, its progress bar, and the files it leaves."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Coroutine
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from prefixstore.demo.command import make_writable
from prefixstore.demo.machine import describe_machine, describe_versions
from prefixstore.errors import ConfigError
from prefixstore.extras import missing_extra
from prefixstore.loadtest.plan import PHASES, Arrival, Plan
from prefixstore.loadtest.prompts import ENDPOINTS, MakePrompt, load_tokenizer, make_prompts
from prefixstore.loadtest.workloads import WORKLOADS, CountTokens, Shape

if TYPE_CHECKING:
    from prefixstore.loadtest.run import Replay
    from prefixstore.loadtest.targets import Target, TargetUnavailable


@dataclass(frozen=True)
class Arguments:
    """The command line of one run."""

    url: str
    name: str
    start: tuple[str, ...]
    against: tuple[str, ...]
    model: str | None
    workload: str
    requests: int
    concurrency: int
    rate: float | None
    phases: tuple[str, ...]
    rounds: int
    seed: int
    prefix_tokens: int
    context_tokens: int
    max_tokens: int
    ignore_eos: bool
    endpoint: str
    tokenizer: Path | None
    timeout_s: float
    start_timeout_s: float


@click.group()
def bench() -> None:
    """Measure a server."""


@bench.command(context_settings={"show_default": True})
@click.option("--url", required=True, help="Of the server: http://127.0.0.1:PORT/v1")
@click.option("--name", default="server", help="What to call it.")
@click.option(
    "--against",
    multiple=True,
    metavar="NAME=URL",
    help="Another server to compare it with, in turns; several.",
)
@click.option(
    "--start",
    multiple=True,
    metavar="[NAME=]COMMAND",
    help="Starts the server, or that of the name, for its turns; it is ended after each.",
)
@click.option("--model", default=None, help="As servers call it.  [default: the first they name]")
@click.option(
    "--api-key-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    default=None,
    help="Holds the key that is sent to every server.",
)
@click.option(
    "--workload",
    type=click.Choice(tuple(WORKLOADS)),
    default="agent",
    help="Questions about the same documents, an airline's agent episodes, or short chats.",
)
@click.option("--requests", type=click.IntRange(1), default=20)
@click.option(
    "--concurrency",
    type=click.IntRange(1, 4096),
    default=1,
    help="Closed loop: so many are asked at once.",
)
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    default=None,
    help="Open loop instead: so many requests a second, at random times.",
)
@click.option(
    "--phase",
    "phases",
    type=click.Choice(PHASES),
    multiple=True,
    default=("cold", "warm"),
    help="Prompts nobody saw, the same again, and again after a restart (with --start).",
)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=1,
    help="Each begins cold, with the servers in the other order.",
)
@click.option("--seed", type=int, default=0)
@click.option(
    "--prefix-tokens",
    type=click.IntRange(64),
    default=7000,
    help="Prompt tokens that the agent loop's requests share, about.",
)
@click.option(
    "--context-tokens",
    type=click.IntRange(256),
    default=8192,
    help="What the server takes; longer episodes are cut at a turn.",
)
@click.option("--max-tokens", type=click.IntRange(1), default=32)
@click.option("--ignore-eos", is_flag=True, help="Ask for all of them, where a server can.")
@click.option(
    "--endpoint",
    type=click.Choice(ENDPOINTS),
    default="chat",
    help="With text or token ids all servers get the same prompt, whatever their templates.",
)
@click.option(
    "--tokenizer",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=None,
    help="The model's folder: lengths are exact, and templates applied here.",
)
@click.option("--timeout-s", type=click.FloatRange(0, min_open=True), default=600.0)
@click.option("--start-timeout-s", type=click.FloatRange(0, min_open=True), default=300.0)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("bench-out"),
    help="Gets serve.json, serve.png and the logs of servers that were started.",
)
def serve(out: Path, api_key_file: Path | None, **options: Any) -> None:
    """Replay real conversations against a server, and compare it with others.

    The servers speak OpenAI's protocol. Each replay is sent twice: cold, and then warm. Times count
    from when a request is sent.
    """
    message = missing_extra("bench")
    if message:
        raise click.ClickException(message)
    arguments = Arguments(**options)
    given = click.get_current_context().get_parameter_source("concurrency")
    if arguments.rate is not None and given is not click.core.ParameterSource.DEFAULT:
        raise click.BadParameter("expected no --concurrency beside it", param_hint="--rate")
    make_writable("--out", out)
    api_key = api_key_file.read_text().strip() if api_key_file else None
    run_bench(arguments, api_key, out, Console())


def run_bench(arguments: Arguments, api_key: str | None, out: Path, console: Console) -> None:
    """Replay everything, print the report and write the files."""
    from prefixstore.loadtest.plot import plot_ttft
    from prefixstore.loadtest.report import print_report
    from prefixstore.loadtest.summary import summarise, write_summary
    from prefixstore.loadtest.targets import check_restart, parse_targets

    targets = parse_targets(
        *(arguments.name, arguments.url, arguments.against, arguments.start, arguments.model),
        api_key,
    )
    tokenizer = load_tokenizer(arguments.tokenizer) if arguments.tokenizer else None
    count_tokens = _counter(tokenizer)
    make_prompt = make_prompts(arguments.endpoint, tokenizer)
    plan = make_plan(arguments, count_tokens)
    plan.conversations(0)  # refuses what cannot be before a server is started
    if "restart" in plan.phases:
        check_restart(targets)
    began, load_before = datetime.now(timezone.utc), os.getloadavg()
    replays, failure = _run_with_progress(plan, targets, make_prompt, out, console)
    if failure is not None and not replays:
        raise failure
    settings = {
        "date": began.isoformat(timespec="seconds"),
        "arguments": _plain(asdict(arguments)),
        "machine": describe_machine(),
        # Of the last minute, five and fifteen: who else was at work on this machine.
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "versions": describe_versions() | {"httpx": version("httpx")},
    }
    summary = summarise(replays, settings, count_tokens)
    write_summary(summary, out / "serve.json")
    plot_ttft(summary, out / "serve.png")
    print_report(console, summary)
    console.print(f"Plot: {out / 'serve.png'}\nFigures: {out / 'serve.json'}", soft_wrap=True)
    if failure is not None:
        raise failure
    if not any(row["num_answered"] for row in summary["rows"]):
        raise ConfigError("requests: expected answers, got errors only (see above)")


def make_plan(arguments: Arguments, count_tokens: CountTokens | None) -> Plan:
    """The plan that the command line asks for."""
    return Plan(
        workload=arguments.workload,
        shape=Shape(
            arguments.prefix_tokens, arguments.context_tokens, arguments.max_tokens, count_tokens
        ),
        num_requests=arguments.requests,
        arrival=Arrival(arguments.concurrency, arguments.rate, arguments.seed),
        # Warm means after cold, so that is always there.
        phases=tuple(name for name in PHASES if name in ("cold", *arguments.phases)),
        num_rounds=arguments.rounds,
        seed=arguments.seed,
        ignore_eos=arguments.ignore_eos,
        timeout_s=arguments.timeout_s,
        start_timeout_s=arguments.start_timeout_s,
    )


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """As JSON takes them."""
    return {name: str(one) if isinstance(one, Path) else one for name, one in arguments.items()}


def _counter(tokenizer: Any) -> CountTokens | None:
    if tokenizer is None:
        return None
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _run_with_progress(
    plan: Plan, targets: list[Target], make_prompt: MakePrompt, out: Path, console: Console
) -> tuple[list[Replay], TargetUnavailable | None]:
    """Every replay that was carried out, and why no more were, if a server failed."""
    from prefixstore.loadtest.run import Hooks, run_rounds
    from prefixstore.loadtest.targets import TargetUnavailable

    progress = Progress(
        TextColumn("{task.description:<20}"),
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:.0f}"),
        TimeElapsedColumn(),
        console=console,
    )
    total = plan.num_rounds * len(targets) * len(plan.phases) * plan.num_requests
    with progress:
        bar = progress.add_task("starting", total=total)

        def advance(target: str, phase: str) -> None:
            progress.update(bar, advance=1, description=f"{target}, {phase}")

        replays: list[Replay] = []
        failure = None
        hooks = Hooks(advance, replays.append)
        try:
            asyncio.run(_until_terminated(run_rounds(plan, targets, make_prompt, out, hooks)))
        except asyncio.CancelledError:
            sys.exit(128 + signal.SIGTERM)
        except TargetUnavailable as error:
            failure = error
        else:
            progress.update(bar, description="done")
    return replays, failure


async def _until_terminated(work: Coroutine[Any, Any, None]) -> None:
    """Await `work`; SIGTERM cancels it, so that the servers it started are ended."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await work
