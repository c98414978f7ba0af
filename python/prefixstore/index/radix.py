"""The radix tree over token ids: which blocks hold the front of a prompt, and which to give up."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

try:
    # What `RadixIndex.match` returns: `num_tokens`, a multiple of the block size; `block_ids`, as
    # they were when matched, `[num_blocks, num_groups]`, int32, -1 where a group's block is not
    # resident; and `node`, an opaque handle. A C++ class, because a Python one takes half a
    # microsecond to make, a fifth of a match of 2,000 tokens.
    from _kvkernels import RadixMatch as Match
    from _kvkernels import RadixTree
except ImportError as error:
    raise ImportError(
        "prefixstore.index needs the compiled extension _kvkernels with RadixTree: install a wheel,"
        " or build it in place with `make native`"
    ) from error


@dataclass(frozen=True)
class Run:
    """One node of the tree: blocks that share a path and were last touched together."""

    salt: bytes
    first_token: int  # tokens before it on its path
    tokens: np.ndarray  # [num_tokens], uint32
    block_ids: np.ndarray  # [num_blocks, num_groups], int32
    tick: int  # of the match or insert that touched it last; a higher one is later
    num_pins: int


@dataclass(frozen=True)
class Outline:
    """Every node of the tree at one moment, without tokens; row `i` of each array is one node.

    Attributes:
        handles: For `RadixIndex.tokens_of`, `[num_runs]`, uint64.
        parents: Row of the node before it, always a lower one; -1 for the first of a salt, and of
            what was detached, int32.
        salt_numbers: Its place in `salts`, uint32.
        first_blocks: Blocks before it on its path, uint32.
        num_blocks: Blocks it holds, uint32.
        num_pins: Of the node itself, uint32.
        ticks: Of the match or insert that touched it last, uint64.
        salts: The namespaces.
        clock: The latest tick.
    """

    handles: np.ndarray
    parents: np.ndarray
    salt_numbers: np.ndarray
    first_blocks: np.ndarray
    num_blocks: np.ndarray
    num_pins: np.ndarray
    ticks: np.ndarray
    salts: list[bytes]
    clock: int


@dataclass(frozen=True)
class Stats:
    """What the index holds, and what it was asked since it was made."""

    num_blocks: int
    num_runs: int  # nodes of the tree
    num_salts: int
    num_pinned_runs: int
    num_matches: int
    lookup_blocks: int  # whole blocks of all prompts given to match
    hit_blocks: int  # those of them that were cached
    inserted_blocks: int
    evicted_blocks: int
    stripped_blocks: int  # ids of one group that were given up alone
    token_bytes: int  # token ids of the cached blocks
    overhead_bytes: int  # all other memory of the tree


class RadixIndex:
    """Knows which blocks are cached, by the tokens they stand for.

    The tree is in C++ (`csrc/include/kvkernels/radix_tree.h` shows it). All methods may be called
    from several threads; each is one atomic step.

    Wherever `tokens` is asked for, it is one-dimensional with values from 0 to 2**32 - 1: a numpy
    array or buffer of any integer type (int32 and uint32 are read without a copy), a list or
    tuple, or what `numpy.asarray` takes, such as a torch tensor on the CPU.

    Args:
        block_size: Tokens in a block, 1 to 65535.
        num_groups: Layer groups; each block has one block id for each of them.
        window_blocks: For each group how many blocks before a place the next token there can see,
            None for all; None stands for a None for each. A group with a window can be stripped.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        block_size: int,
        num_groups: int = 1,
        window_blocks: Sequence[int | None] | None = None,
    ) -> None:
        self._block_size = _check_int("block_size", block_size, 1, 65535)
        self._num_groups = _check_int("num_groups", num_groups, 1, 65535)
        windows = [
            RadixTree.NO_WINDOW if one is None else _check_int("window_blocks", one, 0, 2**32 - 2)
            for one in window_blocks or ()
        ]
        self._tree = RadixTree(self._block_size, self._num_groups, windows)

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self._block_size

    @property
    def num_groups(self) -> int:
        """Layer groups, for each of which a block has an id."""
        return self._num_groups

    @property
    def num_blocks(self) -> int:
        """Blocks cached now."""
        return self._tree.num_blocks()

    @property
    def num_evictable(self) -> int:
        """Blocks that no pin keeps: as many `evict` removes if it is asked for all.

        A group may hold no id of some of them; so many are the most that it can get back.
        """
        return self._tree.num_evictable()

    def match(self, tokens: Any, salt: bytes = b"") -> Match:
        """Find the longest cached run of whole blocks at the front of `tokens`, and touch it.

        Raises:
            ValueError: If `tokens` is not a one-dimensional run of token ids, or `salt` not bytes.
        """
        return self._tree.match(tokens, salt)

    def peek(self, tokens: Any, salt: bytes = b"") -> Match:
        """As `match`, for who goes on with a run: it touches the run, but counts neither as a
        look-up, nor its end as a place where prompts end.

        Raises:
            ValueError: As `match`.
        """
        return self._tree.peek(tokens, salt)

    def insert(self, tokens: Any, block_ids: Any, salt: bytes = b"") -> np.ndarray:
        """Cache the first `num_blocks` whole blocks of `tokens`, and touch them.

        Args:
            tokens: At least `num_blocks * block_size` of them; the rest is ignored.
            block_ids: `[num_blocks, num_groups]`, int32; -1 where a group's block is not resident.
            salt: The tenant's namespace; blocks of different salts never meet.

        Returns:
            The ids that were not taken because the index has one there already, for the caller to
            release: `[num_blocks, num_groups]`, int32, -1 where the id was taken. An id given for
            a place that held -1 is taken.

        Raises:
            ValueError: If an argument has a wrong type, shape or value; nothing changes then.
        """
        return self._tree.insert(tokens, block_ids, salt)

    def pin(self, match: Match) -> None:
        """Keep the matched run, and so all before it, from eviction. Pins are counted.

        Raises:
            ValueError: If a block of the run was evicted since, or another index made the match.
        """
        self._tree.pin(match)

    def unpin(self, match: Match) -> None:
        """Take one pin back.

        Raises:
            ValueError: If the run is not pinned, or as for `pin`.
        """
        self._tree.unpin(match)

    def evict(self, num_blocks: int) -> np.ndarray:
        """Remove up to `num_blocks` blocks, least recently touched first, and return their ids.

        Only a block that has no cached block after it and is not pinned can go; of these it is
        always the one least recently touched by a match or insert. There is never a tie.

        Returns:
            `[n, num_groups]`, int32, `n <= num_blocks`, in order of eviction; -1 where a group's
            block was not resident.

        Raises:
            ValueError: If `num_blocks` is not an integer of 0 or more.
        """
        return self._tree.evict(_check_int("num_blocks", num_blocks, 0, 2**63 - 1))

    def strip(self, group: int, num_blocks: int) -> np.ndarray:
        """Give up ids of one group, which has a window; the other groups keep theirs.

        A prompt whose match ends at some place needs the window before it and nothing else of the
        group. A place counts as an end of prompts where a match ended, where no cached block comes
        after it, or more than one. First go ids within no end's window, those of runs touched least
        recently before others; then the windows of ends by when they were last used, each as a
        whole, and those of pinned ends last.

        Blocks that no group holds any more are removed where nothing comes after them.

        Returns:
            `[n]`, int32: `num_blocks`, more where a window had to be given up whole, or all there
            were; each is -1 in the index now.

        Raises:
            ValueError: If `group` has no window, or `num_blocks` is not an integer of 0 or more.
        """
        group = _check_int("group", group, 0, self._num_groups - 1)
        return self._tree.strip(group, _check_int("num_blocks", num_blocks, 0, 2**63 - 1))[:, 0]

    def detach(self, tokens: Any, num_kept: int, salt: bytes = b"") -> np.ndarray:
        """Take a block, and all that is cached after it, out of reach of `match` and `insert`.

        Runs that are pinned stay so; what is detached is evicted in its turn, as if it were not.

        Args:
            tokens: A prompt; the block is the one after its first `num_kept` whole blocks.
            num_kept: Blocks that stay.
            salt: The namespace.

        Returns:
            The ids of the block, `[1, num_groups]`, int32; `[0, num_groups]` if it is not cached.

        Raises:
            ValueError: If an argument has a wrong type or value.
        """
        return self._tree.detach(tokens, _check_int("num_kept", num_kept, 0, 2**32 - 1), salt)

    def walk(self) -> Iterator[Run]:
        """Yield every run, each after those before it on its path.

        Runs evicted, cut or added while the walk is under way may be missing from it.
        """
        for handle in self._tree.runs():
            fields = self._tree.describe(handle)
            if fields is not None:
                salt, first_block, tokens, block_ids, tick, num_pins = fields
                first_token = first_block * self._block_size
                yield Run(salt, first_token, tokens, block_ids, tick, num_pins)

    def outline(self) -> Outline:
        """Every node without its tokens: one short step, also where `walk` would copy gigabytes."""
        return Outline(**self._tree.outline())

    def tokens_of(self, handle: int) -> np.ndarray | None:
        """The tokens of a node of an outline, `[num_tokens]` uint32; None if it was evicted since.

        It may have been split or cut since, and is then shorter than it was.
        """
        fields = self._tree.describe(int(handle))
        return None if fields is None else fields[2]

    def stats(self) -> Stats:
        """Sizes of the tree now, and counters since it was made."""
        return Stats(**self._tree.stats())

    def check(self) -> list[str]:
        """Recount everything; returns one line for each thing that is wrong."""
        return self._tree.check()


def _check_int(name: str, value: int, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise ValueError(f"{name}: expected an integer, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected {low} to {high}, got {value}")
    return int(value)
