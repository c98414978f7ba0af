"""The next turn of a chat begins with the tokens of the last one."""

import copy
import re

import pytest
from chat_model import chat_tokenizer
from scripted_engine import ScriptedEngine
from serving import MODEL, serving
from tokenizers.processors import TemplateProcessing

from prefixstore.engine.detokenizer import Detokenizer
from prefixstore.server.transcripts import Transcripts

PROMPT = "<|start|>user\nWhat keeps blocks?<|end|>\n<|start|>assistant\n"
ANSWER = "The pool keeps blocks."
REST = "<|end|>\n<|start|>user\nAnd records?<|end|>\n<|start|>assistant\n"


def encode(text):
    return chat_tokenizer()(text, add_special_tokens=False).input_ids


def by_characters(text):
    """Tokens of a text, split as no tokenizer would."""
    return [token_id for character in text for token_id in encode(character)]


@pytest.fixture
def transcripts():
    made = Transcripts(chat_tokenizer(), max_tokens=400, max_texts=4)
    yield made
    assert made.check() == []


def test_the_case_is_one_in_which_cutting_again_gives_other_tokens():
    assert by_characters(ANSWER) != encode(ANSWER)
    assert chat_tokenizer().decode(by_characters(ANSWER)) == ANSWER


@pytest.mark.parametrize("end", [[], [0]], ids=["cut off", "with its end"])
def test_goes_on_from_the_tokens_of_the_answer(transcripts, end):
    answer_ids = by_characters(ANSWER)
    transcripts.remember(PROMPT, ANSWER, encode(PROMPT), answer_ids + end, "a")
    expected = encode(PROMPT) + answer_ids + encode(REST)
    assert transcripts.encode(PROMPT + ANSWER + REST, "a") == expected


def test_goes_on_from_the_longest_text_that_fits(transcripts):
    longer = PROMPT + ANSWER + REST
    first, second = by_characters(ANSWER), by_characters("The tiers.")
    transcripts.remember(PROMPT, ANSWER, encode(PROMPT), first, "a")
    ids = transcripts.encode(longer, "a")
    transcripts.remember(longer, "The tiers.", ids, second, "a")
    assert transcripts.encode(longer + "The tiers." + REST, "a") == ids + second + encode(REST)
    assert transcripts.encode(longer + "The pool." + REST, "a") == ids + encode("The pool." + REST)


@pytest.mark.parametrize(
    ("text", "salt"),
    [
        (PROMPT + ANSWER + REST, "b"),
        (PROMPT + ANSWER + REST, ""),
        (PROMPT + ANSWER + " And so on." + REST, "a"),  # the last word might be continued
        (PROMPT + ANSWER[:-1] + REST, "a"),
        (PROMPT.replace("What", "Who") + ANSWER + REST, "a"),
        (PROMPT + ANSWER, "a"),
        ("", "a"),
    ],
)
def test_cuts_anew_what_is_another_text(transcripts, text, salt):
    transcripts.remember(PROMPT, ANSWER, encode(PROMPT), by_characters(ANSWER), "a")
    assert transcripts.encode(text, salt) == encode(text)


def test_a_salt_cannot_pose_as_text(transcripts):
    transcripts.remember("bc", "d", encode("bc"), encode("d"), "a")
    assert transcripts.encode("cd" + REST, "ab") == encode("cd" + REST)


def test_forgets_an_answer_that_is_not_its_tokens(transcripts):
    # Cut off by a stop string, or a special token within it that the client was not shown.
    for text, ids in [("The pool", by_characters(ANSWER)), (ANSWER, [*encode(ANSWER), 1, 5])]:
        transcripts.remember(PROMPT, text, encode(PROMPT), ids, "a")
        assert transcripts.encode(PROMPT + text + REST, "a") == encode(PROMPT + text + REST)


class Reading:
    """The tokenizer, with decoded texts changed; counts how often it decodes."""

    added_tokens_decoder = chat_tokenizer().added_tokens_decoder
    all_special_ids = chat_tokenizer().all_special_ids
    __call__ = staticmethod(chat_tokenizer().__call__)

    def __init__(self, change=lambda text, **_: text):
        self._change = change
        self.num_decoded = 0

    def decode(self, ids, **options):
        self.num_decoded += 1
        return self._change(chat_tokenizer().decode(ids, **options), **options)


def test_an_answer_that_a_stop_string_ended_is_decoded_once():
    transcripts = Transcripts(tokenizer := Reading())
    transcripts.remember(PROMPT, ANSWER[:-7], encode(PROMPT), encode(ANSWER), "a")
    assert tokenizer.num_decoded == 1


