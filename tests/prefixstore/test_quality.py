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
from prefixstore.quality.restored import compute_prefix, fill_cache, restore

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


def test_what_comes_back_to_the_bit_is_computed_with_once() -> None:
    model = tiny_model().to(torch.bfloat16).eval()
    prefix = compute_prefix(model, torch.arange(128) % 100)
    layout = prefix.pool.layout
    formats = {"own": None, **{name: BlockFormat(layout, name) for name in ("raw", "q8", "l12")}}
    restored = restore(prefix, formats)
    assert restored.rows == {"own": 0, "raw": 0, "q8": 1, "l12": 0}
    assert restored.num_raw == {"own": 0, "raw": 0, "q8": 0, "l12": 0}
    assert torch.equal(restored.data[0], prefix.pool.data)
    with pytest.raises(ValueError, match="tokens: expected a multiple of 64, got 100"):
        compute_prefix(model, torch.arange(100))


def test_a_cache_holds_each_content_in_a_row_of_its_own() -> None:
    model = tiny_model().float().eval()
    tokens = torch.arange(128) % 100
    prefix = compute_prefix(model, tokens)
    other = torch.randn_like(prefix.pool.data)
    cache, alone = fill_cache([other, prefix.pool.data]), fill_cache([prefix.pool.data])
    for both, one in zip(cache.layers, alone.layers, strict=True):
        assert torch.equal(both.keys[1:], one.keys) and torch.equal(both.values[1:], one.values)
    with torch.inference_mode():
        wanted = model(input_ids=torch.cat([tokens, torch.tensor([7])])[None]).logits[0, -1]
        got = model(input_ids=torch.tensor([[7], [7]]), past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(got[1], wanted)
    assert not torch.allclose(got[0], wanted)


def test_kv_may_be_rounded_to_16_bits() -> None:
    prefix = compute_prefix(tiny_model().float().eval(), torch.arange(128) % 100)
    dtypes = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    restored = restore(prefix, {"own": None, **dtypes})
    assert set(restored.num_raw.values()) == {0}
    assert restored.rows == {"own": 0, "bfloat16": 1, "float16": 2}
    for name, dtype in dtypes.items():
        got = restored.data[restored.rows[name]]
        assert torch.equal(got, prefix.pool.data.to(dtype).float())
