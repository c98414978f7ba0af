"""Many requests in flight: bounds, order, deadlines, closing."""

import asyncio
import os
import threading
import time

import pytest

from prefixstore.errors import BlockCorrupted, TierTimeout, TierUnavailable
from prefixstore.tiers.remote.requests import Request, Requests, Window


def soon(seconds: float = 30.0) -> float:
    return time.monotonic() + seconds


class Gauge:
    """Records the most requests and bytes that ran at a time."""

    def __init__(self) -> None:
        self.num_requests = self.num_bytes = 0
        self.most_requests = self.most_bytes = 0

    def add(self, num_requests: int, num_bytes: int) -> None:
        self.num_requests += num_requests
        self.num_bytes += num_bytes
        self.most_requests = max(self.most_requests, self.num_requests)
        self.most_bytes = max(self.most_bytes, self.num_bytes)


class Pause(Request[int]):
    """Takes a while, delivers two pieces, and returns its number."""

    def __init__(self, number: int, seconds: float, num_bytes: int = 0, gauge=None) -> None:
        self.num_bytes = num_bytes
        self.number = number
        self.seconds = seconds
        self.gauge = gauge or Gauge()
        self.taken: list[str] = []
        self.threads: set[str] = set()
        self.was_cancelled = threading.Event()

    def begin(self) -> None:
        self.threads.add(threading.current_thread().name)

    async def run(self, hand_over) -> int:
        self.gauge.add(1, self.num_bytes)
        try:
            hand_over("first")
            await self.pause()
            hand_over("second")
        except asyncio.CancelledError:
            self.was_cancelled.set()
            raise
        finally:
            self.gauge.add(-1, -self.num_bytes)
        return self.number

    async def pause(self) -> None:
        await asyncio.sleep(self.seconds)

    def take(self, piece: str) -> None:
        self.threads.add(threading.current_thread().name)
        self.taken.append(piece)


class Beside(Pause):
    """Ends only once 20 run at the same time."""

    async def pause(self) -> None:
        while self.gauge.most_requests < 20:
            await asyncio.sleep(0.001)
        await super().pause()


class Held(Pause):
    """Ends when the test allows it."""

    def __init__(self, number: int, gauge: Gauge) -> None:
        super().__init__(number, 0.0, gauge=gauge)
        self.may_end = threading.Event()

    async def pause(self) -> None:
        while not self.may_end.is_set():
            await asyncio.sleep(0.001)


class Failing(Request[int]):
    def __init__(self, error: Exception) -> None:
        self.error = error

    async def run(self, hand_over) -> int:
        raise self.error


@pytest.fixture
def make_requests():
    opened: list[Requests] = []

    def make(max_requests: int = 32, max_bytes: int = 1 << 20) -> Requests:
        opened.append(Requests("remote", max_requests, max_bytes))
        return opened[-1]

    yield make
    for requests in opened:
        requests.close()


def wait_until_begun(gauge: Gauge, num_requests: int) -> None:
    end = soon()
    while gauge.most_requests < num_requests:
        assert time.monotonic() < end, "they do not begin"
        time.sleep(0.001)


def test_runs_them_beside_each_other_and_keeps_their_order(make_requests):
    gauge = Gauge()
    pauses = [Beside(i, 0.2 - i / 100, gauge=gauge) for i in range(20)]
    assert make_requests().run(pauses, soon()) == list(range(20))
    own = threading.current_thread().name
    assert all(p.taken == ["first", "second"] and p.threads == {own} for p in pauses)
    assert make_requests().run([], soon()) == []


