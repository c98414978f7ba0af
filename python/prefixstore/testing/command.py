"""`kvkernels check`: its options, its progress bar, its tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from kvkernels import CODECS
from prefixstore.demo.prompts import load_documents
from prefixstore.errors import ConfigError
from prefixstore.quality.command import DTYPES, load, locate, read_text
from prefixstore.testing.adapter import Adapter
from prefixstore.testing.cache_adapter import CacheAdapter
from prefixstore.testing.engine_adapter import EngineAdapter
from prefixstore.testing.matrix import check_engines, num_steps
from prefixstore.testing.plan import BFLOAT16_LIMITS, FLOAT16_LIMITS, FLOAT32_LIMITS, Plan
from prefixstore.testing.prompts import cut_prompts
from prefixstore.testing.reference import ModelReference
from prefixstore.testing.report import Report
from prefixstore.testing.states import STATES

WAYS = ("session", "engine")
LIMITS = {
    torch.float32: FLOAT32_LIMITS,
    torch.float16: FLOAT16_LIMITS,
    torch.bfloat16: BFLOAT16_LIMITS,
}


@click.command()
@click.argument("model")
@click.option(
    "--through",
    "ways",
    multiple=True,
    type=click.Choice(WAYS),
    default=WAYS,
    show_default=True,
    help="How prompts reach the model; may be given more than once.",
)
@click.option(
    "--codec",
    "codecs",
    multiple=True,
    type=click.Choice(tuple(CODECS)),
    default=("raw",),
    show_default=True,
    help="May be given more than once.",
)
@click.option(
    "--tier",
    "tiers",
    multiple=True,
    metavar="NAME|URL",
    default=("memory", "disk"),
    show_default=True,
    help='"memory", "disk" (a temporary directory) or a URL such as redis://host/0; each is'
    " checked by itself.",
)
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice([state.name for state in STATES]),
    help='Which to check, besides "cold".  [default: all]',
)
@click.option("--prompts", "num_prompts", type=click.IntRange(2), default=6, show_default=True)
@click.option("--new-tokens", "num_new", type=click.IntRange(2), default=32, show_default=True)
@click.option("--dtype", type=click.Choice(tuple(DTYPES)), default="float32", show_default=True)
@click.option(
    "--batch-invariant/--no-batch-invariant",
    default=None,
    help="Whether the engine is to give the same bits in every state, compared without any rounding"
    " allowed.  [default: where the model allows it and it costs nothing]",
)
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A plain text in UTF-8 to cut prompts from.  [default: documents that come along]",
)
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Gets the report."
)
def check(
    model: str,
    ways: tuple[str, ...],
    codecs: tuple[str, ...],
    tiers: tuple[str, ...],
    states: tuple[str, ...],
    num_prompts: int,
    num_new: int,
    dtype: str,
    batch_invariant: bool | None,
    text: Path | None,
    json_path: Path | None,
) -> None:
    """Check that a model's answers do not depend on what is cached.

    MODEL is the folder of a transformers model, or "smollm2" or "gemma3" for one that comes as a
    Python package. Each prompt is answered cold, from the pool and from each tier, partly cached,
    evicted, after a restart, preempted, alone and in batches; every answer is compared with the
    model without a cache. Ends with status 1 if one is wrong.
    """
    plan = Plan(
        codecs=codecs,
        tiers=tiers,
        states=("cold", *states) if states else tuple(state.name for state in STATES),
        num_new=num_new,
        limits=LIMITS[DTYPES[dtype]],
    )
    if json_path is not None:
        _check_writable("--json", json_path)
    console = Console()
    with console.status("Loading the model"):
        loaded, tokenizer = load(locate(model), DTYPES[dtype])
    prompts = _make_prompts(tokenizer, text, num_prompts, plan.block_size)
    ours: dict[str, Adapter] = {
        "session": CacheAdapter(loaded),
        "engine": EngineAdapter(loaded, tokenizer, batch_invariant=batch_invariant),
    }
    adapters = [ours[way] for way in ways]
    report = _check_with_progress(adapters, ModelReference(loaded), prompts, plan, console)
    print_report(console, report)
    if json_path is not None:
        json_path.write_text(report.to_json())
    if not report.is_good:
        raise SystemExit(1)


def print_report(console: Console, report: Report) -> None:
    """The tables of a report, and what stands below them."""
    for one in report.tables():
        table = Table(title=one.title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in one.header:
            table.add_column(name)
        for row in one.rows:
            table.add_row(*(Text(cell, "red" if "WRONG" in cell else "") for cell in row))
        console.print(table)
    for note in report.notes():
        console.print(Text(note, "red" if note.startswith("WRONG") else ""), soft_wrap=True)
    console.print(Text(report.summary(), "green" if report.is_good else "red"), soft_wrap=True)


def _check_writable(option: str, path: Path) -> None:
    """Make a file, empty if it is new, and refuse one that cannot be written."""
    try:
        path.open("a").close()
    except OSError as error:
        raise click.BadParameter(
            f"expected a writable file, got {path} ({error.strerror})", param_hint=option
        ) from error


def _make_prompts(
    tokenizer: Any, text: Path | None, count: int, block_size: int
) -> list[list[int]]:
    if text is None:
        texts = [document.text for document in load_documents()]
    else:
        texts = [read_text(text)]
    try:
        return cut_prompts(tokenizer, texts, count, block_size)
    except ValueError as error:
        raise ConfigError(f"--prompts: {error}") from error


def _check_with_progress(
    adapters: Sequence[Adapter],
    reference: ModelReference,
    prompts: Sequence[Sequence[int]],
    plan: Plan,
    console: Console,
) -> Report:
    progress = Progress(
        TextColumn("{task.description:<36}"),
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:.0f}"),
        TimeElapsedColumn(),
        console=console,
    )
    with progress:
        total = num_steps(adapters, plan, prompts)
        bar = progress.add_task("starting", total=total)
        begun = 0

        def advance(what: str) -> None:
            nonlocal begun
            progress.update(bar, description=what, completed=begun)
            begun += 1

        report = check_engines(adapters, reference, prompts, plan, advance)
        progress.update(bar, description="done", completed=total)
    return report
