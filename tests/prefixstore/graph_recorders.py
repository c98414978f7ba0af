"""Recorders that stand in for those of CUDA graphs, which need a GPU."""

import torch
from cached_models import DEVICE

from prefixstore.engine.graph_recorder import WithoutWaiting


class SameAgain:
    """Records by running, replays by running again.

    Attributes:
        num_recorded: Functions.
        num_replays: Of all of them.
    """

    def __init__(self):
        self.num_recorded = self.num_replays = 0

    def record(self, function):
        function()
        self.num_recorded += 1

        def replay():
            self.num_replays += 1
            function()

        return replay


class NeverWaiting(SameAgain):
    """Refuses what waits, as one for a GPU does."""

    def record(self, function):
        with WithoutWaiting(torch.empty(0, device=DEVICE).device):  # by its number
            function()
        return super().record(function)


class Raising:
    def record(self, function):
        function()
        raise RuntimeError("operation not permitted when stream is capturing")


class Stale:
    """As a graph that holds its inputs: a replay leaves what the recording wrote."""

    def record(self, function):
        function()
        return lambda: None