def spoil_runs(text, **_):
    """Like a tokenizer with byte fallback: one wrong byte spoils its whole run."""
    return re.sub(r"[^\x00-\x7f]", "\ufffd", text) if "\ufffd" in text else text


def clean_up(text, clean_up_tokenization_spaces=True, **_):
    return text.replace(" .", ".") if clean_up_tokenization_spaces else text


BYTE = chat_tokenizer().convert_tokens_to_ids("\u00f0")  # F0, which opens four


@pytest.mark.parametrize(
    "change, ids",
    [
        (spoil_runs, [*encode("So é"), BYTE, *encode(" it was.")]),
        (clean_up, by_characters("So it was . So it is .")),
    ],
)
def test_remembers_an_answer_as_it_was_sent(change, ids):
    tokenizer = Reading(change)
    sent = Detokenizer(tokenizer)
    answer = sent.push(ids) + sent.finish()
    assert answer != tokenizer.decode(ids)
    transcripts = Transcripts(tokenizer)
    transcripts.remember(PROMPT, answer, encode(PROMPT), ids, "a")
    assert transcripts.encode(PROMPT + answer + REST, "a") == encode(PROMPT) + ids + encode(REST)


def test_keeps_no_more_than_it_may(transcripts):
    for number in range(20):
        prompt = PROMPT.replace("blocks", f"blocks {number}")
        transcripts.remember(prompt, ANSWER, encode(prompt), by_characters(ANSWER), "a")
        assert transcripts.check() == []
        text = prompt + ANSWER + REST
        assert transcripts.encode(text, "a") != encode(text)  # the newest is kept
    assert len(transcripts._ids) <= 4
    long = "x " * 1000
    transcripts.remember(PROMPT, long, encode(PROMPT), by_characters(long), "a")
    assert len(transcripts._ids) <= 4


def test_trusts_no_tokenizer_that_cuts_otherwise_before_a_special_token():
    class Swallowing:
        """A tokenizer that drops full stops before special tokens, as some drop spaces."""

        added_tokens_decoder = chat_tokenizer().added_tokens_decoder
        all_special_ids = chat_tokenizer().all_special_ids
        decode = staticmethod(chat_tokenizer().decode)

        def __call__(self, text, add_special_tokens):
            return chat_tokenizer()(text.replace(".<|", "<|"), add_special_tokens=False)

    transcripts = Transcripts(Swallowing())
    transcripts.remember(PROMPT, ANSWER, encode(PROMPT), by_characters(ANSWER), "a")
    text = PROMPT + ANSWER + REST
    assert transcripts.encode(text, "a") == encode(text.replace(".<|", "<|"))


class ByCharacters(ScriptedEngine):
    """An engine that answers in tokens that its tokenizer would not have chosen."""

    def answer_ids(self, sampling):
        return [*by_characters(self.answer), self.tokenizer.eos_token_id]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_chat_over_http_keeps_its_tokens(stream):
    engine = ByCharacters(chat_tokenizer(), ANSWER)
    messages = []
    with serving(engine) as server:
        for turn in range(3):
            messages.append({"role": "user", "content": f"And {turn}?"})
            client = server.client()
            answer = client.chat.completions.create(model=MODEL, messages=messages, stream=stream)
            if stream:
                text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
            else:
                text = answer.choices[0].message.content
            messages.append({"role": "assistant", "content": text})
    for before, after in zip(engine.asked, engine.asked[1:], strict=False):
        whole = before.prompt + by_characters(ANSWER)
        assert after.prompt[: len(whole)] == whole
    engine.close()


def test_no_chat_begins_with_the_tokens_of_a_completion():
    """A client may render a chat itself, but the tokenizer then adds its own first token."""
    tokenizer = copy.deepcopy(chat_tokenizer())
    start_id = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", start_id)]
    )
    messages = [
        {"role": "user", "content": "What keeps blocks?"},
        {"role": "assistant", "content": ANSWER},
        {"role": "user", "content": "And records?"},
    ]
    engine = ScriptedEngine(tokenizer, ANSWER)
    with serving(engine) as server:
        client = server.client()
        answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=100)
        assert answer.choices[0].text == ANSWER
        client.chat.completions.create(model=MODEL, messages=messages)
    completion, chat = engine.asked
    assert completion.prompt == [start_id, *encode(PROMPT)]
    assert chat.prompt == encode(PROMPT + ANSWER + REST)
    engine.close()
