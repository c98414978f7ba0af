"""A forward pass beside the loads of what it reads: layers are waited for, and then a verdict."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from prefixstore.engine.scheduler import Step

_VERDICT_S = 0.1  # longest wait, after the last layer, for the load to be judged


class PassIsVoid(Exception):
    """Nothing of a forward pass counts any more, so it need not go on."""


class Overlap:
    """The steps of one pass, some of which read blocks that are still being loaded.

    A layer that is wrong or does not come in time does not stop the pass as long as others are in
    it, too. What was computed on it is dropped.

    `valid_steps` is called under the engine's lock.

    Args:
        steps: Of the pass.
        changed: The engine's condition.
    """

    def __init__(self, steps: Sequence[Step], changed: threading.Condition) -> None:
        self.steps = steps
        self._changed = changed
        self._loads = {i: step.load for i, step in enumerate(steps) if step.load is not None}
        self._waiting = set(self._loads)

    @property
    def before_layer(self) -> Callable[[int], None] | None:
        """For `ModelRunner.run`."""
        return self._wait_layer if self._loads else None

    def _wait_layer(self, layer: int) -> None:
        for i in list(self._waiting):
            if not self._loads[i].wait_layer(layer, self.steps[i].wait_until):
                self._waiting.discard(i)
        if not self._waiting and len(self._loads) == len(self.steps):
            raise PassIsVoid

    def valid_steps(self) -> list[Step]:
        """After the pass: the steps of which all was there that they read; the others are void."""
        return [step for i, step in enumerate(self.steps) if self._is_valid(i, step)]

    def _is_valid(self, i: int, step: Step) -> bool:
        if step.load is None:
            return True
        restoring = step.request.restoring
        assert restoring is not None and restoring.meeting is not None, "only prompts are loaded"
        # Only steps that waited successfully for every layer: a layer that came after its wait had
        # run out was not there when the pass read it.
        if i in self._waiting:
            self._changed.wait_for(lambda: restoring.load_under_way is not step.load, _VERDICT_S)
            if restoring.meeting.is_chunk_valid:
                return True
        restoring.meeting.chunk_void(time.monotonic())
        return False
