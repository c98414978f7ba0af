"""An answer's text piece by piece, with both real models' tokenizers and one of a third kind."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenized_texts import TEXTS, make_stripping_tokenizer

from prefixstore.engine.detokenizer import Detokenizer, StopStrings
from prefixstore.models import load_tokenizer, prepare_gemma3, prepare_smollm2

MAX_TAIL = 34  # tokens decoded at once, however long the answer


@pytest.fixture(scope="module")
def smollm2():
    return load_tokenizer(prepare_smollm2())


@pytest.fixture(scope="module")
def gemma3():
    return load_tokenizer(prepare_gemma3())


@pytest.fixture(params=["smollm2", "gemma3"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def decode(tokenizer, token_ids):
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def without_end(text):
    """The text that no later token can change, with a byte-level tokenizer."""
    return text.rstrip("\ufffd")


class WatchedTokenizer:
    """A tokenizer that records how many tokens it gets at once."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.most_at_once = 0

    def decode(self, token_ids, **options):
        self.most_at_once = max(self.most_at_once, len(token_ids))
        return self.tokenizer.decode(token_ids, **options)


def push_all(tokenizer, token_ids, step=1):
    watched = WatchedTokenizer(tokenizer)
    detokenizer = Detokenizer(watched)
    pieces = [detokenizer.push(token_ids[at : at + step]) for at in range(0, len(token_ids), step)]
    assert watched.most_at_once <= MAX_TAIL
    return "".join(pieces) + detokenizer.finish()


def is_stable(tokenizer, token_ids):
    """Whether no token changes the text before it, except for bytes of a partial character."""
    whole = decode(tokenizer, token_ids)
    return all(
        whole.startswith(without_end(decode(tokenizer, token_ids[:end])))
        for end in range(len(token_ids))
    )


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_pieces_make_the_text(tokenizer, text, step):
    token_ids = tokenizer(text * 5, add_special_tokens=False).input_ids
    assert decode(tokenizer, token_ids) == text * 5
    assert push_all(tokenizer, token_ids, step) == text * 5


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_returns_whole_characters_as_soon_as_they_are_known(tokenizer, text):
    token_ids = tokenizer(text, add_special_tokens=False).input_ids
    detokenizer = Detokenizer(tokenizer)
    returned = ""
    for end in range(1, len(token_ids) + 1):
        piece = detokenizer.push(token_ids[end - 1 : end])
        returned += piece
        assert text.startswith(returned)
        assert returned.startswith(without_end(decode(tokenizer, token_ids[:end])))


def test_pieces_of_random_tokens_make_the_text_where_it_is_stable(tokenizer):
    rng = random.Random(0)
    num_stable = 0
    for _ in range(100):
        token_ids = [rng.randrange(len(tokenizer)) for _ in range(50)]
        made = push_all(tokenizer, token_ids)
        if is_stable(tokenizer, token_ids):
            num_stable += 1
            assert made == decode(tokenizer, token_ids)
    assert num_stable > 50


def test_random_bytes_of_a_byte_level_tokenizer(smollm2):
    """The hardest case: hardly any character is complete."""
    byte_ids = [
        token_id
        for token, token_id in smollm2.get_vocab().items()
        if len(token) <= 2 and "\ufffd" in decode(smollm2, [token_id])
    ]
    assert len(byte_ids) > 100
    rng = random.Random(1)
    for _ in range(100):
        token_ids = rng.choices(byte_ids, k=60)
        assert push_all(smollm2, token_ids) == decode(smollm2, token_ids)


@pytest.mark.parametrize("lead", ["F0", "FF", "80"])
def test_bytes_that_never_make_a_character_are_let_go(gemma3, lead):
    byte = gemma3.convert_tokens_to_ids(f"<0x{lead}>")
    detokenizer = Detokenizer(gemma3)
    returned = [detokenizer.push([byte]) for _ in range(100)]
    assert 90 <= len("".join(returned)) <= 100
    assert max(map(len, returned)) <= 4
    assert "".join(returned) + detokenizer.finish() == "\ufffd" * 100


def test_special_tokens_give_no_text(smollm2):
    words = smollm2("one two", add_special_tokens=False).input_ids
    special = smollm2.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
    token_ids = special + (words + special * 20) * 3
    assert push_all(smollm2, token_ids) == "one two" * 3