@pytest.mark.parametrize(("max_requests", "max_bytes"), [(3, 1 << 20), (32, 350), (32, 50)])
def test_stays_within_its_bounds(make_requests, max_requests, max_bytes):
    requests, gauge = make_requests(max_requests, max_bytes), Gauge()
    results = []

    def work(thread: int) -> None:
        pauses = [Pause(i, 0.005, 100, gauge) for i in range(10)]
        results.append(requests.run(pauses, soon()))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [list(range(10))] * 4
    expected = min(max_requests, max(1, max_bytes // 100))  # one larger than the bound runs alone
    assert (gauge.most_requests, gauge.most_bytes) == (expected, 100 * expected)


def test_whoever_waits_is_served_in_order():
    window = Window(max_requests=1, max_bytes=100)
    assert window.try_enter(10) and not window.try_enter(10)
    served: list[int] = []

    def wait(number: int) -> None:
        assert window.wait_to_enter(10, soon())
        served.append(number)
        window.leave(10)

    threads = [threading.Thread(target=wait, args=(i,)) for i in range(5)]
    for number, thread in enumerate(threads):
        thread.start()
        while len(window._waiting) <= number:
            time.sleep(0.001)
    window.leave(10)
    for thread in threads:
        thread.join()
    assert served == list(range(5))
    assert window.try_enter(100)
    assert not window.wait_to_enter(1, soon(0.02))


def test_no_call_is_kept_out_by_one_with_many_requests(make_requests):
    requests, gauge = make_requests(max_requests=2), Gauge()
    last = Held(99, gauge)  # keeps the first call from ending
    pauses = [*(Pause(i, 0.01, gauge=gauge) for i in range(99)), last]
    first = threading.Thread(target=requests.run, args=(pauses, soon(60)))
    first.start()
    wait_until_begun(gauge, 2)
    assert requests.run([Pause(7, 0.0)], soon()) == [7]
    last.may_end.set()
    first.join()


def test_gives_up_at_the_deadline_and_cancels(make_requests):
    requests = make_requests(max_requests=2)
    for seconds in (0.2, 3, 20):  # the first three may begin late on a stalled machine
        pauses = [Pause(0, 0.0), Pause(1, 60.0), Pause(2, 60.0), Pause(3, 0.0)]
        begin = time.monotonic()
        outcomes = requests.run(pauses, soon(seconds))
        assert time.monotonic() - begin < 50
        if all(pause.taken for pause in pauses[:3]):
            break
    assert outcomes[0] == 0
    assert [type(outcome) for outcome in outcomes[1:]] == [TierTimeout] * 3
    assert "expected an answer before the deadline" in str(outcomes[1])
    assert "expected its turn before the deadline" in str(outcomes[3])
    assert pauses[1].was_cancelled.wait(30) and pauses[2].was_cancelled.wait(30)
    assert requests.run([Pause(i, 0.0) for i in range(4)], soon()) == [0, 1, 2, 3]  # room again


def test_an_error_is_the_outcome_of_its_request_alone(make_requests):
    error = BlockCorrupted("remote: damaged")
    assert make_requests().run([Pause(0, 0.0), Failing(error)], soon()) == [0, error]


def test_a_bug_is_raised_and_takes_no_room(make_requests):
    requests = make_requests(max_requests=2)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            requests.run([Pause(0, 60.0), Failing(ZeroDivisionError())], soon())
    assert requests.run([Pause(1, 0.0)] * 2, soon()) == [1, 1]


def test_closing_ends_calls_that_wait(make_requests):
    requests, gauge = make_requests(), Gauge()
    outcomes: list[object] = []
    pauses = [Pause(i, 60.0, gauge=gauge) for i in range(2)]
    thread = threading.Thread(target=lambda: outcomes.extend(requests.run(pauses, soon(60))))
    thread.start()
    wait_until_begun(gauge, 2)
    requests.close()
    thread.join(30)
    assert [type(outcome) for outcome in outcomes] == [TierUnavailable] * 2
    with pytest.raises(TierUnavailable, match="expected an open tier"):
        requests.run([Pause(0, 0.0)], soon())
    requests.close()


def is_told_of_the_fork(requests: Requests) -> bool:
    try:
        requests.run([Pause(0, 0.0)], soon(5))
    except TierUnavailable as error:
        return "not forked from one which used remote tiers" in str(error)
    return False


def test_a_forked_process_is_told(make_requests):
    requests = make_requests()
    requests.run([Pause(0, 0.0)], soon())
    pid = os.fork()
    if pid == 0:
        another = Requests("another", 1, 1)  # it needs no loop of its own either
        is_told = is_told_of_the_fork(requests) and is_told_of_the_fork(another)
        requests.close()
        os._exit(0 if is_told else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_its_thread_ends_with_it():
    requests = Requests("remote-thread", 4, 100)
    requests.run([Pause(0, 0.0)], soon())
    (thread,) = (one for one in threading.enumerate() if one.name == "remote-thread")
    del requests
    thread.join(30)
    assert not thread.is_alive()
