"""The tokens of chats so far, so that the next turn begins with the very tokens that are cached.

A model need not write an answer in the tokens that a tokenizer would cut its text into. The next
turn brings the answer back as text; cut again, it may give other tokens than those whose blocks are
cached, and everything from there on would be computed once more. So the text of a prompt and its
answer is remembered together with the tokens:

    remembered   <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello      -> ids
    next turn    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n...
                 '---------------------- ids as they were ------------------'  '- cut anew -'

Text is kept as a digest only. The rest must begin with a special token, for there a tokenizer cuts
in any case; elsewhere the last word of the answer might go on.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from threading import Lock
from typing import Any

from prefixstore.engine.detokenizer import REPLACEMENT, Detokenizer

_Key = tuple[int, bytes]  # length of salt and text in bytes, digest


class Transcripts:
    """Remembers texts and their tokens, the most recently used ones; for several threads."""

    def __init__(self, tokenizer: Any, max_tokens: int = 1 << 22, max_texts: int = 4096) -> None:
        """Remember at most `max_texts` texts with `max_tokens` tokens of 4 bytes together."""
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._max_texts = max_texts
        self._lock = Lock()  # of the next three; nothing is tokenized under it
        self._ids: OrderedDict[_Key, array[int]] = OrderedDict()
        self._lengths: Counter[int] = Counter()  # how many texts have so many bytes
        self._num_tokens = 0
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self._specials = tuple(
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if token.special and not token.lstrip
        )
        self._cuts_before = lru_cache(maxsize=256)(self._try_cut)

    def encode(self, text: str, salt: str) -> list[int]:
        """The tokens of a rendered chat, beginning with the longest text that is remembered."""
        remembered = self._longest(text, salt)
        if remembered is None:
            return self._tokenize(text)
        ids, rest = remembered
        return [*ids, *self._tokenize(rest)]

    def remember(
        self,
        prompt: str,
        answer: str,
        prompt_ids: Sequence[int],
        answer_ids: Sequence[int],
        salt: str,
    ) -> None:
        """Keep the tokens of a prompt and its answer, if those of the answer give its text.

        Args:
            prompt: The rendered chat.
            answer: As the client got it: without what a stop string cut off.
            prompt_ids: Tokens of `prompt`.
            answer_ids: As the model gave them, with the token that ended the answer.
            salt: Only chats of the same salt will find it.
        """
        answer_ids = list(answer_ids)
        while answer_ids and answer_ids[-1] in self._special_ids:
            answer_ids.pop()
        if not self._is_text_of(answer, answer_ids):
            return
        num_tokens = len(prompt_ids) + len(answer_ids)
        if num_tokens > self._max_tokens:
            return
        content = _salted(prompt + answer, salt)
        key = (len(content), hashlib.sha256(content).digest())
        ids = array("I", [*prompt_ids, *answer_ids])
        with self._lock:
            self._forget(key)
            self._ids[key] = ids
            self._lengths[len(content)] += 1
            self._num_tokens += num_tokens
            while self._num_tokens > self._max_tokens or len(self._ids) > self._max_texts:
                self._forget(next(iter(self._ids)))

    def check(self) -> list[str]:
        """Recount; returns one line for each thing that is wrong."""
        wrong = []
        if self._num_tokens != sum(map(len, self._ids.values())):
            wrong.append(f"transcripts: counted {self._num_tokens} tokens")
        if self._lengths != Counter(length for length, _ in self._ids):
            wrong.append(f"transcripts: counted {self._lengths} lengths")
        return wrong

    def _is_text_of(self, answer: str, answer_ids: Sequence[int]) -> bool:
        text = self._tokenizer.decode(
            answer_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if text == answer:
            return True
        # As it was sent: bytes that make no character may read otherwise piece by piece. Without
        # any, something was cut off.
        has_bytes = REPLACEMENT in text or REPLACEMENT in answer
        if not has_bytes or not self._special_ids.isdisjoint(answer_ids):
            return False
        sent = Detokenizer(self._tokenizer)
        return sent.push(answer_ids) + sent.finish() == answer

    def _longest(self, text: str, salt: str) -> tuple[array[int], str] | None:
        content = _salted(text, salt)
        digest, hashed, found = hashlib.sha256(), 0, []
        with self._lock:
            lengths = sorted(length for length in self._lengths if length <= len(content))
        # One pass over the text, with a look at each length that some remembered text has.
        for length in lengths:
            digest.update(content[hashed:length])
            hashed = length
            if (length, digest.digest()) in self._ids:
                found.append((length, digest.digest()))
        for key in reversed(found):
            rest = content[key[0] :].decode("utf-8", "surrogatepass")
            special = next((one for one in self._specials if rest.startswith(one)), None)
            if special is None or not self._cuts_before(special):
                continue
            with self._lock:
                if key in self._ids:  # it may have been forgotten meanwhile
                    self._ids.move_to_end(key)
                    return self._ids[key], rest
        return None

    def _forget(self, key: _Key) -> None:
        ids = self._ids.pop(key, None)
        if ids is None:
            return
        self._num_tokens -= len(ids)
        self._lengths[key[0]] -= 1
        if not self._lengths[key[0]]:
            del self._lengths[key[0]]

    def _tokenize(self, text: str) -> list[int]:
        # The template has written the special tokens itself.
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def _try_cut(self, special: str) -> bool:
        """Whether text is cut before a special token as if a new text began there."""
        before, after = "It is so.", f"{special}\nuser It was"
        apart = self._tokenize(before) + self._tokenize(after)
        return self._tokenize(before + after) == apart


def _salted(text: str, salt: str) -> bytes:
    prefix = salt.encode("utf-8", "surrogatepass")
    return b"%d:%s" % (len(prefix), prefix) + text.encode("utf-8", "surrogatepass")
