"""The disk tier's worker threads: no job is lost, and no wait hangs."""

import threading
import time

import pytest

from prefixstore.errors import TierUnavailable
from prefixstore.tiers.disk.files import Slab
from prefixstore.tiers.disk.job_threads import JobBatch, JobThreads
from prefixstore.tiers.disk.jobs import Job

NAME = "job-threads-under-test"


def make_jobs(count):
    return [Job(Slab(number, 4096, 1), []) for number in range(count)]


def threads_alive():
    return [thread for thread in threading.enumerate() if thread.name.startswith(NAME)]


@pytest.fixture
def threads():
    threads = JobThreads(3, NAME)
    yield threads
    threads.close(wait=True)
    assert not threads_alive()


def test_every_job_is_done_once(threads):
    for num_jobs in (0, 1, 2, 50):
        done = []
        batch = JobBatch(make_jobs(num_jobs), lambda job, done=done: done.append(job), None)
        threads.help(batch, num_jobs)
        batch.wait()
        assert sorted(job.slab.slab_id for job in done) == list(range(num_jobs))


def test_none_are_started_for_who_needs_no_help(threads):
    batch = JobBatch(make_jobs(4), lambda job: None, None)
    threads.help(batch, 0)
    batch.work()
    batch.wait()
    assert not threads_alive()


def test_every_job_of_batches_at_the_same_time_is_done_once(threads):
    counts = [0] * 8

    def ask(caller):
        def do(job):
            with lock:
                counts[caller] += 1

        for _ in range(50):
            batch = JobBatch(make_jobs(5), do, None)
            threads.help(batch, 2)
            batch.work()
            batch.wait()

    lock = threading.Lock()
    callers = [threading.Thread(target=ask, args=(caller,)) for caller in range(len(counts))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert counts == [250] * 8


@pytest.mark.parametrize("num_helpers", [0, 3])
def test_a_bug_is_raised_to_who_waits_once_the_rest_is_done(threads, num_helpers):
    done = []

    def do(job):
        if job.slab.slab_id == 1:
            raise ZeroDivisionError
        done.append(job.slab.slab_id)

    batch = JobBatch(make_jobs(4), do, None)
    threads.help(batch, num_helpers)
    batch.work()
    with pytest.raises(ZeroDivisionError):
        batch.wait()
    assert sorted(done) == [0, 2, 3]
    good = JobBatch(make_jobs(4), lambda job: None, None)  # no thread died
    threads.help(good, 4)
    good.wait()


def test_nobody_waits_past_the_deadline_and_what_was_not_begun_never_is(threads):
    may_go_on, done = threading.Event(), []

    def do(job):
        assert may_go_on.wait(60)
        done.append(job)

    batch = JobBatch(make_jobs(10), do, time.monotonic() + 0.2)
    threads.help(batch, 10)
    batch.wait()
    assert not done
    may_go_on.set()
    threads.close(wait=True)
    assert len(done) == 3  # one per thread


def test_closed_threads_refuse_and_may_be_closed_again(threads):
    threads.help(JobBatch(make_jobs(1), lambda job: None, None), 1)
    for _ in range(2):
        threads.close(wait=True)
        with pytest.raises(TierUnavailable, match="expected open threads"):
            threads.help(JobBatch(make_jobs(1), lambda job: None, None), 1)


@pytest.fixture
def allow_threads(monkeypatch):
    """Call it with the number of threads that can yet be started."""
    num_left, start = 0, threading.Thread.start

    def start_or_fail(thread):
        nonlocal num_left
        if num_left == 0:
            raise RuntimeError("can't start new thread")
        num_left -= 1
        start(thread)

    def allow(number):
        nonlocal num_left
        num_left = number

    monkeypatch.setattr(threading.Thread, "start", start_or_fail)
    return allow


def test_it_goes_on_with_the_threads_that_there_are(threads, allow_threads):
    for num_new, num_in_all in ((2, 2), (0, 2), (5, 3), (5, 3)):
        allow_threads(num_new)
        done = []
        batch = JobBatch(make_jobs(10), done.append, None)
        threads.help(batch, 10)
        batch.wait()
        assert len(done) == 10
        assert len(threads_alive()) == num_in_all


def test_it_is_unavailable_without_any_thread(threads, allow_threads):
    batch = JobBatch(make_jobs(1), lambda job: None, None)
    with pytest.raises(TierUnavailable, match="expected a thread, got none: can't start"):
        threads.help(batch, 1)
    threads.help(batch, 0)
    allow_threads(1)
    threads.help(batch, 1)
    batch.wait()


def test_they_end_when_nobody_holds_them():
    threads = JobThreads(2, NAME)
    batch = JobBatch(make_jobs(2), lambda job: None, None)
    threads.help(batch, 2)
    batch.wait()
    alive = threads_alive()
    assert len(alive) == 2
    del threads
    for thread in alive:
        thread.join(timeout=60)
    assert not threads_alive()
