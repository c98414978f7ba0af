"""`kvkernels quality` on a small model: the whole command, its figures, its refusals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from demo_stand_ins import byte_tokenizer, tiny_model

from kvkernels import CODECS, BlockFormat
from prefixstore.commands import kvkernels
from prefixstore.quality import command
from prefixstore.quality.restored import compute_prefix, restore

WORDS = "The harbour lies north of the town, and the boats come in with the tide. "


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    model = tiny_model().to(torch.bfloat16).eval()
    monkeypatch.setattr(command, "load", lambda path, dtype: (model, byte_tokenizer()))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "text.txt").write_text(WORDS * 20)
    return tmp_path


def run(folder: Path, *options: str) -> Result:
    arguments = [str(folder), "--text", str(folder / "text.txt"), "--out", str(folder / "out")]
    arguments += ["--chunks", "2", "--prefix-tokens", "192", "--scored-tokens", "32"]
    return CliRunner().invoke(kvkernels, ["quality", *arguments, *options])


def test_measures_every_codec(small_model: Path) -> None:
    result = run(small_model)
    assert result.exit_code == 0, result.output
    summary = json.loads((small_model / "out" / "quality.json").read_text())
    assert list(summary["codecs"]) == ["own", *CODECS]
    for name in ("own", "raw", "l12"):
        row = summary["codecs"][name]
        assert row["kl_mean"] == row["kl_p99"] == row["perplexity_change"] == 0
        assert row["top1_agreement"] == 1
        assert row["greedy_divergence"] == [64, 64]
    by_codec = [summary["codecs"][name]["kl_mean"] for name in ("q8", "q4", "q2")]
    assert 0 < by_codec[0] < by_codec[1] < by_codec[2]
    assert (small_model / "out" / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert all(name in result.output for name in CODECS)


def test_measures_only_what_is_asked_for(small_model: Path) -> None:
    assert run(small_model, "--codec", "q8", "--codec", "raw").exit_code == 0
    summary = json.loads((small_model / "out" / "quality.json").read_text())
    assert list(summary["codecs"]) == ["own", "raw", "q8"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prefix-tokens", "100"], "--prefix-tokens: expected a multiple of 64, got 100"),
        (["--chunks", "50"], "text: expected 11200 tokens or more, got"),
        (["--codec", "q7"], "'q7' is not one of"),
    ],
)
def test_refuses_wrong_options(small_model: Path, options: list[str], message: str) -> None:
    result = run(small_model, *options)
    assert result.exit_code != 0
    assert message in " ".join(result.output.split())


def test_refuses_what_is_no_model(small_model: Path) -> None:
    (small_model / "config.json").unlink()
    result = run(small_model)
    assert result.exit_code == 1
    assert "MODEL: expected a folder with a config.json" in " ".join(result.output.split())


def test_a_cache_restored_as_it_is_is_the_same() -> None:
    model = tiny_model().to(torch.bfloat16).eval()
    prefix = compute_prefix(model, torch.arange(128) % 100)
    own, _ = restore(prefix, None)
    raw, num_raw = restore(prefix, BlockFormat(prefix.pool.layout, "raw"))
    assert num_raw == 0
    for one, other in zip(own.layers, raw.layers, strict=True):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)
    with pytest.raises(ValueError, match="tokens: expected a multiple of 64, got 100"):
        compute_prefix(model, torch.arange(100))


def test_kv_may_be_rounded_to_16_bits() -> None:
    prefix = compute_prefix(tiny_model().float().eval(), torch.arange(128) % 100)
    own, _ = restore(prefix, None)
    for dtype in (torch.bfloat16, torch.float16):
        rounded, num_raw = restore(prefix, dtype)
        assert num_raw == 0
        for one, other in zip(own.layers, rounded.layers, strict=True):
            assert torch.equal(one.keys.to(dtype).float(), other.keys)
            assert not torch.equal(one.keys, other.keys)
