"""Tokens and block ids that the prefix index accepts and refuses."""

import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from prefixstore.index import RadixIndex


def rows(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32).reshape(-1, 1)


BIG = [1, 2**31, 2**32 - 1, 0]

FORMS: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "tuple": tuple,
    "list of numpy integers": lambda tokens: list(np.array(tokens)),
    "uint32": lambda tokens: np.array(tokens, np.uint32),
    "int64": lambda tokens: np.array(tokens, np.int64),
    "uint64": lambda tokens: np.array(tokens, np.uint64),
    "strided": lambda tokens: np.repeat(np.array(tokens, np.uint32), 3)[::3],
    "reversed": lambda tokens: np.array(tokens[::-1])[::-1],
    "misaligned": lambda tokens: np.frombuffer(
        b"x" + np.array(tokens, np.uint32).tobytes(), np.uint32, offset=1
    ),
    "array q": lambda tokens: array.array("q", tokens),
    "array I": lambda tokens: array.array("I", tokens),
    "memoryview": lambda tokens: memoryview(np.array(tokens)),
    "int64 tensor": torch.tensor,
}
SMALL_FORMS: dict[str, Callable[[list[int]], Any]] = {
    "range": lambda tokens: range(tokens[0], tokens[-1] + 1),
    "bytes": bytes,
    **{
        name: lambda tokens, name=name: np.array(tokens, name)
        for name in ("int8", "uint8", "int16", "uint16", "int32")
    },
    "int32 tensor": lambda tokens: torch.tensor(tokens, dtype=torch.int32),
}


@pytest.mark.parametrize(
    ("form", "tokens"),
    [(form, BIG * 5) for form in FORMS.values()]
    + [(form, list(range(20))) for form in SMALL_FORMS.values()],
    ids=[*FORMS, *SMALL_FORMS],
)
def test_reads_tokens_in_any_form(form: Any, tokens: list[int]) -> None:
    index = RadixIndex(4)
    index.insert(np.array(tokens, np.uint32), rows(1, 2, 3, 4, 5))
    assert index.match(form(tokens)).num_tokens == 20
    assert index.insert(form(tokens[:8]), rows(21, 22)).tolist() == [[21], [22]]
    assert index.match(form(tokens[4:])).num_tokens < 20


class Emptying:
    """A token 1 that empties a list when it is read, as another thread might."""

    def __init__(self, tokens: list[Any]) -> None:
        self._tokens = tokens

    def __index__(self) -> int:
        self._tokens.clear()
        return 1


def test_a_list_may_change_while_it_is_read() -> None:
    index = RadixIndex(4)
    index.insert([7, 1, 2, 3], rows(1))
    tokens: list[Any] = [7]
    tokens += [Emptying(tokens), *range(2, 300_000)]  # too many to stay mapped once they are freed
    assert index.match(tokens).num_tokens == 4
    assert tokens == []


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, -1], "values from 0 to 4294967295, got -1"),
        ([2**32], "values from 0 to 4294967295, got 4294967296"),
        ([2**80], "values from 0 to 4294967295, got 1208925819614629174706176"),
        ([1, 2.0], "integers, got float"),
        ([True], "integers, got bool"),
        ([[1, 2]], "integers, got list"),
        (np.array([3] * 40 + [-7], np.int32), "values from 0 to 4294967295, got -7"),
        (np.array([3] * 40 + [-7]), "values from 0 to 4294967295, got -7"),
        (np.array([2**63], np.uint64), "values from 0 to 4294967295, got 9223372036854775808"),
        (array.array("b", [-1]), "values from 0 to 4294967295, got -1"),
        (np.zeros(4), "a 1-d array of integers, got dtype float64"),
        (np.zeros(4, bool), "a 1-d array of integers, got dtype bool"),
        (np.zeros(4, ">i4"), "a 1-d array of integers, got dtype >i4"),
        (np.zeros((2, 2), int), "a 1-d array of integers, got 2 dimensions"),
        (array.array("d", [1.0]), "a 1-d array of integers, got 1 dimensions of format 'd'"),
        (torch.zeros(4), "a 1-d array of integers, got dtype float32"),
        (torch.zeros(4, dtype=torch.bfloat16), "a 1-d array of integers, got Tensor"),
        ("text", "a 1-d array of integers, got 0 dimensions"),
        (None, "a 1-d array of integers, got 0 dimensions"),
        (5, "a 1-d array of integers, got 0 dimensions"),
    ],
)
def test_refuses_bad_tokens(tokens: Any, message: str) -> None:
    index = RadixIndex(4)
    for call in (lambda: index.match(tokens), lambda: index.insert(tokens, rows())):
        with pytest.raises(ValueError, match=r"^tokens: expected ") as error:
            call()
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("block_ids", "message"),
    [
        (rows(1, 2, 3), "block_ids: expected at most 2 rows (whole blocks of tokens), got 3"),
        (np.zeros(2, np.int32), "block_ids: expected shape [num_blocks, 1], got [2]"),
        (np.zeros((2, 2), np.int32), "block_ids: expected shape [num_blocks, 1], got [2, 2]"),
        ([[1.0]], "block_ids: expected dtype int32, got dtype float64"),
        (rows(1, -2), "block_ids: expected -1 to 2147483647, got -2"),
        ([[2**31]], "block_ids: expected -1 to 2147483647, got 2147483648"),
        (
            np.array([[2**32 - 1]], np.uint32),
            "block_ids: expected -1 to 2147483647, got 4294967295",
        ),
        (np.array([[1]], np.uint64), "block_ids: expected dtype int32, got dtype uint64"),
    ],
)
def test_refuses_bad_block_ids(block_ids: Any, message: str) -> None:
    index = RadixIndex(4)
    with pytest.raises(ValueError, match=r"^block_ids") as error:
        index.insert(range(8), block_ids)
    assert message in str(error.value)
    assert index.num_blocks == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RadixIndex(0), "block_size: expected 1 to 65535, got 0"),
        (lambda: RadixIndex(65536), "block_size: expected 1 to 65535, got 65536"),
        (lambda: RadixIndex(2.0), "block_size: expected an integer, got 2.0"),
        (lambda: RadixIndex(True), "block_size: expected an integer, got True"),
        (lambda: RadixIndex(4, 0), "num_groups: expected 1 to 65535, got 0"),
        (lambda: RadixIndex(4).evict(-1), "num_blocks: expected 0 to 9223372036854775807, got -1"),
        (lambda: RadixIndex(4).match([1], "salt"), "salt: expected bytes, got str"),
        (lambda: RadixIndex(4).insert([1], rows(), None), "salt: expected bytes, got NoneType"),
    ],
)
def test_refuses_other_bad_arguments(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert str(error.value) == message
