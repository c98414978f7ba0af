"""Log-probabilities as clients read them: each with its token's text, once that text is shown."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from prefixstore.engine import FinishReason, OutputDelta, TokenLogprob
from prefixstore.engine.detokenizer import REPLACEMENT, Detokenizer

_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")  # how SentencePiece writes a byte


@dataclass(frozen=True)
class TokenText:
    """A token as clients see it.

    Attributes:
        text: What it reads; `bytes:\\xf0\\x9f` if its bytes are no whole characters.
        data: Its bytes: those of an answer's tokens together are the answer in UTF-8, behind the
            space that some tokenizers leave out in front of a text.
    """

    text: str
    data: bytes


@dataclass(frozen=True)
class ShownToken:
    """A token of an answer of which a client has some text.

    Attributes:
        token: The token.
        offset: Characters of the answer before it, or before the character that it is a part of;
            tokens that read U+FFFD, one behind the other, have that of the first.
        logprob: Natural logarithm of its probability.
        top: The most likely tokens in its place and theirs, the most likely first.
    """

    token: TokenText
    offset: int
    logprob: float
    top: tuple[tuple[TokenText, float], ...]


class TokenTexts:
    """What single tokens of a `transformers.PreTrainedTokenizerBase` read. Thread-safe."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special_ids = frozenset(tokenizer.all_special_ids)
        # Tokens are read behind this one, as the first token of a text may lose its space.
        self._anchor = tokenizer("a", add_special_tokens=False).input_ids
        self._num_before = len(self._decode(self._anchor))
        self._read = lru_cache(maxsize=1 << 14)(self._find)

    def read(self, token_id: int) -> TokenText:
        """The text of a token, wherever in a text it stands."""
        return self._read(token_id)

    def _find(self, token_id: int) -> TokenText:
        text = self._decode([*self._anchor, token_id])[self._num_before :]
        data = text.encode() if REPLACEMENT not in text else self._bytes_of_piece(token_id, text)
        try:
            return TokenText(data.decode(), data)
        except UnicodeDecodeError:
            return TokenText("bytes:" + "".join(f"\\x{one:02x}" for one in data), data)

    def _bytes_of_piece(self, token_id: int, text: str) -> bytes:
        """Bytes that are no whole characters, from how the vocabulary writes them."""
        piece = self.tokenizer.convert_ids_to_tokens(token_id)
        single = _BYTE_PIECE.fullmatch(piece)
        if single is not None:
            return bytes.fromhex(single[1])
        if all(one in _BYTE_OF_CHARACTER for one in piece):
            return bytes(_BYTE_OF_CHARACTER[one] for one in piece)
        return text.encode()

    def _decode(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(
            token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


class LogprobReader:
    """Pairs the tokens of one answer with its text.

    Text may come later than its tokens, as long as it may begin a stop string. A token is told of
    once the text from its offset on is shown, so that one that shows nothing, because it ends the
    answer or belongs to the stop string, is never told of::

        tokens    "It" " is" " so" "." "\\n\\n" <end>        stop string "\\n\\n"
        offsets   0    2     5     8   9      11
        shown     It is so.                              of 9 characters: the first four tokens
    """

    def __init__(self, texts: TokenTexts) -> None:
        self._texts = texts
        self._detokenizer = Detokenizer(texts.tokenizer)
        self._num_read = 0  # characters of all tokens so far, shown or not
        self._num_shown = 0
        # Tokens that are not shown yet, with their offsets.
        self._waiting: deque[tuple[int, TokenLogprob]] = deque()

    def push(self, delta: OutputDelta) -> list[ShownToken]:
        """The tokens that this piece of the answer shows."""
        self._num_shown += len(delta.text)
        for logprob in delta.logprobs or ():
            before = self._num_read
            self._num_read += len(self._detokenizer.push([logprob.token_id]))
            # If half a character came before, this token may have shown that it stays incomplete:
            # those characters are not this token's.
            own_text = self._texts.read(logprob.token_id).text
            offset = max(before, self._num_read - len(own_text))
            self._waiting.append((offset, logprob))
        if delta.finish_reason is FinishReason.STOP and self._ends_with_special():
            # Behind half a character the special token would get that one's offset.
            self._waiting.pop()
        shown = []
        while self._waiting and self._waiting[0][0] < self._num_shown:
            shown.append(self._describe(*self._waiting.popleft()))
        return shown

    def _ends_with_special(self) -> bool:
        return bool(self._waiting) and self._waiting[-1][1].token_id in self._texts.special_ids

    def _describe(self, offset: int, one: TokenLogprob) -> ShownToken:
        read = self._texts.read
        top = tuple((read(token_id), logprob) for token_id, logprob in one.top)
        return ShownToken(read(one.token_id), offset, one.logprob, top)


def _read_byte_characters() -> dict[str, int]:
    """The bytes behind the characters of byte-level vocabularies.

    A byte that prints as a character of Latin-1 stands for itself; the others take the characters
    from U+0100 on, in order.
    """
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {
        chr(0x100 + at): byte for at, byte in enumerate(others)
    }


_BYTE_OF_CHARACTER = _read_byte_characters()
