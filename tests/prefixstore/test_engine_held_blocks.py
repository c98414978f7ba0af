"""Which blocks that tiers report an engine can use, with and without windows."""

import pytest

from prefixstore.engine.held_blocks import held_blocks
from prefixstore.store.holders import Holders

NAMES = ("a", "b")  # fastest first


def tiers_of(text):
    """Each block's tier; "." if none holds it, "?" if one gave no answer."""
    return [None if letter in ".?" else letter for letter in text]


def answers(text):
    return Holders(tiers_of(text), {at for at, letter in enumerate(text) if letter == "?"})


@pytest.mark.parametrize(
    ("groups", "windows", "tiers", "cut_off"),
    [
        (["aab"], [None], "aab", []),
        (["a.b."], [None], "a.b", []),
        (["...."], [None], "", []),
        (["abab", "aab."], [None, None], "abb", []),
        # A window of two blocks, after the two on the device.
        (["aaaa", "..ba"], [None, 32], "aaba", []),
        (["aaaa", "aa.."], [None, 32], "aa", [4, 5]),
        (["aa.a", "aaaa"], [None, 32], "aa", [5]),
        ([".aa", "aaa"], [None, 32], "", [3, 4]),
        (["aa.a"], [32], "aa", [5]),
        # Blocks that no group needs count with those after them, whoever holds them.
        (["..ba"], [32], "bbba", []),
        (["aabb", "..bb"], [32, 16], "bbbb", []),
    ],
)
def test_finds_what_can_be_used(groups, windows, tiers, cut_off):
    held = held_blocks([answers(one) for one in groups], 2, NAMES, 16, windows)
    assert list(held.tiers) == tiers_of(tiers)
    assert sorted(held.cut_off) == cut_off
    assert sorted(held.unanswered) == []


@pytest.mark.parametrize(
    ("groups", "windows", "tiers", "cut_off", "unanswered"),
    [
        (["a?.b"], [None], "a..b", [], [3]),
        (["a.??"], [None], "a", [], [4, 5]),
        (["a??a", "a?.a"], [None, None], "a..a", [], [3]),  # the other group has none
        (["aaaa", "aa?a"], [None, 32], "aa", [], [4, 5]),  # the window might be there
        (["a?aa", "aaaa"], [None, 32], "a", [], [3, 4, 5]),
        (["a?a.aa", "aaaaaa"], [None, 32], "a", [6, 7], [3, 4]),
        (["aaaa", "?.aa"], [None, 32], "aaaa", [], []),  # the window has passed them
        (["aa?a"], [32], "aa", [], [4, 5]),
    ],
)
def test_tells_what_might_be_used_if_all_tiers_answered(
    groups, windows, tiers, cut_off, unanswered
):
    held = held_blocks([answers(one) for one in groups], 2, NAMES, 16, windows)
    assert list(held.tiers) == tiers_of(tiers)
    assert sorted(held.cut_off) == cut_off
    assert sorted(held.unanswered) == unanswered
