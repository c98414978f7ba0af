"""Calls in threads of their own, and what becomes of those that take too long."""

from __future__ import annotations

import logging
import threading

import pytest

from prefixstore.patient_calls import CallLeftError, PatientCalls

LONG_AGO = 0.0


def fails() -> None:
    raise ZeroDivisionError("injected")


def test_gives_what_a_call_gives() -> None:
    calls, threads = PatientCalls(), []
    assert calls.run(lambda: threads.append(threading.get_ident()) or 7, None) == 7
    assert threads != [threading.get_ident()]
    with pytest.raises(ZeroDivisionError):
        calls.run(fails, None)
    calls.close()
    assert (calls.num_under_way, calls.num_left) == (0, 0)


def test_a_call_that_is_late_goes_on_by_itself() -> None:
    calls, may_end, has_ended = PatientCalls(), threading.Event(), threading.Event()

    def hang() -> None:
        assert may_end.wait(60)
        has_ended.set()

    with pytest.raises(CallLeftError):
        calls.run(hang, LONG_AGO)
    assert (calls.num_under_way, calls.num_left) == (1, 1)
    assert calls.run(lambda: 1, None) == 1  # others do not wait for it
    may_end.set()
    calls.close()
    assert has_ended.is_set()
    assert (calls.num_under_way, calls.num_left) == (0, 0)


def test_an_interrupted_wait_leaves_its_call(monkeypatch) -> None:
    calls, may_end = PatientCalls(), threading.Event()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("prefixstore.patient_calls.wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            calls.run(lambda: may_end.wait(60), None)
    assert calls.num_left == 1
    may_end.set()
    calls.close()


def test_what_nobody_waits_for_fails_in_the_log(caplog) -> None:
    calls = PatientCalls()
    with caplog.at_level(logging.ERROR):
        calls.begin(fails)
        calls.close()
    assert "nobody waits for" in caplog.text and "injected" in caplog.text


def test_calls_where_no_thread_can_be_begun(monkeypatch, caplog) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    calls = PatientCalls()
    assert calls.run(threading.get_ident, LONG_AGO) == threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        calls.run(fails, None)
    calls.begin(fails)
    assert "injected" in caplog.text
    assert (calls.num_under_way, calls.num_left) == (0, 0)
