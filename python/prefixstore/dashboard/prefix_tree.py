"""The tree of cached prefixes as the page draws it: the largest runs, the rest folded."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from prefixstore.cache import PrefixCache
from prefixstore.index import Outline

MAX_NODES = 500
MAX_AGE_S = 5.0
EXCERPT_TOKENS = 24
EXCERPT_CHARS = 120

Decode = Callable[[list[int]], str]


class PrefixTree:
    """Makes the picture's data, at most once every `MAX_AGE_S` however many pages ask.

    Args:
        cache: Whose prefixes.
        decode: Text of token ids, to show how each run begins; None to show no text.
    """

    def __init__(self, cache: PrefixCache, decode: Decode | None) -> None:
        self._cache = cache
        self._decode = decode
        # Of one process: digests of salts that can be guessed cannot be looked up by them.
        self._digest_key = os.urandom(16)
        self._lock = threading.Lock()
        self._made_at = -MAX_AGE_S
        self._made: dict[str, Any] = {}

    def as_json(self) -> dict[str, Any]:
        """The newest picture's data."""
        with self._lock:
            if time.monotonic() - self._made_at >= MAX_AGE_S:
                self._made = self._make(self._cache.outline())
                self._made_at = time.monotonic()
            return self._made

    def _make(self, outline: Outline) -> dict[str, Any]:
        block_size = self._cache.config.block_size
        tree = fold(outline, MAX_NODES)
        for node, handle in zip(tree["nodes"], tree.pop("handles"), strict=True):
            node["handle"] = str(handle)  # 64 bits, more than a number holds in JavaScript
            if self._decode is not None:
                node["text"] = self._excerpt(handle)
            for name in ("first", "own", "below", "folded"):
                node[f"{name}_tokens"] = node.pop(f"{name}_blocks") * block_size
        tree["folded_tokens"] = tree.pop("folded_blocks") * block_size
        tree["num_tokens"] = int(outline.num_blocks.sum()) * block_size
        tree["salts"] = {
            number: self._digest(outline.salts[number])
            for number in sorted({node["salt"] for node in tree["nodes"]})
        }
        tree["shows_text"] = self._decode is not None
        tree["num_salts"] = len(outline.salts)
        return tree

    def _excerpt(self, handle: int) -> str:
        tokens = self._cache.tokens_of(handle)
        if tokens is None or self._decode is None:
            return ""
        return self._decode(tokens[:EXCERPT_TOKENS].tolist())[:EXCERPT_CHARS]

    def _digest(self, salt: bytes) -> str:
        """A short name of a namespace; empty for the one without a salt, which tells nothing."""
        if not salt:
            return ""
        return hashlib.blake2b(salt, digest_size=4, key=self._digest_key).hexdigest()


def fold(outline: Outline, max_nodes: int) -> dict[str, Any]:
    """The nodes with the most blocks in and below them; what hangs off them folded into counts.

    A node has more blocks below it than any child, so whatever is kept, all before it is too.

    Returns:
        `nodes`, parents first, each with `parent` (its place among them; -1 for the first of a
        salt), `salt`, `first_blocks`, `own_blocks`, `below_blocks` (its own included), `pins`,
        `age` (look-ups and inserts since it was touched) and what was folded away right below it,
        `folded_runs` and `folded_blocks`; `handles` of those nodes; `folded_runs` and
        `folded_blocks` of whole salts; and `num_runs` of all.
    """
    below, runs_below = _sum_below(outline)
    kept = np.sort(np.argsort(-below, kind="stable")[:max_nodes])
    # places[run]: the run's number among the nodes, or len(kept) where it is folded away.
    places = np.full(len(below) + 1, len(kept))
    places[kept] = np.arange(len(kept))
    # Parent -1 (first run of a salt) indexes the extra last entry: none.
    parents = places[outline.parents]
    folded = places[:-1] == len(kept)
    # Of each folded subtree count only its root: the sums include what lies below.
    folded &= (outline.parents < 0) | (parents < len(kept))
    folded_runs, folded_blocks = (
        np.bincount(parents[folded], sums[folded], len(kept) + 1).astype(np.int64).tolist()
        for sums in (runs_below, below)
    )
    nodes = [
        {
            "parent": int(parents[row]) if outline.parents[row] >= 0 else -1,
            "salt": int(outline.salt_numbers[row]),
            "first_blocks": int(outline.first_blocks[row]),
            "own_blocks": int(outline.num_blocks[row]),
            "below_blocks": int(below[row]),
            "pins": int(outline.num_pins[row]),
            "age": outline.clock - int(outline.ticks[row]),
            "folded_runs": folded_runs[place],
            "folded_blocks": folded_blocks[place],
        }
        for place, row in enumerate(kept.tolist())
    ]
    return {
        "nodes": nodes,
        "handles": outline.handles[kept].tolist(),
        "folded_runs": folded_runs[-1],
        "folded_blocks": folded_blocks[-1],
        "num_runs": len(below),
    }


def _sum_below(outline: Outline) -> tuple[np.ndarray, np.ndarray]:
    """Blocks and runs in and below each node, `[num_runs]` int64 each."""
    blocks, parents = outline.num_blocks.tolist(), outline.parents.tolist()
    runs = [1] * len(blocks)
    # Children follow their parents, so going backwards a node's sum is complete when it is added.
    for row in range(len(blocks) - 1, -1, -1):
        above = parents[row]
        if above >= 0:
            blocks[above] += blocks[row]
            runs[above] += runs[row]
    return np.array(blocks, dtype=np.int64), np.array(runs, dtype=np.int64)
