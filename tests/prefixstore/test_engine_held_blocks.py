"""What of the tiers' answers an engine can use, with windows and without."""

import pytest

from prefixstore.engine.held_blocks import held_blocks

NAMES = ("a", "b")  # fastest first


def answers(text):
    """The tier of each block; a point where none holds it."""
    return [None if letter == "." else letter for letter in text]


@pytest.mark.parametrize(
    ("groups", "windows", "tiers", "cut_off"),
    [
        (["aab"], [None], "aab", []),
        (["a.b."], [None], "a.b", []),
        (["...."], [None], "", []),
        (["abab", "aab."], [None, None], "abb", []),
        # A window of two blocks, after the two that are there.
        (["aaaa", "..ba"], [None, 32], "aaba", []),
        (["aaaa", "aa.."], [None, 32], "aa", [4, 5]),
        (["aa.a", "aaaa"], [None, 32], "aa", [5]),
        ([".aa", "aaa"], [None, 32], "", [3, 4]),
        (["aa.a"], [32], "aa", [5]),
    ],
)
def test_finds_what_can_be_used(groups, windows, tiers, cut_off):
    held = held_blocks([answers(one) for one in groups], 2, NAMES, 16, windows)
    assert list(held.tiers) == answers(tiers)
    assert sorted(held.cut_off) == cut_off
