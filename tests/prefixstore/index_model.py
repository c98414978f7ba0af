"""The prefix index's semantics on a plain dict: slow, as it looks at everything each time."""

from collections.abc import Sequence


class Block:
    def __init__(self, num_groups: int) -> None:
        self.ids = [-1] * num_groups
        self.tick = 0
        self.matched_tick = 0  # of the last match that ended here
        self.num_pins = 0  # of the runs that end here


class IndexModel:
    """`blocks` holds every cached block by its salt and all tokens up to its end."""

    def __init__(
        self, block_size: int, num_groups: int, window_blocks: Sequence[int | None] | None = None
    ) -> None:
        self.block_size = block_size
        self.num_groups = num_groups
        self.window_blocks = window_blocks
        self.clock = 0
        self.num_detached = 0
        self.blocks: dict[tuple[bytes, tuple[int, ...]], Block] = {}

    def _path(self, tokens: list[int], salt: bytes) -> list[tuple[bytes, tuple[int, ...]]]:
        ends = range(self.block_size, len(tokens) + 1, self.block_size)
        return [(salt, tuple(tokens[:end])) for end in ends]

    def match(self, tokens: list[int], salt: bytes) -> list[Block]:
        run = self.peek(tokens, salt)
        if run:
            run[-1].matched_tick = self.clock
        return run

    def peek(self, tokens: list[int], salt: bytes) -> list[Block]:
        self.clock += 1
        run: list[Block] = []
        for key in self._path(tokens, salt):
            if key not in self.blocks:
                break
            run.append(self.blocks[key])
            run[-1].tick = self.clock
        return run

    def insert(self, tokens: list[int], ids: list[list[int]], salt: bytes) -> list[list[int]]:
        self.clock += 1
        rejected = []
        for key, offered in zip(self._path(tokens, salt), ids, strict=False):
            block = self.blocks.setdefault(key, Block(self.num_groups))
            block.tick = self.clock
            is_taken = [held == -1 for held in block.ids]
            rejected.append([-1 if t else new for t, new in zip(is_taken, offered, strict=True)])
            block.ids = [
                new if t else held
                for t, new, held in zip(is_taken, offered, block.ids, strict=True)
            ]
        self._forget_unheld()
        return rejected

    def detach(self, tokens: list[int], num_kept: int, salt: bytes) -> list[list[int]]:
        """Detached blocks keep their place, under a salt that is never asked for."""
        path = self._path(tokens, salt)
        if len(path) <= num_kept or len(self.peek(tokens[: num_kept * self.block_size], salt)) < (
            num_kept
        ):
            return []
        found = self.blocks.get(path[num_kept])
        if found is None:
            return []
        self.num_detached += 1
        hidden = salt + b"\0detached %d" % self.num_detached
        top = path[num_kept][1]
        for key in [key for key in self.blocks if key[0] == salt and key[1][: len(top)] == top]:
            self.blocks[hidden, key[1]] = self.blocks.pop(key)
        ids = list(found.ids)
        self._forget_unheld()
        return [ids]

    def is_cached(self, block: Block) -> bool:
        return any(block is other for other in self.blocks.values())

    def evict(self, num_blocks: int) -> list[list[int]]:
        victims: list[list[int]] = []
        while len(victims) < num_blocks:
            free = self._evictable()
            if not free:
                break
            oldest = min(self.blocks[key].tick for key in free)
            (victim,) = (key for key in free if self.blocks[key].tick == oldest)  # never a tie
            victims.append(self.blocks.pop(victim).ids)
            self._forget_unheld()
        return victims

    def num_evictable(self) -> int:
        kept = {
            key
            for (salt, tokens), block in self.blocks.items()
            if block.num_pins > 0
            for key in self._path(list(tokens), salt)
        }
        return len(self.blocks.keys() - kept)

    def unpin(self, block: Block) -> None:
        block.num_pins -= 1
        self._forget_unheld()

    def strip(self, group: int, num_blocks: int) -> list[int]:
        held = []
        for (salt, tokens), block in self.blocks.items():
            worth = self._worth((salt, tokens), group)
            if block.ids[group] >= 0:
                held.append((worth, block.tick, len(tokens), block))
        victims: list[int] = []
        last_worth = 0
        for worth, _, _, block in sorted(held, key=lambda one: one[:3]):
            if len(victims) >= num_blocks and (worth == 0 or worth != last_worth):
                break
            victims.append(block.ids[group])
            block.ids[group] = -1
            last_worth = worth
        self._forget_unheld()
        return victims

    def _worth(self, key: tuple[bytes, tuple[int, ...]], group: int) -> int:
        """When an end whose window holds the block was last used; far later if it is pinned."""
        assert self.window_blocks is not None
        reach = self.window_blocks[group]
        assert reach is not None
        worth = 0
        for _ in range(reach):
            block, after = self.blocks[key], self._after(key)
            if block.num_pins > 0:
                worth = max(worth, 2**63 + block.tick)
            elif not after or (block.matched_tick == 0 and len(after) > 1):
                worth = max(worth, block.tick)
            else:
                worth = max(worth, block.matched_tick)
            if len(after) != 1:
                break
            (key,) = after
        return worth

    def _after(self, key: tuple[bytes, tuple[int, ...]]) -> list[tuple[bytes, tuple[int, ...]]]:
        """The direct successors of a block."""
        salt, tokens = key
        end = len(tokens)
        return [
            other
            for other in self.blocks
            if other[0] == salt
            and len(other[1]) == end + self.block_size
            and other[1][:end] == tokens
        ]

    def _forget_unheld(self) -> None:
        """With windows, remove blocks that no group holds and that have no successor."""
        if self.window_blocks is None:
            return
        while unheld := [key for key in self._evictable() if max(self.blocks[key].ids) < 0]:
            for key in unheld:
                del self.blocks[key]

    def _evictable(self) -> list[tuple[bytes, tuple[int, ...]]]:
        kept = set()
        for (salt, tokens), block in self.blocks.items():
            kept.add((salt, tokens[: -self.block_size]))  # its successor is kept
            if block.num_pins > 0:
                kept.update(self._path(list(tokens), salt))
        return [key for key in self.blocks if key not in kept]
