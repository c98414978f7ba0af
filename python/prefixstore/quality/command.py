"""`kvkernels quality`: its options, its progress bar, and the files it leaves."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from kvkernels import CODECS, BlockFormat, KVLayout
from prefixstore.demo.command import make_writable
from prefixstore.demo.machine import describe_machine, describe_versions
from prefixstore.errors import ConfigError
from prefixstore.quality.measure import OWN, Formats, Plan, Tally, check_plan, measure
from prefixstore.quality.report import plot_codecs, print_table, write_figures
from prefixstore.quality.restored import BLOCK_SIZE, Stored

ALL = "all"
# Numbers that KV of float32 may be rounded to, measured beside the codecs.
ROUNDED = {"bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@click.command()
@click.argument("model")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="A long plain text, in UTF-8.",
)
@click.option(
    "--codec",
    "codecs",
    multiple=True,
    type=click.Choice((*CODECS, *ROUNDED, ALL)),
    default=(ALL,),
    show_default=True,
    help="Which to measure; may be given more than once.",
)
@click.option("--chunks", type=click.IntRange(1), default=8, show_default=True)
@click.option("--prefix-tokens", type=click.IntRange(BLOCK_SIZE), default=768, show_default=True)
@click.option("--scored-tokens", type=click.IntRange(2), default=256, show_default=True)
@click.option("--dtype", type=click.Choice(tuple(DTYPES)), default="bfloat16", show_default=True)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("quality-out"),
    show_default=True,
    help="Gets quality.png and quality.json.",
)
def quality(
    model: str,
    text: Path,
    codecs: tuple[str, ...],
    chunks: int,
    prefix_tokens: int,
    scored_tokens: int,
    dtype: str,
    out: Path,
) -> None:
    """Measure what each codec does to a model's predictions.

    MODEL is the folder of a transformers model, or "smollm2" or "gemma3" for one that comes as a
    Python package. Its KV of a text is encoded, decoded, and predicted from.
    """
    plan = Plan(chunks, prefix_tokens, scored_tokens, num_greedy=min(4, chunks))
    check_plan(plan)
    make_writable("--out", out)
    console = Console()
    with console.status("Loading the model"):
        path = locate(model)
        loaded, tokenizer = load(path, DTYPES[dtype])
    layout = layout_of(loaded)
    formats = make_formats(layout, codecs)
    content = read_text(text)
    tallies = _measure_with_progress(loaded, tokenizer, content, formats, plan, console)
    summary = {
        "model": {"name": path.name, "dtype": dtype},
        "text": text.name,
        "plan": asdict(plan),
        "codecs": summarise(layout, formats, tallies),
        "machine": describe_machine(),
        "versions": describe_versions(),
    }
    print_table(console, summary)
    write_figures(summary, out / "quality.json")
    plot_codecs(summary, out / "quality.png")
    console.print(f"Plot: {out / 'quality.png'}\nFigures: {out / 'quality.json'}", soft_wrap=True)


def locate(name: str) -> Path:
    """The folder of a model, made first if it is one that comes as a package."""
    from prefixstore.models import find_model

    return find_model(name)


def load(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """A model and its tokenizer."""
    from prefixstore.models import load_model, load_tokenizer

    return load_model(path, dtype), load_tokenizer(path)


def layout_of(model: Any) -> KVLayout:
    return KVLayout.from_config(model.config.get_text_config(), dtype=model.dtype)


def make_formats(layout: KVLayout, codecs: tuple[str, ...]) -> Formats:
    """The formats of the codecs asked for; of all, those that fit the layout."""
    formats: Formats = {OWN: None}
    for name in CODECS:
        if ALL in codecs:
            try:
                formats[name] = BlockFormat(layout, name)
            except ValueError:
                continue
        elif name in codecs:
            try:
                formats[name] = BlockFormat(layout, name)
            except ValueError as error:
                raise ConfigError(f"--codec {name}: {error}") from error
    for name, dtype in ROUNDED.items():
        if layout.dtype == torch.float32 and (ALL in codecs or name in codecs):
            formats[name] = dtype
        elif name in codecs:
            raise ConfigError(f"--codec {name}: expected --dtype float32, got {layout.dtype}")
    return formats


def read_text(path: Path) -> str:
    """Raises ConfigError unless the file holds UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--text: expected UTF-8, got {path} ({error.reason})") from error


def summarise(
    layout: KVLayout, formats: Formats, tallies: dict[str, Tally]
) -> dict[str, dict[str, Any]]:
    rows = {}
    num_numbers = layout.block_bytes // layout.dtype.itemsize
    for name, tally in tallies.items():
        ratio = num_numbers * 2 / _stored_bytes(layout, formats[name])
        rows[name] = {"ratio": ratio, **tally.summary(tallies[OWN])}
    return rows


def _stored_bytes(layout: KVLayout, stored: Stored | None) -> int:
    if isinstance(stored, BlockFormat):
        return stored.payload_bytes
    return replace(layout, dtype=stored or layout.dtype).block_bytes


def _measure_with_progress(
    model: Any, tokenizer: Any, text: str, formats: Formats, plan: Plan, console: Console
) -> dict[str, Tally]:
    progress = Progress(
        TextColumn("{task.description:<16}"),
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:.0f}"),
        TimeElapsedColumn(),
        console=console,
    )
    with progress:
        bar = progress.add_task("starting", total=plan.num_steps)
        begun = 0

        def advance(what: str) -> None:
            nonlocal begun
            progress.update(bar, description=what, completed=begun)
            begun += 1

        tallies = measure(model, tokenizer, text, formats, plan, advance)
        progress.update(bar, description="done", completed=plan.num_steps)
    return tallies
