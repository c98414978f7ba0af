"""What the prefix index means, kept in a plain dict by looking at everything each time."""


class Block:
    def __init__(self, num_groups: int) -> None:
        self.ids = [-1] * num_groups
        self.tick = 0
        self.num_pins = 0  # of the runs that end here


class IndexModel:
    """`blocks` holds every cached block by its salt and all tokens up to its end."""

    def __init__(self, block_size: int, num_groups: int) -> None:
        self.block_size = block_size
        self.num_groups = num_groups
        self.clock = 0
        self.num_detached = 0
        self.blocks: dict[tuple[bytes, tuple[int, ...]], Block] = {}

    def _path(self, tokens: list[int], salt: bytes) -> list[tuple[bytes, tuple[int, ...]]]:
        ends = range(self.block_size, len(tokens) + 1, self.block_size)
        return [(salt, tuple(tokens[:end])) for end in ends]

    def match(self, tokens: list[int], salt: bytes) -> list[Block]:
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
        return rejected

    def detach(self, tokens: list[int], num_kept: int, salt: bytes) -> list[list[int]]:
        """What is detached keeps its place under a name that nobody asks for."""
        path = self._path(tokens, salt)
        if len(path) <= num_kept or len(self.match(tokens[: num_kept * self.block_size], salt)) < (
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
        return [found.ids]

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
        return victims

    def _evictable(self) -> list[tuple[bytes, tuple[int, ...]]]:
        kept = set()
        for (salt, tokens), block in self.blocks.items():
            kept.add((salt, tokens[: -self.block_size]))  # it has this block after it
            if block.num_pins > 0:
                kept.update(self._path(list(tokens), salt))
        return [key for key in self.blocks if key not in kept]
