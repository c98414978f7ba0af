"""The command line: its errors, and the files that it leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import prefixstore.cli
import prefixstore.extras
from kvkernels import UnsupportedError, __version__
from prefixstore.commands import kvkernels
from prefixstore.demo import command
from prefixstore.errors import ConfigError
from prefixstore.extras import EXTRA_PACKAGES
from prefixstore.tiers.disk import DiskTier, DiskTierConfig


def run(*arguments: str) -> Result:
    return CliRunner().invoke(kvkernels, list(arguments))


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> list[command.Arguments]:
    """Replaces the model behind the command line; collects the arguments."""
    seen: list[command.Arguments] = []
    monkeypatch.setattr(command, "run_demo", lambda arguments, *_: seen.append(arguments))
    return seen


def test_prints_its_version() -> None:
    assert run("--version").output == f"kvkernels, version {__version__}\n"


def test_lists_its_commands() -> None:
    assert {"demo", "quality"} <= set(run("--help").output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--requests", "0"], "'--requests': 0 is not in the range"),
        (["--requests", "101"], "'--requests': 101 is not in the range"),
        (["--requests", "many"], "'--requests': 'many' is not a valid integer"),
        (["--prefix-tokens", "-1"], "'--prefix-tokens': -1 is not in the range"),
        (["--max-new-tokens", "0"], "'--max-new-tokens': 0 is not in the range"),
        (["--cold-requests", "0"], "'--cold-requests': 0 is not in the range"),
        (["--dtype", "float8"], "'--dtype': 'float8' is not one of"),
        (["--request", "1"], "No such option"),
    ],
)
def test_refuses_wrong_options(
    no_model: list[command.Arguments], arguments: list[str], message: str
) -> None:
    result = run("demo", *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert no_model == []


@pytest.mark.parametrize("option", ["--out", "--cache-dir"])
def test_refuses_a_directory_it_cannot_write(
    no_model: list[command.Arguments], option: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    target = tmp_path / "file" / "inside"
    others = {"--out": tmp_path / "out", "--cache-dir": tmp_path / "cache"} | {option: target}
    result = run("demo", *(str(part) for pair in others.items() for part in pair))
    assert result.exit_code == 2
    assert f"{option}: expected a writable directory" in result.output
    assert "Not a directory" in result.output
    assert no_model == []


@pytest.mark.parametrize(
    ("tier", "message"),
    [
        ("disk://kv", "tiers: disk: expected an absolute path, disk:///path, got 'disk://kv'"),
        ("memory://1GiB", "tiers: expected distinct names, got ['memory', 'memory']"),
    ],
)
def test_the_demo_refuses_its_tiers_before_it_prepares_the_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tier: str, message: str
) -> None:
    monkeypatch.setattr("prefixstore.models.prepare_smollm2", lambda _: 1 / 0)
    result = run("demo", "--tier", tier, "--out", str(tmp_path), "--cache-dir", str(tmp_path))
    assert (result.exit_code, result.output) == (1, f"Error: {message}\n")


def test_passes_its_options_on(no_model: list[command.Arguments], tmp_path: Path) -> None:
    out, cache_dir = tmp_path / "out", tmp_path / "cache"
    result = run(
        *("demo", "--requests", "2", "--seed", "3", "--fresh"),
        *("--out", str(out), "--cache-dir", str(cache_dir)),
    )
    assert result.exit_code == 0, result.output
    (arguments,) = no_model
    assert (arguments.requests, arguments.seed, arguments.fresh) == (2, 3, True)
    assert (arguments.prefix_tokens, arguments.dtype) == (7000, "auto")
    assert out.is_dir() and list(out.iterdir()) == []


@pytest.mark.parametrize("error", [ConfigError("model: not there"), UnsupportedError("a feature")])
def test_shows_errors_of_its_own_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(command, "run_demo", fail)
    result = run("demo", "--out", str(tmp_path), "--cache-dir", str(tmp_path))
    assert result.exit_code == 1
    assert result.output == f"Error: {error}\n"


def test_tells_in_one_line_what_the_system_refuses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    key = tmp_path / "no" / "key"
    monkeypatch.setattr(command, "run_demo", lambda *_: key.write_text("x"))
    result = run("demo", "--out", str(tmp_path), "--cache-dir", str(tmp_path))
    assert (result.exit_code, result.output) == (1, f"Error: {key}: No such file or directory\n")


def test_a_full_disk_behind_its_output_is_told_in_one_line(tmp_path: Path) -> None:
    program = "from prefixstore.commands import run; run()"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program, "key", str(tmp_path / "key")],
            env={**os.environ, "PYTHONUNBUFFERED": "1"},  # otherwise Python adds lines at its end
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (done.returncode, done.stderr) == (1, "Error: No space left on device\n")


def test_names_the_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str) -> object:
        return None if name in ("rich", "matplotlib") else object()

    monkeypatch.setattr(prefixstore.extras, "find_spec", find_spec)
    monkeypatch.setattr(prefixstore.cli.sys, "argv", ["kvkernels", "demo"])
    with pytest.raises(SystemExit) as caught:
        prefixstore.cli.main()
    assert str(caught.value) == (
        "kvkernels: expected rich, matplotlib to be installed; run: pip install 'kvkernels[demo]'"
    )


def test_an_interrupt_while_it_is_imported_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Interrupted:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == "prefixstore.commands":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "prefixstore.commands")
    monkeypatch.setattr(sys, "meta_path", [Interrupted, *sys.meta_path])
    monkeypatch.setattr(prefixstore.cli.sys, "argv", ["kvkernels", "store"])
    with pytest.raises(SystemExit) as caught:
        prefixstore.cli.main()
    assert str(caught.value) == "Aborted!"


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["serve", "--help"], "kvkernels: expected fastapi to be installed; run: pip install"),
        (
            ["-v", "serve", "--help"],
            "kvkernels: expected fastapi to be installed; run: pip install",
        ),
        (["bench", "serve", "--help"], "0"),  # a client of servers, which needs no fastapi
    ],
)
def test_only_the_server_needs_its_extra(
    monkeypatch: pytest.MonkeyPatch, words: list[str], status: str
) -> None:
    def find_spec(name: str) -> object:
        return None if name == "fastapi" else object()

    monkeypatch.setattr(prefixstore.extras, "find_spec", find_spec)
    monkeypatch.setattr(prefixstore.cli.sys, "argv", ["kvkernels", *words])
    with pytest.raises(SystemExit) as caught:
        prefixstore.cli.main()
    assert str(caught.value).startswith(status)


def test_commands_for_stores_and_keys_need_no_models(tmp_path: Path) -> None:
    DiskTier(DiskTierConfig(tmp_path / "kv", 1 << 20)).close()
    others = {name for names in EXTRA_PACKAGES.values() for name in names}
    others -= {*EXTRA_PACKAGES["cli"]}
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({others}));"
        " import prefixstore.cli; prefixstore.cli.main()"
    )
    for words in (["--help"], ["key", tmp_path / "key"], ["store", "check", tmp_path / "kv"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *words], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_a_process_without_click_ends_with_one_line() -> None:
    program = (
        "import sys; sys.modules['click'] = None; sys.argv = ['kvkernels', 'demo'];"
        " import prefixstore.cli; prefixstore.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "pip install 'kvkernels[demo]'" in done.stderr
