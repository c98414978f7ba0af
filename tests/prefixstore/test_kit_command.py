"""`kvkernels check` on a small model: its output, files, refusals and exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from demo_stand_ins import byte_tokenizer, tiny_model
from kit_faults import damaged_restores, empty_last_block

from prefixstore.commands import kvkernels
from prefixstore.testing import command
from prefixstore.testing.prompts import cut_prompts

WORDS = "The harbour lies north of the town, and the boats come in with the tide. "
FEW = ("--prompts", "3", "--new-tokens", "2", "--state", "evicted", "--tier", "memory")


@pytest.fixture(autouse=True)
def _small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "locate", Path)
    monkeypatch.setattr(
        command, "load", lambda path, dtype: (tiny_model().to(dtype), byte_tokenizer())
    )


def run(*options: str) -> Result:
    return CliRunner().invoke(kvkernels, ["check", "small", *options])


def test_prints_tables_and_writes_json(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    result = run(*FEW, "--codec", "raw", "--codec", "q8", "--json", str(path))
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "session: equal answers, reused tokens" in text
    assert "engine" in text
    assert "codecs with loss" in text
    assert "all as they must be" in text
    report = json.loads(path.read_text())
    assert report["is_good"] and len(report["cells"]) == 8


@pytest.mark.parametrize("is_wanted", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_compares_bits_where_it_is_told_to(tmp_path: Path, dtype: str, is_wanted: bool) -> None:
    path = tmp_path / "report.json"
    wish = "--batch-invariant" if is_wanted else "--no-batch-invariant"
    codecs = ("--codec", "raw", "--codec", "l12") if dtype == "bfloat16" else ()
    result = run(*FEW, *codecs, "--dtype", dtype, wish, "--json", str(path))
    assert result.exit_code == 0, result.output
    cells = json.loads(path.read_text())["cells"]
    assert {cell["adapter"]: cell["is_bitwise"] for cell in cells} == {
        "session": False,
        "engine": is_wanted,
    }


def test_ends_with_1_where_an_answer_is_wrong() -> None:
    with damaged_restores(empty_last_block):
        result = run(*FEW, "--through", "session", "--text", __file__)
    assert result.exit_code == 1
    assert "WRONG session, raw, memory, evicted: prompt 0: expected" in result.output


def test_refuses_a_report_it_cannot_write_before_it_loads_the_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "load", lambda *_: 1 / 0)
    result = run("--json", str(tmp_path / "no" / "report.json"))
    assert result.exit_code == 2
    assert "--json: expected a writable file" in result.output


def test_refuses_too_little_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(WORDS)
    result = run(*FEW, "--text", str(tmp_path / "text.txt"))
    assert result.exit_code == 1
    assert "texts: expected enough for 3 prompts, got 0" in " ".join(result.output.split())


def test_prompts_are_around_whole_blocks_and_share_beginnings() -> None:
    prompts = cut_prompts(byte_tokenizer(), [WORDS * 30], 7, block_size=16)
    beyond = [len(prompt) % 16 for prompt in prompts]
    assert beyond[:2] == [0, 1] and min(map(len, prompts)) >= 32
    assert prompts[2][:56] == prompts[1][:56] and prompts[2][56:60] != prompts[1][56:60]
    assert len({tuple(prompt[:16]) for prompt in prompts}) == 5
