"""Turn an answer's tokens into text as they come, and end it before a stop string."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

REPLACEMENT = "\ufffd"  # how tokenizers show bytes that are no whole character
# UTF-8 has at most 4 bytes a character, and a token at least one byte: an incomplete character
# older than this many tokens stays incomplete.
_MAX_TOKENS_PER_CHARACTER = 4
_MAX_TAIL = 16  # tokens of context, and of pending ones, decoded again with each new one


class UndecodableTokens(Exception):
    """The tokenizer has no text for an answer's tokens."""


class Detokenizer:
    """The text of one answer, piece by piece; the pieces together are the decoded answer.

    But for bytes that make no character: some tokenizers show a run of them otherwise when all of
    it is decoded at once, and pieces that are sent cannot be taken back.

    A token may end within a character, and what a token reads depends on those before it: some
    tokenizers strip the space in front of the first. So the last few tokens are decoded again with
    each new one, and what the text has grown by is new::

        context: returned already         pending: may end within a character
        [" na"] ["ïve"]                   [" " F0 9F] [98]        then [80] makes it whole
        " naïve"                          " " is returned, "�" held back

    Text that a later token may still change is held back. The time for a token does not grow with
    the answer. Special tokens give no text.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Start an answer in the words of a `transformers.PreTrainedTokenizerBase`."""
        self._tokenizer = tokenizer
        self._context: list[int] = []  # tokens whose text was returned completely
        self._pending: list[int] = []  # tokens after those; they may end within a character
        self._num_returned = 0  # characters of the text of both that were returned

    def push(self, token_ids: Sequence[int]) -> str:
        """New text after these tokens, whole characters only; may be empty.

        Raises:
            UndecodableTokens: If the tokenizer raises; so does `finish`.
        """
        return "".join(map(self._push_one, token_ids))

    def finish(self) -> str:
        """The text that was held back; no more tokens come."""
        return self._decode(self._context + self._pending)[self._num_returned :]

    def _push_one(self, token_id: int) -> str:
        self._pending.append(token_id)
        text = self._decode(self._context + self._pending)
        num_held = len(text) - len(text.rstrip(REPLACEMENT))
        if len(self._pending) >= _MAX_TOKENS_PER_CHARACTER:
            # Earlier replacement characters are final by now; only the last may still become a
            # character.
            num_held = min(num_held, 1)
        end = len(text) - num_held
        piece = text[self._num_returned : end]
        self._num_returned = max(self._num_returned, end)
        if num_held == 0:
            self._end_character(has_text=bool(piece))
        elif len(self._pending) > _MAX_TAIL:
            self._context, self._pending = [], self._pending[-_MAX_TOKENS_PER_CHARACTER:]
            self._num_returned = len(self._decode(self._pending)) - num_held
        return piece

    def _end_character(self, has_text: bool) -> None:
        """The text ends with a whole character and is returned: the tail may be cut there."""
        if has_text:
            self._context += self._pending
            if len(self._context) > _MAX_TAIL:
                self._context = self._pending
                self._num_returned = len(self._decode(self._context))
        elif self._num_returned == 0:
            # The first tokens of an answer may stand for a leading space, which decoders drop: keep
            # them.
            self._context = (self._context + self._pending)[-_MAX_TAIL:]
        # Other tokens without text, such as special ones, are left out of the context: the next
        # token decoded behind them alone would lose its space, as the first of a text.
        self._pending = []

    def _decode(self, token_ids: list[int]) -> str:
        try:
            return self._tokenizer.decode(
                token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        except Exception as error:
            # Anybody's code, which may raise anything: most often of ids beyond its vocabulary,
            # which models have that are padded to a round number of tokens.
            raise UndecodableTokens(f"tokenizer: {type(error).__name__}: {error}") from error


class StopStrings:
    """Ends a text before the first of some strings that is complete in it.

    Of several that are complete at the same character the longest counts. What may be the
    beginning of a stop string is held back until it is known not to be.

    All strings are looked for at once, in a time that grows with the text alone (Aho and Corasick,
    "Efficient string matching: an aid to bibliographic search", 1975): a state is the longest end
    of the text that begins a stop string, and its fallback the next shorter one::

        stop strings "ab", "bc"      0 -a-> 1 -b-> 2 ("ab")     fallback of 2: 3
                                     0 -b-> 3 -c-> 4 ("bc")     of all others: 0
    """

    def __init__(self, stop: Sequence[str]) -> None:
        """Look for the strings of `stop`, none of them empty; there may be none."""
        self._next: list[dict[str, int]] = [{}]  # by state, then by character
        self._fallback = [0]
        self._depth = [0]  # characters that the state stands for
        self._match = [0]  # length of the longest stop string the state ends with, or 0
        self._state = 0
        self._held = ""
        for one in stop:
            self._add(one)
        self._link()

    def push(self, text: str) -> tuple[str, bool]:
        """What of the text so far may be shown now, and whether a stop string ended it.

        Raises:
            ValueError: If a stop string ended the text before.
        """
        if self._match[self._state]:
            raise ValueError(f"text: expected none after a stop string, got {text!r}")
        seen = self._held + text
        for at, character in enumerate(text, start=len(self._held)):
            self._state = self._step(self._state, character)
            length = self._match[self._state]
            if length:
                self._held = ""
                return seen[: at + 1 - length], True
        shown = len(seen) - self._depth[self._state]
        self._held = seen[shown:]
        return seen[:shown], False

    def finish(self) -> str:
        """The text that was held back; no more comes."""
        held, self._held = self._held, ""
        return held

    def _add(self, stop: str) -> None:
        state = 0
        for character in stop:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._fallback.append(0)
                self._depth.append(self._depth[state] + 1)
                self._match.append(0)
            state = self._next[state][character]
        self._match[state] = len(stop)

    def _link(self) -> None:
        """Set the fallbacks, those of shorter states first."""
        states = deque(self._next[0].values())
        while states:
            state = states.popleft()
            for character, longer in self._next[state].items():
                fallback = self._step(self._fallback[state], character)
                self._fallback[longer] = fallback
                self._match[longer] = self._match[longer] or self._match[fallback]
                states.append(longer)

    def _step(self, state: int, character: str) -> int:
        while state and character not in self._next[state]:
            state = self._fallback[state]
        return self._next[state].get(character, 0)