def test_finish_gives_what_was_held_back(smollm2):
    token_ids = smollm2("a👍", add_special_tokens=False).input_ids
    detokenizer = Detokenizer(smollm2)
    assert "".join(detokenizer.push([one]) for one in token_ids[:-1]) == "a"
    assert detokenizer.finish() == "\ufffd"


def test_no_tokens_give_no_text(smollm2):
    detokenizer = Detokenizer(smollm2)
    assert detokenizer.push([]) == ""
    assert detokenizer.finish() == ""


STRIPPING = make_stripping_tokenizer()


@settings(max_examples=500, deadline=None)
@given(
    pieces=st.lists(
        st.one_of(
            st.sampled_from(["▁a", "▁b", "c", "▁", "▁▁", "<eos>", "<pad>"]).map(lambda one: [one]),
            st.sampled_from("é你👍").map(lambda one: [f"<0x{byte:02X}>" for byte in one.encode()]),
        ),
        max_size=40,
    )
)
def test_keeps_the_spaces_that_only_the_first_token_loses(pieces):
    token_ids = STRIPPING.convert_tokens_to_ids([token for piece in pieces for token in piece])
    assert push_all(STRIPPING, token_ids) == decode(STRIPPING, token_ids)


@settings(max_examples=300, deadline=None)
@given(values=st.lists(st.sampled_from([0x41, 0xC3, 0xA9, 0xE4, 0xBD, 0xA0, 0xFF]), max_size=40))
def test_no_word_is_lost_beside_bytes(values):
    tokens = [f"<0x{one:02X}>" if one != 0x41 else "▁a" for one in values]
    token_ids = STRIPPING.convert_tokens_to_ids(tokens)
    made = push_all(STRIPPING, token_ids)
    assert made.count("a") == tokens.count("▁a")
    if is_stable(STRIPPING, token_ids):
        assert made == decode(STRIPPING, token_ids)


def before_stop(text, stop):
    """The text before the first complete stop string; None if there is none."""
    for end in range(1, len(text) + 1):
        lengths = [len(one) for one in stop if text[:end].endswith(one)]
        if lengths:
            return text[: end - max(lengths)]
    return None


def longest_beginning(text, stop):
    """The longest suffix of `text` that is a prefix of a stop string."""
    ends = (text[at:] for at in range(len(text)))
    return next((end for end in ends if any(one.startswith(end) for one in stop)), "")


@settings(max_examples=1000, deadline=None)
@given(
    pieces=st.lists(st.text("abc", max_size=6), max_size=12),
    stop=st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
)
def test_stop_strings_agree_with_a_plain_search(pieces, stop):
    strings = StopStrings(stop)
    text, shown = "", ""
    for piece in pieces:
        text += piece
        more, is_stopped = strings.push(piece)
        shown += more
        expected = before_stop(text, stop)
        assert is_stopped == (expected is not None)
        if is_stopped:
            assert shown == expected
            assert strings.finish() == ""
            return
        assert text == shown + longest_beginning(text, stop)
    assert shown + strings.finish() == text


def test_a_stop_string_may_span_many_pieces():
    strings = StopStrings(["</answer>"])
    assert strings.push("yes</") == ("yes", False)
    assert strings.push("ans") == ("", False)
    assert strings.push("wer> more") == ("", True)


def test_what_only_began_a_stop_string_is_shown_later():
    strings = StopStrings(["\n\nUser:"])
    assert strings.push("one\n\nUs") == ("one", False)
    assert strings.push("ual") == ("\n\nUsual", False)


def test_the_string_that_is_complete_first_ends_the_text():
    assert StopStrings(["abcd", "c"]).push("xabcd") == ("xab", True)
    assert StopStrings(["bc", "abc"]).push("xabcd") == ("x", True)


def test_refuses_text_after_the_end():
    strings = StopStrings(["."])
    strings.push("a.")
    with pytest.raises(ValueError, match="text: expected none after a stop string, got 'b'"):
        strings.push("b")


def test_stop_strings_of_any_length_take_linear_time():
    """Thousands of characters nearly match: with quadratic time they would take minutes."""
    strings = StopStrings(["a" * 20_000 + "b"] * 16)
    shown = "".join(strings.push("a" * 1000)[0] for _ in range(200))
    assert len(shown) == 180_000
    assert strings.push("b") == ("", True)
