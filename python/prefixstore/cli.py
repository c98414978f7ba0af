"""The command `kvkernels`."""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec

EXTRA_PACKAGES = {
    "demo": ("click", "rich", "transformers", "accelerate", "gguf", "matplotlib"),
    "serve": ("click", "rich", "transformers", "jinja2", "fastapi", "uvicorn", "prometheus_client"),
    "bench": ("httpx",),  # beside those of the demo
}


def main() -> None:
    """Entry point of the console script; ends the process with its exit status."""
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
    message = missing_extra("serve" if command == "serve" else "demo")  # not `bench serve`
    if message:
        sys.exit(message)
    # The command line's own libraries are an extra, so they are imported once they are known
    # to be there.
    from prefixstore.commands import run

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    run()


def missing_extra(extra: str) -> str | None:
    """One line that names what to install, or None when all of `extra` is there."""
    missing = [name for name in EXTRA_PACKAGES[extra] if find_spec(name) is None]
    if not missing:
        return None
    return (
        f"kvkernels: expected {', '.join(missing)} to be installed; run:"
        f" pip install 'kvkernels[{extra}]'"
    )
