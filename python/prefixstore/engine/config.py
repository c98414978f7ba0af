"""Bounds and policies of an engine."""

from __future__ import annotations

from dataclasses import dataclass

from prefixstore.errors import ConfigError
from prefixstore.planner import POLICIES

_SWITCHES = ("fuses_layers", "cuda_graphs", "reuses_prefixes")


@dataclass(frozen=True)
class EngineConfig:
    """How much an engine takes on at once.

    Attributes:
        max_running: Requests in one batch.
        max_queued: Requests that wait; beyond them a request is refused at once.
        max_batch_tokens: Tokens of one forward pass: those of running answers first, then prompts
            in chunks. Bounds how long a running answer waits for its next token. Default 512, and
            what a question after as many of a prefix takes.
        max_model_len: Tokens of a prompt and its answer; None for the model's context.
        batch_invariant: Give each request the same bits whatever else is in the batch, however its
            prompt is cut and wherever its prefix came from. None: where the model allows it and it
            costs next to nothing, which is on a CPU.
        fuses_layers: On a CPU, run norms, rotations and gates of the model in one pass each where
            that gives the same numbers, and decoder layers in one function each where that gives
            the same bits; see `kvkernels.nn.fused_layers` and `kvkernels.nn.decoder_layers`.
        cuda_graphs: On a GPU, record passes in which every sequence has one new token, and replay
            them; see `prefixstore.engine.decode_graphs`.
        reuses_prefixes: Whether anything cached is reused; without it every prompt is computed, for
            comparison.
        restore_policy: "planned": what tiers hold is loaded as far as that is faster than computing
            it; "load" and "recompute": always.
        num_loaders: Requests whose blocks are looked up at the same time, and at most as many whose
            blocks are loaded: fewer where calls of their tier share a link.
        audit_share: Of the requests whose prompts reused blocks, the share whose blocks are
            computed once more and compared while the engine has nothing else to do; 0 for none.
        audit_seed: Of the choice; None for another one each time.
    """

    max_running: int = 16
    max_queued: int = 256
    max_batch_tokens: int = 576
    max_model_len: int | None = None
    batch_invariant: bool | None = None
    fuses_layers: bool = True
    cuda_graphs: bool = True
    reuses_prefixes: bool = True
    restore_policy: str = "planned"
    num_loaders: int = 4
    audit_share: float = 0.001
    audit_seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_running", "max_batch_tokens", "num_loaders"):
            self._check_positive(name, getattr(self, name))
        if self.restore_policy not in POLICIES:
            raise ConfigError(
                f"restore_policy: expected one of {POLICIES}, got {self.restore_policy!r}"
            )
        if not isinstance(self.audit_share, (int, float)) or not 0 <= self.audit_share <= 1:
            raise ConfigError(f"audit_share: expected 0 to 1, got {self.audit_share!r}")
        if self.audit_seed is not None and type(self.audit_seed) is not int:
            raise ConfigError(f"audit_seed: expected an integer or None, got {self.audit_seed!r}")
        if self.max_model_len is not None:
            self._check_positive("max_model_len", self.max_model_len)
        if type(self.max_queued) is not int or self.max_queued < 0:
            raise ConfigError(f"max_queued: expected 0 or more, got {self.max_queued!r}")
        for name in _SWITCHES if self.batch_invariant is None else (*_SWITCHES, "batch_invariant"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: expected a boolean, got {getattr(self, name)!r}")
        if self.max_batch_tokens < self.max_running:
            raise ConfigError(
                f"max_batch_tokens: expected one for each running request ({self.max_running}) or"
                f" more, got {self.max_batch_tokens}"
            )

    def _check_positive(self, name: str, value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}: expected a positive integer, got {value!r}")
