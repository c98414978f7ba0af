"""Block keys: the hash of a block names its tokens and everything before them."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from sample_blocks import IDENTITY, LAYOUT, make_keys

from prefixstore.record import ROOT_HASH, chain_keys, hash_block


def test_hash_is_as_documented():
    tokens = np.arange(16, dtype=np.uint32)
    digest = hashlib.blake2b(digest_size=16, person=b"kvkernels block1")
    digest.update(ROOT_HASH + IDENTITY + (5).to_bytes(4, "little"))
    digest.update(b"".join(token.to_bytes(4, "little") for token in range(16)))
    assert hash_block(ROOT_HASH, IDENTITY, 5, tokens) == digest.digest()


def test_keys_chain_over_whole_blocks():
    tokens = list(range(40))
    first, second = chain_keys(LAYOUT, IDENTITY, tokens)
    assert first.parent_hash == ROOT_HASH
    assert second.parent_hash == first.block_hash
    assert second.tokens.tolist() == tokens[16:32]
    assert chain_keys(LAYOUT, IDENTITY, tokens[:15]) == []
    assert chain_keys(LAYOUT, IDENTITY, []) == []
    (again,) = chain_keys(LAYOUT, IDENTITY, tokens[16:32], first_parent=first.block_hash)
    assert again.block_hash == second.block_hash


def test_hashes_differ_by_everything_before_them():
    tokens = np.arange(32)
    other_group = replace(LAYOUT, layer_group=1)
    changed = np.concatenate([[99], tokens[1:]])
    runs = [
        chain_keys(LAYOUT, IDENTITY, tokens),
        chain_keys(LAYOUT, bytes(16), tokens),
        chain_keys(other_group, IDENTITY, tokens),
        chain_keys(LAYOUT, IDENTITY, changed),
    ]
    assert len({run[1].block_hash for run in runs}) == len(runs)


def test_keys_do_not_change_with_the_callers_array():
    tokens = np.arange(16, dtype=np.uint32)
    (key,) = chain_keys(LAYOUT, IDENTITY, tokens)
    tokens[:] = 0
    assert key.tokens.tolist() == list(range(16))


@pytest.mark.parametrize("tokens", [[-1] * 16, [1 << 32] * 16, [0.5] * 16, [[0] * 16]], ids=str)
def test_refuses_tokens_that_are_no_ids(tokens):
    with pytest.raises(ValueError, match="tokens: expected"):
        chain_keys(LAYOUT, IDENTITY, tokens)


def test_refuses_a_key_of_wrong_parts():
    (key,) = make_keys(1)
    with pytest.raises(ValueError, match="identity: expected 16 bytes"):
        replace(key, identity=b"short")
    with pytest.raises(ValueError, match=r"tokens: expected uint32 \[16\], got int64 \[16\]"):
        replace(key, tokens=np.arange(16))
