"""Lets a forward pass wait for layers that another thread loads."""

from __future__ import annotations

import threading
import time


class LayerGate:
    """How many layers have come, and whether the rest will: `LayerProgress`. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_layers = 0
        self._has_failed = False

    def add_layers(self, num_layers: int) -> None:
        """So many have come."""
        with self._changed:
            self._num_layers = num_layers
            self._changed.notify_all()

    def fail(self) -> None:
        """No more will come."""
        with self._changed:
            self._has_failed = True
            self._changed.notify_all()

    def wait(self, layer: int, until: float) -> bool:
        """Whether a layer has come, as soon as that is known; False after a time, too.

        Args:
            layer: From 0.
            until: Of `time.monotonic`.
        """
        with self._changed:
            timeout_s = max(0.0, until - time.monotonic())
            self._changed.wait_for(lambda: self._num_layers > layer or self._has_failed, timeout_s)
            return self._num_layers > layer
