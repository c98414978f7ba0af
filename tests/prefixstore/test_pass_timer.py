"""Forward passes are timed, and those of a GPU without waiting for it."""

from __future__ import annotations

import pytest
import torch

from prefixstore.pass_timer import PassTimer

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class FakeEvent:
    """A mark in a stream that reaches marks when the test says so."""

    made: list[FakeEvent]

    def __init__(self, enable_timing: bool) -> None:
        self.is_reached = False
        FakeEvent.made.append(self)

    def record(self, stream: object) -> None:
        assert stream == "stream"

    def query(self) -> bool:
        return self.is_reached

    def elapsed_time(self, other: FakeEvent) -> float:
        return 250.0 * (FakeEvent.made.index(other) - FakeEvent.made.index(self))


@pytest.fixture
def fake_gpu(monkeypatch):
    FakeEvent.made = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def test_a_pass_of_a_gpu_is_told_of_when_it_is_over(fake_gpu) -> None:
    told = []
    timer = PassTimer(GPU, lambda *args: told.append(args), lambda: False)
    for context in (0, 100):
        timed = timer.begin(100, context)
        timer.end(timed)
    timer.collect()
    assert told == []
    FakeEvent.made[1].is_reached = True
    timer.begin(1, 200)
    assert told == [(100, 0, 0.25, False)]
    FakeEvent.made[3].is_reached = True
    timer.collect()
    timer.collect()
    assert told == [(100, 0, 0.25, False), (100, 100, 0.25, False)]


def test_nothing_is_marked_in_a_stream_that_is_captured(fake_gpu, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert PassTimer(GPU, lambda *_: None, lambda: False).begin(1, 0) is None
    assert FakeEvent.made == []


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [(False, False, [False]), (True, True, [True]), (True, False, []), (False, True, [])],
)
def test_a_pass_beside_part_of_a_load_says_nothing(monkeypatch, before, after, expected) -> None:
    told, clock, loading = [], iter([1.0, 1.5]), iter([before, after])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    timer = PassTimer(CPU, lambda *args: told.append(args), lambda: next(loading))
    timed = timer.begin(64, 32)
    timer.end(timed)
    assert told == [(64, 32, 0.5, is_loading) for is_loading in expected]
