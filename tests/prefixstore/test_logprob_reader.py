"""Log-probabilities aligned with an answer's text, with both real models' tokenizers."""

import pytest
from tokenized_texts import TEXTS, make_stripping_tokenizer

from prefixstore.engine import FinishReason, OutputDelta, TokenLogprob
from prefixstore.engine.detokenizer import Detokenizer
from prefixstore.models import load_tokenizer, prepare_gemma3, prepare_smollm2
from prefixstore.server.logprobs import LogprobReader, TokenTexts

LOADERS = {
    "smollm2": lambda: load_tokenizer(prepare_smollm2()),
    "gemma3": lambda: load_tokenizer(prepare_gemma3()),
    "stripping": make_stripping_tokenizer,
}


@pytest.fixture(scope="module")
def texts_of():
    """The `TokenTexts` of a tokenizer, loaded once."""
    loaded = {}

    def find(name):
        if name not in loaded:
            loaded[name] = TokenTexts(LOADERS[name]())
        return loaded[name]

    return find


def answer(texts, token_ids, reason=FinishReason.LENGTH):
    """The pieces of an answer, as an engine sends them."""
    detokenizer = Detokenizer(texts.tokenizer)
    pieces = [
        OutputDelta(detokenizer.push([one]), (one,), logprobs=(TokenLogprob(one, -1.0),))
        for one in token_ids
    ]
    return [*pieces, OutputDelta(detokenizer.finish(), (), reason)]


def read(texts, pieces):
    """The whole text and its tokens."""
    reader = LogprobReader(texts)
    shown = [one for piece in pieces for one in reader.push(piece)]
    return "".join(piece.text for piece in pieces), shown


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_every_token_has_its_bytes_and_place(texts_of, name, text):
    texts = texts_of(name)
    token_ids = texts.tokenizer(text, add_special_tokens=False).input_ids
    whole, shown = read(texts, answer(texts, token_ids))
    assert whole == text
    assert b"".join(one.token.data for one in shown) == text.encode()
    assert len(shown) == len(token_ids)
    num_bytes = 0
    for one in shown:
        before = text.encode()[:num_bytes].decode(errors="ignore")
        if one.token.text == "\ufffd":
            before = before.rstrip("\ufffd")  # a run of these all have the first one's offset
        assert one.offset == len(before)
        num_bytes += len(one.token.data)


@pytest.mark.parametrize("name", LOADERS)
def test_shows_half_a_character_and_not_what_ends_the_answer(texts_of, name):
    texts = texts_of(name)
    if name == "smollm2":
        half = texts.tokenizer("👍", add_special_tokens=False).input_ids[0]
    else:
        half = texts.tokenizer.convert_tokens_to_ids("<0xF0>")
    pieces = answer(texts, [half, texts.tokenizer.eos_token_id], FinishReason.STOP)
    text, (shown,) = read(texts, pieces)
    assert text == "\ufffd"
    assert shown.token.text == "bytes:" + "".join(f"\\x{one:02x}" for one in shown.token.data)
    assert shown.token.data == "👍".encode()[: len(shown.token.data)]


def test_a_space_that_is_left_out_moves_nothing(texts_of):
    texts = texts_of("stripping")
    token_ids = texts.tokenizer.convert_tokens_to_ids(["▁a", "▁b", "<0xC3>", "<0xBC>", "c"])
    text, shown = read(texts, answer(texts, token_ids))
    assert text == "a büc"
    assert [one.offset for one in shown] == [0, 1, 3, 3, 4]
    assert b"".join(one.token.data for one in shown).decode() == f" {text}"


def test_tells_a_token_once_its_text_is_shown(texts_of):
    texts = texts_of("smollm2")
    pieces = answer(texts, texts.tokenizer("It is so", add_special_tokens=False).input_ids)
    held = [OutputDelta("", one.token_ids, logprobs=one.logprobs) for one in pieces[:-1]]
    reader = LogprobReader(texts)
    assert [reader.push(one) for one in held] == [[]] * len(held)
    shown = reader.push(OutputDelta("It is", (), FinishReason.STOP))
    assert [one.token.text for one in shown] == ["It", " is"]
