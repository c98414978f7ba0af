"""What a server reports: metrics, log lines, request ids."""

import json
import logging
import sys

import pytest
from chat_model import chat_tokenizer
from prometheus_client.parser import text_string_to_metric_families
from scripted_engine import ScriptedEngine
from serving import MODEL, request_bytes, serving, wait_until

from prefixstore.server.request_log import JsonFormatter

TEXT = {"model": MODEL, "prompt": "A prompt that no log may show", "max_tokens": 4}
PATH = "/v1/completions"
ANSWER = "An answer that is private"


@pytest.fixture(scope="module")
def engine():
    engine = ScriptedEngine(chat_tokenizer(), ANSWER, is_endless=True, max_model_len=1 << 20)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def server(engine):
    with serving(engine) as running:
        yield running


@pytest.fixture
def lines(caplog):
    """The log's lines, in the format in which they are written."""
    caplog.set_level(logging.INFO, "prefixstore.server")

    def requests():
        formatted = [JsonFormatter().format(record) for record in caplog.records]
        return [one for line in formatted if (one := json.loads(line))["message"] == "request"]

    return requests


def metrics_of(server):
    """Values of all samples, by name and labels."""
    text = server.get("/metrics").text
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_histograms_count_what_clients_wait_for(server):
    before = metrics_of(server)
    server.post(PATH, {**TEXT, "n": 2, "stream": True})
    server.post(PATH, TEXT)
    after = metrics_of(server)
    for name, count in [
        ("time_to_first_token", 3),
        ("queue", 3),
    ]:
        key = (f"kvkernels_{name}_seconds_count",)
        assert after[key] - before[key] == count
    key = ("kvkernels_inter_token_seconds_count",)
    assert 0 < after[key] - before[key] <= 9


def test_every_metric_has_the_prefix_and_no_label_of_a_clients(server):
    for name, *labels in metrics_of(server):
        assert name.startswith("kvkernels_")
        assert {label for label, _ in labels} <= {"le", "tier", "reason", "mode"}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_logs_one_line_for_each_request_and_no_text(server, lines, caplog, stream):
    answer = server.post(PATH, {**TEXT, "stream": stream}, headers={"x-request-id": "abc-1"})
    wait_until(lambda: lines())
    (line,) = lines()
    assert line["request_id"] == "abc-1"
    assert (line["method"], line["path"], line["status"]) == ("POST", PATH, 200)
    assert line["tenant"] == ""
    assert line["duration_s"] > 0
    (made,) = line["answers"]
    assert made["request_id"] == line["answer_id"]
    assert line["answer_id"] in answer.text
    assert (made["finish_reason"], made["output_tokens"]) == ("length", 4)
    assert made["cached_tokens_by_tier"] == {"device": made["prompt_tokens"] // 16 * 16}
    assert {"queue_s", "ttft_s", "decode_s", "missed_tokens_by_reason", "plan"} <= set(made)
    for text in (TEXT["prompt"], ANSWER):
        assert text not in caplog.text + json.dumps(line)


def test_logs_refusals_and_clients_that_went(server, engine, lines):
    server.post(PATH, {**TEXT, "model": "other"})
    server.post(PATH, None, content=b"{}")
    for stream in (False, True):
        with server.connect() as connection:
            num_asked = len(engine.asked)
            body = {**TEXT, "max_tokens": 1_000_000, "stream": stream}
            connection.sendall(request_bytes(PATH, body))
            wait_until(lambda: len(engine.asked) > num_asked and engine.asked[-1].num_sent)  # noqa: B023
    wait_until(lambda: len(lines()) == 4)
    assert [line["status"] for line in lines()] == [404, 415, 499, 200]
    for line in lines()[2:]:
        assert line["answers"][0]["finish_reason"] == "cancelled"


def test_health_and_metrics_are_not_logged(server, lines):
    server.get("/metrics")
    server.get("/health")
    server.get("/v1/models")
    wait_until(lambda: lines())
    assert [line["path"] for line in lines()] == ["/v1/models"]


@pytest.mark.parametrize("given", ["x", "a" * 128, "A-z_0.9:"])
def test_gives_a_requests_id_back(server, given):
    answer = server.get("/v1/models", headers={"x-request-id": given})
    assert answer.headers["x-request-id"] == given


@pytest.mark.parametrize("given", [None, "", "a" * 129, "a b", "a\tb", "{}", "é"])
def test_makes_an_id_where_none_can_be_kept(server, given):
    headers = {} if given is None else {"x-request-id": given.encode()}
    made = {server.get("/health", headers=headers).headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2
    assert all(len(one) == 32 for one in made)


def test_an_exception_is_one_line_of_json_too():
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.getLogger("a").makeRecord(
            "a", logging.ERROR, "f", 1, "it %s", ("failed",), sys.exc_info()
        )
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert json.loads(line)["message"] == "it failed"
    assert "two\nlines" in json.loads(line)["exception"]
