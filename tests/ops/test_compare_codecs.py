"""The comparison of codecs that is run by hand still runs."""

import compare_codecs
import pytest
from codec_blocks import IMPLEMENTATIONS


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    arguments = ["compare_codecs.py", *options, "--only", IMPLEMENTATIONS[0]]
    monkeypatch.setattr("sys.argv", arguments)
    return compare_codecs.main()


def test_compares_random_blocks(monkeypatch, capsys) -> None:
    assert run(monkeypatch, "--random", "20", "--seed", "1") == 0
    assert "q4: 20 blocks" in capsys.readouterr().out


@pytest.mark.model
def test_compares_blocks_of_a_model(monkeypatch, capsys, tmp_path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The harbour lies north of the town, and the boats come in. " * 200)
    assert run(monkeypatch, "--real", "20", "--text", str(text)) == 0
    assert "l12: 20 blocks, 0 raw" in capsys.readouterr().out
