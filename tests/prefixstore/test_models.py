"""Real models from Python packages."""

import sys
from types import SimpleNamespace

import pytest
import torch

from prefixstore import models
from prefixstore.errors import ConfigError

PREPARE = {"smollm2": models.prepare_smollm2, "gemma3": models.prepare_gemma3}
FIRST_WORDS = {"smollm2": " Paris", "gemma3": " the"}


@pytest.fixture
def fake_source(tmp_path, monkeypatch):
    """A package with a file of two bytes instead of a model."""
    package = tmp_path / "site" / "fake_model_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')\n")
    (package / "part0").write_bytes(b"a")
    (package / "part1").write_bytes(b"b")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return models._GgufSource(
        folder="fake",
        files=(("fake_model_package", "part0"), ("fake_model_package", "part1")),
        sha256="fb8e20fc2e4c3f248c60c39bd652f3c1347298bb977b8b4d5903b85055620603",  # of b"ab"
        pip_command="pip install fake-model",
    )


def test_parts_are_joined_without_importing_their_package(fake_source, tmp_path, monkeypatch):
    seen = []

    def convert(gguf, target):
        seen.append(gguf.read_bytes())
        target.mkdir()

    monkeypatch.setattr(models, "_dequantise", convert)
    path = models._prepare(fake_source, tmp_path / "cache")
    assert path == tmp_path / "cache" / "fake"
    assert models._prepare(fake_source, tmp_path / "cache") == path
    assert seen == [b"ab"]  # the second call found it prepared
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == ["fake"]
    assert "fake_model_package" not in sys.modules


def test_missing_package_says_how_to_get_it(tmp_path):
    source = models._GgufSource("fake", (("no_such_package", "x"),), "", "pip install thing")
    with pytest.raises(ConfigError, match="run: pip install thing"):
        models._prepare(source, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_missing_part_says_how_to_get_it(fake_source, tmp_path):
    (tmp_path / "site" / "fake_model_package" / "part1").unlink()
    with pytest.raises(ConfigError, match=r"part1 in package fake_model_package.*pip install fake"):
        models._prepare(fake_source, tmp_path / "cache")


def test_damaged_file_is_refused_and_leaves_nothing(fake_source, tmp_path):
    (tmp_path / "site" / "fake_model_package" / "part1").write_bytes(b"c")
    with pytest.raises(ConfigError, match=r"expected sha256 fb8e20fc.*--force-reinstall"):
        models._prepare(fake_source, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_failed_conversion_leaves_nothing(fake_source, tmp_path, monkeypatch):
    def convert(gguf, target):
        target.mkdir()
        (target / "half").write_text("")
        raise OSError("disk full")

    monkeypatch.setattr(models, "_dequantise", convert)
    with pytest.raises(OSError, match="disk full"):
        models._prepare(fake_source, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_another_process_that_was_faster_wins(fake_source, tmp_path, monkeypatch):
    def convert(gguf, target):
        target.mkdir()
        (tmp_path / "cache" / "fake").mkdir()
        (tmp_path / "cache" / "fake" / "theirs").write_text("")

    monkeypatch.setattr(models, "_dequantise", convert)
    path = models._prepare(fake_source, tmp_path / "cache")
    assert [entry.name for entry in path.iterdir()] == ["theirs"]


def test_default_directory_follows_the_cache_home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.default_directory() == tmp_path / "kvkernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(models, "Path", SimpleNamespace(home=lambda: tmp_path / "home"))
    assert models.default_directory() == tmp_path / "home" / ".cache" / "kvkernels"


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": "{"},
        {"config.json": "[]"},
        {"config.json": '{"model_type": "llama"}'},
        {"config.json": '{"model_type": "llama"}', "model.safetensors": "version https://git-lfs"},
    ],
    ids=["cut", "no_model", "no_weights", "not_downloaded"],
)
def test_says_why_a_folder_cannot_be_loaded(files, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match="MODEL: expected a causal language model in "):
        models.load_model(tmp_path)
    with pytest.raises(ConfigError, match="MODEL: expected a tokenizer in "):
        models.load_tokenizer(tmp_path)


@pytest.mark.model
@pytest.mark.parametrize("name", PREPARE)
def test_real_model_loads_and_speaks(name):
    # Made here if this machine has none yet: that shows packages that are needed but not in the
    # extra.
    path = PREPARE[name]()
    assert PREPARE[name]() == path
    model, tokenizer = models.load_model(path), models.load_tokenizer(path)
    assert model.dtype == torch.float32
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(out[0, -1]) == FIRST_WORDS[name]
