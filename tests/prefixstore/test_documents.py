"""What the documents tell to type."""

import re
import shlex
from pathlib import Path

import click
import pytest

from prefixstore.commands import kvkernels
from prefixstore.tier_urls import check_tiers

ROOT = Path(__file__).parents[2]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
# Whole command lines; of `store` and `verify` the documents have only what they look like.
COMMAND = re.compile(r"^(?:\.venv/bin/)?kvkernels (?!store|verify)(.*)$", re.MULTILINE)


def command_lines():
    blocks = re.compile(r"^```\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [
        pytest.param(line, id=f"{path.name}: {line[:40]}")
        for path in DOCUMENTS
        for block in blocks.findall(path.read_text())
        for line in COMMAND.findall(block.replace("\\\n", ""))
    ]


@pytest.mark.parametrize("line", command_lines())
def test_a_command_is_one_that_parses(line, tmp_path):
    for place in ("$PWD", "MODEL"):
        line = line.replace(place, str(tmp_path))
    words = shlex.split(line, comments=True)
    command = kvkernels
    while isinstance(command, click.Group):
        _, command, words = command.resolve_command(click.Context(command), words)
    options = command.make_context(command.name, words).params
    check_tiers([url for url in options.get("tiers", ()) if "://" in url])
