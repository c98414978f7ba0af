"""`kvkernels demo`: its options, its progress bar, and the files it leaves."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from prefixstore.demo.machine import choose_dtype, describe_machine, describe_versions
from prefixstore.demo.prompts import AgentLoop, build_agent_loop
from prefixstore.demo.run import (
    MEMORY_TIER,
    Outcome,
    Plan,
    check_context,
    disk_url,
    forget,
    run_phases,
)
from prefixstore.demo.summary import summarise, write_summary

DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class Arguments:
    """The command line of one run."""

    requests: int
    prefix_tokens: int
    max_new_tokens: int
    cold_requests: int
    seed: int
    dtype: str
    fresh: bool
    tiers: tuple[str, ...]


@click.command()
@click.option("--requests", type=click.IntRange(1, 100), default=20, show_default=True)
@click.option(
    "--prefix-tokens",
    type=click.IntRange(min=64),
    default=7000,
    show_default=True,
    help="Prompt tokens that all requests share, about.",
)
@click.option("--max-new-tokens", type=click.IntRange(1, 1024), default=24, show_default=True)
@click.option(
    "--cold-requests",
    type=click.IntRange(1, 100),
    default=3,
    show_default=True,
    help="Requests to run with the cache off too; each computes the whole prompt twice.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses the documents.")
@click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True)
@click.option("--fresh", is_flag=True, help="Forget what earlier runs left in the tiers.")
@click.option(
    "--tier",
    "tiers",
    multiple=True,
    metavar="URL",
    help="A tier behind the memory tier, such as redis://host/0; several, fastest first."
    "  [default: a directory on disk]",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo-out"),
    show_default=True,
    help="Gets demo.png and summary.json.",
)
@click.option(
    "--cache-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    help="Keeps the model and the disk tier.  [default: ~/.cache/kvkernels]",
)
def demo(out: Path, cache_dir: Path | None, **options: Any) -> None:
    """Run one agent loop on a real model with the cache off and on.

    A second run starts warm: the shared prompt is restored from disk, or from the tiers that are
    given, wherever that run is.
    """
    from prefixstore.models import default_directory

    arguments = Arguments(**options)
    cache_dir = default_directory() if cache_dir is None else cache_dir
    for option, directory in (("--out", out), ("--cache-dir", cache_dir)):
        make_writable(option, directory)
    run_demo(arguments, out, cache_dir, Console())


def run_demo(arguments: Arguments, out: Path, cache_dir: Path, console: Console) -> None:
    """Prepare the model, run every phase, print the report and write the files."""
    from prefixstore.cache import PrefixCache
    from prefixstore.demo.plot import plot_requests
    from prefixstore.demo.report import print_report
    from prefixstore.models import load_model, load_tokenizer, prepare_smollm2
    from prefixstore.tier_urls import check_tiers

    tiers = arguments.tiers or (disk_url(cache_dir / "demo-blocks"),)
    check_tiers([MEMORY_TIER, *tiers])  # a wrong one is told of before the model is loaded
    with console.status("Preparing SmolLM2-135M-Instruct (the first time takes a minute)"):
        path = prepare_smollm2(cache_dir)
        model = load_model(path, choose_dtype(arguments.dtype))
        tokenizer = load_tokenizer(path)
        loop = build_agent_loop(
            tokenizer,
            num_requests=arguments.requests,
            prefix_tokens=arguments.prefix_tokens,
            seed=arguments.seed,
        )
    check_context(model, loop, arguments.max_new_tokens)
    if arguments.fresh:
        forget(model, tiers, PrefixCache.open)
    plan = Plan(arguments.max_new_tokens, arguments.cold_requests, tiers, cache_dir)
    outcome = _run_with_progress(model, loop, plan, PrefixCache.open, console)
    settings = {
        "arguments": asdict(arguments),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "model": {
            "name": "SmolLM2-135M-Instruct",
            "dtype": str(model.dtype).removeprefix("torch."),
        },
    }
    summary = summarise(loop, outcome, settings, tokenizer.decode)
    write_summary(summary, out / "summary.json")
    plot_requests(summary, out / "demo.png")
    print_report(console, summary)
    console.print(f"Plot: {out / 'demo.png'}\nFigures: {out / 'summary.json'}", soft_wrap=True)


def make_writable(option: str, directory: Path) -> None:
    """Make a directory, and refuse one that cannot be written.

    Raises:
        click.BadParameter: With the system's reason.
    """
    probe = directory / ".kvkernels-probe"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise click.BadParameter(
            f"expected a writable directory, got {directory} ({error.strerror})",
            param_hint=option,
        ) from error


def _run_with_progress(
    model: Any, loop: AgentLoop, plan: Plan, open_cache: Any, console: Console
) -> Outcome:
    progress = Progress(
        TextColumn("{task.description:<16}"),
        BarColumn(),
        TextColumn("request {task.completed:.0f} of {task.total:.0f}"),
        TimeElapsedColumn(),
        console=console,
    )
    with progress:
        bar = progress.add_task("starting", total=plan.num_steps(loop), completed=0)
        started = 0

        def advance(what: str) -> None:
            nonlocal started
            progress.update(bar, description=what, completed=started)
            started += 1

        outcome = run_phases(model, loop, plan, open_cache, advance)
        progress.update(bar, description="done", completed=plan.num_steps(loop))
    return outcome
