"""The dashboard's answers: shapes, bounds, and what they must not reveal."""

import logging
import re
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cached_models import BLOCK_SIZE, random_tokens, run, tiny_llama
from fastapi import FastAPI
from fastapi.testclient import TestClient
from serving import wait_until
from watched_engine import WatchedEngine, make_report

from prefixstore.cache import PrefixCache
from prefixstore.dashboard import dashboard_router, router, sampler, views
from prefixstore.planner.stats import ModeStats

QUESTIONS = ("overview", "history", "requests", "tree")
HOSTILE = "</script><img src=x onerror=alert(1)>"
SECRET_SALT = "the salt of a tenant"


@pytest.fixture
def model():
    torch.manual_seed(1)
    return tiny_llama()


@pytest.fixture
def cache(model, tmp_path):
    options = {"block_size": BLOCK_SIZE, "pool_tokens": 2048, "disk_path": tmp_path / "kv"}
    with PrefixCache.open(model, memory_bytes=1 << 20, **options) as cache:
        yield cache
        assert cache.check() == []


@pytest.fixture
def engine(model, cache):
    return WatchedEngine(model, cache)


@pytest.fixture
def ask(engine):
    """Query the dashboard of `engine`, with its sampler running."""
    app = FastAPI()
    app.include_router(dashboard_router(engine))
    with TestClient(app) as client:
        yield lambda question: client.get(f"/dashboard/{question}").raise_for_status().json()


@pytest.fixture
def client(engine):
    app = FastAPI()
    app.include_router(dashboard_router(engine))
    with TestClient(app) as client:
        yield client


def test_page_loads_only_files_of_its_own(client) -> None:
    answer = client.get("/")
    assert "default-src 'none'; script-src 'self'" in answer.headers["content-security-policy"]
    wanted = set(re.findall(r'(?:src|href)="([^"#]+)"', answer.text))
    modules = [name for name in wanted if name.endswith(".js")]
    assert wanted and modules
    while modules:
        source = client.get("/" + modules.pop()).text
        found = {f"dashboard/{name}" for name in re.findall(r'from "\./([^"]+)"', source)}
        modules += found - wanted
        wanted |= found
    for name in wanted:
        answer = client.get("/" + name)
        assert answer.status_code == 200, name
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_page_never_parses_what_it_is_told(client) -> None:
    for name in ("draw.js", "main.js", "requests.js", "tree.js", "tiers.js", "history.js"):
        source = client.get(f"/dashboard/{name}").text
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", source)


@pytest.mark.parametrize("path", ["/dashboard/nothing.js", "/dashboard/..%2frouter.py"])
def test_serves_no_other_files(client, path) -> None:
    assert client.get(path).status_code == 404


@pytest.mark.parametrize("path", ["/", *(f"/dashboard/{question}" for question in QUESTIONS)])
def test_refuses_requests_that_are_to_change_something(client, path) -> None:
    assert client.get(path).headers["cache-control"] == "no-store"
    assert client.post(path).status_code == 405


def test_overview_shows_pool_and_tiers(engine, model, ask) -> None:
    run(engine.cache, model, random_tokens(5 * BLOCK_SIZE + 1))
    assert engine.cache.flush()
    audits = {"num_audits": 4, "audited_blocks": 3, "num_quarantined": 2}
    hits = {"disk": 64, "device": 128}
    engine.given.update(num_running=2, hit_tokens=hits, num_queued=1, **audits)
    time.sleep(sampler.SAMPLE_INTERVAL_S + 0.3)
    overview = ask("overview")
    assert overview["age_s"] < 2 * sampler.SAMPLE_INTERVAL_S
    assert (overview["num_running"], overview["num_queued"]) == (2, 1)
    assert {name: overview[name] for name in audits} == audits
    assert overview["hit_tokens"] == {"device": 128, "disk": 64}
    assert overview["pool"] == {
        "block_size": BLOCK_SIZE,
        "num_blocks": 128,
        "used_blocks": 5,
        "cached_blocks": 5,
        "evicted_blocks": 0,
    }
    memory, disk = overview["tiers"]
    assert (memory["name"], memory["is_down"], memory["capacity_bytes"]) == (
        "memory",
        False,
        1 << 20,
    )
    assert disk["written_bytes"] > 0


def test_shows_a_tier_that_does_not_answer(engine, ask, monkeypatch) -> None:
    monkeypatch.setattr(engine.cache, "tier_stats", lambda: {"memory": None, "disk": None})
    overview = views.overview(engine, sampler.Sampler(engine))
    assert [tier["used_bytes"] for tier in overview["tiers"]] == [None, None]
    assert [tier["num_errors"] for tier in overview["tiers"]] == [0, 0]


def test_a_tier_that_stalls_delays_no_answer(engine, client, monkeypatch) -> None:
    client.get("/dashboard/overview")
    is_over = threading.Event()
    monkeypatch.setattr(engine.cache, "tier_stats", lambda: is_over.wait(20) and {})
    monkeypatch.setattr(sampler, "HISTORY_INTERVAL_S", 0.1)
    time.sleep(sampler.SAMPLE_INTERVAL_S + 0.3)
    started = time.monotonic()
    age_s = client.get("/dashboard/overview").json()["age_s"]
    is_over.set()
    assert time.monotonic() - started < 5
    assert age_s > 0


