"""The load test's client: its times against a server's own, and how it tells failures apart."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

pytest.importorskip("httpx")

from scripted_openai import MODEL, Reply, ScriptedOpenAI, serving

from prefixstore.loadtest.client import Answer, Asked, Client
from prefixstore.loadtest.prompts import make_prompts

MESSAGES = [{"role": "user", "content": "Count."}]
# How late the client may notice a piece, as the median, since this machine may be busy.
LATE_S = 0.05


def ask(url: str, endpoint: str = "chat", api_key: str | None = None, **asked: Any) -> list[Answer]:
    """Send two requests with one client."""

    async def run() -> list[Answer]:
        client = Client(url, make_prompts(endpoint), api_key)
        try:
            wishes = Asked(MODEL, **{"max_tokens": 3, **asked})
            return [await client.ask(MESSAGES, wishes) for _ in range(2)]
        finally:
            await client.close()

    return asyncio.run(run())


def ask_scripted(reply: Reply, **options: Any) -> tuple[Answer, ScriptedOpenAI]:
    with serving(lambda body: reply) as server:
        return ask(server.url, **options)[0], server


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_times_each_piece_as_the_server_wrote_it(endpoint: str) -> None:
    pieces = tuple(f" {number}" for number in range(12))
    answer, server = ask_scripted(Reply(pieces, first_s=0.3, gap_s=0.04), endpoint=endpoint)
    written_at = server.seen[0].written_at
    came_at = [answer.sent_at + at for at in answer.piece_s]
    late = [came - written for came, written in zip(came_at, written_at, strict=True)]
    # A busy machine delivers some pieces late, but not every one.
    assert 0 <= min(late) < LATE_S
    assert answer.piece_s[0] >= 0.3
    assert answer.piece_s[-1] >= 0.3 + 11 * 0.04
    assert answer.piece_s == sorted(answer.piece_s)
    assert answer.end_s >= answer.piece_s[-1]
    assert answer.text == "".join(pieces)
    assert (answer.finish_reason, answer.error) == ("length", None)


def test_line_separators_are_text() -> None:
    pieces = ("one\u2028", "two\x85", "three")
    answer, _ = ask_scripted(Reply(pieces))
    assert (answer.text, answer.error) == ("".join(pieces), None)


def test_counts_tokens_as_the_server_does_not_by_pieces() -> None:
    usage = {
        "prompt_tokens": 120,
        "completion_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 64},
    }
    answer, _ = ask_scripted(Reply(("three pieces", " of", " seven tokens"), usage=usage))
    assert (answer.prompt_tokens, answer.cached_tokens, answer.output_tokens) == (120, 64, 7)
    assert len(answer.piece_s) == 3


@pytest.mark.parametrize("details", [{}, {"prompt_tokens_details": None}])
def test_knows_what_a_server_did_not_tell(details: dict[str, Any]) -> None:
    usage = {"prompt_tokens": 10, "completion_tokens": 3, **details}
    assert ask_scripted(Reply(usage=usage))[0].cached_tokens is None
    untold, _ = ask_scripted(Reply(usage=None))
    assert (untold.error, untold.output_tokens, untold.prompt_tokens) == (None, None, None)


def test_an_answer_without_text_has_no_first_token() -> None:
    answer, _ = ask_scripted(Reply(pieces=()))
    assert (answer.error, answer.piece_s, answer.text) == (None, [], "")


def test_says_what_is_asked() -> None:
    answer, server = ask_scripted(Reply(), max_tokens=5, ignore_eos=True, api_key="a key")
    (seen, _) = server.seen
    assert answer.error is None
    assert seen.path == "/v1/chat/completions"
    assert seen.headers["authorization"] == "Bearer a key"
    assert seen.body == {
        "model": MODEL,
        "messages": MESSAGES,
        "max_tokens": 5,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }


def test_sends_completions_as_chatml() -> None:
    _, server = ask_scripted(Reply(), endpoint="completions")
    assert server.seen[0].path == "/v1/completions"
    assert server.seen[0].body["prompt"] == (
        "<|im_start|>user\nCount.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "ignore_eos" not in server.seen[0].body


@pytest.mark.parametrize(
    ("reply", "kind", "said"),
    [
        (Reply(status=429), "http 429", "as scripted"),
        (Reply(status=500), "http 500", "as scripted"),
        (Reply(extra=()), "disconnect", "closed"),
        (Reply(extra=('{"error": {"message": "no memory"}}',)), "server", "no memory"),
        (Reply(extra=('{"choices"',)), "malformed", '{"choices"'),
        (Reply(extra=("[1]",)), "malformed", "[1]"),
        (Reply(extra=('{"choices": [7]}',)), "malformed", "7"),
        (Reply(extra=('{"usage": {"total": 1}}',)), "malformed", "total"),
        (Reply(gap_s=20.0), "timeout", "0.5 s"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tells_failures_apart(reply: Reply, kind: str, said: str) -> None:
    timeout_s = 0.5 if kind == "timeout" else 30.0
    with serving(lambda body: reply) as server:
        for answer in ask(server.url, timeout_s=timeout_s):  # a client survives failures
            assert answer.error == kind
            assert said in answer.error_text
            assert answer.end_s > 0


def test_a_server_that_is_not_there() -> None:
    with socket.socket() as bound:  # bound, but not listening
        bound.bind(("127.0.0.1", 0))
        answer, _ = ask(f"http://127.0.0.1:{bound.getsockname()[1]}/v1")
    assert answer.error == "connect"
    assert answer.error_text


END = '{"choices": [{"text": "", "finish_reason": "stop"}]}'


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (Reply(extra=(END,), is_cut=False), None),  # some servers omit the last event
        (Reply(extra=(), is_cut=False), "disconnect"),
        (Reply(extra=(END,), is_cut=True), "disconnect"),
    ],
    ids=["ended", "ended early", "cut"],
)
def test_an_answer_ends_with_its_reason(reply: Reply, kind: str | None) -> None:
    assert ask_scripted(reply)[0].error == kind


def test_asks_again_on_the_same_connection() -> None:
    answer, server = ask_scripted(Reply())
    assert answer.error is None
    assert (len(server.seen), server.num_connections) == (2, 1)


@pytest.mark.parametrize("is_cut", [False, True], ids=["ended", "cut"])
def test_what_comes_after_the_last_event_changes_no_answer(is_cut: bool) -> None:
    answer, _ = ask_scripted(Reply(extra=(END, "[DONE]", '{"choices"'), is_cut=is_cut))
    assert (answer.error, answer.text) == (None, "one two three")
    assert answer.end_s > answer.piece_s[-1]


def test_ignores_proxies_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert ask_scripted(Reply())[0].error is None
