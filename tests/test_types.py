"""The types of what users write: README's program and those of the documents are checked."""

import re
from pathlib import Path

import pytest

api = pytest.importorskip("mypy.api")

ROOT = Path(__file__).parents[1]
SESSION = """
from typing import assert_type
from prefixstore.session import Session

assert_type(session, Session)
"""
ATTENTION = """
from typing import assert_type

import torch

from kvkernels import SharedPrefixes, paged_attention, shared_prefix_attention

Pair = tuple[torch.Tensor, torch.Tensor]


def check(one: torch.Tensor, prefixes: SharedPrefixes, is_wanted: bool) -> None:
    calls = (one, one, one, one, one)
    assert_type(paged_attention(*calls, window=8), torch.Tensor)
    assert_type(paged_attention(*calls, return_lse=True), Pair)
    assert_type(paged_attention(*calls, return_lse=is_wanted), torch.Tensor | Pair)
    assert_type(shared_prefix_attention(*calls, prefixes=prefixes), torch.Tensor)
    assert_type(shared_prefix_attention(*calls, prefixes=prefixes, return_lse=True), Pair)
"""


def test_programs_of_users_have_the_types_that_they_rely_on(tmp_path, monkeypatch):
    (program,) = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S
    )
    (tmp_path / "readme.py").write_text(f'path = prompt = ""\n{program}{SESSION}')
    (tmp_path / "attention.py").write_text(ATTENTION)
    paths = [*tmp_path.glob("*.py"), *(ROOT / "docs").glob("*.py")]
    monkeypatch.chdir(ROOT)  # for its configuration, and the cache of what it has analysed
    told, errors, status = api.run(["--allow-untyped-defs", *map(str, paths)])
    assert status == 0, told + errors
