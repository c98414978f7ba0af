"""Stand-ins for the demo's tests: a byte tokenizer, a tiny model, a cache that keeps tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BLOCK_SIZE = 64
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: at for at, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        eos_token_id=None,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


class StandInCache:
    """A prefix cache with the interface that the demo uses; its "disk" is a file in a directory."""

    def __init__(self, model: Any, *, tiers: list[str]) -> None:
        self.config = SimpleNamespace(block_size=BLOCK_SIZE)
        disk_path = Path(urlsplit(tiers[-1]).path)
        self._model = model
        self._held: list[tuple[list[int], Any]] = []
        self._file = disk_path / "kv.pt"
        self._on_disk = torch.load(self._file, weights_only=False) if self._file.exists() else []

    @contextmanager
    def session(self, token_ids: torch.Tensor) -> Iterator[DynamicCache]:
        tokens = token_ids[0].tolist()
        whole = (len(tokens) - 1) // BLOCK_SIZE * BLOCK_SIZE
        tier, num_reused, found = "none", 0, None
        for name, entries in (("device", self._held), ("disk", self._on_disk)):
            for held, kv in entries:
                pairs = enumerate(zip(held, tokens, strict=False))
                equal = next((at for at, (a, b) in pairs if a != b), min(len(held), len(tokens)))
                equal = min(equal // BLOCK_SIZE * BLOCK_SIZE, whole)
                if equal > num_reused:
                    tier, num_reused, found = name, equal, kv
        kv = copy.deepcopy(found) if found else DynamicCache()
        if found:
            kv.crop(num_reused - kv.get_seq_length())
        kv.report = SimpleNamespace(
            num_prompt_tokens=len(tokens),
            tokens_by_tier={tier: num_reused} if num_reused else {},
            num_recomputed=len(tokens) - num_reused,
            restore_s=0.0,
        )
        yield kv
        kept = copy.deepcopy(kv)
        if kept.get_seq_length() > len(tokens):
            kept.crop(len(tokens) - kept.get_seq_length())
        self._held.append((tokens, kept))

    def flush(self, timeout_s: float) -> bool:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(self._on_disk + self._held, self._file)
        return True

    def stats(self) -> Any:
        return SimpleNamespace(pool_blocks=10, pool_free_blocks=4)

    def tier_stats(self) -> dict[str, Any]:
        disk_bytes = self._file.stat().st_size if self._file.exists() else 0
        return {
            "memory": SimpleNamespace(used_bytes=5000),
            "disk": SimpleNamespace(used_bytes=disk_bytes),
            "away": None,
        }

    def forget(self) -> list[str]:
        self._file.unlink(missing_ok=True)
        return ["away"] if self._file.parent.name == "away" else []

    def check(self) -> list[str]:
        return []

    def __enter__(self) -> StandInCache:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._held.clear()
