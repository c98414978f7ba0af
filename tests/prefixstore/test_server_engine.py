"""The server over a real engine, model and cache: reuse, tenants, cancelling, processes."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from chat_model import chat_model, chat_tokenizer
from prometheus_client.parser import text_string_to_metric_families
from serving import MODEL, request_bytes, serving, wait_until

from prefixstore.engine import Engine

BLOCK_SIZE = 16
SETTINGS = {"block_size": BLOCK_SIZE, "pool_tokens": 4096, "memory_bytes": 0}
TEXT = "A block is sixteen tokens of all layers. The pool keeps blocks, the tiers keep records."
CHAT = [{"role": "user", "content": TEXT}]
GREEDY = {"temperature": 0, "ignore_eos": True}


@pytest.fixture
def start(tmp_path):
    """Starts servers with their own engines; checks and closes them after the test."""
    opened = []

    def start_one(engine_settings=None, **settings):
        engine = Engine.open(
            chat_model(), chat_tokenizer(), **{**SETTINGS, **(engine_settings or {})}
        )
        running = serving(engine, **settings)
        opened.append((running, engine))
        return running.__enter__()

    yield start_one
    for running, engine in opened:
        running.__exit__(None, None, None)
        assert engine.check() == []
        engine.close()


def whole_blocks(num_tokens):
    return num_tokens // BLOCK_SIZE * BLOCK_SIZE


def ask(server, messages, **options):
    body = {"model": MODEL, "messages": messages, "max_tokens": 40, **GREEDY, **options}
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_next_turn_computes_only_what_is_new(start):
    """A tokenizer would cut random weights' answers into other tokens than were generated."""
    server = start()
    messages = list(CHAT)
    num_cached = 0
    for _ in range(4):
        answer = ask(server, messages)
        usage = answer["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] >= num_cached
        assert answer["choices"][0]["finish_reason"] == "length"
        text = answer["choices"][0]["message"]["content"]
        is_kept = "�" not in text  # text with half a character cannot be continued
        # The last token of an answer was never an input, so it has no KV.
        num_known = usage["prompt_tokens"] + usage["completion_tokens"] - 1
        num_cached = whole_blocks(num_known if is_kept else usage["prompt_tokens"])
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "Go on."}]
    assert num_cached > 100


