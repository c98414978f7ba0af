"""The extras of the installed package: what they consist of, and whether it is there."""

from __future__ import annotations

from importlib.util import find_spec

_CLI = ("click", "rich")
EXTRA_PACKAGES = {
    "cli": _CLI,
    "demo": (*_CLI, "transformers", "accelerate", "gguf", "matplotlib"),
    "serve": (*_CLI, "transformers", "jinja2", "fastapi", "uvicorn", "prometheus_client"),
    "bench": ("httpx",),  # beside those of the demo
}


def missing_extra(extra: str) -> str | None:
    """One line that names what to install, or None when all of `extra` is there."""
    missing = [name for name in EXTRA_PACKAGES[extra] if find_spec(name) is None]
    if not missing:
        return None
    return (
        f"kvkernels: expected {', '.join(missing)} to be installed; run:"
        f" pip install 'kvkernels[{extra}]'"
    )
