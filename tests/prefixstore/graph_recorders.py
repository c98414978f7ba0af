"""Stand-ins for the recorder of CUDA graphs, which needs a GPU."""

import torch
from cached_models import DEVICE

from prefixstore.engine.graph_recorder import WithoutWaiting


class SameAgain:
    """Recording runs the function; a replay runs it again.

    Attributes:
        num_recorded: Functions recorded.
        num_replays: Replays of all of them.
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
    """Refuses functions that wait for the device, as on a GPU."""

    def record(self, function):
        with WithoutWaiting(torch.empty(0, device=DEVICE).device):  # by its number
            function()
        return super().record(function)


class Raising:
    def record(self, function):
        function()
        raise RuntimeError("operation not permitted when stream is capturing")


class Stale:
    """Like a graph that captured its inputs' values: a replay repeats the recorded results."""

    def record(self, function):
        function()
        return lambda: None