def test_streams_what_it_answers_whole(start):
    server = start()
    client = server.client()
    options = {"model": MODEL, "prompt": TEXT, "max_tokens": 30, "temperature": 0}
    whole = client.completions.create(**options)
    chunks = list(
        client.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == whole.choices[0].text
    usage = chunks[-1].usage
    assert usage.completion_tokens == whole.usage.completion_tokens
    # At least one token is computed, for its logits.
    cached = whole_blocks(usage.prompt_tokens - 1)
    assert usage.prompt_tokens_details.cached_tokens == cached
    (told,) = usage.kvkernels
    assert told["cached_tokens_by_tier"] == {"device": cached}
    assert told["computed_tokens"] == usage.prompt_tokens - cached
    assert told["ttft_s"] > 0


def test_a_seed_gives_the_same_answers_again(start):
    server = start()
    options = {"temperature": 1.5, "n": 3}
    answers = [
        [
            choice["message"]["content"]
            for choice in ask(server, CHAT, seed=seed, **options)["choices"]
        ]
        for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]
    assert len(set(answers[0])) == 3


def test_stops_before_a_stop_string(start):
    server = start()
    text = ask(server, CHAT)["choices"][0]["message"]["content"]
    stop = text[10:13]
    choice = ask(server, CHAT, stop=[stop])["choices"][0]
    assert choice["message"]["content"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"


def test_tenants_share_no_blocks(start, tmp_path):
    keys = tmp_path / "keys.toml"
    names = ("research", "operations")
    keys.write_text("".join(f"[[keys]]\ntenant = '{n}'\nkey = 'key-of-{n}-12345'\n" for n in names))
    keys.chmod(0o600)
    server = start(api_keys_file=keys)

    def cached(tenant):
        client = server.client(f"key-of-{tenant}-12345")
        answer = client.completions.create(model=MODEL, prompt=TEXT, max_tokens=1)
        return answer.usage.prompt_tokens_details.cached_tokens

    assert [cached(tenant) > 0 for tenant in ("research", "research", "operations")] == [0, 1, 0]
    assert cached("operations") > 0
    assert {report.tenant for report in server.engine.recent()} == set(names)


def test_without_reuse_everything_is_computed(start):
    server = start({"reuses_prefixes": False})
    answers = [ask(server, CHAT) for _ in range(2)]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in answers] == [0, 0]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_the_engine_sees_that_a_client_went(start, stream):
    server = start({"max_running": 1})
    body = {"model": MODEL, "prompt": TEXT, "max_tokens": 900, "ignore_eos": True, "stream": stream}
    with server.connect() as running, server.connect() as queued:
        for connection in (running, queued):
            connection.sendall(request_bytes("/v1/completions", body))
        wait_until(
            lambda: server.engine.stats().num_running + server.engine.stats().num_queued == 2
        )
    wait_until(lambda: server.engine.stats().num_finished.get("cancelled") == 2)
    assert all(report.num_output_tokens < 900 for report in server.engine.recent())
    server.assert_answers()


@pytest.mark.parametrize(
    "prompt", [[-1], [1 << 40], [1 << 70], [384], [5] * 1024], ids=lambda prompt: str(prompt[:1])
)
def test_refuses_prompts_that_the_model_cannot_have(start, prompt):
    server = start()
    answer = server.post("/v1/completions", {"model": MODEL, "prompt": prompt})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "prompt"
    assert error["message"].startswith("prompt: expected")


def test_a_changed_model_is_no_fault_of_the_client(start, caplog):
    server = start()
    weight = next(server.engine.cache.served_model._model.parameters())
    body = {"model": MODEL, "prompt": TEXT, "max_tokens": 2, **GREEDY}
    assert server.get("/health/ready").status_code == 200
    with torch.no_grad():
        weight.add_(1.0)
    answer = server.post("/v1/completions", body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "weights" not in answer.text and "expected the weights" in caplog.text
    assert server.get("/health/ready").status_code == 503
    assert server.get("/health/live").status_code == 200


def metrics_of(server):
    """Values of all samples, by name without its prefix and label."""
    text = server.get("/metrics").text
    return {
        (sample.name.removeprefix("kvkernels_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_are_the_engines_counters(start, tmp_path):
    server = start({"memory_bytes": None, "tiers": [f"disk://{tmp_path}/kv?max_bytes=16MiB"]})
    for _ in range(2):
        ask(server, CHAT)
    assert server.engine.cache.flush()
    values = metrics_of(server)
    stats = server.engine.stats()
    assert values[("requests_submitted_total",)] == stats.num_submitted == 2
    assert values[("requests_finished_total", "length")] == 2
    assert values[("hit_tokens_total", "device")] == stats.hit_tokens["device"] > 0
    assert values[("output_tokens_total",)] == 80
    assert values[("pool_blocks",)] == 256
    assert values[("index_blocks",)] == stats.cache.index.num_blocks > 0
    (tier,) = stats.cache.store.tiers
    assert values[("tier_written_total", tier.name)] == tier.num_written > 0
    assert values[("tier_up", tier.name)] == 1
    assert values[("tier_records", tier.name)] == tier.num_written
    for mode, of_mode in stats.planner.modes.items():
        assert values[("plans_total", mode)] == of_mode.num_plans


def audit_counts(server):
    values = metrics_of(server)
    names = ("audits", "audited_blocks", "quarantined_blocks")
    return {name: values[(f"{name}_total",)] for name in names}


def cached_blocks(answer):
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"] // BLOCK_SIZE


def test_metrics_count_audits_and_what_they_find(start):
    """An audit without findings, and one of a block that was changed in the pool."""
    server = start({"audit_share": 1})
    engine = server.engine
    ask(server, CHAT)
    assert audit_counts(server) == {"audits": 0, "audited_blocks": 0, "quarantined_blocks": 0}
    num_blocks = cached_blocks(ask(server, CHAT))
    wait_until(lambda: engine.stats().num_audits == 1)
    assert audit_counts(server) == {
        "audits": 1,
        "audited_blocks": num_blocks,
        "quarantined_blocks": 0,
    }
    (group,) = engine.cache.blocks.device.groups
    group.pool.key_cache(0).neg_()
    assert cached_blocks(ask(server, CHAT)) == num_blocks
    wait_until(lambda: engine.stats().num_quarantined)
    counts = audit_counts(server)
    assert counts["audits"] == 2
    assert counts["audited_blocks"] == num_blocks + 1
    assert counts["quarantined_blocks"] == engine.stats().num_quarantined >= num_blocks


# The process reports how many objects were frozen, exempt from garbage collections.
PROGRAM = """
import gc
from prefixstore.cli import main

unfreeze = gc.unfreeze
gc.unfreeze = lambda: (print(gc.get_freeze_count()), unfreeze())
main()
"""


class Process:
    """`kvkernels serve` in its own process."""

    def __init__(self, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "serve", *arguments, "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        self.url = json.loads(line)["url"]

    def stop(self):
        """End it with SIGTERM; returns its log lines."""
        self.process.send_signal(signal.SIGTERM)
        out, err = self.process.communicate(timeout=60)
        assert self.process.returncode == 0, err
        assert int(out) > 100_000  # else collections walk through PyTorch while requests wait
        return [json.loads(line) for line in err.splitlines()]


@pytest.fixture
def arguments(tmp_path):
    """The command line that serves a folder with the model, with blocks on disk."""
    folder = tmp_path / "small"
    chat_model().save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return [
        *(str(folder), "--dtype", "float32", "--block-size", "16", "--pool-tokens", "4096"),
        *("--tier", f"disk://{tmp_path}/kv?max_bytes=16MiB"),
    ]


def test_the_next_process_goes_on_from_disk(arguments, tmp_path):
    # Load even if computing is faster: so small a model computes as fast as a busy disk reads.
    config = tmp_path / "config.toml"
    config.write_text('[engine]\nrestore_policy = "load"\n')
    arguments += ["--config", str(config)]
    body = {"model": "small", "messages": CHAT, "max_tokens": 20, **GREEDY}
    answers = []
    for _ in range(2):
        server = Process(*arguments)
        try:
            answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
            answers.append(answer.json())
            assert httpx.get(server.url).headers["content-type"].startswith("text/html")
            shown = httpx.get(f"{server.url}/dashboard/requests").json()["requests"]
            assert [one["request_id"] for one in shown] == [answers[-1]["id"]]
            lines = server.stop()
        finally:
            server.process.kill()
        (line,) = [line for line in lines if line["message"] == "request"]
        assert line["answers"][0]["request_id"] == answers[-1]["id"]
        assert TEXT not in json.dumps(lines)
    texts = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert texts[0] == texts[1]
    num_cached = [answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in answers]
    assert num_cached[0] == 0
    assert answers[1]["usage"]["kvkernels"][0]["cached_tokens_by_tier"] == {"disk": num_cached[1]}


def test_a_process_under_load_finishes_what_it_accepted(arguments):
    server = Process(*arguments, "--max-running", "4")
    statuses = []

    def ask_on(prompt):
        body = {"model": "small", "prompt": prompt, "max_tokens": 30, **GREEDY}
        while True:
            try:
                answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
            except (httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError):
                return  # no longer listening, or stopped while this one was in the backlog
            statuses.append(answer.status_code)
            if answer.status_code == 200:
                assert answer.json()["usage"]["completion_tokens"] == 30

    with ThreadPoolExecutor(8) as pool:
        try:
            asking = [pool.submit(ask_on, f"{number} {TEXT}") for number in range(8)]
            wait_until(lambda: statuses.count(200) > 8, 60)
            lines = server.stop()
            for one in asking:
                one.result(60)
        finally:
            server.process.kill()
    assert set(statuses) <= {200, 503}
    # Every request that the server accepted was answered to its client.
    answered = [line["status"] for line in lines if line["message"] == "request"]
    assert sorted(answered) == sorted(statuses)
