"""A fault to plant in the code, as people might make it. Some test must fail for it."""

from __future__ import annotations

from dataclasses import dataclass

CSRC = "csrc/cpu/"
OPS = (
    "tests/ops/test_attention.py",
    "tests/ops/test_attention_features.py",
    "tests/ops/test_attention_codes.py",
)


@dataclass(frozen=True)
class Fault:
    """A text that occurs once in a file, and its replacement.

    Attributes:
        name: What the fault is.
        path: The file, from the root.
        old: The text.
        new: Its replacement.
        isa: Instruction set whose tests must notice it.
        files: Tests to run.
    """

    name: str
    path: str
    old: str
    new: str
    isa: str = "portable"
    files: tuple[str, ...] = OPS
