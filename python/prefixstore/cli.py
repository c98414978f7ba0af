"""The command `kvkernels`."""

from __future__ import annotations

import logging
import sys

from prefixstore.extras import missing_extra

# What commands need beside the command line's own libraries; those for stores and keys nothing.
_EXTRAS: dict[str | None, str] = {
    **dict.fromkeys(("bench", "check", "demo", "quality"), "demo"),
    "serve": "serve",
}


def main() -> None:
    """Entry point of the console script; ends the process with its exit status."""
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), None)
    message = missing_extra(_EXTRAS.get(command, "cli"))
    if message:
        sys.exit(message)
    # The command line's own libraries are an extra: import them only after checking for them.
    try:
        from prefixstore.commands import run
    except KeyboardInterrupt:  # it takes seconds; afterwards click says the same
        sys.exit("Aborted!")

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    run()
