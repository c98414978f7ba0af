"""Token ids as the index and the records take them, and text that they can be made of."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch


def as_tokens(name: str, token_ids: torch.Tensor | np.ndarray | Sequence[int]) -> np.ndarray:
    """A copy of `token_ids` as `[num_tokens]` uint32, from a tensor, an array or a list."""
    if isinstance(token_ids, torch.Tensor):
        tokens = token_ids.detach().cpu().numpy()
    elif isinstance(token_ids, (str, bytes, Mapping)) or not hasattr(token_ids, "__len__"):
        raise ValueError(
            f"{name}: expected a tensor, an array or a list of token ids,"
            f" got {type(token_ids).__name__}"
        )
    else:
        tokens = np.asarray(token_ids)
    if tokens.size == 0:
        return np.zeros(0, dtype=np.uint32)
    if tokens.ndim == 2 and tokens.shape[0] == 1:
        tokens = tokens[0]
    if tokens.ndim != 1:
        raise ValueError(
            f"{name}: expected one sequence, [num_tokens] or [1, num_tokens],"
            f" got shape {list(tokens.shape)}"
        )
    if tokens.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected integers, got {tokens.dtype}")
    if tokens.min() < 0 or tokens.max() >= 1 << 32:
        raise ValueError(
            f"{name}: expected token ids 0 to 2**32 - 1, got {tokens.min()} to {tokens.max()}"
        )
    # Always a copy: blocks are filed under these tokens after the caller may have changed its own.
    return np.array(tokens, dtype=np.uint32, order="C", copy=True)


def text_problem(text: str) -> str | None:
    """What keeps a text from being written as UTF-8, in words; None if nothing does.

    Half a surrogate pair is what other languages leave where they cut a string within a character,
    and JSON brings it here. No tokenizer takes it, and no digest can be made of it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        return f"expected whole characters, got half a surrogate pair, {half}, at {error.start}"
    return None
