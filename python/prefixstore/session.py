"""The KV of one sequence: what a model generates with, and what became of its prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
import torch

from kvkernels.errors import UnsupportedError
from kvkernels.nn.transformers import PagedCache
from prefixstore.device import DeviceBlocks
from prefixstore.index import Match
from prefixstore.pass_timer import PassTimer, TimedPass
from prefixstore.restore import RestoredPrefix
from prefixstore.reuse_report import ReuseReport
from prefixstore.served_model import ServedModel
from prefixstore.tokens import as_tokens


class Session(PagedCache):
    """The KV of one sequence: a `transformers.Cache` that begins with the reused prefix.

    Made by `PrefixCache.session`. Pass it to `model.generate(ids, past_key_values=session)`; the
    model refuses tokens or positions other than the session's. The prompt's blocks are offered to
    other sessions as soon as the model has computed them. Use it as a context manager, or call
    `release`: until then its blocks cannot be evicted.

    Attributes:
        report: What was reused, from where, and what has to be computed.
        served_model: The model whose forward passes are checked; None if none is watched.
    """

    def __init__(
        self,
        device: DeviceBlocks,
        tokens: np.ndarray,
        restored: RestoredPrefix,
        report: ReuseReport,
        publish: Callable[[np.ndarray, np.ndarray, int], Match | None],
        timer: PassTimer,
        served_model: ServedModel | None = None,
    ) -> None:
        self.report = report
        self.served_model = served_model
        self._device = device
        self._tokens = tokens
        self._match: Match | None = None  # pinned; None once released
        self._num_committed = restored.num_blocks
        # Inputs of steps beyond the known tokens, by the position they start at. They are compared
        # when `commit` names those tokens: reading them at every step would make the host wait for
        # a GPU.
        self._steps: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        self._checked_step: tuple[int, int] | None = None  # start and length
        # The tokens that `check_prompt` saw last (a copy), and how many tokens will then be stored.
        self._checked_prompt = (torch.empty(0, dtype=torch.int64), -1)
        self._publish = publish
        self._timer = timer
        self._timed_pass: TimedPass | None = None
        super().__init__(
            device.groups,
            num_cached_tokens=restored.num_blocks * device.block_size,
            block_tables=[[ids.tolist()] for ids in restored.block_ids.T],
            reserve=device.reserve,
            on_step=Session._commit_stored,
            ends=(restored.num_found * device.block_size,),
            max_pass_blocks=device.max_pass_blocks(),
        )
        self._last_step = self.num_tokens  # where the last step began
        # Last: a session that could not be made must not give the match back.
        self._match = restored.match

    @property
    def has_run(self) -> bool:
        """Whether a forward pass has stored tokens into it, which it still holds."""
        return self.num_tokens > self._last_step

    def commit(self, token_ids: torch.Tensor | Sequence[int]) -> int:
        """Offer the whole blocks of `token_ids` stored so far to later sessions.

        Args:
            token_ids: `[num_tokens]` or `[1, num_tokens]`: the prompt and what followed, as
                `model.generate` returns it. Tokens the model has not stored are left out.

        Returns:
            How many tokens of it are cached now.

        Raises:
            ValueError: If `token_ids` does not begin with the session's tokens or differs from
                what the model was run on, or the session was released.
        """
        tokens = as_tokens("token_ids", token_ids)
        known = min(len(tokens), len(self._tokens))
        differs = np.flatnonzero(tokens[:known] != self._tokens[:known])
        if len(differs):
            at = differs[0]
            raise ValueError(
                f"token_ids: expected to continue this session's tokens, with"
                f" {self._tokens[at]} at {at}, got {tokens[at]}"
            )
        if len(tokens) > len(self._tokens):
            for start, (step_ids, position_ids) in self._steps.items():
                # Up to `num_tokens`: a step that failed midway left no KV, so its tokens do not
                # count.
                _compare(tokens[: self.num_tokens], start, step_ids, position_ids)
            # Tokens that are not stored yet may still change.
            self._tokens = tokens[: max(len(self._tokens), self.num_tokens)]
            self._steps = {
                start: step
                for start, step in self._steps.items()
                # The others need no further comparison.
                if start + step[0].numel() > len(self._tokens)
            }
        self._commit_stored()
        return self._num_committed * self._device.block_size

    def begin_prompt(self) -> None:
        """A new call of `generate`: what it was given need not go on from what the last one was."""
        self._checked_prompt = (self._checked_prompt[0], -1)

    def check_prompt(self, token_ids: torch.Tensor, num_new: int) -> None:
        """Compare the tokens that `generate` is about to leave out with those the session holds.

        Args:
            token_ids: `[1, num_tokens]`: the prompt, or its part that the session lacks, and what
                was generated so far.
            num_new: How many of them, the last ones, the model is to be run on.

        Raises:
            ValueError: If the session holds others, or none are new.
        """
        if token_ids.dim() != 2 or len(token_ids) != 1:
            return  # refused by `check_step`
        if num_new <= 0:
            raise ValueError(
                f"input_ids: expected more tokens than the {self.num_tokens} stored in the session,"
                f" got {token_ids.shape[1]}"
            )
        given = token_ids[0].detach()
        left_out = given[: len(given) - num_new]
        before, num_expected = self._checked_prompt
        self._checked_prompt = (given.clone(), self.num_tokens + num_new)
        goes_on = len(before) == len(left_out) and num_expected == self.num_tokens
        # Further steps of one generation read nothing back from a GPU, which would make the host
        # wait: the prompt was compared at the first.
        if goes_on and (given.is_cuda or torch.equal(left_out, before)):
            return
        first = max(self.num_tokens - len(left_out), 0)
        _compare(self._stored_tokens(), first, left_out, None)

    def check_step(self, token_ids: torch.Tensor, position_ids: torch.Tensor | None) -> None:
        """Compare a step the model is about to run with the session's tokens.

        Args:
            token_ids: `[num_new]` or `[1, num_new]`: the tokens from `num_tokens` on.
            position_ids: `[..., num_new]`; None where the model counts on from `num_tokens`.

        Raises:
            ValueError: If the session's tokens or positions are others.
        """
        start = self.num_tokens
        token_ids = token_ids.detach()
        if token_ids.dim() not in (1, 2) or token_ids.numel() != token_ids.shape[-1]:
            raise ValueError(
                f"input_ids: expected one sequence with a session (no beams, no several return"
                f" sequences), got shape {list(token_ids.shape)}"
            )
        if token_ids.numel() == 0:
            raise ValueError(
                f"input_ids: expected more tokens than the {start} stored in the session, got none"
            )
        is_known = start < len(self._tokens)
        # Past the known tokens one token's position is not read from a GPU, which would stop its
        # stream at every step.
        if position_ids is not None and (
            is_known or token_ids.numel() > 1 or not position_ids.is_cuda
        ):
            _check_positions(start, token_ids.numel(), position_ids)
        while self._steps and next(reversed(self._steps)) >= start:  # they are in order
            self._steps.popitem()
        if is_known:
            _compare(self._tokens, start, token_ids, None)
        if start + token_ids.numel() > len(self._tokens):
            positions = None if position_ids is None else position_ids.detach().clone()
            self._steps[start] = (token_ids.clone(), positions)
        self._checked_step = (start, token_ids.numel())
        if start < self.report.num_prompt_tokens:
            self._timed_pass = self._timer.begin(token_ids.numel(), start)

    def end_step(self) -> None:
        """The forward pass that `check_step` announced is over, finished or not."""
        timed, self._timed_pass = self._timed_pass, None
        if timed is not None and self.num_tokens == timed.context + timed.num_new:
            self._timer.end(timed)
        self._checked_step = None
        self._drop_passed()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, as `PagedCache.crop`; what follows may be other tokens.

        With a sliding window those of the last forward pass, at most as many as the window has.
        """
        super().crop(tokens_to_remove)
        self.begin_prompt()
        self._tokens = self._tokens[: self.num_tokens]
        self._steps = {
            at: (step_ids[..., : self.num_tokens - at], position_ids)
            for at, (step_ids, position_ids) in self._steps.items()
            if at < self.num_tokens
        }
        self._num_committed = min(self._num_committed, self.num_tokens // self._device.block_size)

    def release(self) -> None:
        """Give the blocks back; what was committed stays cached. May be called again."""
        super().release()
        match, self._match = self._match, None
        if match is not None:
            self._device.unpin(match)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise UnsupportedError(
            "session: expected another session of the same tokens from PrefixCache.session, which"
            " shares the blocks of this one, got a request to copy it"
        )

    def __del__(self) -> None:
        # Reached without release() when the session was passed straight to generate().
        match = getattr(self, "_match", None)
        if match is not None:
            self._device.abandon(self._tables, match)

    def _stored_tokens(self) -> np.ndarray:
        """The tokens whose KV the session holds, `[num_tokens]`."""
        known = self._tokens[: self.num_tokens]
        stored = np.empty(self.num_tokens, known.dtype)
        for start, (step_ids, _) in self._steps.items():
            ids = step_ids.reshape(-1)[: max(self.num_tokens - start, 0)].cpu().numpy()
            stored[start : start + len(ids)] = ids
        stored[: len(known)] = known
        return stored

    def _begin_step(self, key_states: torch.Tensor) -> None:
        checked, self._checked_step = self._checked_step, None
        if self.served_model is not None and checked != (self.num_tokens, key_states.shape[2]):
            raise ValueError(
                "past_key_values: expected a forward pass of the model the cache was opened for,"
                " got one of another or of a part of it"
            )
        self._drop_passed()
        super()._begin_step(key_states)
        self._last_step = self.num_tokens

    def _drop_passed(self) -> None:
        """Between two forward passes: give back what the windows passed."""
        size = self._device.block_size
        for tables in self._tables:
            if tables.group.window is not None:
                # Keep a window behind the start of the last pass: assisted generation may take back
                # its guesses.
                least = max(self._last_step, self.num_tokens - tables.group.window)
                tables.drop_before(tables.first_seen(min(least, self.num_tokens) // size * size))

    def _commit_stored(self) -> None:
        if self._match is None:
            raise ValueError("session: expected an open session, got a released one")
        block_size = self._device.block_size
        num_blocks = min(self.num_tokens, len(self._tokens)) // block_size
        if num_blocks <= self._num_committed:
            return
        tables = [self.block_ids(group, 0) for group in range(len(self._device.groups))]
        block_ids = np.array([table[:num_blocks] for table in tables], dtype=np.int32).T
        tokens = self._tokens[: num_blocks * block_size]
        match = self._publish(tokens, block_ids, self._num_committed)
        self._num_committed = num_blocks
        if match is not None:
            before, self._match = self._match, match
            self._device.unpin(before)


def _compare(
    tokens: np.ndarray, start: int, step_ids: torch.Tensor, position_ids: torch.Tensor | None
) -> None:
    """Raise ValueError unless a step from `start` on ran on `tokens`, as far as both reach."""
    num_new = min(step_ids.shape[-1], len(tokens) - start)
    if num_new <= 0:
        return
    given = step_ids.reshape(-1)[:num_new].cpu().numpy()
    expected = tokens[start : start + num_new]
    differs = np.flatnonzero(given != expected)
    if len(differs):
        at = differs[0]
        raise ValueError(
            f"input_ids: expected the session's token {expected[at]} at {start + at}, got"
            f" {given[at]}"
        )
    if position_ids is not None:
        _check_positions(start, num_new, position_ids[..., :num_new])


def _check_positions(start: int, num_new: int, position_ids: torch.Tensor) -> None:
    """Raise ValueError unless a step stands where the session's tokens end."""
    positions = position_ids.detach().cpu().numpy()
    wanted = np.arange(start, start + num_new)
    if positions.shape[-1:] != wanted.shape or (positions != wanted).any():
        got = f"{positions.min()} to {positions.max()}" if positions.size else "none"
        raise ValueError(
            f"position_ids: expected {start} to {start + num_new - 1} with a session that holds"
            f" {start} tokens, got {got}"
        )