def test_history_is_bounded_and_in_columns(engine, monkeypatch) -> None:
    watcher = sampler.Sampler(engine)
    monkeypatch.setattr(sampler, "HISTORY_INTERVAL_S", 0)
    for i in range(400):
        engine.given.update(output_tokens=i, hit_tokens={"device": i} if i > 390 else {})
        watcher.sample()
    history = views.history(watcher.history())
    assert history["output_tokens"] == list(range(400 - 181, 400))
    assert history["hit_tokens"]["device"][-1] == 399
    assert history["hit_tokens"]["device"][0] == 0
    assert len(history["taken_at"]) == len(history["num_queued"]) == 181
    assert history["taken_at"] == sorted(history["taken_at"])


def test_samples_tiers_only_with_the_history(engine, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(engine.cache, "tier_stats", lambda: asked.append(1) or {})
    watcher = sampler.Sampler(engine)
    for _ in range(20):
        watcher.sample()
    assert len(asked) == len(watcher.history()) == 1


def test_a_clock_that_is_set_back_stops_no_history(engine, monkeypatch) -> None:
    clock = SimpleNamespace(wall_s=1e9, ticks_s=50.0)
    module = SimpleNamespace(time=lambda: clock.wall_s, monotonic=lambda: clock.ticks_s)
    monkeypatch.setattr(sampler, "time", module)
    watcher = sampler.Sampler(engine)
    for second in range(60):
        watcher.sample()
        clock.ticks_s += 1
        clock.wall_s += 1 if second != 30 else -3600
    assert len(watcher.history()) == 60 / sampler.HISTORY_INTERVAL_S


def test_sampler_runs_while_the_application_does(engine) -> None:
    app = FastAPI()
    app.include_router(dashboard_router(engine))
    with TestClient(app):
        assert any(thread.name == "dashboard-sampler" for thread in threading.enumerate())
    assert not any(thread.name == "dashboard-sampler" for thread in threading.enumerate())


def test_a_mounted_application_is_sampled_from_its_first_page_on(engine, monkeypatch) -> None:
    watcher = sampler.Sampler(engine)
    monkeypatch.setattr(router, "Sampler", lambda engine: watcher)
    monkeypatch.setattr(sampler, "SAMPLE_INTERVAL_S", 0.05)
    outer, app = FastAPI(), FastAPI()
    app.include_router(dashboard_router(engine))
    outer.mount("/llm", app)
    with TestClient(outer) as client:
        assert client.get("/llm/dashboard/overview").json()["num_running"] == 0
        engine.given.update(num_running=2)
        wait_until(lambda: client.get("/llm/dashboard/overview").json()["num_running"] == 2)
        assert [one.name for one in threading.enumerate()].count("dashboard-sampler") == 1
    watcher.stop()


def test_sampler_ends_when_nobody_has_it_any_more(engine, monkeypatch) -> None:
    monkeypatch.setattr(sampler, "SAMPLE_INTERVAL_S", 0.01)
    watcher = sampler.Sampler(engine)
    watcher.start()
    thread = watcher._thread
    wait_until(watcher.history)
    del watcher
    thread.join(10)
    assert not thread.is_alive()


def test_sampler_goes_on_after_a_failure(engine, monkeypatch, caplog) -> None:
    monkeypatch.setattr(sampler, "SAMPLE_INTERVAL_S", 0.01)
    watcher = sampler.Sampler(engine)
    stats, failures = engine.stats, []

    def fail():
        failures.append(time.monotonic())
        return 1 / 0

    monkeypatch.setattr(engine, "stats", fail)
    with caplog.at_level(logging.ERROR):
        watcher.start()
        try:
            wait_until(lambda: len(failures) > 5, 30)
            assert len(caplog.records) == 1
            assert "ZeroDivisionError" in caplog.text
            monkeypatch.setattr(engine, "stats", stats)
            wait_until(watcher.history, 30)
        finally:
            watcher.stop()


def test_requests_come_newest_first_and_bounded(engine, ask) -> None:
    for i in range(100):
        engine.serve(make_report(i, {"device": 64}, 1))
    requests = ask("requests")
    assert requests["num_recent"] == 100
    assert [one["request_id"] for one in requests["requests"]] == [
        f"cmpl-{i:06x}" for i in range(99, 59, -1)
    ]


def test_names_of_clients_are_shortened_and_otherwise_as_they_are(engine, client) -> None:
    engine.serve(make_report(1, tenant=HOSTILE))
    engine.serve(make_report(2, tenant="x" * 10_000))
    answer = client.get("/dashboard/requests")
    assert answer.headers["content-type"] == "application/json"
    tenants = [one["tenant"] for one in answer.json()["requests"]]
    assert tenants == ["x" * 63 + "…", HOSTILE]


def test_answers_stay_small(engine, client) -> None:
    reasons = {f"reason {i} " + "y" * 500: i for i in range(500)}
    for i in range(256):
        report = make_report(
            i, {f"tier {i} " + "z" * 500: 64 for i in range(100)}, tenant="x" * 999
        )
        report.reuse.misses.update(reasons)
        engine.serve(report)
    modes = {str(i): ModeStats(num_plans=i) for i in range(10_000)}
    engine.given["planner"] = replace(engine.planner.stats(), modes=modes)
    time.sleep(sampler.SAMPLE_INTERVAL_S + 0.3)
    for question in QUESTIONS:
        assert len(client.get(f"/dashboard/{question}").content) < 200_000


def test_tells_cold_from_warm(engine, ask) -> None:
    for i in range(10):
        engine.serve(make_report(i, {}, computed=100, ttft_s=5.0 + i))
        engine.serve(make_report(i, {"device": 900}, computed=100, ttft_s=0.1))
    engine.serve(make_report(99, {"device": 900}, ttft_s=0.0))  # ended without a token
    groups = ask("requests")["first_token"]
    assert groups["cold"]["num_requests"] == groups["warm"]["num_requests"] == 10
    assert (groups["cold"]["p50_s"], groups["cold"]["p95_s"]) == (9.0, 14.0)
    assert (groups["warm"]["p50_s"], groups["warm"]["median_prompt_tokens"]) == (0.1, 1000)


@pytest.mark.parametrize(
    ("percent", "expected"), [(1, 1.0), (50, 2.0), (75, 3.0), (76, 4.0), (100, 4.0)]
)
def test_percentile_is_a_value_that_was_there(percent, expected) -> None:
    assert views.percentile([4.0, 1.0, 3.0, 2.0], percent) == expected


def test_planner_numbers_that_json_has_not_become_null(engine) -> None:
    overview = views.overview(engine, sampler.Sampler(engine))
    modes = overview["planner"]["modes"]
    assert list(modes) == ["none", "recompute", "load", "both"]
    assert modes["load"]["p50_error"] is None  # nan: nothing was planned yet
    assert modes["load"]["num_plans"] == 0
    assert list(overview["planner"]["tiers"]) == ["memory", "disk"]


def test_model_is_named_without_its_path(engine) -> None:
    engine.model.config._name_or_path = "/home/somebody/models/small-1b/"
    assert views.model_name(engine.model) == "small-1b"


def test_tree_has_runs_with_pins_and_no_text(engine, model, ask) -> None:
    shared = random_tokens(4 * BLOCK_SIZE, 1)
    for seed in (2, 3):
        run(engine.cache, model, torch.cat([shared, random_tokens(2 * BLOCK_SIZE, seed)], 1))
    with engine.cache.session(torch.cat([shared, random_tokens(9, 4)], 1)):
        tree = ask("tree")
    front, *tails = tree["nodes"]
    assert (front["parent"], front["first_tokens"], front["own_tokens"]) == (-1, 0, 64)
    assert (front["pins"], front["below_tokens"]) == (1, 64 + 4 * BLOCK_SIZE)
    assert [(tail["parent"], tail["first_tokens"], tail["own_tokens"]) for tail in tails] == [
        (0, 64, 2 * BLOCK_SIZE)
    ] * 2
    assert tree["num_tokens"] == front["below_tokens"]
    assert "text" not in front


def test_tree_shows_text_where_the_engine_says_so(engine, model) -> None:
    run(engine.cache, model, random_tokens(2 * BLOCK_SIZE))
    app = FastAPI()
    app.include_router(dashboard_router(engine, show_text=True))
    with TestClient(app) as client:
        (node,) = client.get("/dashboard/tree").json()["nodes"]
    assert node["text"] == engine.tokenizer.decode(random_tokens(2 * BLOCK_SIZE)[0, :24].tolist())


def test_salts_are_told_apart_and_never_shown(engine, model, client) -> None:
    tokens = random_tokens(2 * BLOCK_SIZE)
    for salt in ("", SECRET_SALT, "another"):
        with torch.no_grad(), engine.cache.session(tokens, salt=salt) as session:
            model(tokens, past_key_values=session)
    tree = client.get("/dashboard/tree").json()
    assert tree["num_salts"] == len(tree["nodes"]) == 3
    digests = list(tree["salts"].values())
    assert len(set(digests)) == 3 and "" in digests
    for question in QUESTIONS:
        answer = client.get(f"/dashboard/{question}").text
        assert SECRET_SALT not in answer and "another" not in answer


def test_digests_of_salts_differ_between_processes(engine, model, client) -> None:
    tokens = random_tokens(2 * BLOCK_SIZE)
    with torch.no_grad(), engine.cache.session(tokens, salt=SECRET_SALT) as session:
        model(tokens, past_key_values=session)
    app = FastAPI()
    app.include_router(dashboard_router(engine))
    with TestClient(app) as other:
        theirs = other.get("/dashboard/tree").json()["salts"]
    assert theirs != client.get("/dashboard/tree").json()["salts"]
