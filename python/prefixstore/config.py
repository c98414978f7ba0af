"""What a prefix cache is built from; each part's own options lie beside that part."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvkernels import CODECS
from prefixstore.errors import ConfigError
from prefixstore.tiers.base import PAGE_BYTES, check_bytes

GIB = 1 << 30


@dataclass(frozen=True)
class CacheConfig:
    """Sizes and places of a `PrefixCache`.

    Attributes:
        block_size: Tokens in a block; one of 16, 32, 64, 128, 256.
        pool_tokens: Tokens the device pool holds, cached and in use together; None for four
            times the model's context, at most a quarter of the memory.
        memory_bytes: Size of the host memory tier, at least 4096; 0 for none.
        disk_path: Directory of the disk tier; None for none.
        disk_bytes: Bound of the disk tier, at least 4096.
        salt: Namespace; sessions of different salts never share blocks.
        codec: How blocks are written into the tiers: one of `kvkernels.CODECS` for all layers, or
            one for each of the model's layers. "raw" and "l12" change nothing; the others are
            smaller and cost some precision.
        exact_blocks: So many blocks at the start of a sequence are written without loss, whatever
            the codec: attention leans on the first tokens more than on others.
    """

    block_size: int = 64
    pool_tokens: int | None = None
    memory_bytes: int = GIB
    disk_path: str | Path | None = None
    disk_bytes: int = 4 * GIB
    salt: str = ""
    codec: str | Sequence[str] = "raw"
    exact_blocks: int = 0

    def __post_init__(self) -> None:
        if self.block_size not in (16, 32, 64, 128, 256):
            raise ConfigError(
                f"block_size: expected one of 16, 32, 64, 128, 256, got {self.block_size!r}"
            )
        for name in ("pool_tokens", "memory_bytes", "disk_bytes"):
            value = getattr(self, name)
            if not isinstance(value, int) and not (value is None and name == "pool_tokens"):
                raise ConfigError(f"{name}: expected an integer, got {value!r}")
        if not isinstance(self.salt, str):
            raise ConfigError(f"salt: expected a string, got {self.salt!r}")
        if not isinstance(self.codec, str):
            object.__setattr__(self, "codec", tuple(self.codec))
        for name in (self.codec,) if isinstance(self.codec, str) else self.codec:
            if name not in CODECS:
                raise ConfigError(f"codec: expected one of {tuple(CODECS)}, got {name!r}")
        if not isinstance(self.exact_blocks, int) or self.exact_blocks < 0:
            raise ConfigError(f"exact_blocks: expected 0 or more, got {self.exact_blocks!r}")
        if self.pool_tokens is not None and self.pool_tokens < self.block_size:
            raise ConfigError(
                f"pool_tokens: expected at least one block of {self.block_size},"
                f" got {self.pool_tokens!r}"
            )
        if self.memory_bytes != 0 and self.memory_bytes < PAGE_BYTES:
            raise ConfigError(
                f"memory_bytes: expected 0 or at least {PAGE_BYTES}, got {self.memory_bytes!r}"
            )
        if self.disk_path is not None:
            if not isinstance(self.disk_path, (str, Path)) or self.disk_path == "":
                raise ConfigError(f"disk_path: expected a directory, got {self.disk_path!r}")
            object.__setattr__(self, "disk_path", Path(self.disk_path))
            check_bytes("disk_bytes", self.disk_bytes, PAGE_BYTES)


def physical_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
