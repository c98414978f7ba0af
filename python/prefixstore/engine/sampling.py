"""How the tokens of an answer are chosen, and when it ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MAX_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """One request's wishes.

    Attributes:
        max_tokens: New tokens at most, 1 or more.
        temperature: Divides the logits, 0 to 2; 0 takes the most likely token.
        top_p: Sample among the most likely tokens whose probabilities sum to this, above 0 to 1.
        top_k: Sample among so many of the most likely tokens; 0 for all.
        seed: Of this request's own random numbers; None for one nobody chose. The same seed and
            the same logits give the same tokens, whatever else the engine serves.
        stop: The answer ends before the first of these strings; at most 16, none empty.
        stop_token_ids: The answer ends with one of these tokens, besides the model's own.
        ignore_eos: Go on after the model's end-of-sequence tokens.
        logprobs: Give each token's log-probability, and those of so many of the most likely tokens
            in its place, 0 to 20; None for none.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _check_int("max_tokens", self.max_tokens, 1)
        _check_int("top_k", self.top_k, 0)
        _check_number("temperature", self.temperature, 0.0, 2.0)
        _check_number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise ValueError(f"top_p: expected a number above 0, got {self.top_p!r}")
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), 2**63 - 1)
        if isinstance(self.stop, str) or not all(isinstance(one, str) for one in self.stop):
            raise ValueError(f"stop: expected a list of strings, got {self.stop!r}")
        if len(self.stop) > 16 or not all(self.stop):
            raise ValueError(f"stop: expected at most 16 strings, none empty, got {self.stop!r}")
        object.__setattr__(self, "stop", tuple(self.stop))
        for token_id in self.stop_token_ids:
            _check_int("stop_token_ids", token_id, 0)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, without drawing."""
        return self.temperature == 0


def _check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}: expected an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        bounds = f"{low} or more" if high is None else f"{low} to {high}"
        raise ValueError(f"{name}: expected {bounds}, got {value}")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name}: expected a number, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected {low:g} to {high:g}, got {value}")
