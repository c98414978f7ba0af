"""What became of a prompt: what was reused, from where, and why the rest was not."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

DEVICE = "device"  # the name of the pool among the tiers, in reports


class MissReason(str, Enum):
    """Why a whole block of a prompt was computed."""

    NEW = "new"  # nobody computed it before, as far as this process and its tiers know
    EVICTED = "evicted"  # this process computed or loaded it once; no place holds it any more
    LOST = "lost"  # a tier said it holds it, and then did not give it, or gave it wrong
    LATE = "late"  # it was asked for, and computing was faster
    CHEAPER = "cheaper"  # a tier holds it; computing it was expected to be faster
    UNREACHABLE = "unreachable"  # a tier that might hold it gave no answer
    QUARANTINED = "quarantined"  # it was found wrong, or one before it: no tier's is used any more
    NO_ROOM = "no_room"  # a tier holds it; the pool had no blocks left
    GAP = "gap"  # it is there; a session goes on from a whole prefix, and one before it is missing
    WINDOW = "window"  # a tier holds it; a sliding window needs another block that is gone or lost


@dataclass(frozen=True)
class ReuseReport:
    """What became of one prompt.

    Attributes:
        num_prompt_tokens: Tokens of the prompt.
        tokens_by_tier: Reused tokens by where their blocks lay: "device", "memory", "disk".
        num_recomputed: Tokens the model has to compute.
        restore_s: Seconds spent looking up, loading and verifying.
        misses: Tokens of whole blocks that were not reused, by the value of their `MissReason`.
            The prompt's last tokens, less than a block or its last token, are in none.
    """

    num_prompt_tokens: int
    tokens_by_tier: dict[str, int]
    num_recomputed: int
    restore_s: float
    misses: dict[str, int] = field(default_factory=dict)

    @property
    def num_reused(self) -> int:
        """Tokens of the prompt that were not computed."""
        return self.num_prompt_tokens - self.num_recomputed
